"""Peaks of calibration's memory beside what is said before: `python -m tests.support.calibration_peaks FOLDER` prints
JSON.

In a process of its own, started with MALLOC_MMAP_THRESHOLD_=65536 (glibc): arrays from 64 KiB on then come from the
system and go back to it, so that resident memory is what is in use. What ran before in a process would show.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from export.models.load import load, sample_inputs
from pipeline import machine
from pipeline.calibrate.blocks import BlockRunner, group_by_block
from pipeline.calibrate.data import CalibrationData, Call
from pipeline.calibrate.learn.tuning import Tuner
from pipeline.calibrate.memory import measure
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.methods import METHODS
from pipeline.recipe import load as load_recipe
from pipeline.recipe import with_settings
from tests.support import tiny

BATCH, STEPS = 8, 2  # samples of a call, calls
FEW = ("formats.activation=E2M3", "weights.search=absmax", "weights.group_size=32")


def model_of(folder, size=32, layers=tiny.LAYERS, row="pixart", **changes):
    """256 tokens of width 64 unless `size` says otherwise, so that activations outweigh what Python itself takes. row:
    of tiny.MODELS, its configuration with `changes`."""
    name, config = tiny.MODELS[row]
    tiny.MODELS[row] = (name, config | {"sample_size": size, "num_layers": layers} | changes)
    try:
        return load(str(tiny.folder(row, folder / str(layers), half=False)))
    finally:
        tiny.MODELS[row] = (name, config)


def made_up(model, batch, steps=STEPS):
    """Calls on random inputs: no trajectory is sampled."""
    calls = []
    for step in range(steps):
        inputs = sample_inputs(model, batch, step)
        calls.append(Call({key: np.ascontiguousarray(value) for key, value in inputs.items()}, 1.0 - step / 9, step))
    return CalibrationData(tuple(calls), steps)


def method_of(model, *settings, data=None):
    recipe = replace(with_settings(load_recipe("pixart_w4a6"), [*FEW, *settings]), model=model.source)
    row = METHODS[recipe.calibrate.method]
    return row.load()(Context(model, recipe, row.resolve("fast", recipe.calibrate.options), None, data))


def quantize_a_block(model, method, units, batch):
    """The second block: its inputs are its own in both networks."""
    first, second = list(units)[:2]
    data = made_up(model, batch)
    runner = BlockRunner(model, data, list(units))
    runner.advance(runner.observe(first, units[first]), [quantize_linear(plan, "absmax") for plan in units[first]])
    method.quantize(Unit(second, units[second], runner.observe(second, units[second])))


def tune(model, method, units, batch):
    method.context = replace(method.context, data=made_up(model, batch))
    method.finish([quantize_linear(plan, "absmax") for plans in units.values() for plan in plans])


# method with settings that keep it short; what is run; of which model. "unknown" has two streams.
CASES = {
    "fp4dit": (("method=fp4dit", "calibrate.options.iterations=2"), quantize_a_block, "pixart"),
    "fp4dit streams": (("method=fp4dit", "calibrate.options.iterations=2"), quantize_a_block, "unknown"),
    "qdit": (("method=qdit", "calibrate.options.rows=256"), quantize_a_block, "pixart"),
    "msfp": (("method=msfp", "calibrate.options.iterations=2", "formats.activation=E2M1"), tune, "pixart"),
}


def peak_and_said(model, settings, work, folder):
    """Bytes: the highest resident size beside what was there before, and the estimate."""
    method = method_of(model, *settings)
    method.context = replace(method.context, folder=folder)
    units = group_by_block(method.plan(make_plans(model.linears(), method.context.recipe)))
    work(model, method, units, 1)  # what is loaded at first use is no part of it
    gc.collect()
    before = psutil.Process().memory_info().rss
    machine.reset_peak_memory()
    work(model, method, units, BATCH)
    peak = machine.peak_memory_bytes() - before
    sizes = measure(model, units, sample_inputs(model, 1, 0), BATCH * STEPS, STEPS, BATCH)
    bytes_of = [0] * len(units) if work is tune else [method.unit_bytes(sizes, block) for block in sizes.blocks]
    said = sizes.total(bytes_of, method.apart_bytes(sizes, [plan for plans in units.values() for plan in plans]))
    return peak, said


def main(folder):
    Tuner.save = lambda *_: None  # a stopped tuning's state would be taken up by the second run
    models = {
        "pixart": model_of(folder),
        "unknown": model_of(folder, layers=3, row="unknown", pos_embed_max_size=16),  # the last block gives no text
    }
    peaks = {case: peak_and_said(models[row], *parts, folder) for case, (*parts, row) in CASES.items()}
    sys.stdout.write(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
