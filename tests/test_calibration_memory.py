"""What calibration says of its memory, against measured peaks; and that finished blocks leave nothing behind."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from export.models import denoiser, load, sample_inputs
from pipeline import machine
from pipeline.calibrate.blocks import BlockRunner, group_by_block, looks_like_chain
from pipeline.calibrate.data import CalibrationData, Call
from pipeline.calibrate.memory import measure
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.plan import make_plans
from pipeline.calibrate.rtn import quantize_linear
from pipeline.methods import METHODS
from pipeline.recipe import load as load_recipe
from pipeline.recipe import with_settings
from tests import tiny

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
BATCH, STEPS = 16, 3  # samples of a call, calls
FEW = ("formats.activation=E2M3", "weights.search=absmax", "weights.group_size=32")


@pytest.fixture
def exact_malloc():
    """Arrays from 64 KiB on come from the system and go back to it, so that resident memory is what is in use."""
    libc = ctypes.CDLL(None)
    if not (sys.platform == "linux" and hasattr(libc, "mallopt")):
        pytest.skip("resident memory can be measured to the array with Linux and glibc only")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # what glibc itself raises it to


def model_of(tmp_path, monkeypatch, size=32, layers=tiny.LAYERS):
    """256 tokens of width 64 unless `size` says otherwise, so that activations outweigh what Python itself takes."""
    name, config = tiny.MODELS["pixart"]
    monkeypatch.setitem(tiny.MODELS, "pixart", (name, config | {"sample_size": size, "num_layers": layers}))
    return load(str(tiny.folder("pixart", tmp_path / str(layers), half=False)))


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


# method with settings that keep it short; what is run
CASES = {
    "fp4dit": (("method=fp4dit", "calibrate.options.iterations=2"), quantize_a_block),
    "qdit": (("method=qdit", "calibrate.options.rows=256"), quantize_a_block),
    "msfp": (("method=msfp", "calibrate.options.iterations=2"), tune),
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_bounds_the_peak_and_is_of_its_size(case, tmp_path, monkeypatch, exact_malloc):
    settings, work = CASES[case]
    if work is tune:
        settings = (*settings, "formats.activation=E2M1")
        monkeypatch.setattr("pipeline.calibrate.talora_tuning.Tuner.save", lambda *_: None)
    model = model_of(tmp_path, monkeypatch)
    method = method_of(model, *settings)
    method.context = replace(method.context, folder=tmp_path)
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
    assert peak <= said <= 4 * peak, f"{case}: {peak / 2**20:.0f} MiB at the peak, {said / 2**20:.0f} MiB said"


def test_nothing_grows_with_the_number_of_blocks(tmp_path, monkeypatch):
    model = model_of(tmp_path, monkeypatch, size=8, layers=4)
    recipe = with_settings(load_recipe("pixart_w4a6"), list(FEW))
    units = group_by_block(make_plans(model.linears(), recipe))
    assert looks_like_chain(denoiser(model), list(units), sample_inputs(model, 1, 0))
    runner, held = BlockRunner(model, made_up(model, 2, 2), list(units)), []
    for name, plans in units.items():
        observed = runner.observe(name, plans)
        observed.layer_inputs(plans[0].name, rows=8)
        runner.advance(observed, [quantize_linear(plan, "absmax") for plan in plans])
        held.append(tensor_bytes())
    assert len(set(held)) == 1, held


def tensor_bytes():
    """Bytes of all tensors of the process."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}
    return sum(storages.values())
