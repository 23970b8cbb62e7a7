"""Rules of a quantized linear's input: how its activation is scaled, what goes before it, and low-rank branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.errors import ContractError
from export.formats.format import Format, get_format

if TYPE_CHECKING:
    from export.checkpoint import QuantizedLinear

SCALINGS = ("per_token", "per_tensor", "token_group")


def check_activation(layer: QuantizedLinear) -> None:
    """Scaling, its parameters, and the arrays that change the input. Raises ContractError naming the layer."""
    if layer.activation_scaling not in SCALINGS:
        raise ContractError(f"{layer.name}: activation_scaling {layer.activation_scaling!r}; use one of {SCALINGS}")
    _check_group(layer)
    _check_static(layer, get_format(layer.activation_format))
    k = layer.in_features
    for key in ("input_multiplier", "input_offset"):
        _check_array(layer, key, (k,))


def _check_group(layer: QuantizedLinear) -> None:
    group, k = layer.activation_group, layer.in_features
    if layer.activation_scaling != "token_group":
        if group:
            fault = f"{layer.activation_scaling} with activation_group {group}"
            raise ContractError(f"{layer.name}: {fault}; it goes with token_group only, use 0")
    elif group <= 0 or k % group:
        raise ContractError(f"{layer.name}: K={k} is not a multiple of activation_group {group}; use a divisor")
    elif not get_format(layer.activation_format).sign_bits:
        raise ContractError(
            f"{layer.name}: token_group with the unsigned format {layer.activation_format}; "
            f"a zero point needs per_tensor, so use a signed format or per_tensor"
        )


def _check_static(layer: QuantizedLinear, fmt: Format) -> None:
    static = layer.activation_scaling == "per_tensor"
    if (layer.activation_scale is not None) != static:
        presence = "without" if layer.activation_scale is None else "with"
        rule = "per_tensor needs one, the others have none"
        raise ContractError(f"{layer.name}: {layer.activation_scaling} {presence} activation_scale; {rule}")
    if (layer.activation_zero is not None) != (static and not fmt.sign_bits):
        presence = "without" if layer.activation_zero is None else "with"
        rule = "a zero goes with per_tensor and an unsigned format such as UE2M2, and only there"
        raise ContractError(f"{layer.name}: {layer.activation_scaling} {fmt.name} {presence} activation_zero; {rule}")
    for key in ("activation_scale", "activation_zero"):
        _check_array(layer, key, (1,))
    if layer.activation_scale is not None and not layer.activation_scale[0] > 0:
        fault = f"activation_scale {layer.activation_scale[0]:g} is not above 0"
        raise ContractError(f"{layer.name}: {fault}; calibrate with data that reaches this layer")


def check_low_rank(layer: QuantizedLinear) -> None:
    """Low-rank branches and router come together and fit. Raises ContractError naming the layer."""
    parts = {key: getattr(layer, key) is not None for key in ("lora_down", "lora_up", "router")}
    if not any(parts.values()):
        return
    if not all(parts.values()):
        missing = next(key for key, present in parts.items() if not present)
        raise ContractError(f"{layer.name}: {missing} is missing; low-rank branches need lora_down, lora_up and router")
    assert layer.lora_down is not None and layer.router is not None
    branches = layer.router.branches
    rank = layer.lora_down.shape[1] if layer.lora_down.ndim == 3 else 0
    _check_array(layer, "lora_down", (branches, rank, layer.in_features))
    _check_array(layer, "lora_up", (branches, layer.out_features, rank))


def _check_array(layer: QuantizedLinear, key: str, shape: tuple[int, ...]) -> None:
    array = getattr(layer, key)
    if array is None:
        return
    if array.dtype != np.float32 or array.shape != shape:
        raise ContractError(f"{layer.name}: {key} is {array.dtype} {array.shape}; it must be float32 {shape}")
    if not np.isfinite(array).all():
        raise ContractError(f"{layer.name}: {key} has NaN or Inf; calibrate again")
