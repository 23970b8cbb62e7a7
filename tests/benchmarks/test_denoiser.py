"""The sweep of benchmarks/denoiser.py: cases, engines, who is measured where, and a whole run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import denoiser, readme
from benchmarks.denoiser import Sizes, calibration_of, parse_engine, slow_ones
from benchmarks.record import Json
from export.errors import RecipeError
from pipeline.bench.peers import Entry
from pipeline.bench.runners import Spec
from pipeline.recipe import load as load_recipe
from pipeline.recipe import settled_attention, with_settings
from tests.support import tiny

RECIPE = load_recipe("pixart_w4a6")
PEERS = ("quick", "fair", "middling", "slow", "absent")


def row(median: float, **facts: object) -> Json:
    spread = {"median": median, "p10": median, "p90": median, "rounds": 1}
    common = {"sqnr_db": 20.0, "load_s": 1.0, "peak_rss_bytes": 5_000_000, "weights_bytes": 10}
    return {"call_ms": spread, **common, **facts}


@pytest.mark.parametrize("text", ["256", "256x", "255x1", "0x1", "256x0", "256x1:0", "256x1:x", "-4x1"])
def test_a_case_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="TOKENS a square number"):
        Sizes.parse(text)


def test_an_engine_is_a_name_and_settings() -> None:
    ours = parse_engine("w8a8: formats.weight=INT8, formats.activation=INT8", "pixart_w4a6", ["weights.group_size=32"])
    assert (ours.name, ours.base) == ("w8a8", "pixart_w4a6")
    assert ours.settings == ("formats.weight=INT8", "formats.activation=INT8")
    assert (ours.recipe.formats.weight, ours.recipe.weights.group_size) == ("INT8", 32)
    rtx = parse_engine("rtx: rtx.sm=[89, 120]", "pixart_w4a6", [])
    assert rtx.settings == ("rtx.sm=[89, 120]",), "a comma inside a value"
    assert parse_engine("same:", "pixart_w4a6", []).recipe == settled_attention(RECIPE, ["cpu"]), "what users get"
    for wrong in ("w8a8", "W8: seed=1", ": seed=1", "onnxruntime_int8: seed=1"):
        with pytest.raises(RecipeError, match="is none; give NAME:KEY=VALUE"):
            parse_engine(wrong, "pixart_w4a6", [])


def test_an_engine_may_be_of_another_recipe() -> None:
    ours = parse_engine("int8: pixart_w8a8, cpu.path=fused", "pixart_w4a6", ["calibrate.seed=3"])
    assert (ours.base, ours.settings) == ("pixart_w8a8", ("cpu.path=fused",))
    assert ours.recipe == with_settings(load_recipe("pixart_w8a8"), ["calibrate.seed=3", "cpu.path=fused"])
    assert parse_engine("int8: pixart_w8a8", "pixart_w4a6", []).recipe == load_recipe("pixart_w8a8")
    with pytest.raises(RecipeError, match="pixart_w9"):
        parse_engine("int8: pixart_w9, cpu.path=fused", "pixart_w4a6", [])


def test_engines_share_a_calibration_unless_it_differs() -> None:
    paths = [with_settings(RECIPE, [f"cpu.path={path}", "sampling.height=512"]) for path in denoiser.PATHS]
    assert {calibration_of(recipe) for recipe in paths} == {calibration_of(RECIPE)}
    assert calibration_of(with_settings(RECIPE, ["weights.group_size=32"])) != calibration_of(RECIPE)


def test_many_tokens_are_for_the_fast_ones_alone() -> None:
    entries = [Entry(name, Spec("onnxruntime", 1)) for name in PEERS]
    entries += [Entry(name, Spec("engine", 1), is_ours=True) for name in ("fused", "stock")]
    times = {"quick": 1.0, "fair": 2.0, "middling": 3.0, "slow": 4.0, "fused": 2.5, "stock": 3.5}
    before = {"contestants": {name: row(value) for name, value in times.items()}}
    assert slow_ones(before, entries) == ["slow", "absent", "stock"]


def test_the_tables_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"fused": row(100.0), "fused_first_step": row(110.0), "ort": row(300.0), "ov": row(150.0, sqnr_db=15.4)}
    second = {"fused": row(1000.0), "ort": row(900.0, sqnr_db=None)}
    quiet = {"tokens": 256, "batch": 1, "contestants": first, "failed": {}, "load_average": 0.5}
    loaded = {"tokens": 4096, "batch": 1, "contestants": second, "failed": {"ov": "ended"}, "load_average": 7.25}
    cases = [quiet | {"left_out": {"ao": "install it"}}, loaded | {"left_out": {}}]
    run: dict[str, Any] = {"machine": {"cpu": "C", "cpus": 2}, "engines": {"fused": {}}, "cases": cases}
    run |= {"commit": "abc+", "versions": {"numpy": "2.4", "onnxruntime": "1.31"}}
    monkeypatch.setattr(readme, "_denoiser_runs", lambda: [run])
    assert readme.speed_short().splitlines()[2:] == [
        "| C, 2 CPUs | `fused` | 1.50 x `ov` (20 to 15 dB) | 0.90 x `ort` |"
    ]
    table = readme.speed().splitlines()
    assert [line.split(" | ")[1] for line in table[2:6]] == ["fused", "fused_first_step", "ov", "ort"]
    assert table[4] == "| C, 2 CPUs | ov | 150 ms | - | 15.4 | 5 | - | 1.0 |"
    load, absent = (
        "- C, 2 CPUs: load average before the cases 0.5 to 7.2, commit abc+, onnxruntime 1.31",
        "- C, 2 CPUs: ao was not measured: install it",
    )
    assert table[6:] == ["", load, absent], "ov has a row of another case"
    assert readme.speed_equal() == readme.NOT_MEASURED, "an error is not known"
    monkeypatch.setattr(readme, "_denoiser_runs", list)
    assert readme.speed() == readme.speed_short() == readme.speed_equal() == readme.NOT_MEASURED


def test_the_table_at_equal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"w4": row(100.0), "w8": row(200.0, sqnr_db=33.0), "wide": row(250.0, sqnr_db=35.0)}
    rows |= {"w4_first_step": row(90.0), "ort": row(220.0, sqnr_db=26.0), "ov": row(500.0, sqnr_db=34.0)}
    rows |= {"int4": row(150.0, sqnr_db=20.0), "fp32": row(900.0, sqnr_db=110.0)}
    more = {"w8": row(50.0, sqnr_db=20.0), "wide": row(80.0, sqnr_db=20.1), "ort": row(40.0, sqnr_db=20.1)}
    cases = [{"tokens": 256, "batch": 1, "contestants": rows}, {"tokens": 1024, "batch": 1, "contestants": more}]
    run = {"machine": {"cpu": "C", "cpus": 2}, "engines": {"w4": {}, "w8": {}, "wide": {}}, "cases": cases}
    monkeypatch.setattr(readme, "_denoiser_runs", lambda: [run])
    assert readme.speed_equal().splitlines()[2:] == [
        "| C, 2 CPUs | `int4` | 1.50 x by `w4` (20.0 to 20.0 dB) | - |",
        "| C, 2 CPUs | `ort` | 1.10 x by `w8` (33.0 to 26.0 dB) | 0.50 x by `wide` (20.1 to 20.1 dB) |",
        "| C, 2 CPUs | `ov` | 2.00 x by `wide` (35.0 to 34.0 dB) | - |",
        "| C, 2 CPUs | `fp32` | none has 110 dB | - |",
    ]


def test_cases_of_an_earlier_result_stay_if_the_same_code_measured_them() -> None:
    head = {"model": "M", "layers": 2, "recipe": "r", "settings": [], "threads": 2, "code": "abc"}
    earlier = head | {"cases": [{"tokens": 256, "batch": 1}], "commit": "1"}
    assert denoiser.cases_of(earlier, head, Path("a.json")) == earlier["cases"]
    for key, value in (("code", "abd"), ("threads", 1), ("recipe", "s")):
        with pytest.raises(RecipeError, match=f"a.json: its {key} is"):
            denoiser.cases_of(earlier, head | {key: value}, Path("a.json"))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.process
def test_a_tiny_model_is_prepared_once_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.folder("pixart", tmp_path)
    flags = ["--model", str(model), "--work-dir", str(tmp_path / "work"), "-o", str(tmp_path / "out"), "--threads", "1"]
    flags += ["--set", "weights.group_size=32", "--set", "method=rtn", "--paths", "stock"]
    flags += ["--engine", "w8a8: cpu.path=stock, formats.weight=INT8"]
    flags += ["--cases", "16x1:2", "16x2:1", "--peers", "onnxruntime_fp32,onnxruntime_int8,openvino_int8"]
    monkeypatch.setattr(denoiser, "LOADS", 1)
    denoiser.main([*flags, "--only-prepare"])
    assert "prepared in" in capsys.readouterr().out and not (tmp_path / "out").exists()
    monkeypatch.setattr(denoiser, "_build_group", None)  # nothing is built again
    denoiser.main(flags)
    (path,) = (tmp_path / "out").glob("denoiser_*.json")
    document = json.loads(path.read_text())
    assert [(case["tokens"], case["batch"]) for case in document["cases"]] == [(16, 1), (16, 2)]
    for case in document["cases"]:
        engines = [f"{name}{step}" for name in ("stock", "w8a8") for step in ("", "_first_step")]
        assert [*case["contestants"]] == [*engines, "onnxruntime_fp32", "onnxruntime_int8"]
        assert case["left_out"]["openvino_int8"].startswith("openvino_int8 needs ") and not case["failed"]
        assert case["contestants"]["onnxruntime_fp32"]["sqnr_db"] > 80
        assert case["contestants"]["w8a8"]["sqnr_db"] > case["contestants"]["stock"]["sqnr_db"]
    assert document["cases"][0]["contestants"]["stock"]["drawing_peak_rss_bytes"] > 0
    assert document["engines"]["stock"]["settings"] == ["cpu.path=stock", "attention.qk=float", "attention.pv=float"]
    assert document["engines"]["stock"]["sqnr_to_reference_db"] > denoiser.LEAST_SQNR_DB
    denoiser.main([*flags[:-5], "--cases", "16x2:3", "--peers", "onnxruntime_int8", "--append"])
    document = json.loads(path.read_text())
    assert [(case["batch"], case["rounds"]) for case in document["cases"]] == [(1, 2), (2, 3)]
    assert document["engines"]["stock"]["sqnr_to_reference_db"] > denoiser.LEAST_SQNR_DB
    monkeypatch.setattr(readme, "_denoiser_runs", lambda: [document])
    assert "| w8a8 |" in readme.speed() and "`stock`" in readme.speed_short()
