"""Loading: every family with its true class, where models come from, and what is refused with which message."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.documents import sha256
from export.errors import EnvironmentLacksError, ModelError
from export.models import load as models
from export.models.families import FAMILIES, LAYER_KINDS
from export.models.load import denoiser, float_linears, load, sample_inputs, stored_value
from export.models.torch_modules import MaskedAttention, UpcastLinear, set_resolution, with_modules
from export.to_onnx import export_float, export_portable
from pipeline.backends.base import only
from pipeline.backends.reference import ReferenceEngine, fake_quant
from tests.support import tiny

pytestmark = pytest.mark.torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK = {"attn.qkv": 3, "attn.out": 1, "cross.q": 1, "cross.kv": 2, "cross.out": 1, "ff.in": 1, "ff.out": 1}
# name -> (family, linears to quantize by kind)
EXPECTED = {
    "pixart": ("pixart", {kind: 2 * count for kind, count in BLOCK.items()}),
    "pixart_sizes": ("pixart", {kind: 2 * count for kind, count in BLOCK.items()}),
    "pixart_sigma": ("pixart_sigma", {kind: 2 * count for kind, count in BLOCK.items()}),
    "dit": ("dit", {"attn.qkv": 6, "attn.out": 2, "ff.in": 2, "ff.out": 2}),
    "hunyuan": ("hunyuan", {kind: 4 * count for kind, count in BLOCK.items()} | {"adaln": 4, "skip": 1}),
    "unknown": ("recorded", {"attn.qkv": 12, "attn.out": 3, "ff.in": 3, "ff.out": 3}),
}
# A second image size for each model, in pixels (64 is the own one but for Sigma).
SIZES = {"dit": (96, 96), "unknown": (48, 32)}


def tensors(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def run(model: models.LoadedModel, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return denoiser(model)(**tensors(inputs))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.folder(name, root) for name in tiny.MODELS}


@pytest.fixture
def pixart(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny PixArt that a test may damage."""
    return Path(shutil.copytree(folders["pixart"], tmp_path / "model"))


@pytest.mark.parametrize("name", EXPECTED)
def test_family_is_recognised_and_every_linear_is_quantized_or_kept_with_a_reason(folders, name):
    model = load(str(folders[name]))
    family, kinds = EXPECTED[name]
    assert model.family.name == family
    assert Counter(ref.kind for ref in model.linears()) == kinds
    assert set(kinds) <= set(LAYER_KINDS)
    kept = dict(model.kept())
    assert not set(kept) & {ref.name for ref in model.linears()}
    linears = {path for path, part in model.module.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linears <= set(kept) | {ref.name for ref in model.linears()}
    assert all(reason != "not one of the linears that this family quantizes" for reason in kept.values()), kept


@pytest.mark.parametrize("name", EXPECTED)
def test_denoiser_equals_the_diffusers_model(folders, name):
    import diffusers

    model = load(str(folders[name]))
    class_name, _ = tiny.MODELS[name]
    original = getattr(diffusers, class_name).from_pretrained(folders[name]).float().eval()
    set_resolution(original, *model.cells())
    inputs = sample_inputs(model, 2, seed=3, tokens=9)
    with torch.inference_mode():
        expected = model.family.call(original, tensors(inputs))
    # The attention processor of ours broadcasts the mask instead of repeating it: the same sums in the same order up
    # to the kernel chosen, so a few units in the last place, passed through two to four blocks.
    assert (run(model, inputs) - expected).abs().max() <= 64 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("name", EXPECTED)
def test_second_resolution_gives_its_output_shape(folders, name):
    model = load(str(folders[name]))
    height, width = SIZES.get(name, (96, 48))
    output = run(model, sample_inputs(model, 1, 0, height, width, tokens=5))
    assert output.shape[-2:] == (height // 8, width // 8)


@pytest.mark.parametrize("name", EXPECTED)
def test_inputs_follow_the_table_and_the_seed(folders, name):
    model = load(str(folders[name]))
    first, again, other = (sample_inputs(model, 3, seed, tokens=9) for seed in (1, 1, 2))
    assert list(first) == [row.name for row in model.inputs]
    assert all(first[row.name].dtype == row.dtype for row in model.inputs)
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["hidden_states"] != other["hidden_states"]).any()
    assert all(len(first[row.name]) == 3 for row in model.inputs if row.shape[0] == "batch")


def test_masked_tokens_do_not_matter(folders):
    model = load(str(folders["pixart"]))
    inputs = sample_inputs(model, 2, 0, tokens=6)
    inputs["encoder_attention_mask"][:, 4:] = 0
    changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].copy()}
    changed["encoder_hidden_states"][:, 4:] = 7.0
    assert torch.equal(run(model, inputs), run(model, changed))
    changed["encoder_hidden_states"][:, :4] = 7.0
    assert not torch.equal(run(model, inputs), run(model, changed))


