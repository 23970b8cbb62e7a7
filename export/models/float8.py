"""Weights stored in 8-bit floating point, as wider ones with the same values.

A float8 number has at most 4 significant bits and fits fp16, subnormals included, so a plain cast loses nothing. With a
scale (one for the tensor, or one for each output channel) the weight is the product in float32, rounded once: what the
programs that write such files compute.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Range, infinities and zero differ between them; all of their values are fp16's.
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
# "layer.weight_scale" of compressed-tensors and ModelOpt, "layer.scale_weight" of ComfyUI.
SCALE = re.compile(r"(?P<layer>.*)\.(weight_scale|scale_weight)")


def is_float8(tensor: torch.Tensor) -> bool:
    """Is the tensor of a type whose values are all fp16's?"""
    return str(tensor.dtype).removeprefix("torch.") in FLOAT8


def weight_of_scale(name: str) -> str | None:
    """Name of the weight that a scale belongs to; None for any other tensor."""
    match = SCALE.fullmatch(name)
    return f"{match['layer']}.weight" if match else None


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Float8 as fp16 with the same values; float64 as float32, rounded; any other tensor as it is."""
    if is_float8(tensor):
        return tensor.half()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize > 4 else tensor


def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 weight [N, K] from float8 codes [N, K] and a scale of one number, [N] or [N, 1]."""
    per_channel = scale.numel() == weight.shape[0] and scale.numel() > 1
    return weight.float() * (scale.float().reshape(-1, 1) if per_channel else scale.float().reshape(()))


def scale_problem(weight: torch.Tensor | None, scale: torch.Tensor) -> str | None:
    """Why `scale` cannot be applied to `weight` (None if the file has no such tensor), in words; None if it can."""
    if weight is None:
        return "belongs to no weight of the file"
    if not is_float8(weight) or weight.ndim != 2:
        return f"belongs to a weight that is {weight.dtype} {tuple(weight.shape)}, not a float8 matrix"
    if not scale.is_floating_point() or scale.itemsize < 2:
        return f"is {scale.dtype}"
    if tuple(scale.shape) not in ((), (1,), (1, 1), (weight.shape[0],), (weight.shape[0], 1)):
        return f"has shape {tuple(scale.shape)}, neither one number nor one for each of {weight.shape[0]} channels"
    values = scale.float()
    return None if bool((values.isfinite() & (values > 0)).all()) else "is not finite and positive"
