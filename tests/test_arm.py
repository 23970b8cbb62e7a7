"""The run time on 64-bit Arm, in an emulator: from a prompt to a PNG with the bundled model, as on x86.

The kernel library is cross-compiled into the package, as a wheel for Arm has it. What is emulated says nothing of
speed, and nothing of a board's memory.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.cache_folder import cache_folder
from pipeline import compiler
from pipeline.build import main as build
from pipeline.distance import psnr_db
from pipeline.generate.draw import to_pixels
from pipeline.verify.gates import FACTOR_DB, ROUNDED_DB
from tests.support import arm

pytestmark = pytest.mark.slow
STEPS = 4
# Prompt, noise, every step and the picture; and what the machine is.
PROGRAM = """
import json, platform, sys
import numpy as np
from ditc import Pipeline
from pipeline.generate.schedulers.base import SeededNoise
from plugins.cpu import library, packaged

bundle, target, steps, output = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
latents = []
with Pipeline.load(bundle, target, threads=1) as pipeline:
    prompt = pipeline.examples[0]
    drawn = pipeline(
        prompt, seed=3, num_inference_steps=steps,
        callback_on_step_end=lambda drawing, i, timestep, values: latents.append(values["latents"].copy()) or None,
    )
    drawn.images[0].save(output + ".png")
noise = SeededNoise([3])(latents[0].shape)
np.savez(output + ".npz", latents=np.stack(latents), noise=noise)
problem = packaged.problem(library.FOLDER, library.version())
print(json.dumps({"machine": platform.machine(), "prompt": prompt, "kernels": problem}))
"""


@dataclass(frozen=True)
class Run:
    facts: Any
    latents: Any  # [steps, 1, C, H, W] float32
    noise: Any
    picture: Any  # [H, W, 3] uint8


@pytest.fixture(scope="module")
def board() -> arm.Arm:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip(f"the emulation is of Arm on x86-64 with Linux, this is {platform.machine()} on {sys.platform}")
    try:
        return arm.make(cache_folder("tests", "arm"))
    except arm.AbsentError as error:
        pytest.skip(f"no Python for 64-bit Arm: {error}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model. Its gates are left out: this is compared with them on x86."""
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("verified", "benched"):
            patch.setattr(compiler, stage, lambda *_: None)
        flags = ["--engine", "pixart_w4a6", "--set", "method=rtn", "--target", "cpu,onnx"]
        assert build([*flags, "-o", str(folder / "bundle")]) == 0
    return folder / "bundle"


def outcome(text: str, output: Path) -> Run:
    with np.load(output.with_suffix(".npz")) as stored, Image.open(output.with_suffix(".png")) as image:
        return Run(arm.answer(text), stored["latents"], stored["noise"], np.asarray(image))


def here(bundle: Path, target: str, output: Path) -> Run:
    command = [sys.executable, "-c", PROGRAM, str(bundle), target, str(STEPS), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=arm.ROOT, timeout=600)
    return outcome(done.stdout, output)


def test_from_a_prompt_to_a_picture_as_on_x86(board: arm.Arm, bundle: Path, tmp_path: Path) -> None:
    """Prompt and noise are equal to the bit. Codes flip where another library rounds otherwise, so that latents differ
    by no more than two ways of computing differ on x86 itself, less the 6 dB of the gates (pipeline/verify/gates.py). A
    flip falls into any step, and its power is about the same in each: the worst step of x86's is the limit of all."""
    x86, portable = here(bundle, "cpu", tmp_path / "x86"), here(bundle, "onnx", tmp_path / "portable")
    output = tmp_path / "arm"
    emulated = outcome(board.run("-c", PROGRAM, bundle, "cpu", STEPS, output, cwd=tmp_path), output)
    assert (x86.facts["machine"], emulated.facts["machine"]) == ("x86_64", "aarch64")
    assert emulated.facts["kernels"] is None, "the kernel library did not load in the emulator"
    assert emulated.facts["prompt"] == x86.facts["prompt"]
    np.testing.assert_array_equal(emulated.noise, x86.noise)
    own, other = (
        [psnr_db(run.latents[step], x86.latents[step], 2.0) for step in range(STEPS)] for run in (portable, emulated)
    )
    assert min(other) >= min(*own, ROUNDED_DB) - FACTOR_DB, f"{other} dB from x86, whose portable model is {own}"
    np.testing.assert_array_equal(emulated.picture, to_pixels(emulated.latents[-1])[0])
    assert np.ptp(emulated.picture) > 100  # it is no flat one
