"""A new target is one folder and one row: a toy one, whose folder is this file, goes through every verb.

It runs the portable model's own graph in stock onnxruntime from a folder of its own, and keeps its option `pace` in
metadata.json.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest
from typing_extensions import TypedDict

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from export.models import load as models
from pipeline import __main__ as cli
from pipeline import load
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, ROWS, metadata_file
from pipeline.backends.base import Arithmetic, Backend, BuildResult, Check, Engine, Flag, LoweredGraph, Options
from pipeline.backends.portable.engine import PortableEngine
from pipeline.backends.portable.linears import portable_linears
from pipeline.files import write_json
from pipeline.list import target_rows
from pipeline.recipe import Recipe
from tests.support import tiny

pytestmark = pytest.mark.torch
NAMES = ("model.onnx", "model.onnx.data", "metadata.json")


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyOptions(Options):
    """pace: of nothing."""

    target: ClassVar[str] = "toy"
    pace: Literal["walk", "trot", "run"] = "walk"


class ToyNeeds(TypedDict):
    """metadata.json."""

    pace: Literal["walk", "trot", "run"]


class ToyBackend(Backend[ToyOptions]):
    """Runs whatever the portable model's engine runs."""

    options_type = ToyOptions
    package = "onnxruntime"
    speed_rank = 0
    file_names = frozenset(NAMES)
    disk_bytes_per_parameter = 1.0
    repeatable = True
    flags = (Flag("--toy-pace", "pace", str, "PACE", "how the toy goes"),)
    paces: ClassVar[set[str]] = {"walk", "trot", "run"}

    def checks(self) -> list[Check]:
        return [Check("toy", True, f"goes at {', '.join(sorted(self.paces))}")]

    def fitness_problem(self, manifest: Mapping[str, Any], source: Path) -> str | None:
        pace = self.metadata(manifest, source, ToyNeeds)["pace"]
        return None if pace in self.paces else f"target toy does not {pace} here; build it with another toy.pace"

    def problems(self, recipe: Recipe) -> list[str]:
        return [] if recipe.weights.granularity != "group" else ["target toy has no groups"]

    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        for name in NAMES[:2]:
            shutil.copyfile(portable.with_name(name), work_dir / name)
        linears = portable_linears(ir.load(work_dir / NAMES[0]))
        probes, choices = tuple(row.probe for row in linears), tuple(row.choice for row in linears)
        return LoweredGraph(work_dir / NAMES[0], probes, choices)

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        for name in NAMES[:2]:
            shutil.copyfile(lowered.path.with_name(name), out_dir / name)
        metadata = {"pace": self.options(recipe).pace}
        write_json(out_dir / NAMES[2], metadata)
        return BuildResult(tuple(sorted(self.files)), lowered, metadata)

    def load(self, bundle_dir: Path, threads: int = 0) -> Engine:
        if metadata_file.read(bundle_dir / "toy", ToyNeeds)["pace"] not in self.paces:
            raise EnvironmentLacksError("the toy does not go so here")
        return PortableEngine(bundle_dir / "toy", threads)

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        return "fp32"


