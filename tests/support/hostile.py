"""Whole folders of every kind that the verbs read, tiny and true, for tests that then damage a copy of them.

model/       a DiT that draws digits of 8 x 8 pixels        sharded/   the same in shards
words/       a PixArt with a vocabulary                     alone/     the configuration of model/ by itself
recipe.toml
checkpoint/  what `calibrate` wrote of model/               e/         the bundle that `build` wrote of it
e2.partial/  a build that was stopped before its gates      w/         a bundle of words/, with engines for GPUs
pipe/        a pipeline of a DiT with latents               l/         a bundle of its transformer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.zoo import scenes
from export.documents import sha256
from pipeline import compiler
from pipeline.build import main as build
from pipeline.calibrate.__main__ import main as calibrate
from pipeline.files import MANIFEST_FILE, tree
from tests.support import hostile_gpu, pipelines, tiny

DIGITS = {"kind": "classes", "names": [str(i) for i in range(10)], "null_class": 10}
SAMPLING = {"sampler": "flow_euler", "timestep_scale": 1000, "n_steps": 2, "guidance_scale": 2.0, "output": "pixels"}
SLOTS = [{"name": name, "words": list(words)} for name, words in scenes.SLOTS.items()]
VOCABULARY = {"kind": "vocabulary", "embedding": "tokens.safetensors", "tensor": "t", "null_token": 0, "slots": SLOTS}
RECIPE = """name = "fuzzed"
model = "{model}"
description = "of a test"

[formats]
weight = "E2M1"
activation = "E2M3"
weight_of = {{ "ff.in" = "E3M0" }}

[weights]
granularity = "exact_group"
group_size = 32

[calibrate]
method = "rtn"
size = 2
timesteps = 1
options = {{}}

[sampling]
n_steps = 1
guidance_scale = 1.0

[budgets]
quant_sqnr_db = -50.0
final_psnr_fp_db = -50.0

[cpu]
path = "stock"
"""


def make_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write every folder of the module's table below `folder`. The build's gates and measurement are left out."""
    make_models(folder)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=folder / "model"))
    assert calibrate(["--engine", str(recipe), "-o", str(folder / "checkpoint")]) == 0
    flags = ["--engine", str(recipe), "--target", "cpu", "-o"]
    monkeypatch.setattr(compiler, "benched", lambda *_: None)
    monkeypatch.setattr(compiler, "verified", stop)
    assert build([*flags, str(folder / "e2")]) == 130
    shutil.copytree(folder / "e2.partial", folder / "e.partial")
    monkeypatch.setattr(compiler, "verified", lambda *_: None)
    assert build([*flags, str(folder / "e"), "--resume"]) == 0
    words = ["-m", str(folder / "words"), "--target", "cpu,cuda", "-o", str(folder / "w")]
    assert build(["--engine", str(recipe), *words]) == 0
    hostile_gpu.add_engines(folder / "w")
    reseal(folder / "w")
    pipelines.write("dit", folder / "pipe")
    assert build([*flags, str(folder / "l"), "-m", str(folder / "pipe" / "transformer")]) == 0
    return folder


def stop(*_: Any) -> None:
    """Stands for a key press."""
    raise KeyboardInterrupt


def make_models(folder: Path) -> None:
    """model/, sharded/, alone/ and words/."""
    config = tiny.DIT | {"in_channels": 1, "out_channels": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "model", ("DiTTransformer2DModel", config))
        patch.setitem(tiny.MODELS, "words", ("PixArtTransformer2DModel", tiny.PIXART | {"in_channels": 3}))
        tiny.folder("model", folder)
        tiny.folder("words", folder)
        tiny.folder("model", folder / "s", shard_size="100KB").rename(folder / "sharded")
    (folder / "s").rmdir()
    (folder / "alone").mkdir()
    shutil.copyfile(folder / "model/config.json", folder / "alone/config.json")
    for name in ("model", "sharded"):
        (folder / name / "generation.json").write_text(json.dumps(SAMPLING | {"conditioning": DIGITS}))
    (folder / "words/generation.json").write_text(json.dumps(SAMPLING | {"conditioning": VOCABULARY}))
    rows = sum(len(slot["words"]) for slot in SLOTS) + 1
    save_file({"t": np.zeros((rows, 32), np.float32)}, folder / "words/tokens.safetensors")


def copies(source: Path, destination: Path, args: Sequence[str]) -> Path:
    """Copies of the folders that a command line, or the recipe, names, with the recipe pointing to the copies."""
    destination.mkdir()
    named = {arg.partition("/")[0] for arg in args}
    entries = {"recipe.toml", "model", *named} | ({"e2.partial"} if "e2" in args else set())
    for name in sorted(entries & {path.name for path in source.iterdir()}):
        kind: Any = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        kind(source / name, destination / name)
    recipe = destination / "recipe.toml"
    if "e2" not in args:  # resumed, a build must have the model that it began with
        recipe.write_text(recipe.read_text().replace(str(source), str(destination)))
    return destination


def sentence(log: str) -> str:
    """The one line by which a verb says why it failed. Raises AssertionError for a stack trace."""
    assert "Traceback" not in log, log
    lines = [line for line in log.splitlines() if " error: " in line]
    assert len(lines) == 1 and log.rstrip().endswith(lines[0]), log
    return lines[0]


def reseal(bundle: Path) -> None:
    """Make the manifest's table of files agree with what lies in the folder, where the manifest still is one."""
    path = bundle / MANIFEST_FILE
    try:
        document = json.loads(path.read_bytes())
        files = {name: bundle / name for name in tree(bundle) if name != MANIFEST_FILE}
        rows = {name: {"size": file.stat().st_size, "sha256": sha256(file)} for name, file in files.items()}
        document["files"] = rows
    except (ValueError, TypeError, OSError, RecursionError):
        return
    path.write_text(json.dumps(document))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Apply `change` to the document in a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
