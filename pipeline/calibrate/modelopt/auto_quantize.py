"""ModelOpt's search for each linear's format, among configurations of ours and of ModelOpt.

    module = auto_quantized(model, recipe, [W4A6_FP4DIT_CFG, W8A6_CFG], effective_bits=5)
    take_over(model, recipe, module, Path("checkpoints/mixed"))

What it takes over has a format of its own for each linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.errors import RecipeError
from export.models.load import LoadedModel
from export.models.torch_modules import Denoiser, first_output
from pipeline.calibrate import with_method
from pipeline.calibrate.data import Call, calibration_data
from pipeline.calibrate.modelopt.backend import kept_in_float, refuse_without_cuda, register
from pipeline.recipe import Recipe


def auto_quantized(
    model: LoadedModel,
    recipe: Recipe,
    configs: Sequence[Mapping[str, Any]],
    effective_bits: float,
    some_in_float: bool = False,
) -> nn.Module:
    """A copy of the model's module in which `mtq.auto_quantize` has chosen one of `configs` for each linear, on the
    recipe's calibration calls, so that their weights have at most `effective_bits` on average.

    configs: of backend.py or of ModelOpt, with an algorithm that auto_quantize takes (max, mse, smoothquant, AWQ's).
    some_in_float: may linears stay in float, at 16 bits? `take_over` then says by which setting they are kept. Raises
    RecipeError for fewer bits than the smallest configuration has, EnvironmentLacksError as `quantized` does.
    """
    register()
    for config in configs:
        refuse_without_cuda(config)
    import modelopt.torch.quantization as mtq

    formats = [dict(config) for config in configs]
    _refuse_too_few_bits(formats, effective_bits)
    calls = calibration_data(model, with_method(recipe, model)).calls
    ours, kept = [linear.name for linear in model.linears()], kept_in_float(model)
    space = {"module_name_patterns": ours, "quantization_formats": formats, "allow_no_quant": some_in_float}
    module, search = mtq.auto_quantize(
        copy.deepcopy(model.module),
        constraints={"effective_bits": effective_bits, "cost": {"excluded_module_name_patterns": kept}},
        quantization_formats=formats,
        module_search_spaces=[space],
        data_loader=calls,
        forward_step=_forward_step(model),
        loss_func=random_direction(recipe.calibrate.seed),
        disabled_layers=kept,
        num_calib_steps=len(calls),
        num_score_steps=len(calls),
    )
    if not search["best"]["is_satisfied"]:
        raise RecipeError(f"auto_quantize found no choice of {effective_bits} bits; give it more, or other formats")
    return module


def _refuse_too_few_bits(formats: Sequence[dict[str, Any]], effective_bits: float) -> None:
    from modelopt.torch.quantization.algorithms import QuantRecipe

    least = min(16 * QuantRecipe(config, name="format").compression for config in formats)
    if not least <= effective_bits <= 16:
        raise RecipeError(
            f"effective_bits {effective_bits:g}: the smallest of these formats has {least:g}; give {least:g} to 16"
        )


def _forward_step(model: LoadedModel) -> Callable[[nn.Module, Call], Tensor]:
    """The output of a call, through which gradients go."""
    names = tuple(row.name for row in model.inputs)

    def forward(module: nn.Module, call: Call) -> Tensor:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in call.inputs.items()}
        with _torchs_attention(module):
            return first_output(Denoiser(module, model.family, names).eval()(**tensors))

    return forward


@contextmanager
def _torchs_attention(module: nn.Module) -> Iterator[None]:
    """In the place of ModelOpt's, which computes the same, as its quantizers are off here, and has no gradient."""
    attentions: list[Any] = [part for part in module.modules() if hasattr(part, "q_bmm_quantizer")]
    for part in attentions:
        part._functionals_to_replace = []  # of the instance: hides what the class has
    try:
        yield
    finally:
        for part in attentions:
            del part._functionals_to_replace


def random_direction(seed: int) -> Callable[[Tensor, object], Tensor]:
    """A loss whose squared gradient is on average the curvature of the output's squared error: the output times normal
    noise. The squared error itself has no gradient at the float model, where it is 0."""
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Tensor, _: object) -> Tensor:
        return (output * torch.randn(output.shape, generator=generator)).sum()

    return loss
