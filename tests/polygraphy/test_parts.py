"""What `verify --polygraphy` writes is made of, each by itself; and what the verb refuses."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipeline.backends.base import Arrays
from pipeline.generate.case import Case
from pipeline.polygraphy import folder
from pipeline.polygraphy.commands import Feed
from pipeline.polygraphy.layer_table import LayerRow, write_table
from pipeline.polygraphy.reference_calls import first_step
from pipeline.verify import __main__ as verb
from pipeline.verify.report import Gate, Report
from tests.support.bundles import make_bundle

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install '.[polygraphy]'")


def test_the_first_step_has_the_noise_and_both_conditions() -> None:
    noise = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    prompted, plain = ({"caption": np.full((2, 5), value, np.float32), "cos": np.ones(4)} for value in (1, 0))
    case = Case(("a", "b"), (prompted, plain), noise, "ddim", 1000.0, 4, 2.0, "pixels", frozenset({"cos"}))
    call = first_step(case)
    assert np.array_equal(call["hidden_states"], np.concatenate([noise, noise]))
    assert call["caption"][:, 0].tolist() == [1, 1, 0, 0] and call["cos"].shape == (4,)
    assert len(set(call["timestep"])) == 1 and call["timestep"].shape == (4,)


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("feeds", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_graph_is_fed_from_calls_and_from_what_others_gave(tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    calls: list[Arrays] = [{"x": np.full(2, i, np.float32), "caption": np.zeros(3)} for i in range(2)]
    save_json(calls, str(tmp_path / "inputs.json"))
    results = RunResults()
    results.add([{"k": np.full(4, 10 + i)} for i in range(2)], runner_name="condition")
    results.save(str(tmp_path / "cpu.condition.json"))
    feeds = [Feed("cpu_condition", ("caption",), ()), Feed("cpu_model", ("k", "x"), ("cpu.condition.json",))]
    (tmp_path / "feeds.py").write_text(folder.feeds_module(feeds), encoding="utf-8")
    module = module_of(tmp_path / "feeds.py")
    assert [list(call) for call in module.cpu_condition()] == [["caption"], ["caption"]]
    first, second = module.cpu_model()
    assert list(first) == ["k", "x"] and first["k"][0] == 10 and second["k"][0] == 11 and second["x"][0] == 1


def test_a_linear_that_a_graph_lacks_is_the_worst(tmp_path: Path) -> None:
    found, lacking = ({"cpu": 50.0, "onnx": value} for value in (60.0, float("nan")))
    limits = {"cpu": 45.0, "onnx": 45.0}
    rows = [LayerRow(name, "ff", "E2M1 x E2M3", db, limits) for name, db in (("a", found), ("b", lacking))]
    assert [row.margin_db for row in rows] == [5.0, -np.inf]
    write_table(rows, tmp_path / "layers.csv")
    assert (tmp_path / "layers.csv").read_text().splitlines() == [
        "layer,kind,weight x activation,cpu_db,cpu_limit_db,onnx_db,onnx_limit_db",
        "a,ff,E2M1 x E2M3,50.00,45.00,60.00,45.00",
        "b,ff,E2M1 x E2M3,50.00,45.00,nan,45.00",
    ]


def test_polygraphy_gets_two_runners() -> None:
    from pipeline.polygraphy.run_arguments import argument_groups

    assert [group.get_name_opt()[1] for group in argument_groups()] == ["ditc", "ditc-onnxrt"]


# --- the flag of `verify` ---------------------------------------------------------------------------------------------


def test_files_are_asked_for_where_the_flag_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def verified(*arguments: object) -> Report:
        asked.append(arguments[-1])
        return Report([Gate("g", 1.0, 1.0, "", "why")])

    monkeypatch.setattr(verb, "verify_bundle", verified)
    bundle = str(make_bundle(tmp_path / "bundle"))
    assert verb.main([bundle, "--polygraphy", str(tmp_path / "out")]) == 0 and verb.main([bundle]) == 0
    assert asked == [tmp_path / "out", None]


def test_a_folder_in_a_bundle_and_a_missing_package_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "verify_bundle", lambda *_: pytest.fail("work began"))
    bundle = make_bundle(tmp_path / "bundle")
    for inside in (bundle, bundle / "polygraphy"):
        assert verb.main([str(bundle), "--polygraphy", str(inside)]) == 2
    monkeypatch.setattr("pipeline.machine.find_spec", lambda name: None if name == "polygraphy" else object())
    capsys.readouterr()
    assert verb.main([str(bundle), "--polygraphy", str(tmp_path / "out")]) == 3
    assert "pip install 'ditc[polygraphy]'" in capsys.readouterr().err


def test_layers_below_their_limit_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def row(name: str, db: float) -> LayerRow:
        return LayerRow(name, "ff", "E2M1 x E2M3", {"cpu": db}, {"cpu": 30.0})

    with caplog.at_level(logging.INFO):
        folder.tell([row("a", 31.5), row("b", 40)])
        folder.tell([row("c", math.nan), row("d", 29), row("e", 40)])
    good, bad = caplog.records
    assert good.levelname == "INFO" and good.getMessage().endswith("a is nearest to its limit: 1.5 dB above")
    assert (
        bad.levelname == "WARNING" and "2 of 3 quantized linears are below their limit, the worst is c" in bad.message
    )
