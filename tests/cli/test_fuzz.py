"""Any damage to any document, in any verb that reads it, ends in an exit code of the contract and one sentence.

Documents are damaged in their structure, their values and their bytes (tests/support/mutations.py), and a bundle's
manifest is made to agree, so that the readers behind the hashes are reached. `--fuzz-cases N` tries more than one
damage to each. What takes long and reads nothing from outside (tracing, gates, measurement) is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import pytest

from export import to_onnx
from pipeline import __main__ as cli
from pipeline import compiler
from pipeline.bench import baselines
from pipeline.bench import measure as bench
from pipeline.verify import proof as verify
from pipeline.verify.report import Gate, Report
from tests.support import hostile, hostile_gpu
from tests.support.bundles import NOTHING_MEASURED
from tests.support.mutations import damaged_bytes, damaged_json

pytestmark = [pytest.mark.slow, pytest.mark.torch]

CODES = {0, 2, 3, 4, 5}
# Beyond this a document has made the program do work for it: a wrong number made something vast, or something waits.
SLOWEST_S = 30
BUILD = ("build", "--engine", "recipe.toml", "--target", "cpu", "-o", "o")
INSPECT = ("inspect", "--engine", "recipe.toml")
CALIBRATE = ("calibrate", "--engine", "recipe.toml", "-o", "o")
DRY, RESUME = (*BUILD, "--dry-run"), (*BUILD[:-1], "e2", "--resume")
DRAW = ("generate", "e", "--prompt", "3", "-o", "out.png", "--n-steps", "1")
OF_BUNDLE = (("inspect", "e"), DRAW, ("verify", "e"), ("bench", "e", "-o", "bench.json"))
OF_MODEL = (DRY, CALIBRATE, INSPECT)
OF_CHECKPOINT = (
    ("export", "checkpoint", "-o", "o"),
    (*BUILD, "--checkpoint", "checkpoint"),
    (*CALIBRATE[:-1], "checkpoint", "--resume"),
)
WORDS = (*CALIBRATE, "-m", "words")
CAPTION = ("--prompt", "a red circle on white", "-o", "out.png", "--n-steps", "1")
OF_WORDS = {target: ("generate", "w", *CAPTION, "--target", target) for target in ("cpu", "cuda", "rtx", "trt", "onnx")}
LATENT = ("generate", "l", "--prompt", "3", "-o", "out.png", "--n-steps", "1", "--pipeline", "pipe")
OBSERVED = (*CALIBRATE, "-m", "pipe", "--set", "method=ptq4dm")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Document -> the command lines that read it.
DOCUMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "e/manifest.json": OF_BUNDLE,
    "e/config.json": OF_BUNDLE[1:],
    "e/generation.json": OF_BUNDLE[1:],
    "e/recipe.toml": OF_BUNDLE[:2],
    "e/model.onnx": (("verify", "e"),),
    "e/cpu/model.onnx": (DRAW,),
    "e/cpu/lowering.json": (("verify", "e"),),
    "e/cpu/metadata.json": (DRAW, ("verify", "e")),
    "model/config.json": OF_MODEL,
    "model/generation.json": OF_MODEL[:2],
    f"model/{WEIGHTS}": (DRY,),
    "alone/config.json": ((*DRY, "-m", f"model/{WEIGHTS}", "--config", "alone/config.json"),),
    f"sharded/{WEIGHTS}.index.json": ((*DRY, "-m", "sharded"),),
    "words/generation.json": ((*WORDS, "--set", "method=ptq4dm"),),
    "words/tokens.safetensors": ((*WORDS, "--set", "method=ptq4dm"),),
    "recipe.toml": (DRY, INSPECT),
    "checkpoint/quantized.json": OF_CHECKPOINT,
    "checkpoint/quantized.safetensors": OF_CHECKPOINT[:2],
    "checkpoint/calibration.json": OF_CHECKPOINT,
    "checkpoint/kept/config.json": OF_CHECKPOINT[:1],
    "checkpoint/kept/generation.json": OF_CHECKPOINT[:1],
    f"checkpoint/kept/{WEIGHTS}": OF_CHECKPOINT[:1],
    "e/model.onnx.data": (("verify", "e"), (*DRAW, "--target", "onnx")),
    "e/cpu/model.onnx.data": (DRAW,),
    "w/manifest.json": tuple(OF_WORDS.values()),
    "w/tokens.safetensors": (OF_WORDS["cpu"],),
    "w/model.onnx": (OF_WORDS["onnx"],),
    "w/cpu/condition.onnx": (OF_WORDS["cpu"],),
    "w/cpu/model.onnx.data": (OF_WORDS["cpu"],),
    "w/cuda/metadata.json": (OF_WORDS["cuda"],),
    "w/cuda/model.onnx": (OF_WORDS["cuda"],),
    "w/cuda/condition.onnx": (OF_WORDS["cuda"],),
    "w/cuda/model.onnx.data": (OF_WORDS["cuda"],),
    "w/rtx/metadata.json": (OF_WORDS["rtx"],),
    "w/rtx/model.engine": (OF_WORDS["rtx"],),
    "w/trt/metadata.json": (OF_WORDS["trt"],),
    "pipe/model_index.json": (LATENT, OBSERVED),
    "pipe/scheduler/scheduler_config.json": (LATENT, OBSERVED),
    "pipe/vae/config.json": (LATENT,),
    "e2.partial/key.json": (RESUME,),
    "e2.partial/stages/calibrate.json": (RESUME,),
    "e2.partial/stages/cpu.json": (RESUME,),
    "e2.partial/cpu.result.json": (RESUME,),
    "e2.partial/cpu.lowering.json": (RESUME,),
    "e2.partial/calibrate/quantized.json": (RESUME,),
}
CASES = [(file, args) for file, calls in DOCUMENTS.items() for args in calls]


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: Any
    log: str
    seconds: float


@pytest.fixture
def quick(victims: Path) -> Iterator[Path]:
    """The victims, with the slow parts left out that read no document of ours."""

    def exported(model: Any, layers: Any, path: Path, *size: int) -> str:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(victims / "e" / name, path.with_name(name))
        return "made before"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "export_portable", exported)
        patch.setattr(compiler, "verified", lambda *_: None)
        patch.setattr(compiler, "benched", lambda *_: None)
        patch.setattr(bench, "bench", lambda *_: NOTHING_MEASURED)
        patch.setattr(baselines, "baselines", lambda *_: [])
        hostile_gpu.pretend_gpu(patch)
        patch.setattr(verify, "verify", lambda *_: Report(gates=[Gate("none", 0, 1, "", "left out", True)]))
        yield victims


def run(folder: Path, args: tuple[str, ...]) -> End:
    """Run a command line in `folder`, in this process."""
    log, here, begun = io.StringIO(), Path.cwd(), time.monotonic()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(log):
            code: Any = cli.main(args)
    except SystemExit as error:
        code = error.code
    finally:
        os.chdir(here)
    return End(code, log.getvalue(), time.monotonic() - begun)


def damage(path: Path, rng: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(damaged_json(data, rng) if path.suffix == ".json" else damaged_bytes(data, rng))


def check(victims: Path, file: str, args: tuple[str, ...], rng: Random) -> None:
    """Damage one document of a copy, run the command, judge its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = hostile.copies(victims, Path(name) / "w", (*args, file.split("/")[0]))
        damage(folder / file, rng)
        for bundle in ("e", "w", "l"):
            hostile.reseal(folder / bundle)
        end = run(folder, args)
        outside = sorted(path.name for path in Path(name).iterdir())
    assert end.code in CODES and "Traceback" not in end.log, f"{file}, {args}: exit {end.code}\n{end.log[-3000:]}"
    if end.code:
        assert hostile.sentence(end.log), file
    assert end.seconds < SLOWEST_S, f"{file}, {args}: {end.seconds:.1f} s\n{end.log[-3000:]}"
    assert outside == ["w"], f"{file}, {args}: {outside} was written outside of the folder"


def test_undamaged_documents_are_taken_by_every_verb(quick: Path, tmp_path: Path) -> None:
    """Else the other test would show nothing. Two engines are read up to where a vendor's runtime is asked."""
    for index, args in enumerate(dict.fromkeys(args for _, args in CASES)):
        folder = hostile.copies(quick, tmp_path / str(index), args)
        end = run(folder, args)
        last = hostile_gpu.NO_GPU if args in (OF_WORDS["rtx"], OF_WORDS["trt"]) else ""
        assert end.code == (3 if last else 0) and last in end.log, f"{args}: {end.log[-3000:]}"


def test_damaged_documents_end_in_a_sentence(quick: Path, request: pytest.FixtureRequest) -> None:
    """Every document in every verb that reads it, each time damaged in another way; if more is asked for, again."""
    for seed, case in zip(range(request.config.getoption("--fuzz-cases") or len(CASES)), cycle(CASES), strict=False):
        check(quick, *case, Random(seed))
