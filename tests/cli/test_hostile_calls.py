"""Whatever a person or a file can cause ends with exit code 2, 3 or 5 and one sentence, never with a stack trace.

Each row of CALLS changes a copy of true folders (tests/support/hostile.py) and names a command line, its exit code
and words of its sentence. tests/cli/test_fuzz.py looks for rows that are missing here.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from pipeline import __main__ as cli
from tests.support import hostile
from tests.support.hostile import edit, reseal

pytestmark = [pytest.mark.torch, pytest.mark.slow]

BUILD = ("build", "--engine", "recipe.toml", "--target", "cpu", "-o", "o")
DRY = (*BUILD, "--dry-run")
DRAW = ("generate", "e", "--prompt", "3", "-o", "out.png", "--n-steps", "1")
CALIBRATE = ("calibrate", "--engine", "recipe.toml", "-o", "o")
EXPORT = ("export", "checkpoint", "-o", "o")
DEEP = "[" * 100_000 + "]" * 100_000
WEIGHTS = "diffusion_pytorch_model.safetensors"

Damage = Callable[[Path], object]
Call = tuple[Damage, tuple[str, ...], int, str]


def setting(file: str, *keys: Any, value: Any) -> Damage:
    """Set a value in a JSON file; a bundle's manifest is made to agree, so that the file is read at all."""

    def change(folder: Path) -> None:
        def put(document: Any) -> None:
            for key in keys[:-1]:
                document = document[key]
            document[keys[-1]] = value

        edit(folder / file, put)
        if file.startswith("e/") and file != "e/manifest.json":
            reseal(folder / "e")

    return change


def writing(file: str, content: str | bytes) -> Damage:
    """Replace a file, with the manifest made to agree."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        if file.startswith("e/") and file != "e/manifest.json":
            reseal(folder / "e")

    return change


def pipe(file: str) -> Damage:
    """A pipe that nobody writes to in the place of a file: opening it would wait for ever."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def link(file: str, target: str) -> Damage:
    """A link in the place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return change


def nothing(folder: Path) -> None:
    """The folders are as they should be; the command line is not."""


def file_in_the_way(folder: Path) -> None:
    (folder / "o").write_text("a file")


def external_data(location: str) -> Damage:
    """The portable model's data is said to be in another file."""

    def change(folder: Path) -> None:
        path = folder / "e/model.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        onnx.save(model, path)
        reseal(folder / "e")

    return change


def payload(folder: Path) -> None:
    """A model whose description names a file of the host, as if it were the model's own."""
    shutil.copyfile(folder / "words/tokens.safetensors", folder / "payload.safetensors")
    setting("words/generation.json", "conditioning", "embedding", value="../payload.safetensors")(folder)


def long_header(folder: Path) -> None:
    """A weights file whose header is said to have 2^60 bytes."""
    (folder / "model" / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + bytes(400_000))


def no_null_token(folder: Path) -> None:
    setting("words/generation.json", "conditioning", "null_token", value=10**6)(folder)


def integers(folder: Path) -> None:
    tensors = load_file(folder / "words/tokens.safetensors")
    save_file({"t": tensors["t"].astype(np.int32)}, folder / "words/tokens.safetensors")


def socket_file(folder: Path) -> None:
    (folder / "model/config.json").unlink()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder / "model")  # the path of a socket has few characters
    server.bind("config.json")
    os.chdir(here)
    server.close()


