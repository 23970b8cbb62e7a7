"""Our formats as a quantization backend of ModelOpt, with configurations that use it: `mtq.quantize` then calibrates in
the numbers that our engines compute with.

    from pipeline.calibrate.modelopt.backend import W4A6_FP4DIT_CFG, fitted, register
    register()
    module = mtq.quantize(module, fitted(W4A6_FP4DIT_CFG | {"algorithm": "awq_lite"}, model), forward_loop)

Weights are rounded with the amax that ModelOpt's algorithms settle on, activations with a scale found at run time.
Gradients pass the rounding as if it were not there, which is what auto_quantize's scores need; scales have none: it
calibrates, it does not train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from export.errors import EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends.reference import fake_quantize, fake_quantize_groups, round_to_format
from pipeline.calibrate.modelopt.rounding import (
    BACKEND,
    INPUT,
    ROLE,
    WEIGHT,
    Refused,
    WeightRounding,
    own_input,
    own_scales,
    own_weight,
)

if TYPE_CHECKING:
    from export.models.load import LoadedModel

Config = dict[str, Any]
LEAVES = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.LayerNorm)


def quant_config(
    weight: str, activation: str, granularity: str = "per_channel", group_size: int = 0, algorithm: object = "max"
) -> Config:
    """A ModelOpt configuration: weights in `weight` with scales by `granularity`, inputs in `activation` per token.

    Raises RecipeError for formats and sizes that the backend has not.

    >>> quant_config("E2M1", "E2M3", "exact_group", 64)["quant_cfg"][1]["cfg"]["block_sizes"]
    {-1: 64, 'type': 'static'}
    """
    scales = {"granularity": granularity, "group_size": group_size, "activation": activation}
    arguments = {ROLE: WEIGHT, "format": weight, **scales}
    inputs = {ROLE: INPUT, "format": activation}
    try:
        own_weight(arguments), own_input(inputs)
    except Refused as reason:
        raise RecipeError(f"{weight} x {activation}: the configuration {reason}") from reason
    shared = {"num_bits": 8, "backend": BACKEND}  # the backend knows the format, which ModelOpt does not look at
    blocks = {"block_sizes": {-1: group_size, "type": "static"}} if group_size else {"axis": 0}
    of_weight = shared | blocks | {"backend_extra_args": arguments}
    of_input = shared | {"backend_extra_args": inputs}
    rows = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": of_weight},
        {"quantizer_name": "*input_quantizer", "cfg": of_input},
    ]
    return {"quant_cfg": rows, "algorithm": algorithm, "effective_bits": own_weight(arguments).bits_per_weight}


W4A6_FP4DIT_CFG = quant_config("E2M1", "E2M3", "exact_group", 64)
W4A8_FP4DIT_CFG = quant_config("E2M1", "E3M4", "exact_group", 64)
W4A6_GROUP_CFG = quant_config("E2M1", "E2M3", "group", 64)
W4A8_INT_CFG = quant_config("INT4", "INT8", "exact_group", 64)
W6A6_CFG = quant_config("E2M3", "E2M3")
W8A6_CFG = quant_config("INT8", "E2M3")


def register() -> None:
    """Make the backend known to ModelOpt, once. Raises EnvironmentLacksError where that is not installed."""
    machine.require(("modelopt",), "calibrating with ModelOpt", "modelopt")
    from modelopt.torch.quantization.nn.modules import tensor_quantizer as quantizers

    if not quantizers.is_registered_quant_backend(BACKEND):
        quantizers.register_quant_backend(BACKEND, rounded)


def rounded(x: Tensor, quantizer: Any) -> Tensor:
    """The backend: `x` as ModelOpt hands it over, rounded by the quantizer's arguments, in x's own type."""
    result: Tensor = _StraightThrough.apply(x, quantizer)
    return result


class _StraightThrough(torch.autograd.Function):
    """Rounding, whose gradient is that of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Any) -> Tensor:
        return _rounded(x, quantizer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _rounded(x: Tensor, quantizer: Any) -> Tensor:
    arguments = quantizer.backend_extra_args
    if arguments.get(ROLE) == INPUT:
        how = own_input(arguments)
        if how.group_size:
            return fake_quantize_groups(how.format, x.float(), how.group_size).to(x.dtype)
        return fake_quantize(how.format, x.float()).to(x.dtype)
    return _rounded_weight(x.float(), quantizer, own_weight(arguments)).to(x.dtype)


def _rounded_weight(x: Tensor, quantizer: Any, how: WeightRounding) -> Tensor:
    """Channels [N, K], or blocks [N * groups, group_size] in order, in the arithmetic of our reference."""
    amax = getattr(quantizer, "_amax", None)
    peaks = x.abs().amax(dim=1) if amax is None else amax.detach().float()
    channels = len(x) if how.granularity == "per_channel" else int(quantizer._original_shape[0])
    by_channel = np.broadcast_to(peaks.cpu().numpy().reshape(-1), (len(x),)).reshape(channels, -1)
    by_block = [np.broadcast_to(part, by_channel.shape).reshape(-1, 1) for part in own_scales(by_channel, how)]
    scales, multipliers = (torch.from_numpy(part.astype(np.float32)).to(x.device) for part in by_block)
    return round_to_format(how.format, x / (scales * multipliers)) * multipliers * scales


def fitted(config: Mapping[str, Any], model: LoadedModel) -> Config:
    """A configuration, of ours or of ModelOpt, with everything switched off that our engines keep in float: embedders,
    convolutions, norms, adaLN and output layers by the table of the model's family."""
    config = standard(config)
    off = ({"quantizer_name": f"{path}.*quantizer", "enable": False} for path in kept_in_float(model))
    return {**config, "quant_cfg": [*config["quant_cfg"], *off]}


def kept_in_float(model: LoadedModel) -> list[str]:
    """Paths of the layers that ModelOpt would quantize and our engines keep in float."""
    ours = {linear.name for linear in model.linears()}
    return [path for path, part in model.module.named_modules() if isinstance(part, LEAVES) and path not in ours]


def standard(config: Mapping[str, Any]) -> Config:
    """The same with a row {"quantizer_name", "cfg", "enable"} for each pattern, in order: ModelOpt also takes a dict by
    patterns, and rows of one such entry. Raises RecipeError for what it does not take."""
    rows = config["quant_cfg"]
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) and "quantizer_name" in row for row in rows):
        return {**config, "quant_cfg": list(rows)}
    from modelopt.torch.quantization.config import normalize_quant_cfg_list

    try:
        entries = normalize_quant_cfg_list(rows)
    except ValueError as error:
        raise RecipeError(f"quant_cfg: {error}") from error
    return {**config, "quant_cfg": [entry.model_dump(exclude_unset=True) for entry in entries]}


def refuse_without_cuda(config: Mapping[str, Any]) -> None:
    """Raise EnvironmentLacksError naming the quantizer that ModelOpt can only compute with CUDA, where there is none:
    formats in blocks whose scales are rounded (NVFP4, MXFP4, MXFP6, MXFP8) have no other code there."""
    if torch.cuda.is_available():
        return
    for row in standard(config)["quant_cfg"]:
        for settings in _settings(row):
            if "scale_bits" in (settings.get("block_sizes") or {}) and settings.get("enable", True):
                name, bits = row["quantizer_name"], settings.get("num_bits")
                fault = f"{name} is {bits} in blocks with rounded scales, which ModelOpt computes with CUDA alone"
                raise EnvironmentLacksError(
                    f"{fault}, and there is no such GPU; use FP8, INT8 or a configuration of ours"
                )


def _settings(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    settings = row.get("cfg") or {}
    return settings if isinstance(settings, list) else [settings]
