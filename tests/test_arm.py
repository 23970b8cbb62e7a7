"""The run time on 64-bit Arm, in an emulator: from a prompt to a PNG with the bundled model, and with whole pipelines,
the bundled one and one of random weights, as on x86.

The kernel library is cross-compiled into the package, as a wheel for Arm has it. What is emulated says nothing of
speed, and nothing of a board's memory.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from export.cache_folder import cache_folder
from export.onnx_files import read_graph
from pipeline import load
from pipeline.backends import lowering_file
from pipeline.backends.base import CONDITION, MODEL, TIMESTEP, Arrays
from pipeline.backends.cpu.engine import open_session
from pipeline.distance import psnr_db, sqnr_db
from pipeline.generate.draw import to_pixels
from pipeline.generate.example_prompts import drawn_prompts, own_prompts
from pipeline.verify.gates import FACTOR_DB, ROUNDED_DB
from pipeline.verify.parts import part_of
from tests.support import arm, pipelines
from tests.support.quick_build import build_unproven

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
    """Of the bundled model; what is measured here is compared with its gates on x86."""
    return build_unproven(tmp_path_factory.mktemp("arm") / "bundle", "--target", "cpu,onnx")


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


# --- a whole pipeline ------------------------------------------------------------------------------------------------

# Pictures, of those drawn on x86.
EMULATED = 2
# The prompts' ids, states and latents, what the decoder is given and gives, and one call of what has codes.
WHOLE_PROGRAM = """
import json, platform, sys
from dataclasses import replace
from functools import partial
import numpy as np
from pipeline.bundle.pipeline_bundle import load_pipeline
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.schedulers.base import SeededNoise
from pipeline.text_to_image import Pipeline
from plugins.cpu import library, packaged

bundle, target, steps, output, *prompts = sys.argv[1:]
whole = load_pipeline(bundle, threads=1)
engines = {name: partial(part.engine, target) for name, part in whole.components.items()}
with whole.source(target) as source:
    model = LatentModel(replace(source, engines=engines))
run, calls, latents = model.components.run, {name: [] for name in engines}, {}

def recorded(name, inputs):
    calls[name].append((inputs, run(name, inputs)))
    return calls[name][-1][1]

def seen(drawing, step, timestep, values):
    for picture, row in zip(drawing.pictures, values["latents"], strict=True):
        latents.setdefault(picture.prompt, []).append(row.copy())

model.components.run = recorded
with Pipeline(model) as pipeline:
    drawn = pipeline(prompts, seed=3, num_inference_steps=int(steps), callback_on_step_end=seen)
drawn.images[0].save(output + ".png")

def of(name, key, place):
    return np.concatenate([call[place][key] for call in calls[name]])

arrays = {
    "ids": of("text_encoder", "input_ids", 0),
    "mask": of("text_encoder", "attention_mask", 0),
    "states": of("text_encoder", "last_hidden_state", 1),
    "noise": SeededNoise(drawn.seeds)((len(prompts), *model.latent_shape)),
    "latents": np.stack([latents[prompt] for prompt in prompts]),
    "decoder_inputs": of("vae_decoder", "latents", 0),
    "decoded": of("vae_decoder", "sample", 1),
}
for name in ("text_encoder", "transformer"):
    arrays |= {f"{name}/{key}": array for key, array in calls[name][0][0].items()}
np.savez(output + ".npz", **arrays)
problem = packaged.problem(library.FOLDER, library.version())
print(json.dumps({"machine": platform.machine(), "kernels": problem}))
"""
# What graphs compute of the arrays beside them.
CODES_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from pipeline.backends.cpu.engine import open_session
for graph in map(Path, sys.argv[1:]):
    session = open_session(graph, 1, with_library=True)
    names = [output.name for output in session.get_outputs()]
    with np.load(graph.with_suffix(".npz")) as fed:
        computed = session.run(names, dict(fed))
    np.savez(graph.with_suffix(".computed"), **dict(zip(names, computed, strict=True)))
"""


