"""Adapters that are merged into a float model: in the forms that others write, to the number; or refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tools.environments import CannotBeHadError
from export.errors import ModelError
from export.models import adapter_names
from export.models import load as models
from export.models.adapters import Adapter, merged
from export.models.load import load, save_kept
from pipeline.__main__ import main
from tests.support import peft_run, recorded_models, tiny
from tests.support.environments import python_with, without_xdist
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER, WIDTH, RANK, SCALE = "transformer_blocks.1.attn1.to_q", 64, 3, 0.5
CONVOLUTION = "pos_embed.proj"
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DOWN, UP = random(RANK, WIDTH), random(WIDTH, RANK)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp16; to be read only."""
    return tiny.folder("pixart", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_models.save("flux", tmp_path_factory.mktemp("models") / "flux")


def written(path: Path, tensors: Tensors, header: dict[str, object] | None = None) -> Path:
    metadata = None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def loaded(model: Path, *adapters: Path, scale: float = SCALE) -> Tensors:
    """The model's tensors as float32 numbers, with adapters in them."""
    module = load(str(model), adapters=[Adapter(path, scale) for path in adapters]).module
    return dict(module.state_dict())


def expected(model: Path, layer: str, change: Tensor) -> Tensor:
    """The layer's weight with a float32 change, rounded once to the type of the file."""
    weight = load_file(model / WEIGHTS)[f"{layer}.weight"]
    return (weight.float() + change).to(weight.dtype).float()


# --- forms -----------------------------------------------------------------------------------------------------------

ALPHA = torch.tensor(2.0)
JOINED = LAYER.replace(".", "_")
# Name of the form -> tensors, and alpha / rank.
FORMS: dict[str, tuple[Tensors, float]] = {
    "diffusers": ({f"transformer.{LAYER}.lora_A.weight": DOWN, f"transformer.{LAYER}.lora_B.weight": UP}, 1.0),
    "no prefix": ({f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}, 1.0),
    "a name of PEFT": ({f"{LAYER}.lora_A.mine.weight": DOWN, f"{LAYER}.lora_B.mine.weight": UP}, 1.0),
    "down and up, with alpha": (
        {f"{LAYER}.lora_down.weight": DOWN, f"{LAYER}.lora_up.weight": UP, f"{LAYER}.alpha": ALPHA},
        2 / RANK,
    ),
    "Kohya": (
        {
            f"lora_unet_{JOINED}.lora_down.weight": DOWN,
            f"lora_unet_{JOINED}.lora_up.weight": UP,
            f"lora_unet_{JOINED}.alpha": ALPHA,
        },
        2 / RANK,
    ),
    "old diffusers": (
        {
            "transformer_blocks.1.attn1.processor.to_q_lora.down.weight": DOWN,
            "transformer_blocks.1.attn1.processor.to_q_lora.up.weight": UP,
        },
        1.0,
    ),
    "half": ({f"{LAYER}.lora_A.weight": DOWN.half(), f"{LAYER}.lora_B.weight": UP.bfloat16()}, 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_to_the_number(pixart: Path, form: str, tmp_path: Path) -> None:
    tensors, factor = FORMS[form]
    path = written(tmp_path / "a.safetensors", tensors)
    down, up = (tensor.float() for tensor in list(tensors.values())[:2])
    plain, merged = loaded(pixart), loaded(pixart, path)
    assert torch.equal(merged[f"{LAYER}.weight"], expected(pixart, LAYER, SCALE * factor * (up @ down)))
    assert [name for name in plain if not torch.equal(plain[name], merged[name])] == [f"{LAYER}.weight"]


STATED: dict[str, tuple[dict[str, object], float]] = {
    "alpha": ({"lora_alpha": 6}, 2.0),
    "PEFT's default": ({}, 8 / RANK),
    "rank stabilized": ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
    "the layer's own": ({"lora_alpha": 6, "alpha_pattern": {"attn2.to_q": 5, "attn1.to_q": 9}}, 3.0),
    "the whole path": ({"lora_alpha": 6, "alpha_pattern": {"^attn1.to_q": 5, f"^{LAYER}": 12}}, 4.0),
}


@pytest.mark.parametrize("case", STATED)
@pytest.mark.parametrize("place", ["header", "beside"])
def test_a_scale_that_peft_states(pixart: Path, case: str, place: str, tmp_path: Path) -> None:
    config, factor = STATED[case]
    prefix = "transformer" if place == "header" else "base_model.model"
    tensors = {f"{prefix}.{LAYER}.lora_A.weight": DOWN, f"{prefix}.{LAYER}.lora_B.weight": UP}
    header = {f"transformer.{key}": value for key, value in config.items()} if place == "header" else None
    path = written(tmp_path / "a.safetensors", tensors, header)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}), encoding="utf-8")
    merged = loaded(pixart, path)[f"{LAYER}.weight"]
    assert torch.equal(merged, expected(pixart, LAYER, SCALE * factor * (UP @ DOWN)))


