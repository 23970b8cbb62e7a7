"""Loading models: what is refused, with which message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export.errors import ModelError, RecipeError
from export.models.load import load, sample_inputs
from tests.support import tiny

pytestmark = pytest.mark.torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.folder(name, root) for name in ("pixart", "dit")}


@pytest.fixture
def pixart(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny PixArt that a test may damage."""
    return Path(shutil.copytree(folders["pixart"], tmp_path / "model"))


def _edit(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def _fill(key: str, value: float) -> Any:
    return lambda state: state[key].view(-1)[3:4].fill_(value)


def _reshape(state: dict) -> None:
    state["proj_out.weight"] = state["proj_out.weight"][:, :-1].contiguous()


def _integers(state: dict) -> None:
    state["proj_out.bias"] = state["proj_out.bias"].int()


TO_Q = "transformer_blocks.1.attn1.to_q.weight"
DAMAGES = [
    (lambda state: state.pop(TO_Q), f"tensor {TO_Q} is missing \\(1 of"),
    (_reshape, r"tensor proj_out.weight has shape \(32, 63\), config.json asks for \(32, 64\)"),
    (_fill(TO_Q, float("nan")), f"tensor {TO_Q} holds NaN or Inf"),
    (_fill(TO_Q, float("inf")), f"tensor {TO_Q} holds NaN or Inf"),
    (_fill("proj_out.bias", float("-inf")), "tensor proj_out.bias holds NaN or Inf"),
    (_integers, "tensor proj_out.bias is torch.int32; weights must be fp16, bf16 or fp32"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_bad_tensor_is_named_with_its_file(pixart, change, message):
    _edit(pixart, change)
    with pytest.raises(ModelError, match=message) as error:
        load(str(pixart))
    assert str(pixart / WEIGHTS) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(pixart, size):
    data = (pixart / WEIGHTS).read_bytes()
    (pixart / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(
        ModelError, match=f"{WEIGHTS}: not a whole safetensors file .*; copy or download the file again"
    ):
        load(str(pixart))


def test_missing_weights(pixart):
    (pixart / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"has no {WEIGHTS} and no {WEIGHTS}.index.json; copy or download it again"):
        load(str(pixart))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.pt"])
def test_pickles_are_refused_unread(pixart, name):
    (pixart / WEIGHTS).rename(pixart / name)
    with pytest.raises(ModelError, match=f"{name} is a pickle, .*safe_serialization=True"):
        load(str(pixart))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json.*; copy or download it again"),
        ("[1]", "config.json.*; copy or download it again"),
        ("{}", "config.json: no _class_name in it"),
        ('{"_class_name": "Nonsense"}', "has no model 'Nonsense'"),
        (
            '{"_class_name": "AutoencoderKL", "in_channels": 3}',
            "AutoencoderKL is an autoencoder, of which each half is built by itself",
        ),
        (
            '{"_class_name": "Lumina2Transformer2DModel", "in_channels": 4, "hidden_size": 48, "num_layers": 1,'
            ' "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,'
            ' "axes_dim_rope": [8, 8, 8], "axes_lens": [30, 64, 64], "cap_feat_dim": 24}',
            "config.json: Lumina2Transformer2DModel: its forward reads sizes from the numbers in its inputs",
        ),
        (
            '{"_class_name": "UNet2DModel", "in_channels": 4, "sample_size": 8, "patch_size": 2}',
            "config.json: diffusers .* has no pipeline that draws with UNet2DModel alone",
        ),
    ],
)
def test_bad_configuration(pixart, text, message):
    (pixart / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load(str(pixart))


def test_configuration_the_class_refuses(pixart):
    config = json.loads((pixart / "config.json").read_text())
    (pixart / "config.json").write_text(json.dumps(config | {"norm_type": "layer_norm"}))
    with pytest.raises(ModelError, match="PixArtTransformer2DModel refuses it"):
        load(str(pixart))


def test_missing_configuration(pixart):
    (pixart / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json; give a diffusers transformer folder"):
        load(str(pixart))


def test_missing_shard_and_index_that_leaves_the_folder(tmp_path):
    shards = tiny.folder("dit", tmp_path, shard_size="100KB")
    index = shards / f"{WEIGHTS}.index.json"
    text = index.read_text()
    first = sorted(shards.glob("*.safetensors"))[0]
    first.rename(first.with_suffix(".gone"))
    with pytest.raises(ModelError, match=f"{first.name}: this shard is missing"):
        load(str(shards))
    index.write_text(text.replace(first.name, f"../{first.name}"))
    with pytest.raises(ModelError, match="leaves the folder"):
        load(str(shards))
    index.write_text("{}")
    with pytest.raises(ModelError, match="'weight_map' is missing"):
        load(str(shards))


def test_tensor_missing_from_its_shard(tmp_path):
    shards = tiny.folder("dit", tmp_path, shard_size="100KB")
    first = sorted(shards.glob("*.safetensors"))[0]
    state = load_file(first)
    gone = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != gone}, first)
    with pytest.raises(ModelError, match=f"{first.name}: tensor {gone} is missing"):
        load(str(shards))


@pytest.mark.parametrize(("size", "message"), [((60, 64), "multiples of 16 pixels"), ((64, 96), "square images only")])
def test_image_sizes_a_model_cannot_make(folders, size, message):
    with pytest.raises(RecipeError, match=message):
        sample_inputs(load(str(folders["dit"])), 1, 0, *size)
