"""Engines of models with adapters: proven against the merged model, which the bundle names, and verified again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.documents import sha256
from export.models import load as models
from export.models.description import sample_inputs
from pipeline import __main__ as cli
from pipeline import load
from pipeline import recipe as recipes
from pipeline.bundle.card import Repository, compose, read_parts
from pipeline.parts import read_folder
from tests.support import recorded_models, tiny
from tests.support.quick_build import measure_little

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ADAPTER, SCALE, RANK = "style.safetensors", 0.75, 4
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = ("method=rtn", "sampling.n_steps=2", "weights.group_size=32")
SIZE = {"sd35": recorded_models.SIZE}


@dataclass(frozen=True)
class Built:
    """model: its folder, without the adapter. merged: the same with the adapter's update in its file."""

    model: Path
    merged: Path
    adapter: Path
    bundle: Path


def write_adapter(model: Path, path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter of all queries and outputs of attention, whose effect is large; the changes of their weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model / WEIGHTS)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith((".to_q.weight", ".to_out.0.weight"))]
    tensors, changes = {}, {}
    for layer in layers:
        rows, columns = weights[f"{layer}.weight"].shape
        down, up = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator) / 16
        tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        changes[f"{layer}.weight"] = SCALE * (up @ down)
    save_file(tensors, path)
    return changes


@pytest.fixture(scope="module", params=["pixart", "sd35"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    own = request.param in tiny.MODELS
    model = tiny.folder(request.param, folder) if own else recorded_models.save(request.param, folder / "model")
    changes = write_adapter(model, folder / ADAPTER)
    merged = shutil.copytree(model, folder / "merged")
    weights = load_file(model / WEIGHTS)
    whole = {name: (weights[name].float() + change).to(weights[name].dtype) for name, change in changes.items()}
    save_file(weights | whole, merged / WEIGHTS)
    flags = ["--engine", "pixart_w4a8", "-m", str(model), "--target", "cpu", "-o", str(folder / "engine")]
    for name, side in zip(("--height", "--width"), SIZE.get(request.param, ()), strict=False):
        flags += [name, str(side)]
    for setting in SETTINGS:
        flags += ["--set", setting]
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        assert cli.main(["build", *flags, "--lora", f"{folder / ADAPTER}:{SCALE}"]) == 0
    return Built(model, merged, folder / ADAPTER, folder / "engine")


def test_the_engine_is_that_of_the_merged_model(built: Built) -> None:
    """As near to it as the build says of itself, and far from the model without the adapter."""
    bundle, merged, plain = load(built.bundle), models.load(str(built.merged)), models.load(str(built.model))
    size = bundle.recipe.sampling
    outputs = []
    inputs = sample_inputs(merged, 2, 5, size.height, size.width)
    [drawn] = bundle.engine("cpu").run(inputs).values()
    for model in (merged, plain):
        if model.family.recordings is not None:
            from export.models.torch_modules import set_resolution

            set_resolution(model.module, *model.cells(size.height, size.width))
        with torch.no_grad():
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            outputs.append(models.denoiser(model)(**given).numpy())
    errors = [np.abs(drawn - output).std() / output.std() for output in outputs]
    gates = json.loads((built.bundle / "report" / "parity.json").read_text())["gates"]
    stated = next(gate["value"] for gate in gates if gate["name"] == "quant_sqnr_db")
    assert errors[0] < 10 ** ((6 - stated) / 20) and errors[1] > 2 * errors[0]


def test_the_adapter_is_named_by_file_hash_and_scale(built: Built) -> None:
    row = {"file": ADAPTER, "sha256": sha256(built.adapter), "scale": SCALE}
    bundle = load(built.bundle)
    assert bundle.manifest["model"].get("adapters") == [row]
    assert bundle.manifest["model"]["sha256"] != models.load(str(built.model)).sha256
    assert bundle.recipe.lora == (f"{built.adapter}:{SCALE}",)
    card = compose(read_parts(built.bundle), Repository("someone/engine", None))
    assert f"the adapter `{ADAPTER}` (sha256 `{row['sha256'][:16]}...`) merged into it at scale 0.75" in card
    assert f"{ADAPTER} ({row['sha256'][:16]}) at scale 0.75" in (built.bundle / "report" / "index.html").read_text()


def verified(built: Built, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """Exit code, and the reason where it failed."""
    capsys.readouterr()
    code = cli.main(["verify", str(built.bundle), "--quick", "--json", *flags])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1]).get("reason", "")


def test_it_is_verified_against_the_merged_model_and_no_other(
    built: Built, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = shutil.copyfile(built.adapter, tmp_path / "moved.safetensors")
    assert verified(built, capsys, "--lora", f"{moved}:{SCALE}") == (0, "")
    code, reason = verified(built, capsys, "--lora", f"{moved}:0.5")
    assert code == 2 and f"its adapters with --lora, unchanged and in their order: {ADAPTER}:0.75" in reason
    write_adapter(built.model, moved, seed=1)
    assert verified(built, capsys, "--lora", f"{moved}:{SCALE}")[0] == 2
    code, reason = verified(built, capsys, "--lora", str(tmp_path / "lost.safetensors"))
    assert code == 2 and "lost.safetensors is not a file here; check the path" in reason


def test_a_changed_adapter_ends_a_resumed_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder("pixart", tmp_path)
    write_adapter(model, tmp_path / ADAPTER)
    flags = ["--engine", "pixart_w4a8", "-m", str(model), "--lora", f"{tmp_path / ADAPTER}:{SCALE}", "--json"]
    flags += ["--set", "method=rtn", "--set", "weights.group_size=32", "-o", str(tmp_path / "layers")]
    assert cli.main(["calibrate", *flags]) == 0
    assert cli.main(["calibrate", *flags, "--resume"]) == 0
    write_adapter(model, tmp_path / ADAPTER, seed=1)
    capsys.readouterr()
    assert cli.main(["calibrate", *flags, "--resume"]) == 2
    assert "model" in json.loads(capsys.readouterr().out.splitlines()[-1])["reason"]


def test_of_a_whole_pipeline_the_denoiser_takes_the_adapters() -> None:
    recipe = recipes.with_model(recipes.load("pixart_w4a6"), "zoo:pixart_scenes", None, None, ["a.safetensors:2"])
    parts = {part.name: part.recipe.lora for part in read_folder(recipe).parts}
    assert parts["transformer"] == ("a.safetensors:2.0",) and not any(
        parts[name] for name in parts.keys() - {"transformer"}
    )
    assert len(parts) > 2
