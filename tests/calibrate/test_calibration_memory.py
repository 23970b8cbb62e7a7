"""What calibration says of its memory, against measured peaks; and that finished blocks leave nothing behind."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.calibrate.blocks import BlockRunner, group_by_block
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.recipe import load as load_recipe
from pipeline.recipe import with_settings
from tests.support.calibration_peaks import FEW, made_up, model_of

ROOT = Path(__file__).parents[2]
CASES = ("fp4dit", "fp4dit streams", "qdit", "msfp")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Case -> (bytes at the peak, bytes said)."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("resident memory can be measured to the array with Linux and glibc only")
    command = [sys.executable, "-m", "tests.support.calibration_peaks", str(tmp_path_factory.mktemp("peaks"))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_bounds_the_peak_and_is_of_its_size(case, peaks):
    peak, said = peaks[case]
    assert peak <= said <= 4 * peak, f"{case}: {peak / 2**20:.0f} MiB at the peak, {said / 2**20:.0f} MiB said"


@pytest.mark.torch
def test_nothing_grows_with_the_number_of_blocks(tmp_path):
    model = model_of(tmp_path, size=8, layers=4)
    recipe = with_settings(load_recipe("pixart_w4a6"), list(FEW))
    units = group_by_block(make_plans(model.linears(), recipe))
    runner, held = BlockRunner(model, made_up(model, 2, 2), list(units)), []
    assert runner.is_chain
    for name, plans in units.items():
        observed = runner.observe(name, plans)
        observed.layer_inputs(plans[0].name, rows=8)
        runner.advance(observed, [quantize_linear(plan, "absmax") for plan in plans])
        held.append(tensor_bytes())
    *between, last = held
    assert len(set(between)) == 1, held
    assert last < between[0], "behind the last block nothing goes on"


def tensor_bytes():
    """Bytes of all tensors of the process."""
    gc.collect()
    tensors = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