def test_adapters_of_one_layer_add_up(pixart: Path, tmp_path: Path) -> None:
    one = written(tmp_path / "one.safetensors", FORMS["diffusers"][0])
    other = written(
        tmp_path / "other.safetensors", {f"{LAYER}.lora_A.weight": DOWN[:1], f"{LAYER}.lora_B.weight": UP[:, :1]}
    )
    merged = load(str(pixart), adapters=[Adapter(one, 0.25), Adapter(other, -1.5)]).module.state_dict()
    change = 0.25 * (UP @ DOWN), -1.5 * (UP[:, :1] @ DOWN[:1])
    weight = load_file(pixart / WEIGHTS)[f"{LAYER}.weight"]
    assert torch.equal(merged[f"{LAYER}.weight"], (weight.float() + change[0] + change[1]).half().float())


def test_biases_and_convolutions(pixart: Path, tmp_path: Path) -> None:
    down, up, bias = random(RANK, 4, 2, 2), random(WIDTH, RANK, 1, 1), random(WIDTH)
    name = f"{CONVOLUTION}.lora_"
    path = written(tmp_path / "a.safetensors", {f"{name}A.weight": down, f"{name}B.weight": up, f"{name}B.bias": bias})
    merged, stored = loaded(pixart, path), load_file(pixart / WEIGHTS)
    change = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)  # as PEFT computes it
    torch.testing.assert_close(merged[f"{CONVOLUTION}.weight"], expected(pixart, CONVOLUTION, SCALE * change))
    assert torch.equal(
        merged[f"{CONVOLUTION}.bias"], (stored[f"{CONVOLUTION}.bias"].float() + SCALE * bias).half().float()
    )


# --- through diffusers -----------------------------------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def kohya_flux(flux: Path) -> tuple[Tensors, Tensor, Tensor]:
    """An adapter in the names of FLUX's own repository, of queries, keys and values in one; and its factors."""
    width = load_file(flux / WEIGHTS)["transformer_blocks.0.attn.to_q.weight"].shape[1]
    down, up = random(RANK, width), random(3 * width, RANK)
    return {f"{QKV}.lora_down.weight": down, f"{QKV}.lora_up.weight": up, f"{QKV}.alpha": ALPHA}, down, up


def test_names_of_a_models_own_repository_are_converted_by_diffusers(flux: Path, tmp_path: Path) -> None:
    tensors, down, up = kohya_flux(flux)
    merged = loaded(flux, written(tmp_path / "a.safetensors", tensors))
    for part, rows in zip("qkv", up.chunk(3), strict=True):
        layer = f"transformer_blocks.0.attn.to_{part}"
        whole = expected(flux, layer, SCALE * 2 / RANK * (rows @ down))
        torch.testing.assert_close(merged[f"{layer}.weight"], whole, rtol=0, atol=1e-6)


