"""What NVIDIA ModelOpt calibrated becomes layers of ours: number for number where the formats are the same, and refused
with the quantizer's name where they are not. States are made by hand here; test_modelopt_itself.py runs ModelOpt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export import checkpoint
from export.errors import EnvironmentLacksError, ModelError, RecipeError
from export.models.load import LoadedModel, load
from export.models.weights import WEIGHTS_FILE
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.calibrate import __main__ as command
from pipeline.calibrate import adopt, calibrate
from pipeline.calibrate.modelopt import backend
from pipeline.calibrate.modelopt.auto_quantize import auto_quantized, random_direction
from pipeline.calibrate.modelopt.layers import Taken
from pipeline.calibrate.modelopt.rounding import (
    Refused,
    WeightRounding,
    input_rounding,
    own_weight,
    weight_rounding,
)
from pipeline.calibrate.modelopt.state import STATE_FILE, State, read_state
from pipeline.calibrate.modelopt.take_over import RECIPE_FILE, recipe_of_file
from tests.support import tiny

FP8 = {"_num_bits": (4, 3), "_axis": 0, "_fake_quant": True, "_if_quant": True}
FP8_INPUT = FP8 | {"_axis": None}
INT4_GROUPS = FP8 | {"_num_bits": 4, "_axis": (0,), "_block_sizes": {-1: 16}, "_narrow_range": True}
TOKEN = FP8 | {"_dynamic": True, "_axis": (0, 1)}
OFF = {"_disabled": True}


def own(role: str, **arguments: Any) -> dict[str, Any]:
    """Settings of a quantizer of our backend."""
    return FP8 | {"backend": "ditc", "backend_extra_args": {"role": role, **arguments}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny.folder("pixart", tmp_path_factory.mktemp("modelopt"))))


def state(model: LoadedModel, weight: dict[str, Any] = FP8, activation: dict[str, Any] = FP8_INPUT) -> State:
    """A state in which all linears have quantizers with these settings, and the amax that goes with them."""
    tensors = {name: tensor.float() for name, tensor in model.module.state_dict().items()}
    quantizers: dict[str, Any] = {}
    for linear in model.linears():
        w = tensors[f"{linear.name}.weight"]
        blocks = (weight.get("_block_sizes") or {}).get(-1)
        amax = w.reshape(-1, blocks or w.shape[1]).abs().amax(1, keepdim=True)
        tensors[f"{linear.name}.weight_quantizer._amax"] = amax
        tensors[f"{linear.name}.input_quantizer._amax"] = torch.tensor(3.5)
        quantizers |= {f"{linear.name}.weight_quantizer": weight, f"{linear.name}.input_quantizer": activation}
        quantizers[f"{linear.name}.output_quantizer"] = OFF
    return State(tensors, quantizers, "state")


def saved(state: State, path: Path, mode: str = "max_calibrate") -> Path:
    """The file that ModelOpt writes of it."""
    modes = [
        ("quantize", {"metadata": {"quantizer_state": {}}}),
        (mode, {"metadata": {"quantizer_state": state.quantizers}}),
    ]
    torch.save({"modelopt_state": {"modelopt_state_dict": modes}, "model_state_dict": state.tensors}, path)
    return path


def saved_folder(state: State, folder: Path, mode: str = "max_calibrate") -> Path:
    """The folder that a model's save_pretrained writes of it, once ModelOpt has been told to add its part."""
    file = saved(state, folder.with_suffix(".pt"), mode)
    conversions = torch.load(file, weights_only=True)["modelopt_state"] | {"modelopt_version": "0.47.0"}
    folder.mkdir()
    torch.save(conversions, folder / STATE_FILE)
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def by_modelopt(w: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """ModelOpt's E4M3, as its fp8_eager computes it."""
    scale = 448.0 / amax
    return (w * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * (1 / scale)


def test_e4m3_is_what_modelopt_multiplies_with(model: LoadedModel) -> None:
    given = state(model)
    for linear in model.linears():
        layer = Taken(model, given).layer(linear.name)
        w, amax = (given.tensors[f"{linear.name}.{key}"] for key in ("weight", "weight_quantizer._amax"))
        np.testing.assert_array_equal(layer.dequantized().astype(np.float32), by_modelopt(w, amax).numpy())
        assert (layer.weight_format, layer.activation_scaling, layer.granularity) == (
            "E4M3",
            "per_tensor",
            "per_channel",
        )
        assert layer.activation_scale == np.float32(3.5) / np.float32(448)


def test_one_amax_for_the_tensor_serves_all_channels(model: LoadedModel) -> None:
    given, name = state(model), model.linears()[0].name
    tensors = {**given.tensors, f"{name}.weight_quantizer._amax": torch.tensor(0.7)}
    layer = Taken(model, replace(given, tensors=tensors)).layer(name)
    np.testing.assert_array_equal(
        layer.dequantized().astype(np.float32), by_modelopt(tensors[f"{name}.weight"], torch.tensor(0.7)).numpy()
    )


def test_integers_in_groups_have_the_same_codes(model: LoadedModel) -> None:
    """ModelOpt divides by what we multiply with: two roundings of difference."""
    given, name = state(model, INT4_GROUPS, FP8 | {"_num_bits": 8, "_axis": None}), model.linears()[0].name
    layer = Taken(model, given).layer(name)
    w, amax = given.tensors[f"{name}.weight"], given.tensors[f"{name}.weight_quantizer._amax"]
    scale = torch.tensor(7.0) / amax
    codes = (w.reshape(-1, 16) * scale).round().clamp(-7, 7)
    np.testing.assert_array_equal(layer.integers().reshape(-1, 16), codes.numpy())
    np.testing.assert_allclose(layer.dequantized(), (codes / scale).reshape(w.shape).numpy(), rtol=2.0**-22)
    assert (layer.granularity, layer.group_size, layer.activation_format) == ("group", 16, "INT8")


def test_a_lowest_integer_that_ours_has_not_is_refused(model: LoadedModel) -> None:
    given, name = state(model, INT4_GROUPS | {"_narrow_range": False}), model.linears()[0].name
    key = f"{name}.weight_quantizer._amax"
    clipped = replace(given, tensors={**given.tensors, key: given.tensors[key] / 2})
    with pytest.raises(RecipeError, match=rf"{name}.weight_quantizer rounds to -8, which INT4 has not; set"):
        Taken(model, clipped).layer(name)


def test_a_dead_channel_is_zero(model: LoadedModel) -> None:
    """Its scale may be any: ModelOpt takes 448 and 0."""
    for settings in (FP8, FP8 | {"_num_bits": 8}):
        given, name = state(model, settings), model.linears()[0].name
        weight, amax = (given.tensors[f"{name}.{key}"].clone() for key in ("weight", "weight_quantizer._amax"))
        weight[3], amax[3] = 0, 0
        changed = {f"{name}.weight": weight, f"{name}.weight_quantizer._amax": amax}
        layer = Taken(model, replace(given, tensors={**given.tensors, **changed})).layer(name)
        assert not layer.dequantized()[3].any() and layer.dequantized()[2].any()


def test_balance_and_low_rank_branch_are_taken_over(model: LoadedModel) -> None:
    """The branch reads the balanced input there, and the input itself here."""
    given, linear = state(model), model.linears()[0]
    n, k = linear.module.weight.shape
    scale, down, up = torch.rand(k) + 0.5, torch.randn(4, k), torch.randn(n, 4)
    parts = {"input_quantizer._pre_quant_scale": scale, "weight_quantizer._svdquant_lora_a": down}
    parts["weight_quantizer._svdquant_lora_b"] = up
    named = {f"{linear.name}.{key}": tensor for key, tensor in parts.items()}
    layer = Taken(model, replace(given, tensors={**given.tensors, **named})).layer(linear.name)
    assert layer.input_multiplier is not None and layer.lora_down is not None and layer.lora_up is not None
    np.testing.assert_array_equal(layer.input_multiplier, scale.numpy())
    np.testing.assert_array_equal(layer.lora_down[0], (down * scale).numpy())
    np.testing.assert_array_equal(layer.lora_up[0], up.numpy())
    assert layer.router is None


WEIGHTS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NVFP4": (
        {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
        "has scales that are rounded themselves (E2M1, NVFP4 and its like)",
    ),
    "MXFP4": (
        {"_num_bits": (2, 1), "_dynamic": True, "_block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
        "has scales that are rounded themselves (E2M1, an MX format)",
    ),
    "blocks of rows": ({"_block_sizes": {-1: 128, -2: 128}}, "has blocks of {-1: 128, -2: 128}; weights have groups"),
    "other axis": ({"_axis": 1}, "has a scale for each of the axes 1; weights have one"),
    "5 bits": ({"_num_bits": 5}, "rounds to 5 bits; of ModelOpt's own there are E4M3, INT4, INT6 and INT8"),
    "E5M2": ({"_num_bits": (5, 2)}, "rounds to E5M2"),
    "dynamic": ({"_dynamic": True}, "rounds weights with scales found at run time, E4M3"),
    "rotated": ({"_rotate": {"enable": True}}, "rotates its tensor"),
    "affine": ({"_bias": {-1: None}}, "has a bias (affine quantization)"),
    "compressed": ({"_fake_quant": False}, "holds a compressed weight; save before mtq.compress"),
    "sequence": ({"is_sequential_quantizer": True}, "is a sequence of quantizers"),
    "backend": ({"backend": "psx"}, "runs the backend 'psx'"),
    "unfinished": ({"_if_calib": True}, "does not quantize now; finish the calibration"),
    "LSQ": ({"_lsq": True}, "learns its scales"),
    "unsigned": ({"_num_bits": 8, "_unsigned": True}, "rounds to unsigned integers; set unsigned=False"),
    "dynamic blocks": ({"_block_sizes": {-1: 16, "type": "dynamic"}}, "rounds weights with scales found at run time"),
    "empty blocks": ({"_block_sizes": {-1: 0}}, "has blocks of {-1: 0}; give a number of channels"),
    "no dictionary": ({"_block_sizes": [16]}, "has block_sizes [16]; they are a dictionary"),
    "strange arguments": ({"backend": "ditc", "backend_extra_args": [1]}, "has backend_extra_args [1]; they are a"),
    "constant": ({"_use_constant_amax": True}, "has a constant instead of a calibrated amax"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", WEIGHTS_REFUSED)
def test_weights_without_an_equal_are_refused(case: str) -> None:
    settings, words = WEIGHTS_REFUSED[case]
    with pytest.raises(Refused) as caught:
        weight_rounding(FP8 | settings)
    assert str(caught.value).startswith(words)


INPUTS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unsigned": ({"_unsigned": True}, "rounds to unsigned integers"),
    "channels": ({"_axis": -1}, "has calibrated scales per channel or block of its input"),
    "blocks": ({"_block_sizes": {-1: 64}}, "has calibrated scales per channel or block"),
    "run time, all tokens": ({"_dynamic": True, "_axis": None}, "finds scales at run time in blocks, or one for all"),
    "run time, each sample": ({"_dynamic": True, "_axis": (0,)}, "finds scales at run time in blocks, or one for all"),
    "run time, each number": ({"_dynamic": True, "_axis": (0, 1, 2)}, "finds scales at run time in blocks, or one for"),
    "run time, blocks": (
        {"_dynamic": True, "_block_sizes": {-1: 32, "type": "dynamic"}},
        "finds scales at run time in",
    ),
    "weight's role": (own("weight", format="E2M1"), "has the role 'weight' of our backend where 'input' belongs"),
    "no format": (own("input", format="E9M9"), "has format 'E9M9'"),
    "group": (own("input", format="E2M3", group_size=-1), "has group_size -1"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", INPUTS_REFUSED)
def test_inputs_without_an_equal_are_refused(case: str) -> None:
    settings, words = INPUTS_REFUSED[case]
    with pytest.raises(Refused) as caught:
        input_rounding(FP8_INPUT | settings)
    assert str(caught.value).startswith(words)


@pytest.mark.fast
def test_inputs_with_an_equal() -> None:
    before_the_first_call = {"_dynamic": True, "_axis": None, "_block_sizes": {-1: None, "type": "dynamic"}}
    for settings, scaling in (
        (FP8_INPUT, "per_tensor"),
        (TOKEN, "per_token"),
        (FP8 | before_the_first_call, "per_token"),
    ):
        assert input_rounding(settings).scaling == scaling
    assert input_rounding(TOKEN | {"_axis": (0,)}, leading=(1,)).scaling == "per_token"
    assert input_rounding(own("input", format="E2M3", group_size=32)).group_size == 32


def test_the_message_names_the_quantizer(model: LoadedModel) -> None:
    given, name = state(model), model.linears()[1].name
    for settings, message in (
        (FP8 | {"_num_bits": 5}, rf"state: {name}.weight_quantizer rounds to 5 bits"),
        (
            OFF,
            rf"{name}.weight_quantizer is disabled and .*; enable it, or --set 'keep=\[\"{name}\"\]' keeps it in float",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            Taken(model, replace(given, quantizers={**given.quantizers, f"{name}.weight_quantizer": settings}))


def test_linears_that_are_not_quantized_are_told_with_the_setting_that_keeps_them(
    model: LoadedModel, tmp_path: Path
) -> None:
    given, names = state(model), [linear.name for linear in model.linears()][:3]
    off = {f"{name}.{part}": OFF for name in names for part in ("weight_quantizer", "input_quantizer")}
    mixed = replace(given, quantizers={**given.quantizers, **off})
    keep = "keep=[" + ", ".join(f'"{name}"' for name in names) + "]"
    with pytest.raises(RecipeError) as caught:
        Taken(model, mixed)
    share = f"3 of {len(model.linears())} linears are not quantized"
    assert str(caught.value) == f"state: {share}; --set '{keep}' keeps them in float"
    recipe = recipes.with_settings(recipes.load("pixart_w4a6"), [f"model={model.source}", keep])
    taken = Taken(recipes.load_float_model(recipe), mixed)
    assert list(taken.rows) == [linear.name for linear in model.linears()][3:]


@pytest.mark.parametrize("path", ["transformer_blocks.0.attn1.q_bmm_quantizer", "proj_out.weight_quantizer"])
def test_quantizers_of_what_stays_in_float_are_refused(path: str, model: LoadedModel) -> None:
    given = state(model)
    with pytest.raises(RecipeError, match=rf"state: {path} is enabled, which has no place here: inputs and"):
        Taken(model, replace(given, quantizers={**given.quantizers, path: FP8}))
    Taken(model, replace(given, quantizers={**given.quantizers, path: OFF}))


@pytest.mark.parametrize("rotation", [True, {"enable": True}])
def test_rotations_that_disabled_quantizers_make_are_refused(rotation: object, model: LoadedModel) -> None:
    given = state(model)
    rotating = {**given.quantizers, "proj_out.input_quantizer": OFF | {"_rotate": rotation}}
    with pytest.raises(
        RecipeError, match=r"state: proj_out.input_quantizer rotates its tensor, disabled or not; leave"
    ):
        Taken(model, replace(given, quantizers=rotating))


def test_an_amax_that_scales_of_run_time_are_not_found_by_is_refused(model: LoadedModel) -> None:
    """ModelOpt takes it for every token, dynamic or not; our backend looks at none."""
    name = model.linears()[0].name
    with pytest.raises(
        RecipeError, match=rf"state: {name}.input_quantizer finds its scales at run time and has an amax"
    ):
        Taken(model, state(model, activation=TOKEN))
    Taken(model, state(model, activation=own("input", format="E2M3")))
    given = state(model, activation=TOKEN)
    tensors = {key: tensor for key, tensor in given.tensors.items() if not key.endswith("input_quantizer._amax")}
    assert Taken(model, replace(given, tensors=tensors)).layer(name).activation_scaling == "per_token"


def test_groups_that_do_not_divide_the_channels_are_refused_by_the_quantizers_name(model: LoadedModel) -> None:
    """ModelOpt fills the last one up with zeros."""
    given, name = state(model, INT4_GROUPS), model.linears()[0].name
    uneven = {**given.quantizers, f"{name}.weight_quantizer": INT4_GROUPS | {"_block_sizes": {-1: 24}}}
    with pytest.raises(
        RecipeError, match=rf"state: {name}.weight_quantizer has groups of 24, .* its 64 input channels"
    ):
        Taken(model, replace(given, quantizers=uneven))


def test_a_missing_amax_is_refused(model: LoadedModel) -> None:
    given, key = state(model), f"{model.linears()[0].name}.input_quantizer._amax"
    tensors = {name: tensor for name, tensor in given.tensors.items() if name != key}
    with pytest.raises(RecipeError, match="input_quantizer has no amax; calibrate it with a forward loop"):
        Taken(model, replace(given, tensors=tensors))


LORA = "weight_quantizer._svdquant_lora_"
STRAY: dict[str, tuple[str, torch.Tensor, str]] = {
    "negative": ("weight_quantizer._amax", torch.tensor(-1.0), "has an amax that is negative, NaN or Inf"),
    "NaN": ("input_quantizer._amax", torch.tensor(torch.nan), "has an amax that is negative, NaN or Inf"),
    "half a branch": ("weight_quantizer._svdquant_lora_a", torch.ones(4, 64), "has one of SVDQuant's two matrices"),
    "two values": ("input_quantizer._amax", torch.ones(64), "has 64 values of amax where one belongs"),
    "no numbers": (
        "weight_quantizer._amax",
        torch.ones(64, device="meta"),
        "._amax is no plain tensor of real numbers",
    ),
    "complex": ("weight_quantizer._amax", torch.ones(64) * 1j, "._amax is no plain tensor of real numbers"),
    "weight's scale": ("weight_quantizer._pre_quant_scale", torch.ones(64), "has a pre_quant_scale; only inputs"),
    "output's scale": ("output_quantizer._pre_quant_scale", torch.ones(64), "has a pre_quant_scale; only inputs"),
}


@pytest.mark.parametrize("case", STRAY)
def test_tensors_that_would_be_read_wrongly_are_refused(case: str, model: LoadedModel) -> None:
    key, tensor, message = STRAY[case]
    given, name = state(model), model.linears()[0].name
    start = f"{name}.{key.partition('.')[0]}" + " " * (not message.startswith("."))
    with pytest.raises((ModelError, RecipeError), match=start + message):
        Taken(model, replace(given, tensors={**given.tensors, f"{name}.{key}": tensor})).layer(name)


def test_branches_of_other_sizes_are_refused(model: LoadedModel) -> None:
    given, name = state(model), model.linears()[0].name
    for down, up in ((torch.ones(4, 32), torch.ones(64, 4)), (torch.ones(4, 64), torch.ones(64, 5))):
        tensors = {**given.tensors, f"{name}.{LORA}a": down, f"{name}.{LORA}b": up}
        with pytest.raises(
            ModelError, match=rf"{name}.weight_quantizer has matrices of SVDQuant of the shapes .*; its"
        ):
            Taken(model, replace(given, tensors=tensors)).layer(name)


@pytest.mark.parametrize(
    "name", ["transformer_blocks.2.ff.net.2.weight", "transformer_blocks.0.attn1.to_q.lora_A.weight"]
)
def test_what_the_model_has_not_is_refused(name: str, model: LoadedModel) -> None:
    """A layer too many or an adapter would else be lost without a word."""
    given = state(model)
    with pytest.raises(ModelError, match=rf"state: {name} is no tensor of .*, nor a quantizer's; give the model that"):
        Taken(model, replace(given, tensors={**given.tensors, name: torch.ones(4, 64)}))
    of_quantizer = f"{model.linears()[0].name}.output_quantizer._amax"
    Taken(model, replace(given, tensors={**given.tensors, of_quantizer: torch.ones(1)}))


def test_a_state_of_another_model_is_refused(model: LoadedModel) -> None:
    given = state(model)
    whole = {**given.tensors, "proj_out.bias": given.tensors["proj_out.bias"].to(torch.int8)}
    with pytest.raises(ModelError, match=r"proj_out.bias of .* is another there"):  # what remains of it is equal
        Taken(model, replace(given, tensors=whole))
    other = {**given.tensors, "proj_out.weight": given.tensors["proj_out.weight"] + 1}
    with pytest.raises(ModelError, match=r"proj_out.weight of .* is another there; give the model that ModelOpt"):
        Taken(model, replace(given, tensors=other))
    del other["proj_out.weight"]
    with pytest.raises(ModelError, match=r"proj_out.weight of .* is not in it"):
        Taken(model, replace(given, tensors=other))


def test_files_that_are_none_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(ModelError, match=r"no such file; save the quantized model with modelopt\.torch\.opt\.save"):
        read_state(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match="cannot be read as tensors and plain values"):
        read_state(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ModelError, match="it is not what ModelOpt saves"):
        read_state(path)
    torch.save({"modelopt_state": SimpleNamespace()}, path)
    with pytest.raises(ModelError, match="cannot be read as tensors and plain values"):  # it would run code
        read_state(path)
    with pytest.raises(RecipeError, match="ModelOpt's mode 'real_quantize' changed more than quantizers"):
        read_state(saved(state(model), path, "real_quantize"))


def test_folders_that_are_none_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    whole = saved_folder(state(model), tmp_path / "transformer")
    with pytest.raises(ModelError, match=rf"has no {STATE_FILE}; give its folder transformer"):
        read_state(tmp_path)
    for name in (STATE_FILE, WEIGHTS_FILE):
        part = tmp_path / f"without {name}"
        shutil.copytree(whole, part)
        (part / name).unlink()
        with pytest.raises(ModelError, match=f"has no {name}"):
            read_state(part)
    (part / STATE_FILE).unlink()
    with pytest.raises(ModelError, match=r"call modelopt\.torch\.opt\.enable_huggingface_checkpointing\(\) before"):
        read_state(part)
    with pytest.raises(RecipeError, match=rf"{STATE_FILE}: ModelOpt's mode 'real_quantize' changed more than quantiz"):
        read_state(saved_folder(state(model), tmp_path / "compressed", "real_quantize"))


def test_a_folder_runs_no_code(model: LoadedModel, tmp_path: Path) -> None:
    folder, ran = saved_folder(state(model), tmp_path / "folder"), tmp_path / "ran"
    torch.save({"modelopt_state_dict": RunsCode(ran)}, folder / STATE_FILE)
    with pytest.raises(ModelError, match=rf"{STATE_FILE}: cannot be read as tensors and plain values"):
        read_state(folder)
    (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.bin")
    torch.save({"modelopt_state_dict": [("quantize", {"metadata": {"quantizer_state": {}}})]}, folder / STATE_FILE)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.bin is a pickle, which can run code when read"):
        read_state(folder)
    assert not ran.exists()


class RunsCode:
    """What a pickle of it does when it is read: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [saved, saved_folder])
def test_the_command_takes_a_file_or_folder_over(save: Any, model: LoadedModel, tmp_path: Path) -> None:
    """Its recipe then builds from the folder, which is as good as the file."""
    path, folder = save(state(model), tmp_path / "a"), tmp_path / "taken"
    words = ["--engine", "pixart_w4a6", "-m", model.source, "--from-modelopt", str(path), "-o", str(folder)]
    assert command.main(words) == 0
    layers = checkpoint.load(folder)
    recipe = recipes.load(str(folder / RECIPE_FILE))
    assert (recipe.formats.weight, recipe.formats.activation) == ("E4M3", "E4M3")
    assert recipe.weights.granularity == "per_channel" and recipe.calibrate.options["activations"] == "per_tensor"
    adopted = adopt(model, recipe, folder, tmp_path / "adopted")
    again = calibrate(model, recipe, tmp_path / "again")
    for one, other, third in zip(layers, adopted, again, strict=True):
        assert one.codes.tobytes() == other.codes.tobytes() == third.codes.tobytes()


def test_a_file_that_has_changed_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = saved(state(model), tmp_path / "a.pt")
    recipe = recipe_of_file(model, recipes.load("pixart_w4a6"), path)
    saved(state(model, FP8 | {"_axis": None}), path)
    with pytest.raises(RecipeError, match=r"has the hash .*; take it over anew"):
        calibrate(model, recipe, tmp_path / "layers")
    folder = saved_folder(state(model), tmp_path / "folder")
    recipe = recipe_of_file(model, recipes.load("pixart_w4a6"), folder)
    tensors = {name: 2 * tensor for name, tensor in state(model).tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(RecipeError, match=r"has the hash .*; take it over anew"):
        calibrate(model, recipe, tmp_path / "layers")
    options = {"sha256": "0" * 64}
    recipe = replace(recipe, calibrate=replace(recipe.calibrate, options=options))
    with pytest.raises(RecipeError, match=r"the layers were made in Python; give the folder .*build --checkpoint DIR"):
        calibrate(model, recipe, tmp_path / "layers")


ROUNDINGS = {
    "channel": {"format": "E2M3", "granularity": "per_channel"},
    "group": {"format": "E2M1", "granularity": "group", "group_size": 16},
    "exact": {"format": "E2M1", "granularity": "exact_group", "group_size": 16, "activation": "E2M3"},
    "integers": {"format": "INT4", "granularity": "exact_group", "group_size": 32, "activation": "INT8"},
}


@pytest.mark.fast
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("case", ROUNDINGS)
def test_the_backend_rounds_as_the_layers_that_are_made_of_it(case: str, calibrated: bool) -> None:
    """To the bit, also where an algorithm has chosen an amax that clips."""
    arguments = {"role": "weight", **ROUNDINGS[case]}
    how = own_weight(arguments)
    w = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    blocks = w.reshape(-1, how.group_size or 64)
    amax = np.abs(blocks).max(1) * (np.float32(0.8) if calibrated else 1)
    quantizer = SimpleNamespace(backend_extra_args=arguments, _original_shape=w.shape)
    if calibrated:
        quantizer._amax = torch.from_numpy(amax[:, None])
    rounded = backend.rounded(torch.from_numpy(blocks), quantizer).numpy().reshape(w.shape)
    np.testing.assert_array_equal(rounded, _values(how, w, amax))


def _values(how: WeightRounding, w: Any, amax: Any) -> Any:
    """Value of each code times multiplier times scale, in float32."""
    codes, scales, multipliers = how.codes(w, amax, "layer")
    values = how.format.values[codes].astype(np.float32).reshape(len(w), multipliers.shape[1], -1)
    return (values * multipliers[..., None].astype(np.float32) * scales[..., None]).reshape(w.shape)


@pytest.mark.fast
def test_gradients_pass_the_rounding() -> None:
    arguments = {"role": "input", "format": "E2M3"}
    x = torch.linspace(-3, 3, 32).reshape(2, 16).requires_grad_()
    wanted = torch.arange(32.0).reshape(2, 16)
    rounded = backend.rounded(x, SimpleNamespace(backend_extra_args=arguments))
    assert not torch.equal(rounded, x)
    rounded.backward(wanted)
    assert x.grad is not None and torch.equal(x.grad, wanted)


@pytest.mark.fast
def test_configurations_say_how_many_bits_a_weight_takes() -> None:
    """By which auto_quantize weighs them: codes, 4 bits for a multiplier, 32 for a group's scale."""
    configs = (backend.W4A6_FP4DIT_CFG, backend.W4A6_GROUP_CFG, backend.W6A6_CFG, backend.W8A6_CFG)
    assert [config["effective_bits"] for config in configs] == [4 + 4 / 64, 4 + 32 / 64, 6, 8]


@pytest.mark.fast
def test_configurations_say_what_they_cannot_be() -> None:
    with pytest.raises(RecipeError, match="E2M1 x E2M3: the configuration has group_size 0 with group"):
        backend.quant_config("E2M1", "E2M3", "group")
    with pytest.raises(RecipeError, match="has format 'E9M9'"):
        backend.quant_config("E9M9", "E2M3")
    for weight in ("E3M2", "E4M3", "E3M4"):
        with pytest.raises(RecipeError, match=f"has exact_group with {weight}, whose groups no multiplier keeps exact"):
            backend.quant_config(weight, "E2M3", "exact_group", 16)


@pytest.mark.fast
def test_what_is_not_the_same_number_is_told(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    wide = FP8_INPUT | {"_num_bits": 8}
    Taken(model, state(model, activation=wide | {"_narrow_range": True})), Taken(model, state(model))
    assert not caplog.records
    Taken(model, state(model, activation=wide))
    assert "beyond their amax end one code later there than here" in caplog.text
    caplog.clear()
    single = state(model)
    names = [f"{linear.name}.weight" for linear in model.linears()]
    half = Taken(model, replace(single, tensors={**single.tensors, **{n: single.tensors[n].half() for n in names}}))
    assert f"({names[0].removesuffix('.weight')}, ...) to torch.float16 once more" in caplog.text
    rounded = {**single.tensors, **{name: single.tensors[name].half().float() for name in names}}
    whole = Taken(model, replace(single, tensors=rounded))
    for linear in model.linears():  # the same codes and scales
        one, other = half.layer(linear.name), whole.layer(linear.name)
        assert one.codes.tobytes() == other.codes.tobytes() and one.scales.tobytes() == other.scales.tobytes()


@pytest.mark.fast
def test_what_modelopt_needs_cuda_for_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    config = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": blocks}], "algorithm": "max"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentLacksError, match=r"\*weight_quantizer is \(2, 1\) in blocks with rounded scales"):
        backend.refuse_without_cuda(config)
    backend.refuse_without_cuda(backend.W4A6_FP4DIT_CFG)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend.refuse_without_cuda(config)


@pytest.mark.fast
def test_auto_quantize_is_refused_without_modelopt(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacksError, match=r"needs modelopt; install with: pip install 'ditc\[modelopt\]'"):
        auto_quantized(model, recipes.load("pixart_w4a6"), [backend.W6A6_CFG], 6)


@pytest.mark.fast
def test_gradients_of_random_directions_are_the_curvature_of_the_squared_error() -> None:
    """Of |Ax - Ax0|^2 / 2 it is the diagonal of A^T A. The mean of n squared normal numbers has a standard deviation
    of sqrt(2 / n) of itself; five of them are no matter of luck."""
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws, loss = 4000, random_direction(0)
    squares = torch.zeros(6, dtype=torch.float64)
    for _ in range(draws):
        x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        loss(matrix @ x, None).backward()
        assert x.grad is not None
        squares += x.grad**2 / draws
    torch.testing.assert_close(squares, (matrix**2).sum(0), rtol=5 * (2 / draws) ** 0.5, atol=0)
