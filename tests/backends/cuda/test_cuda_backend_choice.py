"""Where the `cuda` target is built and chosen, and what recipes, machines and damaged files it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.cuda.engine import CudaEngine, machine_problem
from pipeline.bundle import bundle as bundles
from pipeline.bundle.bundle import Bundle
from pipeline.compiler import parse_targets

BACKEND = BACKENDS["cuda"]


@pytest.mark.parametrize(
    ("sm", "triton", "message"),
    [
        (0, "3.9.0", "needs an NVIDIA GPU and a PyTorch with CUDA; none is visible here"),
        (75, "3.9.0", "needs SM 80 or newer, this GPU is SM 75; build with --target cpu"),
        (90, "", "needs triton; install with: pip install triton"),
        (90, "3.5.1", "needs triton 3.6 or newer, this is 3.5.1; pip install -U triton"),
        (90, "3.6.0", ""),
    ],
)
def test_what_a_machine_lacks(sm: int, triton: str, message: str) -> None:
    problem = machine_problem({"least_sm": 80}, sm, triton)
    assert (message in problem) if message else problem is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}'])
def test_damaged_metadata_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ContractError, match=r"metadata\.json.*; build (the engine|it) again"):
        CudaEngine(tmp_path, device="cpu")


def test_metadata_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"schema_version": 2}')
    with pytest.raises(ContractError, match="schema version 2, this version reads 1"):
        CudaEngine(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"formats": {"weight": "INT6"}}, "weights in INT6: the GPU kernels take 4-bit weights"),
        (
            {"calibrate": {"method": "qdit", "options": {"activations": "token_group"}}},
            "calibrate.method qdit scales activations token_group: the GPU kernels have no scale per token and group",
        ),
    ],
)
def test_recipes_that_no_kernel_takes(chosen: dict[str, Any], message: str) -> None:
    problems = BACKEND.problems(recipes.from_dict({"name": "tiny", "model": "none"} | chosen, "test"))
    assert len(problems) == 1 and message in problems[0]


def test_the_usual_recipe_has_no_problem() -> None:
    assert BACKEND.problems(recipes.load("pixart_w4a6")) == []


@pytest.mark.parametrize(("sm", "included"), [(0, False), (75, False), (80, True), (90, True)])
def test_auto_builds_it_where_a_gpu_is_visible(sm: int, included: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles.machine, "cuda_sm", lambda: sm)
    assert ("cuda" in parse_targets("auto")) is included
    assert parse_targets("cuda") == ("cuda",)


@pytest.mark.parametrize(("sm", "chosen"), [(90, "cuda"), (70, "cpu"), (0, "cpu")])
def test_a_bundle_takes_it_before_the_cpu_where_it_runs(
    sm: int, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles.machine, "cuda_sm", lambda: sm)
    versions = {"onnxruntime": "1.31.1", "triton": "3.9.0"}
    monkeypatch.setattr(bundles.machine, "tool_version", lambda name: versions.get(name, ""))
    targets = {"cpu": {}, "cuda": {"metadata": {"least_sm": 80}}}
    assert Bundle(tmp_path, {"targets": targets, "tools": versions}).choose() == chosen