# Layers of a block in Wan's own repository, and in diffusers.
WAN = {
    **{f"{kind}_attn.{own}": f"{ours}.{part}" for kind, ours in (("self", "attn1"), ("cross", "attn2"))
       for own, part in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}  # fmt: skip


@pytest.mark.parametrize("trainer", ["original", "musubi"])
def test_a_video_model_takes_adapters_of_its_own_repository(trainer: str, tmp_path: Path) -> None:
    wan = recorded_models.save("wan", tmp_path / "wan")
    weights, tensors, changes = load_file(wan / WEIGHTS), Tensors(), Tensors()
    for block in {name.split(".")[1] for name in weights if name.startswith("blocks.")}:
        for own, ours in WAN.items():
            layer, path = f"blocks.{block}.{own}", f"blocks.{block}.{ours}"
            rows, columns = weights[f"{path}.weight"].shape
            down, up = random(RANK, columns), random(rows, RANK)
            if trainer == "musubi":
                name, factor = f"lora_unet_{layer.replace('.', '_')}", 2 / RANK
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": ALPHA}
            else:
                name, factor = f"diffusion_model.{layer}", 1.0
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            changes[path] = SCALE * factor * (up @ down)
    merged = loaded(wan, written(tmp_path / "a.safetensors", tensors))
    for path, change in changes.items():
        torch.testing.assert_close(merged[f"{path}.weight"], expected(wan, path, change), rtol=0, atol=1e-6)


def test_what_diffusers_drops_is_refused(flux: Path, tmp_path: Path) -> None:
    """It leaves norms out, with a line in its log; where they are zeros, they say nothing."""
    tensors, _, _ = kohya_flux(flux)
    norm = "lora_unet_double_blocks_0.norm.diff"
    loaded(flux, written(tmp_path / "a.safetensors", tensors | {norm: torch.zeros(8)}))
    path = written(tmp_path / "b.safetensors", tensors | {norm: torch.ones(8)})
    with pytest.raises(ModelError, match=f"b.safetensors: tensor {norm}: diffusers leaves them out for this model"):
        loaded(flux, path)


@pytest.mark.parametrize(("alpha", "is_merged"), [(RANK, True), (RANK + 1, False)])
def test_an_alpha_that_diffusers_drops_is_refused_unless_it_is_the_rank(
    flux: Path, alpha: int, is_merged: bool, tmp_path: Path
) -> None:
    """It converts the factors of FLUX's last layer, and not their alpha."""
    rows, columns = load_file(flux / WEIGHTS)["proj_out.weight"].shape
    down, up, name = random(RANK, columns), random(rows, RANK), "lora_unet_final_layer_linear"
    tensors = kohya_flux(flux)[0] | {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    path = written(tmp_path / "a.safetensors", tensors | {f"{name}.alpha": torch.tensor(float(alpha))})
    if is_merged:
        whole = expected(flux, "proj_out", SCALE * (up @ down))
        torch.testing.assert_close(
            loaded(flux, path)["proj_out.weight"], models.stored_value("", whole), rtol=0, atol=1e-6
        )
    else:
        with pytest.raises(ModelError, match=f"tensor {name}.alpha: diffusers leaves them out for this model"):
            loaded(flux, path)


def test_what_comes_out_of_a_conversion_is_told_by_numbers_that_no_rank_is() -> None:
    """With four rows, alphas that are handed on have the value 4, and the fourth tensor is dropped."""
    factors = {f"{layer}.lora_{side}.weight": random(4, 4) for layer in "ab" for side in ("down", "up")}
    tensors = factors | {f"{layer}.alpha": ALPHA for layer in "abc"}
    dropped = {"b.lora_up.weight", "b.alpha"}

    def convert(given: Tensors) -> Tensors:
        """The first layer's alpha is handed on, the last one's, too, and the second one's is forgotten."""
        return {f"new.{name}": tensor for name, tensor in given.items() if name not in dropped}

    def multiply(given: Tensors) -> Tensors:
        """Alphas are multiplied into one factor or the other, but for the last one."""
        alphas = [given.pop(f"{layer}.alpha") for layer in "abc"]
        given["a.lora_down.weight"] = given["a.lora_down.weight"] * alphas[0] / 4
        given["b.lora_up.weight"] = given["b.lora_up.weight"] * alphas[1] / 4
        return given

    assert list(tensors)[3] == "b.lora_up.weight"
    assert adapter_names._kept(tensors, convert) == tensors.keys() - dropped
    assert adapter_names._kept(tensors, multiply) == tensors.keys() - {"c.alpha"}


def test_names_that_diffusers_cannot_convert_are_refused(flux: Path, tmp_path: Path) -> None:
    tensors = {"diffusion_model.nonsense.lora_A.weight": DOWN, "diffusion_model.nonsense.lora_B.weight": UP}
    with pytest.raises(
        ModelError, match=r"tensors diffusion_model.nonsense.lora_A.weight, diffusion_model.nonsense.lora_B"
    ):
        loaded(flux, written(tmp_path / "a.safetensors", tensors))


@pytest.mark.slow
@pytest.mark.process
def test_peft_and_diffusers_merge_to_the_same_numbers(tmp_path: Path) -> None:
    """What they wrote, with ranks and alphas of layers, of a class that diffusers loads adapters into and of one that
    it does not."""
    try:
        python = python_with("peft", "peft>=0.18,<0.22")
    except CannotBeHadError as error:
        pytest.skip(str(error))
    folders = {"PixArtTransformer2DModel": tiny.folder("pixart", tmp_path, half=False)}
    for name in ("sd35", "flux"):
        folders[recorded_models.stated(name)[0]] = recorded_models.save(name, tmp_path / name)
    arguments = [str(tmp_path), *(f"{name}={folder}" for name, folder in folders.items())]
    words = [str(python), "-m", "tests.support.peft_run", *arguments]
    done = subprocess.run(
        words, cwd=ROOT, env=without_xdist(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, folder in folders.items():
        [path] = [path for path in (tmp_path / name).glob("*.safetensors") if path.name != peft_run.MERGED]
        ours, theirs = loaded(folder, path, scale=peft_run.SCALE), load_file(tmp_path / name / peft_run.MERGED)
        changed = [key for key, tensor in load_file(folder / WEIGHTS).items() if not torch.equal(tensor, theirs[key])]
        assert len(changed) > 8
        model = models.load(str(folder))
        for key in changed:
            if key.removesuffix(".weight") in {ref.name for ref in model.linears()}:
                assert torch.equal(ours[key], theirs[key])
            else:  # kept, which engines store in fp16
                assert torch.equal(ours[key], models.stored_value(key, theirs[key]))


# --- what else is of the merged model --------------------------------------------------------------------------------


def test_the_hash_stands_for_the_adapters_too(pixart: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FORMS["diffusers"][0])
    plain = load(str(pixart))
    hashes = {plain.sha256, load(str(pixart), adapters=[Adapter(path, 0.5)]).sha256}
    hashes.add(load(str(pixart), adapters=[Adapter(path, 0.25)]).sha256)
    written(path, FORMS["half"][0])
    hashes.add(load(str(pixart), adapters=[Adapter(path, 0.5)]).sha256)
    assert len(hashes) == 4 and plain.sha256 == load(str(pixart)).sha256


def test_the_scale_beside_a_file_of_peft_is_hashed_with_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {f"base_model.model.{LAYER}.lora_A.weight": DOWN})
    hashes = {Adapter(path).sha256}
    for alpha in (1, 2):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}), encoding="utf-8")
        hashes.add(Adapter(path).sha256)
    assert len(hashes) == 3


