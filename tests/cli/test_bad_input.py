"""Bad input ends with its exit code and one sentence that names value and remedy, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from export import to_onnx
from export.errors import UserError
from export.models import load as models
from pipeline import __main__ as cli
from pipeline import build, compiler
from pipeline.bundle import stages
from plugins.cpu import library
from tests.support import hostile, tiny
from tests.support.bundles import make_bundle

pytestmark = pytest.mark.torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMON = ["--engine", "pixart_w4a6", "--target", "cpu", "--n-steps", "1"]
COMMON += ["--set", "method=rtn", "--set", "weights.group_size=32"]


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder("pixart", tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in good_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refused(args: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str], output: Path) -> None:
    """Run `build`, expect this exit code and a one-line reason with `text` in it, and nothing at or beside `output`."""
    before = sorted(output.parent.parent.rglob("*"))
    assert build.main([*args, "-o", str(output)]) == code
    shown = capsys.readouterr()
    last = shown.out.splitlines()[-1]
    assert last.startswith("FAILED ") and text in last, last
    assert "Traceback" not in shown.err
    assert sorted(output.parent.parent.rglob("*")) == before, "something was left behind"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def plant_nan(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["transformer_blocks.1.attn1.to_k.weight"].fill(float("nan")))


def drop_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("transformer_blocks.1.attn1.to_k.weight"))


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


LAYER = "transformer_blocks.1.attn1.to_k.weight"
BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "truncated weights": (truncate, "not a whole safetensors file"),
    "missing tensor": (drop_tensor, f"tensor {LAYER} is missing"),
    "shape mismatch": (lambda folder: edit_config(folder, caption_channels=48), "config.json asks for"),
    "NaN weights": (plant_nan, f"tensor {LAYER} holds NaN or Inf"),
    "pickle": (only_pickle, "is a pickle"),
    "missing config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "unsupported family": (
        lambda folder: edit_config(folder, _class_name="UNet2DConditionModel"),
        "UNet2DConditionModel",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, text = BAD_MODELS[name]
    damage(model)
    refused([*COMMON, "-m", str(model)], 2, text, capsys, tmp_path / "engines/e")


BAD_FLAGS: dict[str, tuple[list[str], int, str]] = {
    "unknown recipe": (["--engine", "pixart_w2a2"], 2, "recipe 'pixart_w2a2' is unknown; use one of bert_w4a8"),
    "missing recipe file": (["--engine", "none.toml"], 2, "recipe file none.toml does not exist"),
    "unknown key": ([*COMMON, "--set", "weights.granularty=group"], 2, "key weights.granularty is unknown; use one of"),
    "unknown table": ([*COMMON, "--set", "wieghts.group_size=32"], 2, "wieghts"),
    "ill-typed value": (
        [*COMMON, "--set", "weights.group_size=big"],
        2,
        "weights.group_size is 'big'; expected an integer",
    ),
    "unknown format": ([*COMMON, "--set", "formats.weight=E9M9"], 2, "number format 'E9M9' is unknown; use one of"),
    "no such model": ([*COMMON, "-m", "nowhere"], 2, "model 'nowhere' is not a folder here"),
    "no such zoo model": ([*COMMON, "-m", "zoo:nothing"], 2, "zoo:nothing is not a bundled model; use one of"),
    "model not downloaded": ([*COMMON, "-m", "nobody/nothing"], 3, "hf download nobody/nothing"),
    "SM that is not buildable": ([*COMMON, "--target", "rtx", "--target-sm", "90"], 3, "90"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args, code, text = BAD_FLAGS[name]
    refused(args, code, text, capsys, tmp_path / "engines/e")


def test_recipe_file_with_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\nmodel = "zoo:pixart_mini"\ncolour = "red"\n')
    refused(
        ["--engine", str(recipe)], 2, "key colour is unknown; use one of name, model", capsys, tmp_path / "engines/e"
    )


def test_recipe_file_that_is_not_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("name = ")
    refused(["--engine", str(tmp_path / "mine.toml")], 2, "not valid TOML", capsys, tmp_path / "engines/e")


def test_group_size_that_does_not_divide(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*COMMON, "-m", str(model), "--set", "weights.group_size=48"]
    refused(args, 2, "--set weights.group_size=", capsys, tmp_path / "engines/e")


def test_image_size_that_does_not_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*COMMON, "-m", str(model), "--height", "100", "--width", "100"]
    refused(args, 2, "needs multiples of", capsys, tmp_path / "engines/e")


def test_unwritable_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused([*COMMON, "-m", str(model)], 2, "choose another --output-dir", capsys, tmp_path / "file/e")


def test_existing_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = make_bundle(tmp_path / "engines/e")
    refused([*COMMON, "-m", str(model)], 2, "exists; add --force to replace it", capsys, output)


def test_force_does_not_replace_what_is_no_bundle(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engines/e").mkdir(parents=True)
    (tmp_path / "engines/e/thesis.txt").write_text("precious")
    refused(
        [*COMMON, "-m", str(model), "--force"], 2, "is not a bundle and is not replaced", capsys, tmp_path / "engines/e"
    )


def test_too_little_free_space_is_refused_before_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused([*COMMON, "-m", str(model)], 5, "0.00 GB free, about", capsys, tmp_path / "engines/e")


def test_full_disk_at_a_stage(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, document: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(stages, "write_json", full)
    refused([*COMMON, "-m", str(model)], 5, "the disk is full", capsys, tmp_path / "engines/e")


@contextlib.contextmanager
def files_of_at_most(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to write beyond `limit_bytes` per file, in whatever library the write happens."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit_bytes", [20_000, 120_000, 250_000])
def test_files_that_may_not_grow(
    limit_bytes: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = models.load(str(model))
    to_onnx.export_portable(loaded, tiny.quantized(loaded), tmp_path / "model.onnx")  # so that it is traced before
    with files_of_at_most(limit_bytes):
        assert build.main([*COMMON, "-m", str(model), "-o", str(tmp_path / "engines/e")]) == 5
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED the disk is full")
    assert not (tmp_path / "engines").exists()


def damaged(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[3] ^= 1
    (bundle / "model.onnx").write_bytes(data)


def leaving(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"]["../../outside"] = {"size": 1, "sha256": "0" * 64}
    (bundle / "manifest.json").write_text(json.dumps(document))


def newer(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(document | {"schema_version": 99}))


BAD_BUNDLES = {
    "changed byte": (damaged, "model.onnx differs from the manifest"),
    "path leaving the folder": (leaving, "leaves the folder"),
    "another version": (newer, "schema version 99, this version reads 1; build it again"),
}


@pytest.mark.parametrize("verb", ["inspect", "verify", "bench", "generate"])
@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_bad_bundle(verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, text = BAD_BUNDLES[name]
    bundle = make_bundle(tmp_path / "e")
    damage(bundle)
    before = sorted(tmp_path.rglob("*"))
    extra = ["--prompt", "a red circle", "-o", str(tmp_path / "out.png")] if verb == "generate" else []
    assert cli.main([verb, str(bundle), *extra]) == 2
    shown = capsys.readouterr()
    assert text in shown.out + shown.err and "Traceback" not in shown.err
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_checks_everything_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "engines/e"
    assert build.main([*COMMON, "-m", str(model), "-o", str(output), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"DRY RUN {output}" and "20 linears to quantize, 7 kept, targets cpu" in shown
    assert sorted(tmp_path.rglob("*")) == before
    assert (
        build.main([*COMMON, "-m", str(model), "-o", str(output), "--dry-run", "--set", "weights.group_size=48"]) == 2
    )


def test_dry_run_says_what_auto_means(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["--set", "method=auto", "--set", "cpu.path=auto", "--dry-run", "--json"]
    assert build.main([*COMMON, "-m", str(model), "-o", str(tmp_path / "engines/e"), *auto]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["calibrate"]["method"] == "fp4dit"
    assert recipe["cpu"]["path"] == ("stock" if library.problem() else "fused")


def _no_checkpoint(folder: Path) -> list[str]:
    return ["--checkpoint", str(folder / "nope")]


def _no_sampler(folder: Path) -> list[str]:
    (folder / "m/generation.json").write_text('{"conditioning": {"kind": "synthetic", "inputs": {}}}')
    return []


def _unknown_sampler(folder: Path) -> list[str]:
    text = '{"sampler": "dpm", "conditioning": {"kind": "synthetic", "inputs": {}}}'
    (folder / "m/generation.json").write_text(text)
    return []


def _interrupted(folder: Path) -> list[str]:
    (folder / "e.partial").mkdir()
    return []


def _bad_group(folder: Path) -> list[str]:
    return ["--set", "weights.group_size=48"]


# What is wrong -> (how to make it so, part of the sentence).
UNBUILDABLE = {
    "no checkpoint": (_no_checkpoint, "nope holds no finished calibration"),
    "no sampler": (_no_sampler, "'sampler' is missing"),
    "unknown sampler": (_unknown_sampler, "'dpm'"),
    "interrupted": (_interrupted, "holds an interrupted build"),
    "group size": (_bad_group, "48"),
}


@pytest.mark.parametrize("name", UNBUILDABLE)
def test_dry_run_refuses_what_build_refuses_before_work_starts(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same code and the same sentence; the build has not begun any stage by then."""
    monkeypatch.setattr(stages.WorkFolder, "run", lambda *_: pytest.fail("work has started"))
    shutil.copytree(model, tmp_path / "m")
    spoil, text = UNBUILDABLE[name]
    flags = [*COMMON, "-m", str(tmp_path / "m"), "-o", str(tmp_path / "e"), *spoil(tmp_path)]
    ends = []
    for extra in ([], ["--dry-run"]):
        code = build.main([*flags, *extra])
        ends.append((code, hostile.sentence(capsys.readouterr().err).partition(" error: ")[2]))
    assert ends[0] == ends[1] and ends[0][0] == 2 and text in ends[0][1]


def test_every_user_error_has_an_exit_code_of_the_contract() -> None:
    assert {kind.exit_code for kind in [UserError, *UserError.__subclasses__()]} == {2, 3, 4, 5, 6, 7}
