"""Run by a Python that has ModelOpt: calibrate a tiny model by each of its algorithms, and keep what came out.

    python -m tests.support.modelopt_run MODEL FOLDER

FOLDER/NAME.pt is what ModelOpt saves, FOLDER/NAME.npz what its module gives and multiplies with; FOLDER/live the layers
of a module that was not saved; FOLDER/folder the last case as save_pretrained writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch import nn

from export.errors import EnvironmentLacksError, RecipeError
from export.models.load import LoadedModel, load, sample_inputs
from export.models.torch_modules import Denoiser
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine
from pipeline.backends.side_by_side import single_threaded_torch
from pipeline.calibrate.modelopt import backend
from pipeline.calibrate.modelopt.auto_quantize import auto_quantized
from pipeline.calibrate.modelopt.backend import W6A6_CFG, quant_config, refuse_without_cuda
from pipeline.calibrate.modelopt.take_over import quantized, take_over

GROUPS = quant_config("E2M1", "E2M3", "group", 32)
EXACT = quant_config("E2M1", "E2M3", "exact_group", 32)
CASES: dict[str, Any] = {
    "max": EXACT,
    "mse": GROUPS | {"algorithm": "mse"},
    "awq": EXACT | {"algorithm": "awq_lite"},
    "gptq": GROUPS | {"algorithm": {"method": "gptq"}},
    "smoothquant": W6A6_CFG | {"algorithm": "smoothquant"},
    "svdquant": EXACT | {"algorithm": {"method": "svdquant", "lowrank": 4}},
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_svdquant": mtq.FP8_DEFAULT_CFG | {"algorithm": {"method": "svdquant", "lowrank": 4}},
    "int8": mtq.INT8_SMOOTHQUANT_CFG,
}
# Configurations by name, each of which calibrates and is taken over.
PRESETS = [name for name in vars(backend) if name.endswith("_CFG")]
CHOICES = [
    EXACT,
    GROUPS | {"algorithm": "mse"},
    quant_config("E2M3", "E3M4") | {"algorithm": "awq_lite"},
    mtq.FP8_DEFAULT_CFG,
]
SETTINGS = ["calibrate.size=1", "calibrate.timesteps=2", "sampling.n_steps=2", "sampling.guidance_scale=1.0"]


def recipe_of_tests(model: LoadedModel) -> recipes.Recipe:
    return recipes.with_settings(recipes.load("pixart_w4a6"), [*SETTINGS, f"model={model.source}"])


def main(source: str, folder: Path) -> None:
    model = load(source)
    recipe = recipe_of_tests(model)
    for case, config in CASES.items():
        module = quantized(model, recipe, config)
        keep(model, folder, case, module)
        if case == "awq":
            take_over(model, recipe, module, folder / "live")
    for name in PRESETS:
        take_over(model, recipe, quantized(model, recipe, getattr(backend, name)), folder / "presets" / name)
    spellings(model, recipe)
    searched(model, recipe, folder)
    nvfp4(folder)
    mto.enable_huggingface_checkpointing()
    module.save_pretrained(folder / "folder")


def spellings(model: LoadedModel, recipe: recipes.Recipe) -> None:
    """ModelOpt's other ways to write a configuration give the same module, and are refused alike."""
    parts = {"*weight_quantizer": {"num_bits": (4, 3), "axis": 0}, "*input_quantizer": {"num_bits": (4, 3)}}
    rows = [{"quantizer_name": name, "cfg": settings} for name, settings in parts.items()]
    ways: list[Any] = [rows, parts, [{name: settings} for name, settings in parts.items()]]
    dicts = [quantized(model, recipe, {"quant_cfg": way, "algorithm": "max"}).state_dict() for way in ways]
    for other in dicts[1:]:
        assert other.keys() == dicts[0].keys() and all(torch.equal(other[name], dicts[0][name]) for name in other)
    blocks = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    for way in ({"*weight_quantizer": blocks}, [{"*weight_quantizer": blocks}]):
        try:
            refuse_without_cuda({"quant_cfg": way, "algorithm": "max"})
        except EnvironmentLacksError as error:
            assert "*weight_quantizer is (2, 1) in blocks with rounded scales" in str(error), error
        else:
            assert torch.cuda.is_available(), way


def searched(model: LoadedModel, recipe: recipes.Recipe, folder: Path) -> None:
    """Formats that auto_quantize has chosen: one for each linear, and of some none; and what it is refused."""
    keep(model, folder, "auto", auto_quantized(model, recipe, CHOICES, 5.5))
    keep(model, folder, "auto_floats", auto_quantized(model, recipe, CHOICES, 9, some_in_float=True))
    try:
        auto_quantized(model, recipe, CHOICES, 4)
    except RecipeError as error:
        (folder / "refused.txt").write_text(str(error), encoding="utf-8")


def keep(model: LoadedModel, folder: Path, case: str, module: nn.Module) -> None:
    """The two files of a case."""
    names = tuple(row.name for row in model.inputs)
    with single_threaded_torch():
        engine = ReferenceEngine(Denoiser(module, model.family, names).eval())
        sample = engine.run(sample_inputs(model, 2, 0))["sample"]
    np.savez(folder / f"{case}.npz", sample=sample, **weights(model, module))
    mto.save(module, folder / f"{case}.pt")


def nvfp4(folder: Path) -> None:
    """A weight in NVFP4, and what ModelOpt makes of it again."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    packed, blocks, whole = NVFP4QTensor.quantize(weight, 16)
    scales = {"scale": blocks, "double_scale": whole, "block_sizes": {-1: 16}}
    back = packed.dequantize(torch.float32, **scales)
    parts = {"codes": packed._quantized_data, "blocks": blocks.view(torch.uint8), "whole": whole, "weight": back}
    np.savez(folder / "nvfp4.npz", **{name: part.numpy() for name, part in parts.items()})


def weights(model: LoadedModel, module: nn.Module) -> dict[str, Any]:
    """What each quantized linear multiplies with."""
    linears: dict[str, Any] = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    parts = {linear.name: linears[linear.name] for linear in model.linears()}
    return {name: part.weight_quantizer(part.weight).detach().float().numpy() for name, part in parts.items()}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
