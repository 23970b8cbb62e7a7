"""What a weights file may hold: layouts, prefixes, float8, harmless tensors; everything else is refused by name."""

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

from benchmarks.tools.environments import CannotBeHadError
from export.checkpoint import save
from export.errors import ModelError
from export.models.load import LoadedModel, load, save_kept
from pipeline.__main__ import main
from tests.support import original_weights, tiny
from tests.support.environments import python_with, without_xdist

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
State = dict[str, Any]
ATTENTION = "transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.folder(name, root) for name in tiny.MODELS}


@pytest.fixture
def pixart(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny PixArt that a test may change."""
    return Path(shutil.copytree(folders["pixart"], tmp_path / "model"))


def change(folder: Path, edit: Callable[[State], State]) -> None:
    """Rewrite the weights of a folder."""
    state = edit(load_file(folder / WEIGHTS))
    save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / WEIGHTS)


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def assert_same(model: LoadedModel, other: LoadedModel) -> None:
    state, expected = model.module.state_dict(), other.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


# --- layouts and prefixes ------------------------------------------------------------------------------------------


# HunyuanDiT 1.2 has no style conditions.
CASES = [*((name, {}) for name in original_weights.LAYOUTS), ("hunyuan", {"use_style_cond_and_image_meta_size": False})]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_file_in_the_layout_of_the_models_own_repository(folders, tmp_path, name, changes):
    folder = Path(shutil.copytree(folders[name], tmp_path / "diffusers"))
    if changes:
        tiny.build(name, **changes).half().save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    if name == "dit":  # the blocks share one embedder there
        first = {key: value for key, value in state.items() if "blocks.0.norm1.emb" in key}
        state |= {key.replace("blocks.0", "blocks.1"): value.clone() for key, value in first.items()}
        save_file(state, folder / WEIGHTS)
    layers = json.loads((folder / "config.json").read_text())["num_layers"]
    original = {key: value.half() for key, value in original_weights.LAYOUTS[name](state, layers).items()}
    assert not set(original) >= {key for key in state if "attn" in key}
    path = tmp_path / "original.safetensors"
    save_file({f"module.{key}": value.clone().contiguous() for key, value in original.items()}, path)
    model = load(str(path), config=str(folder / "config.json"))
    assert_same(model, load(str(folder)))
    assert set(model.used) | set(model.ignored) == {f"module.{key}" for key in original}
    assert [key for key in model.ignored if not key.endswith("y_embedding")] == []


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "_orig_mod.", "model.diffusion_model.", "module._orig_mod.", "model.module."]
)
def test_prefixes_of_wrappers(folders, tmp_path, prefix):
    path, folder = tmp_path / "one.safetensors", folders["dit"]
    save_file({prefix + key: value for key, value in load_file(folder / WEIGHTS).items()}, path)
    assert_same(load(str(path), config=str(folder)), load(str(folder)))


def test_compiled_blocks_and_a_name_that_comes_twice(pixart):
    expected = load(str(pixart))
    change(pixart, lambda state: {key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in state.items()})
    assert_same(load(str(pixart)), expected)
    change(pixart, lambda state: state | {f"{ATTENTION}.to_q.bias": torch.zeros(64)})
    with pytest.raises(ModelError, match=r"tensors .*to_q\.bias and .*to_q\.bias are both .*; remove one of them"):
        load(str(pixart))


def test_denoiser_of_a_whole_pipelines_file(folders, tmp_path):
    path, folder = tmp_path / "one.safetensors", folders["pixart"]
    state = {f"model.diffusion_model.{key}": value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(state | {"first_stage_model.conv.weight": torch.zeros(3)}, path)
    model = load(str(path), config=str(folder))
    assert_same(model, load(str(folder)))
    assert model.ignored == {"first_stage_model.conv.weight": "belongs to another part of the pipeline"}
    save_file(state | {"model_ema.proj.weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"model_ema\.proj\.weight: PixArtTransformer2DModel of this config.json has"):
        load(str(path), config=str(folder))


def positions(width: int, side: int) -> torch.Tensor:
    """The table of the original models, from their definition: [1, side * side, width] in float64."""
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    # The column comes first.
    angles = [place.flatten()[:, None] * rates for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_table_of_positions_in_an_original_file(folders, tmp_path, dtype):
    path, folder = tmp_path / "one.safetensors", folders["dit"]
    state = {key: value.clone() for key, value in original_weights.dit(load_file(folder / WEIGHTS), 2).items()}
    table = positions(64, 4).to(dtype)
    save_file(state | {"pos_embed": table}, path)
    assert load(str(path), config=str(folder)).ignored == {"pos_embed": "the table of positions that config.json makes"}
    save_file(state | {"pos_embed": table.flip(1)}, path)  # trained, or of another model
    with pytest.raises(ModelError, match=r"pos_embed of shape \(1, 16, 64\) is not the table of positions that config"):
        load(str(path), config=str(folder))


def test_a_tensor_under_both_of_its_names(folders, tmp_path):
    state = load_file(folders["dit"] / WEIGHTS)
    both = original_weights.dit(state, 2) | {"pos_embed.proj.bias": state["pos_embed.proj.bias"]}
    save_file({key: value.clone() for key, value in both.items()}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"proj\.bias and .*proj\.bias are both pos_embed\.proj\.bias; remove one"):
        load(str(tmp_path / "one.safetensors"), config=str(folders["dit"]))


def test_a_matrix_that_does_not_hold_q_k_and_v(folders, tmp_path):
    state = {
        key: value.half() for key, value in original_weights.pixart(load_file(folders["pixart"] / WEIGHTS), 2).items()
    }
    state["blocks.0.attn.qkv.weight"] = torch.zeros(100, 64)
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.qkv\.weight of shape \(100, 64\) does not hold 3 equal"):
        load(str(tmp_path / "one.safetensors"), config=str(folders["pixart"]))


# --- float8 --------------------------------------------------------------------------------------------------------


def matrices(state: State) -> list[str]:
    return [key for key, value in state.items() if "blocks" in key and key.endswith(".weight") and value.ndim == 2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights_keep_their_values(pixart, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(codes.half().float().nan_to_num(7), codes.float().nan_to_num(7))  # all of them fit fp16
    change(pixart, lambda state: state | {key: state[key].to(dtype) for key in matrices(state)})
    state, model = load_file(pixart / WEIGHTS), load(str(pixart)).module.state_dict()
    assert len(matrices(state)) == 20
    assert all(torch.equal(model[key], state[key].float()) for key in matrices(state))


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)], ids=str)
def test_float8_with_scales_is_their_product(pixart, name, shape):
    def quantize(state: State) -> State:
        scales = {}
        for key in matrices(state):
            rows = len(state[key]) if -1 in shape else 1
            scale = torch.linspace(0.5, 0.7, rows) * 1e-3
            state[key] = (state[key].float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            scales[key.removesuffix("weight") + name] = scale.reshape(shape)
            scales[key.removesuffix("weight") + "input_scale"] = torch.tensor(3.0)
        return state | scales | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}

    change(pixart, quantize)
    state, model = load_file(pixart / WEIGHTS), load(str(pixart))
    loaded = model.module.state_dict()
    for key in matrices(state):
        scale = state[key.removesuffix("weight") + name].double()
        exact = state[key].double() * (scale.reshape(-1, 1) if -1 in shape else scale)
        assert torch.equal(loaded[key], exact.float())  # rounded once
    assert len(model.ignored) == 21 and "scaled_fp8" in model.ignored


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Names of the parts of an NVFP4 weight: codes, scales of blocks, global scale, and the range of the layer's input.
NVFP4 = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def in_nvfp4(state: State, names: tuple[str, ...]) -> State:
    """The state with random codes and scales in the place of all matrices."""
    parts: State = {}
    for seed, key in enumerate(matrices(state)):
        generator = torch.Generator().manual_seed(seed)
        n, k = state.pop(key).shape
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
        blocks = (torch.rand(n, k // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
        whole = torch.tensor([3e-5 * (seed + 1)])
        values = (codes, blocks, 1 / whole if "global" in names[2] else whole, torch.tensor(3.0))
        parts |= {key.removesuffix("weight") + name: value for name, value in zip(names, values, strict=True)}
    return state | parts


@pytest.mark.parametrize("kind", NVFP4)
def test_nvfp4_is_the_product_of_code_and_scales(pixart, kind):
    names = NVFP4[kind]
    change(pixart, lambda state: in_nvfp4(state, names))
    state, model = load_file(pixart / WEIGHTS), load(str(pixart))
    loaded = model.module.state_dict()
    layers = [key.removesuffix(names[2]) for key in state if key.endswith(names[2])]
    assert len(layers) == 20 and len(model.ignored) == 20
    for layer in layers:
        codes, blocks, whole = (state[layer + name] for name in names[:3])
        scale = blocks.float() / whole if kind == "compressed-tensors" else blocks.float() * whole
        for column in (0, 1, 17, 63):
            code = codes[:, column // 2].long() >> (4 * (column % 2)) & 15
            expected = E2M1[code] * scale[:, column // 16]
            assert torch.equal(loaded[f"{layer}weight"][:, column], expected)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("form", ["float-quantized", "nvfp4-pack-quantized"])
def test_what_compressed_tensors_writes_is_read_as_it_reads_it(pixart, form, tmp_path):
    """In the type that it decompresses to, which is narrower than ours."""
    try:
        python = python_with("compressed_tensors", "compressed-tensors>=0.20,<0.21")
    except CannotBeHadError as error:
        pytest.skip(str(error))
    words = [str(python), "-m", "tests.support.compressed_tensors_run", str(pixart / WEIGHTS), str(tmp_path)]
    done = subprocess.run(
        words, cwd=ROOT, env=without_xdist(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copyfile(tmp_path / f"{form}.safetensors", pixart / WEIGHTS)
    configure(pixart, quantization_config={"quant_method": "compressed-tensors", "format": form})
    model, theirs = load(str(pixart)).module.state_dict(), load_file(tmp_path / f"{form}-back.safetensors")
    assert len(theirs) == 20 and all(torch.equal(model[key].to(back.dtype), back) for key, back in theirs.items())


NVFP4_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "lost scales": ({"weight_scale": None}, "goes with scales of blocks that the file has not"),
    "lost codes": ({"weight": None}, "goes with codes that the file has not"),
    "wide codes": (
        {"weight": torch.ones(64, 64)},
        r"codes that are torch.float32 \(64, 64\), not bytes of two",
    ),
    "other blocks": (
        {"weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn)},
        r"scales of blocks that are torch.float8_e4m3fn \(64, 2\), not float8_e4m3fn \(64, 4\)",
    ),
    "negative scale of a block": (
        {"weight_scale": (-torch.ones(64, 4)).to(torch.float8_e4m3fn)},
        "goes with scales of blocks that are negative or NaN",
    ),
    "NaN for a block's": (
        {"weight_scale": torch.full((64, 4), torch.nan).to(torch.float8_e4m3fn)},
        "goes with scales of blocks that are negative or NaN",
    ),
    "two global scales": ({"weight_scale_2": torch.ones(2)}, r"is torch.float32 \(2,\), not one number"),
    "negative": ({"weight_scale_2": torch.tensor(-1.0)}, "is not finite and positive"),
}


@pytest.mark.parametrize("fault", NVFP4_FAULTS)
def test_parts_that_are_no_nvfp4_weight(pixart, fault):
    parts, message = NVFP4_FAULTS[fault]

    def edit(state: State) -> State:
        changed = in_nvfp4(state, NVFP4["modelopt"]) | {f"{ATTENTION}.to_q.{key}": part for key, part in parts.items()}
        return {key: value for key, value in changed.items() if value is not None}

    change(pixart, edit)
    with pytest.raises(ModelError, match=rf"to_q.weight_scale_2 is a scale of NVFP4 and .*{message}; give the float"):
        load(str(pixart))


@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "float4_e2m1fn_x2", "uint8", "bool", "complex64"])
def test_types_that_are_no_weights(pixart, kind):
    """Packed types hold two numbers in an element; this one has the right number of elements."""
    codes = torch.zeros(64 * 64 * 8, dtype=torch.uint8).view(getattr(torch, kind))[: 64 * 64].reshape(64, 64)
    state = load_file(pixart / WEIGHTS) | {Q_WEIGHT: codes}
    save_file(state, pixart / WEIGHTS)
    with pytest.raises(ModelError, match=rf"to_q\.weight is torch\.{kind}; weights must be fp16, bf16 or fp32"):
        load(str(pixart))


def test_float64_is_rounded_to_float32(pixart):
    change(pixart, lambda state: state | {key: state[key].double() + 1e-12 for key in matrices(state)})
    state, model = load_file(pixart / WEIGHTS), load(str(pixart)).module.state_dict()
    assert all(torch.equal(model[key], state[key].float()) for key in matrices(state))


Q_WEIGHT = f"{ATTENTION}.to_q.weight"
BAD_SCALES = {
    "of blocks": (torch.ones(2, 2), "has shape \\(2, 2\\), neither one number nor one for each of 64 channels"),
    "negative": (torch.tensor(-1.0), "is not finite and positive"),
    "zero": (torch.zeros(64), "is not finite and positive"),
    "not finite": (torch.tensor(float("inf")), "is not finite and positive"),
    "of integers": (torch.tensor(1), "is torch.int64"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_are_refused(pixart, case):
    scale, message = BAD_SCALES[case]
    codes = {Q_WEIGHT: torch.ones(64, 64).to(torch.float8_e4m3fn), f"{ATTENTION}.to_q.weight_scale": scale}
    change(pixart, lambda state: state | codes)
    with pytest.raises(ModelError, match=f"to_q.weight_scale is a scale and {message}; give the float model"):
        load(str(pixart))


def test_a_scale_without_a_float8_weight(pixart):
    change(pixart, lambda state: state | {f"{ATTENTION}.to_q.weight_scale": torch.tensor(2.0)})
    with pytest.raises(ModelError, match=r"is a scale and belongs to a weight that is torch.float16 \(64, 64\)"):
        load(str(pixart))


@pytest.mark.parametrize("mark", [f"{ATTENTION}.to_q.input_scale", f"{ATTENTION}.to_q.scale_input", "scaled_fp8"])
def test_a_scale_that_got_lost(pixart, mark):
    codes = {Q_WEIGHT: torch.ones(64, 64).to(torch.float8_e4m3fn), mark: torch.tensor(3.0)}
    change(pixart, lambda state: state | codes)
    with pytest.raises(ModelError, match=rf"to_q\.weight is float8 without a scale, though {mark} says"):
        load(str(pixart))


K_WEIGHT = f"{ATTENTION}.to_k.weight"


def test_a_scale_that_other_matrices_have(pixart):
    ones = torch.ones(64, 64).to(torch.float8_e4m3fn)
    scales = {f"{ATTENTION}.to_k.weight_scale": torch.tensor(0.1)}
    change(pixart, lambda state: state | {Q_WEIGHT: ones, K_WEIGHT: ones} | scales)
    with pytest.raises(ModelError, match=r"to_q\.weight is float8 without a scale, though .*to_k\.weight_scale says"):
        load(str(pixart))


def test_scales_of_which_the_configuration_alone_tells(pixart):
    """Without it, weights were cast; with it, each stands for another number."""
    change(pixart, lambda state: state | {Q_WEIGHT: torch.ones(64, 64).to(torch.float8_e4m3fn)})
    assert load(str(pixart)).module.state_dict()[Q_WEIGHT].float().eq(1).all()
    configure(pixart, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(ModelError, match=r"to_q\.weight is float8 without a scale, though quantization_config says"):
        load(str(pixart))


# --- used, harmless, refused ---------------------------------------------------------------------------------------


def test_harmless_tensors_are_told(folders, tmp_path):
    folder = Path(shutil.copytree(folders["pixart"], tmp_path / "model"))
    table = load(str(folder)).module.pos_embed.pos_embed
    extra = {"caption_projection.y_embedding": torch.randn(4, 32), "pos_embed.pos_embed": table.half()}
    change(folder, lambda state: state | extra)
    model = load(str(folder))
    assert model.ignored.keys() == extra.keys()
    assert set(model.used) == set(load_file(folder / WEIGHTS)) - set(extra)
    change(folder, lambda state: state | {"pos_embed.pos_embed": table * 1.01})
    with pytest.raises(ModelError, match=r"pos_embed of shape \(1, 16, 64\) is not the table of positions that config"):
        load(str(folder))


NORM = torch.ones(32)
# name of a tensor that is added -> what is said of it
REFUSED = {
    f"{ATTENTION}.to_q.lora_A.default.weight": "part of an adapter that was not merged; give the folder of its base",
    f"{ATTENTION}.processor.to_q_lora.up.weight": "part of an adapter that was not merged; give the folder",
    "lora_unet_blocks_0.alpha": "part of an adapter that was not merged; give the folder",
    f"{ATTENTION}.norm_q.weight": "a norm of queries or keys, which the class does not compute with this config.json",
    "transformer_blocks.1.attn2.norm_k.bias": "a norm of queries or keys, which the class does not compute with this",
    f"{ATTENTION}.sr.weight": "a part of key and value compression, which the class does not compute; give a model",
    "transformer_blocks.2.ff.net.2.weight": "a layer beyond config.json's num_layers of 2; correct num_layers",
    f"{ATTENTION}.to_q.weight_scale_inv": "a scale that no weight of the file goes with; give the float model",
    f"{ATTENTION}.to_q.weight_quantizer._amax": "part of a quantized weight in a form that is not read; give the float",
    f"{ATTENTION}.to_q.pre_quant_scale": "part of a quantized weight in a form that is not read; give the float model",
    f"{ATTENTION}.to_q.svdquant_lora_a": "part of a quantized weight in a form that is not read; give the float model",
    "nothing.input_scale": "a scale that no weight of the file goes with; give the float model",
    f"{ATTENTION}.to_q.input_amax": "part of a quantized weight in a form that is not read; give the float model",
    f"ema.{ATTENTION}.to_q.bias": "a tensor of the model under the prefix 'ema.', which not all of its tensors have",
    "vae.conv.weight": "PixArtTransformer2DModel of this config.json has no such tensor; config.json and the weights",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_without_a_use_is_refused_by_name(pixart, name):
    change(pixart, lambda state: state | {name: NORM, "zzz.other": NORM})
    with pytest.raises(ModelError) as error:
        load(str(pixart))
    assert str(error.value).startswith(f"{pixart / WEIGHTS}: tensor ")
    assert f"tensor {name}: {REFUSED[name]}" in str(error.value)


def test_biases_that_the_configuration_denies(pixart):
    configure(pixart, attention_bias=False)
    with pytest.raises(
        ModelError, match=r"attn1\.to_k\.bias \(and 11 more\): a bias of a layer that has none by config"
    ):
        load(str(pixart))


@pytest.mark.parametrize("prefix", ["net.", "generator.core."])
def test_a_prefix_that_no_wrapper_adds_is_named(pixart, prefix):
    change(pixart, lambda state: {prefix + key: value for key, value in state.items()})
    count = len(load_file(pixart / WEIGHTS))
    with pytest.raises(ModelError, match=rf"\(and {count - 1} more\): a tensor .* under the prefix '{prefix}', which"):
        load(str(pixart))


def test_no_bias_is_denied_by_a_configuration_that_has_them(pixart):
    change(pixart, lambda state: state | {"transformer_blocks.0.attn3.to_q.bias": NORM})
    with pytest.raises(
        ModelError, match=r"attn3\.to_q\.bias: PixArtTransformer2DModel of this config.json has no such"
    ):
        load(str(pixart))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 4}, "unknown"),
        ("modelopt", "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt, quant_algo W4A8_AWQ"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, format pack-quantized",
        ),
        ({"quant_method": ["modelopt"]}, r"\['modelopt'\]"),
    ],
)
def test_configuration_of_a_quantized_model(pixart, quantization, words):
    configure(pixart, quantization_config=quantization)
    with pytest.raises(ModelError, match=rf"says that the weights are quantized already \({words}\); give the float"):
        load(str(pixart))


TRANSFORMED = {"format": "nvfp4-pack-quantized", "transform_config": {"config_groups": {"R1": {}}}}


def test_a_configuration_with_rotations_is_refused(pixart):
    change(pixart, lambda state: in_nvfp4(state, NVFP4["compressed-tensors"]))
    configure(pixart, quantization_config={"quant_method": "compressed-tensors"} | TRANSFORMED)
    with pytest.raises(ModelError, match=r"quantized already \(compressed-tensors, with transform_config\); give"):
        load(str(pixart))


@pytest.mark.parametrize("kind", NVFP4)
def test_checkpoints_of_both_programs_are_read(pixart, kind):
    """With the configuration that lies beside them, which changes nothing."""
    change(pixart, lambda state: in_nvfp4(state, NVFP4[kind]))
    plain = load(str(pixart))
    said = {"modelopt": {"quant_algo": "NVFP4"}, "compressed-tensors": {"format": "nvfp4-pack-quantized"}}
    configure(pixart, quantization_config={"quant_method": kind, **said[kind]})
    assert_same(load(str(pixart)), plain)


def test_a_tensor_in_two_shards(tmp_path):
    shards = tiny.folder("dit", tmp_path, shard_size="100KB")
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    state = load_file(first)
    save_file(load_file(second) | dict([next(iter(state.items()))]), second)
    with pytest.raises(ModelError, match=f"{second.name}: tensor {next(iter(state))} is in {first.name} too; remove"):
        load(str(shards))


def test_the_command_line_says_it_in_a_sentence(pixart, capsys):
    change(pixart, lambda state: state | {f"{ATTENTION}.norm_q.weight": NORM})
    arguments = ["--engine", "pixart_w4a6", "-m", str(pixart), "--target", "cpu", "--dry-run"]
    assert main(["build", *arguments]) == 2
    printed = capsys.readouterr()
    assert f"FAILED {pixart / WEIGHTS}: tensor {ATTENTION}.norm_q.weight: a norm of" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_what_is_kept_of_an_original_layout_is_read_back(folders, tmp_path, name):
    """`calibrate` keeps what is not quantized under the names of diffusers."""
    state = original_weights.LAYOUTS[name](load_file(folders[name] / WEIGHTS), 2)
    save_file({key: value.half().clone() for key, value in state.items()}, tmp_path / "one.safetensors")
    model = load(str(tmp_path / "one.safetensors"), config=str(folders[name]))
    save(tiny.quantized(model), tmp_path / "checkpoint")
    save_kept(model, tmp_path / "kept")
    kept = load(str(tmp_path / "kept"), kept_only=True)
    quantized = {ref.name for ref in model.linears()}
    expected = {
        key: value for key, value in model.module.state_dict().items() if key.rpartition(".")[0] not in quantized
    }
    assert expected and all(torch.equal(kept.module.state_dict()[key], value) for key, value in expected.items())
