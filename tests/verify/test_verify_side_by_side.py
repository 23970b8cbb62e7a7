"""A verification of several targets at once finds what one after the other finds, to the last digit.

Elsewhere in the tests every process has one thread, so that targets and the study's runs come one after the other.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from export.models import load as models
from export.to_onnx import export_portable
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Engine, LoweredGraph
from pipeline.backends.side_by_side import side_by_side
from pipeline.verify import proof as verify
from pipeline.verify import study
from tests.support import tiny

pytestmark = [pytest.mark.slow, pytest.mark.torch]

TARGETS = ("cpu", "rtx", "onnx")
THREADS = 3


@dataclass(frozen=True)
class Verified:
    """parity.json, which has every number of the report, and the threads that looked at targets and ran the study."""

    document: dict[str, Any]
    targets: set[int]
    runs: set[int]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """PyTorch with one thread, as it is while work is done side by side: how sums are split depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, alone: None) -> dict[int, Verified]:
    """By how many things are done at once, on a machine that says it has THREADS cores."""
    folder = tmp_path_factory.mktemp("targets")
    model = models.load(str(tiny.folder("pixart", folder)))
    layers = tiny.quantized(model, granularity="exact_group")
    recipe = recipes.from_dict({"name": "tiny", "model": model.source, "sampling": {"n_steps": 2}}, "test")
    export_portable(model, layers, folder / "model.onnx")
    lowered: dict[str, LoweredGraph] = {}
    for target in TARGETS:
        (folder / target).mkdir()
        lowered[target] = BACKENDS[target].lower(folder / "model.onnx", folder / target, recipe)
    (folder / "bundle" / "cpu").mkdir(parents=True)
    BACKENDS["cpu"].build(lowered["cpu"], folder / "bundle" / "cpu", recipe)
    engines: dict[str, Engine] = {"cpu": BACKENDS["cpu"].load(folder / "bundle", 1)}

    def verified(at_once: int) -> Verified:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "threads", lambda asked=None: asked or THREADS)
            targets, runs = watched(patch, verify, "verify_target"), watched(patch, study, "_realisations")
            if at_once == 1:
                for module in (verify, study):
                    patch.setattr(module, "side_by_side", lambda work, threads: side_by_side(work, 1))
            out = folder / f"report-{at_once}"
            verify.verify(model, layers, lowered, engines, recipe, out)
        return Verified(json.loads((out / "parity.json").read_text()), targets, runs)

    return {at_once: verified(at_once) for at_once in (1, THREADS)}


def watched(patch: pytest.MonkeyPatch, module: Any, name: str) -> set[int]:
    """Which threads call a function of a module from now on."""
    function, seen = getattr(module, name), set[int]()

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(threading.get_ident())
        return function(*args, **kwargs)

    patch.setattr(module, name, noted)
    return seen


def test_work_is_shared_out(reports: dict[int, Verified]) -> None:
    """A thread for each target, and for each arithmetic of the reference: float32, and FP16 for rtx."""
    here = threading.get_ident()
    assert reports[1].targets == reports[1].runs == {here}
    assert len(reports[THREADS].targets - {here}) == len(TARGETS) and len(reports[THREADS].runs - {here}) == 2


def test_every_gate_passes(reports: dict[int, Verified]) -> None:
    for verified in reports.values():
        assert [gate["name"] for gate in verified.document["gates"] if not gate["passed"]] == []
        assert {gate["name"].partition("/")[0] for gate in verified.document["gates"]} >= set(TARGETS)


@pytest.mark.parametrize("part", ["gates", "layers", "steps", "segments", "notes"])
def test_the_report_is_the_same_whatever_is_done_at_once(part: str, reports: dict[int, Verified]) -> None:
    one, several = (reports[at_once].document[part] for at_once in (1, THREADS))
    assert one and several == one