def test_kept_layers_of_a_checkpoint_are_merged(pixart: Path, tmp_path: Path) -> None:
    down, up = random(RANK, 32), random(WIDTH, RANK)
    layer = "caption_projection.linear_1"
    path = written(tmp_path / "a.safetensors", {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    model = load(str(pixart), adapters=[Adapter(path)])
    assert layer in dict(model.kept())
    save_kept(model, tmp_path / "kept")
    kept = load(str(tmp_path / "kept"), kept_only=True).module.state_dict()
    assert torch.equal(kept[f"{layer}.weight"], model.module.state_dict()[f"{layer}.weight"])
    assert not torch.equal(kept[f"{layer}.weight"], loaded(pixart)[f"{layer}.weight"])


@pytest.mark.parametrize("changed", ["adapter", "model"])
def test_files_that_changed_since_the_model_was_loaded_end_a_checkpoint(
    pixart: Path, changed: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(pixart, tmp_path / "model")
    path = written(tmp_path / "a.safetensors", FORMS["diffusers"][0])
    model = load(str(folder), adapters=[Adapter(path)])
    other = path if changed == "adapter" else folder / WEIGHTS
    tensors = load_file(other)
    other.unlink()  # the model maps its file
    written(other, tensors | {name: tensor + 1 for name, tensor in list(tensors.items())[:1]})
    with pytest.raises(ModelError, match=rf"{other.name}:? .*changed since the model was loaded"):
        save_kept(model, tmp_path / "kept")
    assert not list(tmp_path.glob("kept*"))


def test_an_adapter_beside_the_model_is_told_unless_it_is_merged(pixart: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pixart, tmp_path / "model")
    path = written(folder / "pytorch_lora_weights.safetensors", FORMS["diffusers"][0])
    assert "give its file with --lora, or merge the adapter" in load(str(folder)).notes[0]
    assert load(str(folder), adapters=[Adapter(path)]).notes == ()
    of_peft = written(
        folder / "adapter_model.safetensors", {f"base_model.model.{n}": t for n, t in FORMS["no prefix"][0].items()}
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}), encoding="utf-8")
    [note] = load(str(folder), adapters=[Adapter(of_peft)]).notes
    assert note.startswith(f"{path} is an adapter and is not part of this model")


# --- refused ---------------------------------------------------------------------------------------------------------

BOTH = FORMS["diffusers"][0]
A, B = BOTH
REFUSED: dict[str, tuple[Tensors, str]] = {
    "rank 0": ({A: DOWN[:0], B: UP[:, :0]}, f"layer {LAYER}: factors of rank 0"),
    "other width": (
        {A: random(RANK, 32), B: UP},
        rf"layer {LAYER} of shape \[64, 64\] takes factors of \[3, 64\] and \[64, 3\], the adapter has \[3, 32\] and",
    ),
    "two ranks": ({A: DOWN, B: UP[:, :2]}, r"the adapter has \[3, 64\] and \[64, 2\]"),
    "NaN": ({A: DOWN * torch.nan, B: UP}, f"tensor {A} holds NaN or Inf"),
    "integers": ({A: DOWN.int(), B: UP}, f"tensor {A} is torch.int32; factors are floating-point numbers"),
    "one factor": ({A: DOWN}, f"layer {LAYER} has no up factor"),
    "nothing": ({}, "holds no tensors"),
    "another family": (
        {f"single_blocks.{i}.lora_{side}.weight": DOWN for i in range(3) for side in "AB"},
        r"tensors single_blocks.0.lora_A.weight, .* \(and 3 more\): none of its 6 tensors fits a layer of PixArtTransf",
    ),
    "one key too many": (
        BOTH | {"transformer_blocks.9.attn1.to_q.lora_A.weight": DOWN},
        "tensor transformer_blocks.9.attn1.to_q.lora_A.weight: no layer of PixArtTransformer2DModel takes that",
    ),
    "text encoder": (
        BOTH | {"text_encoder.block.0.lora_A.weight": DOWN},
        "tensor text_encoder.block.0.lora_A.weight: of another component than the denoiser",
    ),
    "Kohya's text encoder": (BOTH | {"lora_te1_x.lora_down.weight": DOWN}, "tensor lora_te1_x.* of another component"),
    "two adapters": (BOTH | FORMS["no prefix"][0], f"is the second down of {LAYER}; give one adapter in each file"),
    "a norm": (
        {"caption_projection.act_1.lora_A.weight": DOWN},
        "none of its 1 tensors fits a layer",
    ),
    "alphas of some": (
        FORMS["Kohya"][0] | {"transformer_blocks.0.attn1.to_q.lora_A.weight": DOWN},
        "layer transformer_blocks.0.attn1.to_q has no alpha, though 1 others have",
    ),
    "alpha of several": (
        FORMS["down and up, with alpha"][0] | {f"{LAYER}.alpha": torch.ones(2)},
        rf"alpha of layer {LAYER} is of shape \[2\], not one number",
    ),
    "another bias": (
        BOTH | {f"transformer.{LAYER}.lora_B.bias": random(5)},
        rf"layer {LAYER} has a bias of \[64\], the adapter one of \[5\]",
    ),
    "out of range": ({A: DOWN, B: UP * 1e6}, f"merged, {LAYER}.weight leaves the range of torch.float16; give a sma"),
    "DoRA": (
        BOTH | {f"{LAYER}.lora_magnitude_vector.weight": random(WIDTH)},
        "DoRA, which scales the merged rows anew",
    ),
    "Kohya's DoRA": (FORMS["Kohya"][0] | {f"lora_unet_{JOINED}.dora_scale": random(WIDTH)}, "DoRA, which"),
    "LoKr": ({f"{LAYER}.lokr_w1": DOWN, f"{LAYER}.lokr_w2": UP}, "LoKr, a Kronecker product; only LoRA is merged"),
    "LoHa": ({f"{LAYER}.hada_w1_a": DOWN}, "LoHa, a product of products"),
    "OFT": ({f"{LAYER}.oft_blocks": DOWN}, "OFT, which rotates weights"),
    "IA3": ({f"base_model.model.{LAYER}.ia3_l": DOWN}, "IA3, which scales activations"),
    "LoCon": (BOTH | {f"{LAYER}.lora_mid.weight": DOWN}, "LoCon with a third factor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_whole_is_refused(pixart: Path, case: str, tmp_path: Path) -> None:
    tensors, words = REFUSED[case]
    with pytest.raises(ModelError, match=f"adapter .*a.safetensors.*{words}"):
        loaded(pixart, written(tmp_path / "a.safetensors", tensors))


STATED_WRONG: dict[str, tuple[dict[str, object], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True, which is no product of two factors alone"),
    "another method": ({"peft_type": "OFT"}, "peft_type is 'OFT'; only LORA is merged here"),
    "a start that changes the base": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', which changes the",
    ),
    "no number": ({"lora_alpha": "much"}, f"lora_alpha of layer {LAYER} is 'much', not a number"),
    "a pattern that is no table": (
        {"alpha_pattern": [["attn1.to_q", 9]]},
        "alpha_pattern is .*, not a table of layers",
    ),
    "ranks that are no table": ({"rank_pattern": "attn1"}, "rank_pattern is 'attn1', not a table of layers"),
    "an expression": ({"alpha_pattern": {"(a+)+": 1}}, r"alpha_pattern has '\(a\+\)\+', which is no layer's path"),
}


@pytest.mark.parametrize("case", STATED_WRONG)
def test_what_peft_states_and_is_not_merged_here(pixart: Path, case: str, tmp_path: Path) -> None:
    config, words = STATED_WRONG[case]
    header: dict[str, object] = {f"transformer.{key}": value for key, value in config.items()}
    with pytest.raises(ModelError, match=words):
        loaded(pixart, written(tmp_path / "a.safetensors", BOTH, header))


@pytest.mark.parametrize("name", ["one", "other"])
def test_a_layer_that_shares_its_weight_is_refused(name: str, tmp_path: Path) -> None:
    """A module of two paths, and a parameter of two modules."""
    one, third = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    third.weight = one.weight
    for module in ({"one": one, "other": one}, {"one": one, "other": third}):
        whole = torch.nn.ModuleDict(module)
        path = written(tmp_path / "a.safetensors", {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP})
        with pytest.raises(ModelError, match=r"one.weight and other.weight are one parameter of the model"):
            merged(whole.state_dict(), [Adapter(path)], whole, "PixArtTransformer2DModel")


def test_two_scales_for_one_layer_are_refused(pixart: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FORMS["down and up, with alpha"][0], {"transformer.lora_alpha": 3})
    with pytest.raises(ModelError, match="both alphas of layers and PEFT's settings state a scale; keep one of them"):
        loaded(pixart, path)


def test_a_file_of_peft_without_its_scale_is_refused(pixart: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {f"base_model.model.{LAYER}.lora_A.weight": DOWN})
    with pytest.raises(
        ModelError, match=r"its scale stands in adapter_config.json, as PEFT writes it; put it beside it"
    ):
        loaded(pixart, path)


def missing(folder: Path) -> Path:
    return folder / "none.safetensors"


def pickle(folder: Path) -> Path:
    (folder / "a.bin").write_bytes(b"PK")
    return folder / "a.bin"


def torn(folder: Path) -> Path:
    path = written(folder / "a.safetensors", BOTH)
    path.write_bytes(path.read_bytes()[:-8])
    return path


def whole_folder(folder: Path) -> Path:
    written(folder / "pytorch_lora_weights.safetensors", BOTH)
    return folder


FILES: list[tuple[Callable[[Path], Path], str]] = [
    (missing, "none.safetensors is not a file here; check the path"),
    (pickle, "a.bin is a pickle, which can run code when read"),
    (torn, "a.safetensors: not a whole safetensors file"),
    (whole_folder, "is a folder; give its file, "),
]


@pytest.mark.parametrize(("make", "words"), FILES)
def test_files_that_are_no_adapter_end_a_build_before_it_starts(
    pixart: Path, make: Callable[[Path], Path], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", str(pixart), "--target", "cpu", "-o", str(tmp_path / "out"), "--json"]
    assert main(["build", "--engine", "pixart_w4a6", *flags, "--lora", f"{make(tmp_path)}:0.5"]) == 2
    printed = capsys.readouterr()
    assert words in json.loads(printed.out.splitlines()[-1])["reason"] and "Traceback" not in printed.err
    assert not list(tmp_path.glob("out*"))


def test_models_other_than_denoisers_take_none(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", BOTH)
    folder: Any = t5_folder(tmp_path)
    with pytest.raises(ModelError, match="T5EncoderModel is no denoiser, and only those take --lora; leave it away"):
        loaded(folder, path)