# --- the row ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def row() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROWS, "toy", (__name__, "ToyBackend"))
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model, built by the command, for the toy alone (and the portable model, as always)."""
    folder = tmp_path_factory.mktemp("toy")
    model = tiny.folder("dit", folder)
    settings = [*("--set", "method=rtn"), *("--set", "sampling.n_steps=2"), *("--set", "weights.group_size=32")]
    flags = ["--target", "toy", "--toy-pace", "trot", "-o", str(folder / "bundle"), *settings]
    assert cli.main(["build", "--engine", "dit_w4a8", "-m", str(model), *flags]) == 0
    return folder / "bundle"


# --- what the verbs make of them -------------------------------------------------------------------------------------


def test_it_is_listed_and_looked_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy" in [row["target"] for row in target_rows()]
    assert cli.main(["doctor", "--json"]) in (0, 3)
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [entry["found"] for entry in checks if entry["name"] == "toy"] == ["goes at run, trot, walk"]
    with pytest.raises(SystemExit):
        cli.main(["build", "--help"])
    assert "--toy-pace PACE" in capsys.readouterr().out


def test_a_recipe_has_its_table() -> None:
    recipe = recipes.with_settings(recipes.load("dit_w4a8"), ["toy.pace=run"])
    assert recipe.options(ToyOptions) == ToyOptions("run") and '[toy]\npace = "run"' in recipes.to_toml(recipe)
    assert recipes.from_dict(recipe.document(), "test") == recipe
    with pytest.raises(RecipeError, match=r"toy\.pace 'fly'; use walk, trot or run"):
        recipes.with_settings(recipe, ["toy.pace=fly"])
    with pytest.raises(RecipeError, match=r"key toy\.speed is unknown; use one of pace"):
        recipes.with_settings(recipe, ["toy.speed=3"])


def test_a_build_holds_and_proves_it(bundle: Path) -> None:
    opened = load(bundle)
    assert opened.targets == ("toy", "onnx") and opened.choose("auto") == "toy", "it is the fastest"
    assert opened.manifest["targets"]["toy"]["metadata"] == {"pace": "trot"}
    assert opened.recipe.options(ToyOptions) == ToyOptions("trot")
    report = json.loads((bundle / "report" / "parity.json").read_text())
    assert report["passed"] and any(gate["name"] == "toy/codes_equal" for gate in report["gates"])
    assert "toy" in json.loads((bundle / "bench.json").read_text())["contestants"]


def test_it_runs(bundle: Path) -> None:
    inputs = models.sample_inputs(models.load(str(bundle.parent / "dit")), 2, 0)
    opened = load(bundle)
    results = [opened.engine(target).run(inputs)["sample"] for target in ("toy", "onnx")]
    assert np.array_equal(*results)


def test_verify_repeats_its_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle)]) == 0
    assert "ok    toy/coverage" in capsys.readouterr().out


def test_inspect_shows_its_paths(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(bundle), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all(set(layer["targets"]) == {"toy", "onnx"} for layer in layers)


def test_inspect_shows_a_recipe_beside_a_target_with_a_flag(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--engine", "dit_w4a8", "-m", str(bundle.parent / "dit"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "dit_w4a8"


def test_where_it_does_not_fit_the_next_is_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyBackend, "paces", {"walk"})
    opened = load(bundle)
    assert opened.choose("auto") == "onnx"
    with pytest.raises(EnvironmentLacksError, match="target toy does not trot here"):
        opened.choose("toy")


def test_without_its_row_the_bundle_is_refused_by_name(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ROWS, "toy")
    with pytest.raises(ContractError, match="target 'toy' is unknown to this version, which has cpu, rtx"):
        load(bundle)


def test_every_row_is_the_class_of_its_own_package() -> None:
    for name, (module, class_name) in ROWS.items():
        backend = BACKENDS[name]
        assert (backend.name, type(backend).__name__) == (name, class_name)
        assert module == __name__ or module.startswith("pipeline.backends.")
    ranks = [backend.speed_rank for backend in BACKENDS.values()]
    assert len(set(ranks)) == len(ranks), "one is the fastest"


def test_nobody_but_the_backends_tells_targets_apart() -> None:
    """No comparison with a target's name, and no table by targets' names, outside of pipeline/backends."""
    root = Path(cli.__file__).parent
    names, places = set(ROWS) - {"toy"}, []
    for path in sorted(set(root.rglob("*.py")) - set((root / "backends").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            compared = [*node.comparators, node.left] if isinstance(node, ast.Compare) else []
            keys = node.keys if isinstance(node, ast.Dict) and len(node.keys) > 1 else []
            constants = {part.value for part in compared if isinstance(part, ast.Constant)}
            keyed = {key.value for key in keys if isinstance(key, ast.Constant)}
            if constants & names or len(keyed & names) > 1:
                places.append(f"{path.name}:{node.lineno}")
    # machine.py compares the names of control groups' controllers, of which one is "cpu".
    assert [place for place in places if not place.startswith("machine.py")] == []
