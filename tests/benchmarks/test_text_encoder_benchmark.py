"""The measurement of a text encoder of true size: memory of a build's processes, bytes of a bundle, a prompt's cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import text_encoder
from benchmarks.text_encoder import TreeMemory, bundle_facts, encode

HELD = 64 * 2**20
CHILD = f"import time; held = bytearray(b'1') * {HELD}; time.sleep(1.5)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory of other processes is read from /proc")
def test_memory_of_what_a_process_started_counts() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT])
    memory = TreeMemory(process)
    memory.start()
    memory.join()
    assert HELD < memory.anonymous <= memory.resident < 4 * HELD


def test_bytes_of_a_bundle_are_told_by_folder(tmp_path: Path) -> None:
    for name, size in {"model.onnx": 3, "cpu/model.onnx.data": 5, "report/images/a.png": 7}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    gate = {"name": "cpu/calls", "value": 1.0, "limit": 2.0, "unit": "dB", "passed": True, "why": "so"}
    (tmp_path / "report" / "parity.json").write_text(json.dumps({"gates": [gate]}))
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": {"quantized": 7}, "stages": []}))
    facts = bundle_facts(tmp_path)
    sizes = facts["size_bytes"]
    assert sizes["cpu"] == 5 and sizes["all"] == sum(sizes[key] for key in (".", "cpu", "report"))
    assert facts["gates"] == [{key: value for key, value in gate.items() if key != "why"}]


def test_a_prompt_has_no_padding_and_is_encoded_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(inputs)
        return {"last_hidden_state": np.zeros((1, 9, 4), np.float32)}

    bundle = SimpleNamespace(engine=lambda target: SimpleNamespace(run=run))
    arrays = {"input_ids": np.arange(9)[None], "attention_mask": np.array([[1] * 5 + [0] * 4])}
    monkeypatch.setattr(text_encoder, "load", lambda path: bundle)
    monkeypatch.setattr(text_encoder, "description", lambda opened: None)
    monkeypatch.setattr(text_encoder, "sample_inputs", lambda *_, tokens: arrays)
    row = encode(Path("bundle"), 9, 3)
    assert len(calls) == 3 and all(call["attention_mask"].all() for call in calls)
    assert row["tokens"] == 9 and row["peak_resident_bytes"] > 0
