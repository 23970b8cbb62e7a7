"""A complete bundle folder made in a moment from one small linear: for tests of the folder, not of its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import QuantizedLinear
from export.documents import sha256
from pipeline import recipe
from pipeline.backends.base import BuildResult, LoweredGraph
from pipeline.bundle import manifest
from pipeline.bundle.bundle import Bundle
from pipeline.files import tree
from pipeline.passes.probes import Choice
from pipeline.verify.report import Gate, Report
from tests.support.portable import make_linear

# What `bench` gives where no engine runs.
NOTHING_MEASURED = {
    "engine": "e",
    "batch_size": 1,
    "threads": 1,
    "image": {"n_steps": 1, "guidance_scale": 1.0},
    "machine": {"cpu": "none"},
    "contestants": {},
    "ratios": {},
}


def small_linear(name: str = "blocks.0.attn1.to_q") -> QuantizedLinear:
    """N=8, K=64, E2M1 codes in groups of 32."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 64)).astype(np.uint8)
    return make_linear(
        codes,
        name=name,
        kind="attn.qkv",
        weight_format="E2M1",
        activation_format="E2M3",
        granularity="exact_group",
        group_size=32,
        scales=np.full((8, 1), 0.5, np.float32),
        multipliers=np.full((8, 2), 3, np.uint8),
    )


def facts(folder: Path) -> manifest.BuildFacts:
    """Build facts of one layer and the target cpu."""
    layer = small_linear()
    lowered = LoweredGraph(folder / "cpu/model.onnx", (), (Choice(layer.name, "int8", "E2M3 embeds in INT8"),))
    result = BuildResult(("cpu/model.onnx",), lowered, {"opset": 21})
    model = {"source": "here", "revision": "", "sha256": "0" * 64, "family": "pixart"}
    kept = [("proj_out", "the last layer")]
    return manifest.BuildFacts(
        "0" * 64, recipe.Recipe(name="small", model="here"), model, [layer], kept, {"cpu": result}
    )


def make_bundle(folder: Path) -> Path:
    """Write the files and a true manifest of them."""
    (folder / "cpu").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"portable")
    (folder / "cpu/model.onnx").write_bytes(b"lowered")
    (folder / "config.json").write_text('{"in_channels": 4, "sample_size": 32}')
    manifest.write(manifest.compose(facts(folder), folder), folder)
    return folder


def make_reported(
    folder: Path, gates: Sequence[Gate], ratio: float | None = None, pictures: Mapping[str, bytes] | None = None
) -> Path:
    """The bundle with a report of these gates. ratio: of cpu to torch_fp32, as measured on one processor. pictures: PNG
    files by the names that they have in a report."""
    make_bundle(folder)
    (folder / "report/images").mkdir(parents=True)
    (folder / "report/parity.json").write_text(Report(list(gates)).to_json())
    (folder / "recipe.toml").write_text('name = "small"\n')
    if ratio is not None:
        (folder / "bench.json").write_text(json.dumps(measured(ratio)))
    for name, png in (pictures or {}).items():
        (folder / "report/images" / name).write_bytes(png)
    manifest.write(manifest.compose(facts(folder), folder), folder)
    return folder


def measured(ratio: float, cpu: str = "a processor", threads: int = 2) -> dict[str, Any]:
    """What of bench.json is read again."""
    stated = {"batch_size": 1, "threads": threads, "shapes": {"x": [1, 3]}, "machine": {"cpu": cpu}}
    return {"schema_version": 1, **stated, "ratios": {"cpu": {"torch_fp32": ratio}}}


@dataclass(frozen=True)
class StandIn(Bundle):
    """A bundle of a few true files with something else in place of its engine and recipe."""

    make_engine: Callable[[], Any] = lambda: None
    stated: recipe.Recipe | None = None

    @property
    def recipe(self) -> recipe.Recipe:
        assert self.stated is not None
        return self.stated

    def engine(self, target: str = "auto") -> Any:
        return self.make_engine()


def stand_in(path: Path, stated: recipe.Recipe, model: dict[str, str], make_engine: Callable[[], Any]) -> StandIn:
    """A bundle of the files in `path`; model: family and source."""
    files = {name: {"size": (path / name).stat().st_size, "sha256": sha256(path / name)} for name in tree(path)}
    document = {"engine": stated.name, "model": model, "files": files}
    return StandIn(path, document, make_engine=make_engine, stated=stated)