def test_positional_and_named_inputs_are_the_same_and_wrong_ones_are_named(folders):
    model = load(str(folders["dit"]))
    inputs = tensors(sample_inputs(model, 2, 0))
    net = denoiser(model)
    with torch.inference_mode():
        assert torch.equal(net(*inputs.values()), net(**inputs))
    with pytest.raises(TypeError, match="missing \\['timestep'\\], unknown \\['time'\\]"):
        net(**{("time" if name == "timestep" else name): value for name, value in inputs.items()})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"sample_size": 64}, "pixart"),
        ({"sample_size": 128}, "pixart"),
        ({"sample_size": 128, "use_additional_conditions": True}, "pixart"),
        ({"sample_size": 128, "use_additional_conditions": False}, "pixart_sigma"),
        ({"sample_size": 256, "use_additional_conditions": False}, "pixart_sigma"),
        ({"sample_size": 64, "_name_or_path": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"}, "pixart_sigma"),
        ({"sample_size": 128, "_name_or_path": "PixArt-alpha/pixart_sigma_sdxlvae"}, "pixart_sigma"),
    ],
)
def test_alpha_and_sigma_are_told_apart_by_configuration(config, family):
    row = models._family_of(config | {"_class_name": "PixArtTransformer2DModel"}, Path("x"))
    assert row is FAMILIES[family]


def test_old_class_name_of_hub_folders_is_understood(pixart):
    config = json.loads((pixart / "config.json").read_text())
    (pixart / "config.json").write_text(
        json.dumps(config | {"_class_name": "Transformer2DModel", "double_self_attention": False})
    )
    assert load(str(pixart)).family.name == "pixart"


def test_a_class_without_a_row_says_where_it_was_learned(folders, caplog):
    with caplog.at_level(logging.INFO):
        load(str(folders["unknown"]))
    assert "SD3Transformer2DModel: inputs are learned from StableDiffusion3Pipeline" in caplog.text


# --- where models come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "pixels"), [("pixels", 1), ("latents", 8)])
def test_image_size_is_in_pixels_whatever_a_cell_is(pixart, output, pixels):
    (pixart / "generation.json").write_text(json.dumps({"output": output}))
    model = load(str(pixart))
    assert model.pixels_per_cell == pixels
    assert model.cells() == (8, 8)
    assert model.cells(32, 16) == (32 // pixels, 16 // pixels)


def test_pipeline_folder(folders, tmp_path):
    shutil.copytree(folders["dit"], tmp_path / "pipeline" / "transformer")
    model = load(str(tmp_path / "pipeline"))
    assert model.folder == tmp_path / "pipeline" / "transformer"
    assert model.sha256 == sha256(model.folder / WEIGHTS)


def test_shards_give_the_same_model_as_one_file(folders, tmp_path):
    shards = tiny.folder("dit", tmp_path, shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, many = load(str(folders["dit"])), load(str(shards))
    state = many.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.module.state_dict().items())
    assert one.sha256 != many.sha256 == load(str(shards)).sha256


def test_hub_id_that_was_not_downloaded_tells_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        EnvironmentLacksError, match='run: hf download someone/some-model --include "transformer/\\*"'
    ) as e:
        load("someone/some-model")
    assert e.value.exit_code == 3


