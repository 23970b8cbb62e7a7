"""What drawing takes of memory is known before it is loaded: as measured, and said in a sentence where it is short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.errors import ResourceError
from pipeline import machine
from pipeline.bundle import memory
from pipeline.bundle.memory import LIBRARIES_BYTES, PART_BYTES, PartMemory, needed_bytes, part_memory
from pipeline.text_to_image import Pipeline
from tests.support.scenes_bundle import PROMPT

ROOT = Path(__file__).parents[2]
GIB = 2**30
# Weights and calls of a pipeline of true size, about.
PARTS = {"text_encoder": PartMemory(2 * GIB, 0), "transformer": PartMemory(GIB, GIB), "vae_decoder": PartMemory(0, GIB)}
ALL, ONE = 4 * GIB + 3 * PART_BYTES + LIBRARIES_BYTES, 2 * GIB + PART_BYTES + LIBRARIES_BYTES


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_parts_in_turn_need_the_largest_and_kept_ones_all_and_the_largest_call() -> None:
    assert needed_bytes(PARTS, keep_loaded=True) == ALL
    assert needed_bytes(PARTS, keep_loaded=False) == ONE


def looked_at(keep_loaded: bool, free: int | machine.FreeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PARTS, on a machine with so much memory."""
    monkeypatch.setattr(memory, "part_memory", lambda *_: PARTS)
    monkeypatch.setattr(
        machine, "free_memory", lambda: free if isinstance(free, machine.FreeMemory) else machine.FreeMemory(free)
    )
    bundle, model = SimpleNamespace(name="it"), SimpleNamespace(components=SimpleNamespace(keep_loaded=keep_loaded))
    memory.refuse_too_large(bundle, model, "auto", 1)  # type: ignore[arg-type]


@pytest.mark.fast
@pytest.mark.parametrize("keep_loaded, enough", [(True, ALL), (False, ONE)])
def test_where_there_is_enough_nothing_is_said(
    keep_loaded: bool, enough: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked_at(keep_loaded, enough, monkeypatch)
    assert not caplog.records
    looked_at(keep_loaded, enough - 1, monkeypatch)
    (record,) = caplog.records
    assert record.levelname == "WARNING"


@pytest.mark.fast
@pytest.mark.parametrize(
    "keep_loaded, free, remedy",
    [
        (True, ALL - GIB // 2, "serve with --no-keep-loaded), which needs about 2.04 GiB"),
        (False, ONE - 1, "close other programs, draw fewer pictures at a time, or build it for smaller ones"),
    ],
)
def test_where_calls_do_not_fit_a_warning_has_the_remedy(
    keep_loaded: bool, free: int, remedy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked_at(keep_loaded, free, monkeypatch)
    assert caplog.records[0].levelname == "WARNING" and remedy in caplog.text


@pytest.mark.fast
@pytest.mark.parametrize(
    "keep_loaded, sentence",
    [
        (True, r"^it: all parts at once of 3.02 GiB, 1.95 GiB of memory are free; let them take turns \(generate"),
        (False, r"^it: text_encoder of 2.01 GiB, 1.95 GiB of memory are free; close other programs, or build that"),
    ],
)
def test_weights_that_do_not_fit_are_refused(keep_loaded: bool, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=sentence):
        looked_at(keep_loaded, int(1.95 * GIB), monkeypatch)


@pytest.mark.fast
def test_the_limit_that_is_short_is_the_one_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.FreeMemory(GIB, " within the limit of `ulimit -v`", "raise that limit")
    with pytest.raises(ResourceError, match=r"are free within the limit of `ulimit -v`; raise that limit, or build"):
        looked_at(False, free, monkeypatch)


# --- beside what is measured -----------------------------------------------------------------------------------------

# What a call adds to a process that has made a small one.
CALL = """
import json, sys
import numpy as np
from pipeline import load, machine
bundle, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine, rng = load(f"{bundle}/{name}", threads=1).engine("cpu"), np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)

def inputs(count):
    if name == "vae_decoder":
        return {"latents": normal(1, 4, count, count)}
    if name == "text_encoder":
        return dict.fromkeys(("input_ids", "attention_mask"), np.ones((count, 120), np.int64))
    return {
        "hidden_states": normal(count, 4, 16, 16), "encoder_hidden_states": normal(count, 120, 128),
        "timestep": np.full(count, 500, np.float32), "encoder_attention_mask": np.ones((count, 120), np.float32),
    }

engine.run(inputs(16 if name == "vae_decoder" else 2))
machine.reset_peak_memory()
before = machine.peak_memory_bytes()
engine.run(inputs(count))
print(json.dumps(machine.peak_memory_bytes() - before))
"""
# What drawing adds to a process that has opened the pipeline, in which free memory was looked at.
DRAW = """
import json, sys
from ditc import Pipeline
from pipeline import machine
bundle, kept, count, prompt = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), sys.argv[4]
with Pipeline.load(bundle, threads=1, keep_loaded=kept) as pipeline:
    machine.reset_peak_memory()
    before = machine.peak_memory_bytes()
    pipeline(prompt, num_images_per_prompt=count, num_inference_steps=2)
print(json.dumps(machine.peak_memory_bytes() - before))
"""


def measured(program: str, *arguments: object) -> Any:
    """What a process prints in which the compiler is nowhere."""
    command = [sys.executable, "-c", f"from tests.support.absent import hide\nhide()\n{program}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a moment is Linux's")


@needs_linux
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name, count", [("text_encoder", 64), ("transformer", 64), ("vae_decoder", 128)])
def test_a_call_takes_what_is_reckoned(name: str, count: int, scenes_bundle: Path) -> None:
    """Of so many samples, or of a picture of so many latents a side, so that it is much beside all else; within a
    quarter, for attention adds to it and kernels that fuse operators spare some."""
    with Pipeline.load(scenes_bundle) as pipeline:
        of_picture = part_memory(pipeline.bundle, pipeline.model)[name].call_bytes  # type: ignore[arg-type]
    samples, side = 2, 16
    reckoned = of_picture * (count**2 / side**2 if name == "vae_decoder" else count / samples)
    assert 0.75 < measured(CALL, scenes_bundle, name, count) / reckoned < 1.25


@needs_linux
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_drawing_takes_what_is_reckoned(kept: bool, count: int, scenes_bundle: Path) -> None:
    """No more, and not much less: some megabytes are weights and calls, the rest the runtime's own."""
    with Pipeline.load(scenes_bundle) as pipeline:
        reckoned = needed_bytes(part_memory(pipeline.bundle, pipeline.model, "auto", count), kept)  # type: ignore[arg-type]
    assert 0.7 < measured(DRAW, scenes_bundle, kept, count, PROMPT) / reckoned < 1.1


@pytest.mark.slow
def test_it_is_refused_before_a_part_is_loaded(scenes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: machine.FreeMemory(2**20))
    with pytest.raises(ResourceError, match=r"pixart_w4a6: transformer of .* of memory are free; close other programs"):
        Pipeline.load(scenes_bundle)
    Pipeline.load(scenes_bundle, batch_size=None).close()