@dataclass(frozen=True)
class WholeRun:
    facts: Any
    arrays: Arrays
    picture: Any  # [H, W, 3] uint8, the first one


@dataclass(frozen=True)
class Whole:
    """A bundle, and prompts: as many as show on x86 what a code that flips does."""

    bundle: Path
    prompts: Sequence[str]


# Of random weights one prompt in three has a code that flips, of the bundled pipeline every one.
PICTURES = {"random": 32, "bundled": 8}


@pytest.fixture(scope="module", params=PICTURES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A pipeline whose pictures have 64 pixels."""
    if request.param == "bundled":
        bundle: Path = request.getfixturevalue("scenes_bundle")
    else:
        folder = tmp_path_factory.mktemp("whole")
        flags = ["-m", str(pipelines.write_wide(folder / "pipeline")), "--target", "cpu"]
        bundle = build_unproven(folder / "bundle", *flags)
    return Whole(bundle, drawn_prompts(own_prompts(bundle), PICTURES[request.param], 0))


def whole_outcome(text: str, output: Path) -> WholeRun:
    with np.load(f"{output}.npz") as stored, Image.open(f"{output}.png") as image:
        return WholeRun(arm.answer(text), dict(stored), np.asarray(image))


@pytest.fixture(scope="module")
def on_x86(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[str, WholeRun]:
    """By target, of all parts."""
    folder, runs = tmp_path_factory.mktemp("x86"), {}
    for target in ("cpu", "onnx"):
        words = ["-c", WHOLE_PROGRAM, whole.bundle, target, STEPS, folder / target, *whole.prompts]
        done = arm.called(sys.executable, *words, cwd=arm.ROOT)
        runs[target] = whole_outcome(done, folder / target)
    return runs


def limit_db(runs: Mapping[str, WholeRun], name: str) -> float:
    """What two ways of computing differ by on x86 at most, less the 6 dB of the gates."""
    return min(*decibels(*(runs[target].arrays[name] for target in ("cpu", "onnx"))), ROUNDED_DB) - FACTOR_DB


def decibels(reference: Any, value: Any) -> list[float]:
    """Signal to noise of each sample; of latents [B, steps, C, h, w] the worst step's."""
    steps = reference.shape[1] if reference.ndim == 5 else 1
    pairs = zip(*(array.reshape(len(array), steps, -1) for array in (reference, value)), strict=True)
    return [min(map(sqnr_db, one, other)) for one, other in pairs]


def test_a_whole_pipeline_draws_as_on_x86(
    board: arm.Arm, whole: Whole, on_x86: dict[str, WholeRun], tmp_path: Path
) -> None:
    """Ids and noise are equal to the bit. States and latents differ by what a flipped code does, as above; nothing in a
    decoder flips, and its pictures differ by roundings alone."""
    words = ["-c", WHOLE_PROGRAM, whole.bundle, "cpu", STEPS, tmp_path / "arm", *whole.prompts[:EMULATED]]
    emulated = whole_outcome(board.run(*words, cwd=tmp_path), tmp_path / "arm")
    assert emulated.facts == {"machine": "aarch64", "kernels": None}
    x86, own = on_x86["cpu"].arrays, emulated.arrays
    places = [np.flatnonzero((x86["ids"] == ids).all(axis=1)) for ids in own["ids"]]
    assert len(places) == EMULATED + 1 and all(map(len, places)), "ids are no prompt's on x86"
    rows = [place[0] for place in places]
    np.testing.assert_array_equal(own["mask"], x86["mask"][rows])
    np.testing.assert_array_equal(own["noise"], x86["noise"][:EMULATED])
    np.testing.assert_array_equal(on_x86["onnx"].arrays["ids"], x86["ids"])
    states = decibels(x86["states"][rows], own["states"])
    assert min(states) >= limit_db(on_x86, "states"), states
    latents = decibels(x86["latents"][:EMULATED], own["latents"])
    assert min(latents) >= limit_db(on_x86, "latents"), latents
    factor = json.loads((whole.bundle / "vae_decoder/config.json").read_text())["scaling_factor"]
    np.testing.assert_array_equal(own["decoder_inputs"], own["latents"][:, -1] / np.float32(factor))
    decoder = load(whole.bundle / "vae_decoder", threads=1).engine("cpu")
    pictures = decoder.run({"latents": own["decoder_inputs"]})["sample"]
    decoder.close()
    assert min(decibels(pictures, own["decoded"])) >= ROUNDED_DB - FACTOR_DB
    np.testing.assert_array_equal(emulated.picture, to_pixels(own["decoded"])[0])
    assert emulated.picture.shape == (64, 64, 3) and np.ptp(emulated.picture) > 20  # it is no flat one


def test_every_quantizer_gives_the_codes_of_x86(
    board: arm.Arm, whole: Whole, on_x86: dict[str, WholeRun], tmp_path: Path
) -> None:
    """Of what it reads on x86, in a call of the text encoder and of the denoiser: equal to the bit."""
    graphs = []
    for name in ("text_encoder", "transformer"):
        call = {key.partition("/")[2]: array for key, array in on_x86["cpu"].arrays.items() if key.startswith(name)}
        graphs += quantizers(whole.bundle / name / "cpu", call, tmp_path / name)
    arm.called(sys.executable, "-c", CODES_PROGRAM, *graphs, cwd=arm.ROOT)
    expected = list(map(computed, graphs))
    board.run("-c", CODES_PROGRAM, *graphs, cwd=tmp_path)
    emulated = list(map(computed, graphs))
    assert sum(map(len, expected)) > 20
    for of_x86, of_arm in zip(expected, emulated, strict=True):
        for name, codes in of_x86.items():
            assert codes.dtype.kind in "iu" and np.ptp(codes) > 0
            np.testing.assert_array_equal(of_arm[name], codes, name)


def computed(graph: Path) -> Arrays:
    with np.load(graph.with_suffix(".computed.npz")) as stored:
        return dict(stored)


def quantizers(engine: Path, call: Arrays, folder: Path) -> list[Path]:
    """Graphs of the nodes alone that give the codes of an engine's linears, with what they read in a call beside them.
    A node that reads another's codes reads x86's."""
    shutil.copytree(engine, folder)
    codes = {name for row in lowering_file.read(folder / "lowering.json").probes for name in row.codes}
    known, graphs = dict(call), list[Path]()
    for name in (CONDITION, TIMESTEP, MODEL):
        if not (folder / name).is_file():
            continue
        model = read_graph(folder / name)
        nodes = [node for node in model.graph.node if codes & set(node.output)]
        made = {output for node in model.graph.node for output in node.output if output}
        read = {key for node in nodes for key in node.input} & made
        outputs = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=key) for key in read - outputs)
        (folder / f"seen_{name}").write_bytes(model.SerializeToString())
        session = open_session(folder / f"seen_{name}", 1, with_library=True)
        asked = sorted(read | outputs)
        fed = {value.name: known[value.name] for value in session.get_inputs()}
        known |= dict(zip(asked, session.run(asked, fed), strict=True))
        if nodes:
            graphs.append(folder / f"codes_{name}")
            fed = {key: known[key] for node in nodes for key in node.input if key in known}
            write_nodes(model, nodes, codes, fed, graphs[-1])
    return graphs


def write_nodes(model: Any, nodes: Sequence[Any], codes: set[str], fed: Arrays, path: Path) -> None:
    """A graph of `nodes` alone, whose codes have other names than those that are fed, and the arrays beside it."""
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
        copies[-1].output[:] = [name and f"{name}/again" for name in node.output]
    asked = sorted(f"{name}/again" for node in nodes for name in node.output if name in codes)
    path.write_bytes(part_of(model, copies, fed, asked).SerializeToString())
    np.savez(path.with_suffix(".npz"), **fed)