def test_hub_id_in_the_cache(folders, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--some-model"
    shutil.copytree(folders["pixart"], repository / "snapshots" / commit / "transformer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = load("someone/some-model")
    assert (model.revision, model.family.name) == (commit, "pixart")


def test_hub_id_of_which_only_other_parts_were_downloaded(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--some-model" / "refs").mkdir()
    (tmp_path / "models--someone--some-model" / "refs" / "main").write_text("0" * 40)
    (snapshot / "model_index.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentLacksError, match="has no transformer; run: hf download someone/some-model"):
        load("someone/some-model")


def test_zoo_name_that_does_not_exist():
    with pytest.raises(ModelError, match="zoo:nothing is not a bundled model; use one of"):
        load("zoo:nothing")


def test_a_part_of_a_bundled_pipeline():
    model = load("zoo:pixart_scenes/text_encoder")
    assert (model.family.name, model.folder.name, model.folder.parent.name) == ("t5", "text_encoder", "pixart_scenes")
    for name, remedy in {
        "pixart_scenes/tokenizer": "use one of zoo:pixart_scenes/text_encoder, zoo:pixart_scenes/transformer, zoo:p",
        "pixart_scenes/": "use one of zoo:pixart_scenes/text_encoder",
        "pixart_scenes/../dit_mini": "use one of zoo:pixart_scenes/text_encoder",
        "pixart_mini/transformer": "use zoo:pixart_mini",
    }.items():
        with pytest.raises(ModelError, match=rf"^zoo:{name} is no part of a bundled model; {remedy}"):
            load(f"zoo:{name}")


def test_folder_that_does_not_exist():
    with pytest.raises(ModelError, match="not a folder here and not a hub id; give a folder"):
        load("./does/not/exist")


# --- types and memory ----------------------------------------------------------------------------------------------


def test_large_models_keep_16_bit_weights_mapped_and_compute_the_same(folders, monkeypatch):
    resident = load(str(folders["pixart"]))
    monkeypatch.setattr(models, "RESIDENT_BYTES", 0)
    mapped = load(str(folders["pixart"]))
    layers = [ref.module for ref in mapped.linears()]
    assert all(isinstance(part, UpcastLinear) and part.weight.dtype == torch.float16 for part in layers)
    assert all(ref.module.weight.dtype == torch.float32 for ref in resident.linears())
    inputs = sample_inputs(mapped, 2, 0, tokens=5)
    assert torch.equal(run(mapped, inputs), run(resident, inputs))
    copies = float_linears(mapped)
    assert len(copies) == len(layers)
    with torch.inference_mode():
        assert torch.equal(denoiser(mapped, copies)(**tensors(inputs)), run(resident, inputs))
    assert float_linears(resident) == {}


def test_large_kept_linears_of_blocks_stay_in_16_bits(tmp_path, monkeypatch):
    path = tiny.folder("dit", tmp_path, half=False)  # its blocks have a modulation each
    modulation = "transformer_blocks.0.norm1.linear"
    whole = load(str(path))
    monkeypatch.setattr(models, "LARGE_ELEMENTS", whole.module.get_submodule(modulation).weight.numel())
    model = load(str(path))
    part = model.module.get_submodule(modulation)
    assert isinstance(part, UpcastLinear) and part.weight.dtype == torch.float16
    stored = {path for path, part in model.module.named_modules() if isinstance(part, UpcastLinear)}
    assert all(re.search(r"\.\d+\.", path) and model.family.kind_of(path) is None for path in stored)
    inputs = sample_inputs(model, 2, 0, tokens=5)
    assert torch.equal(run(model, inputs), run(whole, inputs))
    assert set(float_linears(model)) == stored
    layers = tiny.quantized(whole)
    for dtype in (torch.float32, torch.float64):
        exact = [ReferenceEngine(fake_quant(each, layers, dtype), dtype).run(inputs) for each in (model, whole)]
        np.testing.assert_array_equal(*(only(outputs) for outputs in exact))
    for name, export in (("float", export_float), ("portable", lambda each, to: export_portable(each, layers, to))):
        files = [tmp_path / name / str(k) / "model.onnx" for k in range(2)]
        for each, file in zip((model, whole), files, strict=True):
            file.parent.mkdir(parents=True)
            export(each, file)
        assert files[0].read_bytes() == files[1].read_bytes()
        assert Path(f"{files[0]}.data").read_bytes() == Path(f"{files[1]}.data").read_bytes()


def test_float32_files_are_used_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "RESIDENT_BYTES", 0)
    model = load(str(tiny.folder("dit", tmp_path, half=False)))
    assert all(type(ref.module) is torch.nn.Linear for ref in model.linears())


def test_kept_weights_are_rounded_to_what_engines_store(tmp_path):
    path = tiny.folder("pixart", tmp_path, half=False)
    model, original = load(str(path)), load_file(path / WEIGHTS)
    kept, quantized = "proj_out.weight", "transformer_blocks.0.ff.net.2.weight"
    state = model.module.state_dict()
    assert torch.equal(state[kept], original[kept].half().float())
    assert not torch.equal(state[kept], original[kept])
    assert torch.equal(state[quantized], original[quantized])


@pytest.mark.parametrize("values", [[1.0, 70000.0], [1e-8, 3e-9]])
def test_weights_outside_fp16_stay_in_fp32(values, caplog):
    with caplog.at_level(logging.INFO):
        assert stored_value("a.b", torch.tensor(values)).tolist() == torch.tensor(values).tolist()
    assert "a.b: does not fit into fp16" in caplog.text


def test_replacing_modules_shares_all_other_tensors(folders):
    model = load(str(folders["pixart"]))
    path = "transformer_blocks.0.ff.net.2"
    stand_in = torch.nn.Identity()
    changed = with_modules(model.module, {path: stand_in})
    assert changed.get_submodule(path) is stand_in
    assert isinstance(model.module.get_submodule(path), torch.nn.Linear)
    mine = {id(p) for p in model.module.parameters()}
    assert all(id(p) in mine for p in changed.parameters())


def test_attention_processor_leaves_other_kinds_of_attention_alone(folders):
    pixart, hunyuan = (load(str(folders[name])).module for name in ("pixart", "hunyuan"))
    assert all(isinstance(p, MaskedAttention) for p in pixart.attn_processors.values())
    assert not any(isinstance(p, MaskedAttention) for p in hunyuan.attn_processors.values())


def test_size_conditions_reach_the_model(folders):
    model = load(str(folders["pixart_sizes"]))
    inputs = sample_inputs(model, 1, 0, tokens=5)
    assert inputs["resolution"].tolist() == [[64.0, 64.0]]
    moved = inputs | {"resolution": np.float32([[512.0, 64.0]])}
    assert not torch.equal(run(model, inputs), run(model, moved))