WORDS = ("calibrate", "--engine", "recipe.toml", "-m", "words", "-o", "o", "--set", "method=ptq4dm")
SHARDS = (*DRY, "-m", "sharded")
INDEX = f"sharded/{WEIGHTS}.index.json"
FIRST_SHARD = "diffusion_pytorch_model-00001-of-00005.safetensors"
CALLS: dict[str, Call] = {
    # names that lead out of their folder
    "embedding outside the model": (payload, WORDS, 2, "leaves the folder"),
    "embedding is an absolute path": (
        setting("words/generation.json", "conditioning", "embedding", value="/etc/passwd"),
        WORDS,
        2,
        "leaves the folder",
    ),
    "embedding is another file of a bundle": (
        setting("words/generation.json", "conditioning", "embedding", value="manifest.json"),
        WORDS,
        2,
        "is no .safetensors",
    ),
    "embedding is a link out": (
        link("words/tokens.safetensors", "/etc/passwd"),
        WORDS,
        2,
        "leaves the folder by a link",
    ),
    "shard outside": (
        setting(INDEX, "weight_map", "proj_out_1.bias", value="../model/" + WEIGHTS),
        SHARDS,
        2,
        "leaves the folder",
    ),
    "shard with a drive": (
        setting(INDEX, "weight_map", "proj_out_1.bias", value="C:\\w.safetensors"),
        SHARDS,
        2,
        "leaves the folder",
    ),
    "shard is a link out": (link(f"sharded/{FIRST_SHARD}", "/etc/passwd"), SHARDS, 2, "leaves the folder by a link"),
    "shard is a pipe": (pipe(f"sharded/{FIRST_SHARD}"), SHARDS, 2, "this shard is missing"),
    "data of the portable model outside": (
        external_data("../model/" + WEIGHTS),
        ("verify", "e"),
        2,
        "leaves the folder",
    ),
    "data of the portable model absolute": (external_data("/etc/passwd"), ("verify", "e"), 2, "leaves the folder"),
    "lowered graph outside": (
        setting("e/manifest.json", "files", value={"../x": {"size": 1, "sha256": "0" * 64}}),
        ("inspect", "e"),
        2,
        "leaves the folder",
    ),
    "target outside": (
        lambda folder: edit(folder / "e/manifest.json", lambda d: d["targets"].update({"../x": d["targets"]["cpu"]})),
        ("inspect", "e"),
        2,
        "leaves the folder",
    ),
    "stage's file outside": (
        setting("e2.partial/stages/cpu.json", "files", value={"../x": "0" * 64}),
        (*BUILD[:-1], "e2", "--resume"),
        2,
        "leaves the folder",
    ),
    "one file twice where case does not matter": (
        lambda folder: ((folder / "e/Config.JSON").write_text("{}"), reseal(folder / "e")),
        ("inspect", "e"),
        2,
        "are one file on some systems",
    ),
    # what is no file
    "manifest is a pipe": (pipe("e/manifest.json"), ("inspect", "e"), 2, "has no manifest.json"),
    "file of a bundle is a pipe": (pipe("e/config.json"), ("inspect", "e"), 2, "is a pipe, not a file"),
    "config is a pipe": (pipe("model/config.json"), DRY, 2, "has no config.json"),
    "config is a socket": (socket_file, DRY, 2, "has no config.json"),
    "weights are a device": (
        link(f"model/{WEIGHTS}", "/dev/zero"),
        DRY,
        2,
        "has no diffusion_pytorch_model.safetensors",
    ),
    "checkpoint is a pipe": (pipe("checkpoint/quantized.safetensors"), EXPORT, 2, "is a pipe, not a file"),
    "recipe is a device": (nothing, ("build", "--engine", "/dev/zero.toml", "-o", "o"), 2, "does not exist"),
    # form of documents
    "deep manifest": (writing("e/manifest.json", DEEP), ("inspect", "e"), 2, "is nested more than"),
    "deep config": (writing("model/config.json", '{"a":' * 3000 + "1" + "}" * 3000), DRY, 2, "is nested more than"),
    "deep recipe": (writing("recipe.toml", "a = " + DEEP), DRY, 2, "recipe.toml is nested more than"),
    "recipe in Latin-1": (writing("recipe.toml", 'name = "caf\xe9"'.encode("latin-1")), DRY, 2, "is not in UTF-8"),
    "recipe in UTF-16": (writing("recipe.toml", 'name = "a"'.encode("utf-16")), DRY, 2, "is not in UTF-8"),
    "recipe that is large": (writing("recipe.toml", "# comment\n" * 50_000), DRY, 2, "has more than 262,144 bytes"),
    "recipe with a number of 5000 digits": (writing("recipe.toml", f"name = {'9' * 5000}"), DRY, 2, "not valid TOML"),
    "key twice": (
        writing("model/config.json", '{"sample_size": 8, "sample_size": 9}'),
        DRY,
        2,
        "'sample_size' stands there twice",
    ),
    "NaN": (writing("e/generation.json", '{"sampler": NaN}'), DRAW, 2, "NaN is not a number"),
    "number beyond floats": (writing("e/generation.json", '{"n_steps": 1e999}'), DRAW, 2, "too large"),
    "integer of 5000 digits": (
        writing("model/config.json", '{"a": ' + "9" * 5000 + "}"),
        DRY,
        2,
        "does not fit into 64 bits",
    ),
    "half a surrogate": (setting("e/manifest.json", "engine", value="\ud800"), ("inspect", "e"), 2, "cannot be shown"),
    "colours for the terminal": (
        setting("e/manifest.json", "engine", value="\x1b[31mred"),
        ("inspect", "e"),
        2,
        "cannot be shown",
    ),
    "not JSON": (writing("checkpoint/quantized.json", "{"), EXPORT, 2, "is not valid JSON"),
    # what documents say
    "layers of the wrong type": (
        setting("e/manifest.json", "layers", 0, "shape", value="8 x 8"),
        ("inspect", "e"),
        2,
        "layers.0.shape is '8 x 8'",
    ),
    "choices of the wrong type": (
        setting("e/manifest.json", "targets", "cpu", "choices", value=[]),
        ("inspect", "e"),
        2,
        "targets.cpu.choices is []",
    ),
    "no version of onnxruntime": (
        lambda folder: edit(folder / "e/manifest.json", lambda d: d["tools"].pop("onnxruntime")),
        DRAW,
        2,
        "names no version of onnxruntime",
    ),
    "unknown target": (
        lambda folder: edit(folder / "e/manifest.json", lambda d: d["targets"].update(npu=d["targets"]["cpu"])),
        DRAW,
        2,
        "target 'npu' is unknown",
    ),
    "metadata of the wrong type": (
        setting("e/cpu/metadata.json", "requires", value="all"),
        DRAW,
        2,
        "requires is 'all'",
    ),
    "sample_size 0 in a bundle": (setting("e/config.json", "sample_size", value=0), DRAW, 2, "sample_size is 0"),
    "no sample_size in a bundle": (
        lambda folder: (edit(folder / "e/config.json", lambda d: d.pop("sample_size")), reseal(folder / "e")),
        DRAW,
        2,
        "'sample_size' is missing",
    ),
    "unknown sampler": (setting("e/generation.json", "sampler", value="magic"), DRAW, 2, "sampler 'magic' is unknown"),
    "endless sampling": (setting("e/generation.json", "n_steps", value=10**9), DRAW, 2, "n_steps is 1000000000"),
    "names that are no list": (setting("e/generation.json", "conditioning", "names", value=3), DRAW, 2, "names is 3"),
    "kind that is no text": (setting("e/generation.json", "conditioning", "kind", value=[]), DRAW, 2, "kind []"),
    "null token outside the table": (no_null_token, WORDS, 2, "null_token is 1000000"),
    "embedding of integers": (integers, WORDS, 2, "int32 tensor of shape"),
    "slots of another grammar": (
        setting("words/generation.json", "conditioning", "slots", value=[]),
        WORDS,
        2,
        "a scene has colour, shape",
    ),
    "ten million layers": (setting("model/config.json", "num_layers", value=10**7), DRY, 2, "num_layers is 10000000"),
    "more layers than the file": (
        setting("model/config.json", "num_layers", value=500),
        DRY,
        2,
        "asks for 8,192,000 parameters",
    ),
    "a wide model": (
        setting("model/config.json", "num_attention_heads", value=1000),
        DRY,
        2,
        "parameters or more, its weights have",
    ),
    "a vast picture": (setting("model/config.json", "sample_size", value=4096), DRY, 2, "a table of positions beyond"),
    "no heads": (setting("model/config.json", "num_attention_heads", value=0), DRY, 2, "num_attention_heads is 0"),
    "heads that are text": (
        setting("model/config.json", "num_attention_heads", value="two"),
        DRY,
        2,
        "num_attention_heads is 'two'",
    ),
    "no patch": (setting("model/config.json", "patch_size", value=None), DRY, 2, "patch_size is None"),
    "class that is a module": (setting("model/config.json", "_class_name", value="logging"), DRY, 2, "'logging'"),
    "config that is a list": (writing("model/config.json", "[]"), DRY, 2, "the document is []"),
    "header of an exabyte": (long_header, DRY, 2, "not a whole safetensors file"),
    "index without a map": (writing(INDEX, "{}"), SHARDS, 2, "'weight_map' is missing"),
    "layers with an unknown key": (
        setting("checkpoint/quantized.json", "layers", 0, "colour", value=1),
        EXPORT,
        2,
        "layers.0.colour",
    ),
    "layer twice": (
        lambda folder: edit(folder / "checkpoint/quantized.json", lambda d: d["layers"].append(d["layers"][0])),
        EXPORT,
        2,
        "stands there twice",
    ),
    "layer of another model": (
        setting("checkpoint/quantized.json", "layers", 0, "name", value="elsewhere"),
        EXPORT,
        2,
        "elsewhere",
    ),
    "times that are text": (
        setting("checkpoint/calibration.json", "model", value=3),
        (*BUILD, "--checkpoint", "checkpoint"),
        2,
        "made from other settings",
    ),
    "portable model that is no ONNX": (
        writing("e/model.onnx", b"\xff" * 100),
        ("verify", "e"),
        2,
        "is not an ONNX file",
    ),
    "engine that is no ONNX": (writing("e/cpu/model.onnx", b"\xff" * 100), DRAW, 2, "onnxruntime refuses it"),
    "engine cut short": (
        lambda folder: ((folder / "e/cpu/model.onnx.data").write_bytes(b"abc"), reseal(folder / "e")),
        DRAW,
        2,
        "onnxruntime refuses it",
    ),
    # places that cannot be written, before any work
    "picture is a folder": (lambda folder: (folder / "out.png").mkdir(), DRAW, 2, "is a folder"),
    "picture under a file": (nothing, (*DRAW[:4], "-o", "recipe.toml/a.png"), 2, "is not a folder"),
    "picture on a file system that takes none": (nothing, (*DRAW[:4], "-o", "/proc/a/b.png"), 2, "/proc/a"),
    "build under a file": (nothing, (*BUILD[:-1], "recipe.toml/o"), 2, "is not a folder"),
    "build on a file system that takes none": (nothing, (*BUILD[:-1], "/proc/a"), 5, "/proc: 0.00 GB free"),
    "build over a file": (file_in_the_way, (*BUILD, "--force"), 2, "is not a bundle and is not replaced"),
    "calibrate over a file": (file_in_the_way, CALIBRATE, 2, "is a file"),
    "calibrate under a file": (nothing, (*CALIBRATE[:-1], "recipe.toml/o"), 2, "is not a folder"),
    "calibrate on a file system that takes none": (nothing, (*CALIBRATE[:-1], "/proc/a/b"), 2, "/proc/a"),
    "export under a file": (nothing, (*EXPORT[:-1], "recipe.toml/o"), 2, "is not a folder"),
    "export on a file system that takes none": (nothing, (*EXPORT[:-1], "/proc/a/b"), 2, "/proc/a"),
    "report over a file": (nothing, ("verify", "e", "-o", "recipe.toml"), 2, "is a file"),
    "report into the bundle": (nothing, ("verify", "e", "-o", "e"), 2, "which a new file would damage"),
    "report below the bundle": (nothing, ("verify", "e", "-o", "e/new/report"), 2, "which a new file would damage"),
    "picture into the bundle": (nothing, (*DRAW[:4], "-o", "e/report/a.png"), 2, "which a new file would damage"),
    "numbers into the bundle": (nothing, ("bench", "e", "-o", "e/bench.json"), 2, "which a new file would damage"),
    "numbers into a folder": (nothing, ("bench", "e", "-o", "model"), 2, "is a folder"),
    "bundle whose name is too long": (nothing, ("inspect", "e" * 5000), 2, ""),
    "links in a circle": (lambda folder: (folder / "loop").symlink_to("loop"), ("inspect", "loop"), 2, "loop"),
    # slips of the finger
    "a billion pictures": (nothing, (*DRAW, "--num-images", "1000000000"), 2, "from 1 to 4096"),
    "a scale of a million": (nothing, (*DRAW, "--scale", "1000000"), 2, "is too large"),
    "guidance that is no number": (nothing, (*DRAW, "--guidance-scale", "nan"), 2, "is not a number"),
    "prompt that is no text": (nothing, ("generate", "e", "--prompt", "\udcff", "-o", "out.png"), 2, "is not text"),
    "seed of 100 digits": (nothing, (*DRY, "--seed", "1" + "0" * 100), 2, "below 2**63"),
    "height of a billion": (nothing, (*DRY, "--height", "1000000000"), 2, "use at most"),
    "name with a path": (nothing, (*DRY, "--set", 'name="../x"'), 2, "leaves the folder"),
}


@pytest.mark.parametrize("name", CALLS)
def test_hostile_call(
    name: str, victims: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, args, code, words = CALLS[name]
    folder = hostile.copies(victims, tmp_path / "w", args)
    monkeypatch.chdir(folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(args) == code, capsys.readouterr().err
    sentence = hostile.sentence(capsys.readouterr().err)
    assert words in sentence, sentence
    if args[0] in ("build", "generate", "inspect") and "--resume" not in args:
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
