"""Contestants in turn: order, rows, those that fail or are absent."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from export.errors import RecipeError
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.bench import contest, convert, peers
from pipeline.bench.convert import CONVERSIONS, FloatModel, how_it_ended, place, prepared
from pipeline.bench.peers import PEERS, Entry, absence, entries, parse_peers
from pipeline.bench.runners import RUNTIMES, Spec
from pipeline.bench.worker import Answer, WorkerError, load_arrays, save_arrays

EXPECTED: Arrays = {"sample": np.arange(1, 5, dtype=np.float32)}
MODEL = FloatModel("no/such/model", "", "", 0, 0)


class FakeWorker:
    """Answers as a process would. path of its Spec: what it does."""

    calls: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, spec: Spec, inputs: Path, log: Path) -> None:
        self.kind, self.count = spec.path, 0
        if self.kind == "closed":
            raise WorkerError("it does not open")
        self.opened: Answer = {"s": 2.0, "peak_rss_bytes": 1}

    def call(self, forget: bool = False, output: Path | None = None) -> Answer:
        self.count += 1
        if self.kind == "mortal" and self.count == 3:
            raise WorkerError("out of memory")
        if output is not None:
            factor = {"nan": np.nan, "exact": 1.0}.get(str(self.kind), 1.1)
            save_arrays(output, {"sample": EXPECTED["sample"] * np.float32(factor)})
        self.calls.append(f"{self.kind}{' first' if forget else ''}")
        return {"s": 0.2 if forget else 0.1, "peak_rss_bytes": 100}

    def draw(self, case: Path) -> Answer:
        return {"s": 1.0, "peak_rss_bytes": 200}

    def close(self) -> None:
        self.calls.append(f"{self.kind} closed")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(contest, "Worker", FakeWorker)
    monkeypatch.setattr(contest.Spec, "size_bytes", lambda self: 5)
    monkeypatch.setattr(FakeWorker, "calls", [])
    return FakeWorker.calls


def entry(kind: str, is_ours: bool = False, draws: bool = False) -> Entry:
    return Entry(kind, Spec("onnxruntime", 1, kind), is_ours, draws)


GIVEN = contest.Given(Path("inputs.npz"), Path("case.npz"), EXPECTED)


def test_rounds_go_there_and_back_and_engines_have_two_rows(calls: list[str], tmp_path: Path) -> None:
    found = contest.contest([entry("ours", True, True), entry("exact")], GIVEN, 2, tmp_path)
    turn, turn_rows = ["ours", "ours first"], ["ours", "ours_first_step"]
    assert calls == ["ours", "ours", "exact", *turn, "exact", "exact", *turn, "exact closed", "ours closed"], (
        "each is called once before, an engine that has drawn twice"
    )
    rows = found["contestants"]
    assert list(rows) == ["ours", "ours_first_step", "exact"] and not found["failed"]
    assert [rows[name]["call_ms"]["median"] for name in turn_rows] == pytest.approx([100, 200])
    assert rows["ours"]["sqnr_db"] == pytest.approx(20, abs=0.01) and rows["exact"]["sqnr_db"] is None
    assert rows["ours"]["drawing_peak_rss_bytes"] == 200 and "drawing_peak_rss_bytes" not in rows["exact"]
    assert (rows["exact"]["peak_rss_bytes"], rows["exact"]["load_s"], rows["exact"]["weights_bytes"]) == (100, 2.0, 5)


def test_rounds_fill_the_budget(calls: list[str], tmp_path: Path) -> None:
    found = contest.contest([entry("exact")], GIVEN, None, tmp_path)
    assert found["contestants"]["exact"]["call_ms"]["rounds"] == contest.CALL_ROUNDS[1]


def test_those_that_fail_say_so_and_the_others_go_on(calls: list[str], tmp_path: Path) -> None:
    kinds = ("closed", "nan", "mortal", "exact")
    found = contest.contest([entry(kind) for kind in kinds], GIVEN, 3, tmp_path)
    assert found["failed"] == {
        "closed": "it does not open", "nan": "its outputs are not all finite", "mortal": "out of memory",
    }  # fmt: skip
    assert found["contestants"]["exact"]["call_ms"]["rounds"] == 3 and list(found["contestants"]) == ["exact"]
    assert {"nan closed", "mortal closed", "exact closed"} <= set(calls)


def test_several_loads_give_their_median(calls: list[str], tmp_path: Path) -> None:
    contest.contest([entry("exact")], GIVEN, 1, tmp_path, loads=3)
    assert calls.count("exact closed") == 3


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_row_has_a_runtime_and_a_conversion() -> None:
    assert {row.runtime for row in PEERS.values()} <= RUNTIMES.keys()
    assert {row.conversion for row in PEERS.values()} - {None} <= CONVERSIONS.keys()
    assert all(row.conversion is not None or row.runtime == "torch" for row in PEERS.values())


def test_peers_are_named() -> None:
    assert parse_peers("all") == tuple(PEERS)
    assert parse_peers("torch_fp32, openvino_int8") == ("torch_fp32", "openvino_int8")
    with pytest.raises(RecipeError, match=r"peer 'tvm' is unknown; use all, or some of torch_fp32, .*openvino_int8"):
        parse_peers("torch_fp32,tvm")
    with pytest.raises(RecipeError, match="peer '' is unknown"):
        parse_peers(",")


def test_one_that_is_not_installed_is_left_out_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    absent = {"openvino", "nncf", "torchao"}
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in absent else find(name))
    monkeypatch.setattr(machine, "cpu_flags", lambda: ("avx2",))
    ready, absences = entries([name for name in PEERS if "onnx" not in name], MODEL, "0" * 64, tmp_path, 3)
    assert [(row.name, row.spec.threads, row.spec.model) for row in ready] == [("torch_fp32", 3, MODEL)]
    install = "install with: pip install 'ditc[peers]'"
    assert absences["left_out"]["torchao_int8"] == f"torchao_int8 needs torchao; {install}"
    assert absences["left_out"]["openvino_int8"] == f"openvino_int8 needs openvino, nncf; {install}"
    assert "needs a processor with avx512_bf16 or amx_int8" in absences["left_out"]["torch_bf16"]
    assert not absences["failed"]


def test_without_the_compiler_all_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COMPILER", ("no_such_module",))
    assert "pip install 'ditc[build]'" in str(absence("onnxruntime_int8"))


# --- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_conversion_that_fails_is_said(tmp_path: Path) -> None:
    ready, absences = entries(["onnxruntime_int8"], MODEL, "0" * 64, tmp_path, 1)
    assert not ready and "no/such/model" in absences["failed"]["onnxruntime_int8"]
    assert absences["failed"]["onnxruntime_int8"].startswith("onnx_fp32 was not made: ")
    assert [path.name for path in place(MODEL, "0" * 64, tmp_path).iterdir()] == ["onnx_fp32.log"]


def test_a_conversion_is_made_again_for_other_weights_sizes_and_tools(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: object) -> Done:
        job = json.loads(command[-1])
        made.append(f"{job['name']} {job['model']['height']}")
        (Path(job["folder"]) / f"{job['name']}.part" / "model.xml").touch()
        return Done()

    monkeypatch.setattr(convert.subprocess, "run", run)
    larger = dataclasses.replace(MODEL, height=64, width=64)
    versions = {"openvino": "1"}
    monkeypatch.setattr(machine, "tool_versions", lambda more=(): dict(versions))
    for model in (MODEL, larger, MODEL):
        path = prepared("openvino_int8", model, "a" * 64, tmp_path)
        assert path.name == "model.xml" and path.is_file()
    every = ["openvino_fp32 0", "openvino_int8 0", "openvino_fp32 64", "openvino_int8 64"]
    assert made == every, "each size once"
    made.clear()
    prepared("openvino_int8", MODEL, "b" * 64, tmp_path)
    versions["openvino"] = "2"
    prepared("openvino_int8", MODEL, "a" * 64, tmp_path)
    assert made == every[:2] * 2


def test_how_a_process_ended_is_said(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Traceback\n  ValueError: K is 7\n\n")
    assert how_it_ended(1, tmp_path / "log") == f"ValueError: K is 7 (exit 1; all of it: {tmp_path / 'log'})"
    assert "ended by signal 9, memory may have run out" in how_it_ended(-9, tmp_path / "log")
    assert "ended by signal 11;" in how_it_ended(-11, tmp_path / "log")


@pytest.mark.torch
@pytest.mark.process
def test_a_tiny_model_beside_torch_and_onnxruntime(tmp_path: Path) -> None:
    """Conversions, the float model's answer and measured rows, with what the compiler itself needs."""
    from export.models import load as models
    from tests.support import tiny

    source = tiny.folder("pixart", tmp_path)
    model, size = models.load(str(source)), FloatModel(str(source), "", "", 0, 0)
    inputs = save_arrays(tmp_path / "inputs.npz", models.sample_inputs(model, 1, 0))
    ready, absences = entries(["torch_fp32", "onnxruntime_fp32"], size, model.sha256, tmp_path / "work", 1)
    assert absences == {"left_out": {}, "failed": {}}
    expected = peers.reference(size, inputs, tmp_path / "reference.npz", 1)
    assert np.array_equal(load_arrays(tmp_path / "reference.npz")["sample"], expected["sample"])
    found = contest.contest(ready, contest.Given(inputs, None, expected), 2, tmp_path / "logs")
    assert not found["failed"]
    rows = found["contestants"]
    assert rows["torch_fp32"]["sqnr_db"] is None, "it is the reference"
    # float32 twins: about 60 operations in a row, each off by 2^-24, sums of 64: 2^-24 * 60 * 16, in dB
    assert rows["onnxruntime_fp32"]["sqnr_db"] > -20 * np.log10(2.0**-24 * 60 * 16)
    assert all(row["peak_rss_bytes"] > 0 and row["call_ms"]["rounds"] == 2 for row in rows.values())
    assert rows["onnxruntime_fp32"]["weights_bytes"] > 4 * 100_000
