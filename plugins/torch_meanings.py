"""What the GPU kernels compute, in plain torch on any device: their place on a machine without a GPU.

The same numbers as the NumPy meanings (export/dialect/reference.py), on operand bytes and quick enough to run a whole
model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.dialect.ops import attributes
from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import get_format
from export.formats.operands import exact_sum_limit
from plugins.gpu.gemm_constants import weight_exponent
from plugins.gpu.operands import operand_bytes
from plugins.gpu.specs import GemmSpec, QuantizeSpec

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TYPE_NAMES = {value: key for key, value in TORCH_TYPES.items()}


@cache
def byte_values(name: str, integers: bool = False) -> Tensor:
    """Operand byte of format `name` -> the value it stands for, f32 [256]; bytes that no code has are NaN."""
    found, fmt = np.full(256, np.nan, np.float32), get_format(name)
    found[operand_bytes(name, integers)] = fmt.values
    return torch.from_numpy(found)


def weight_values(spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None) -> Tensor:
    """Packed codes u8 [N, K / 2] -> value times multiplier, f32 [N, K]."""
    values = torch.from_numpy(spec.weight_format.values.astype(np.float32)).to(w.device)
    found = values[_nibbles(w, spec.in_features)]
    if multiplier_codes is None:
        return found
    table = torch.tensor(spec.multipliers, dtype=torch.float32, device=w.device)
    factors = table[_nibbles(multiplier_codes, spec.groups)]
    return (found.reshape(len(w), spec.groups, -1) * factors[..., None]).reshape(found.shape)


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """u8 [N, bytes] -> i32 [N, count], element 2i from the low nibble."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(len(packed), -1)[:, :count].int()


def expand(spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None) -> Tensor:
    """Packed codes u8 [N, K / 2] -> u8 [N, K], bytes of spec.weight_kind, of value * multiplier * 2^weight_exponent."""
    values = weight_values(spec, w, multiplier_codes) * 2.0 ** weight_exponent(spec)
    return values.to(_held_as(spec)).view(torch.uint8)


def expanded_values(spec: GemmSpec, w_expanded: Tensor) -> Tensor:
    """What `expand` gives -> value times multiplier, f32 [N, K]."""
    return w_expanded.view(_held_as(spec)).float() * 2.0 ** -weight_exponent(spec)


def _held_as(spec: GemmSpec) -> torch.dtype:
    return torch.int8 if spec.multiplies_integers else torch.float8_e4m3fn


def gemm(
    spec: GemmSpec,
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor,
    *,
    a_zero: Tensor | None = None,
    w_sums: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens: int = 0,
) -> Tensor:
    """GemmSpec's y [M, N] with `weight` as values f32 [N, K]: exact sums, then float32, rounded once to the output."""
    groups = spec.scale_groups
    dtype = _sum_type(spec)
    x = byte_values(spec.activation, spec.integers).to(a.device)[a.int()].to(dtype).reshape(len(a), groups, -1)
    w = weight.to(dtype).reshape(len(weight), groups, -1)
    sums = (x.transpose(0, 1) @ w.permute(1, 2, 0)).float()
    y = (sums * w_scales.t()[:, None, :]).sum(0) * a_scale[:, None]
    if a_zero is not None and w_sums is not None:
        y = y + a_zero[:, None] * w_sums
    y = y + bias
    if spec.epilogue == "gelu":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    if gate is not None and residual is not None:
        y = residual.float() + gate.float().repeat_interleave(tokens, 0) * y
    return y.to(TORCH_TYPES[spec.output])


def _sum_type(spec: GemmSpec) -> torch.dtype:
    """float32 where it adds the products exactly, float64 else."""
    kmax_w = spec.weight_format.kmax * max(spec.multipliers)
    length = spec.in_features // spec.scale_groups
    exact = length <= exact_sum_limit(spec.activation_format.kmax, kmax_w)
    return torch.float32 if exact else torch.float64


def quantize(
    spec: QuantizeSpec, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """QuantizeSpec's (operand bytes u8 [M, C], scale f32 [M])."""
    x = x.float()
    if spec.before == "gelu":
        x = torch.nn.functional.gelu(x, approximate="tanh")
    if shift is not None and scale is not None:
        gain, offset = (item.float().repeat_interleave(tokens, 0) for item in (1 + scale.float(), shift))
        x = (torch.nn.functional.layer_norm(x.double(), (spec.channels,), eps=spec.epsilon) * gain + offset).float()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    found = x.abs().amax(-1, keepdim=True).clamp(min=ABSMAX_FLOOR) / get_format(spec.format).max_value
    return encoded(spec.format, x / found, spec.integers), torch.where(finite, found, torch.nan)[:, 0]


def quantize_static(spec: QuantizeSpec, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """A static QuantizeSpec's operand bytes u8 [M, C]."""
    x = x.float()
    if spec.before == "gelu":
        x = torch.nn.functional.gelu(x, approximate="tanh")
    return encoded(spec.format, (x - zero) / scale, spec.integers)


def encoded(name: str, x: Tensor, integers: bool = False) -> Tensor:
    """Operand bytes of the codes nearest to x: ties to even, saturating, -0 folded; NaN has the code 0."""
    tables = _tables(name, x.device, integers)
    magnitude = x.abs().nan_to_num(0.0).clamp(max=float(get_format(name).max_value))
    binade = torch.bucketize(magnitude, tables["thresholds"], right=True)
    code = (magnitude / tables["steps"][binade]).round().int() + binade.int() * tables["binade_codes"]
    code = code.clamp(max=tables["max_code"])
    return torch.where(x < 0, tables["negative"][code], tables["positive"][code])


@cache
def _tables(name: str, device: torch.device, integers: bool) -> dict[str, Any]:
    found = attributes("QuantizeActivation", format=name)
    bytes_ = torch.from_numpy(operand_bytes(name, integers)).to(device)
    return {
        "thresholds": torch.tensor(found["thresholds"], device=device),
        "steps": torch.tensor(found["steps"], device=device),
        "binade_codes": found["binade_codes"],
        "max_code": found["max_code"],
        "positive": bytes_[: found["max_code"] + 1],
        "negative": bytes_[torch.tensor(found["negative_codes"], device=device)],
    }
