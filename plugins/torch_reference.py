"""What the GPU kernels compute, in plain torch on any device: their place on a machine without a GPU.

The same numbers as the NumPy reference (plugins/gpu/reference.py), of which each function here has the name and the
arguments, but quick enough to run a whole model, and rounded to the output type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from export.dialect.ops import attributes
from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import get_format
from export.formats.operands import exact_sum_limit
from plugins.gpu import reference
from plugins.gpu.spec import FloatType, GemmSpec, PackSpec, QuantizeSpec, operand_bytes

TORCH_TYPES: dict[FloatType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TYPE_NAMES = {value: key for key, value in TORCH_TYPES.items()}

# --- GEMMs -----------------------------------------------------------------------------------------------------------


def packed_gemm(
    spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None = None, **operands: Tensor | int
) -> tuple[Tensor]:
    """GemmSpec's y [M, N] of packed codes w u8 [N, K / 2]."""
    return (_gemm(spec, _weight_values(spec, w, multiplier_codes), **operands),)


def expanded_gemm(spec: GemmSpec, w: Tensor, **operands: Tensor | int) -> tuple[Tensor]:
    """As packed_gemm, with w u8 [N, K] from `expand`."""
    return (_gemm(spec, w.view(_expanded_type(spec)).float() * 2.0**-spec.byte_exponent, **operands),)


def _gemm(
    spec: GemmSpec,
    weight: Tensor,
    *,
    a: Tensor,
    a_scale: Tensor,
    w_scales: Tensor,
    bias: Tensor,
    a_zero: Tensor | None = None,
    w_sums: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens: int = 0,
) -> Tensor:
    """GemmSpec's y [M, N] with `weight` as values f32 [N, K]: exact sums, then float32, rounded once to the output."""
    dtype, scale_groups = _sum_type(spec), spec.scale_groups
    x = byte_values(spec.activation, spec.integers).to(a.device)[a.int()].to(dtype).reshape(len(a), scale_groups, -1)
    w = weight.to(dtype).reshape(len(weight), scale_groups, -1)
    sums = (x.transpose(0, 1) @ w.permute(1, 2, 0)).float()
    y = (sums * w_scales.t()[:, None, :]).sum(0) * a_scale[:, None]
    if a_zero is not None and w_sums is not None:
        y = y + a_zero[:, None] * w_sums
    y = y + bias
    if spec.epilogue == "gate_residual":
        assert gate is not None and residual is not None
        y = residual.float() + gate.float().repeat_interleave(tokens, 0) * y
    return y.to(TORCH_TYPES[spec.output])


def _sum_type(spec: GemmSpec) -> torch.dtype:
    """float32 where it adds the products exactly, float64 else."""
    kmax_w = spec.weight_format.kmax * max(spec.multipliers)
    length = spec.in_features // spec.scale_groups
    exact = length <= exact_sum_limit(spec.activation_format.kmax, kmax_w)
    return torch.float32 if exact else torch.float64


@cache
def byte_values(name: str, integers: bool = False) -> Tensor:
    """Operand byte of format `name` -> the value it stands for, f32 [256]; bytes that no code has are NaN."""
    return torch.from_numpy(reference.byte_values(name, integers).astype(np.float32))


def _weight_values(spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None) -> Tensor:
    """Packed codes u8 [N, K / 2] -> value times multiplier, f32 [N, K]."""
    of_code = torch.from_numpy(spec.weight_format.values.astype(np.float32)).to(w.device)
    values = of_code[_nibbles(w, spec.in_features)]
    if multiplier_codes is None:
        return values
    table = torch.tensor(spec.multipliers, dtype=torch.float32, device=w.device)
    factors = table[_nibbles(multiplier_codes, spec.groups)]
    return (values.reshape(len(w), spec.groups, -1) * factors[..., None]).reshape(values.shape)


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """u8 [N, bytes] -> i32 [N, count], element 2i from the low nibble."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(len(packed), -1)[:, :count].int()


def pack(spec: PackSpec, codes: Tensor) -> tuple[Tensor]:
    """codes u8 [N, K] below 16 -> u8 [N, K / 2], element 2i in the low nibble."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4),)


def expand(spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None = None) -> tuple[Tensor]:
    """w u8 [N, K / 2] -> u8 [N, K]: INT8 or E4M3 bytes of value * multiplier * 2^spec.byte_exponent."""
    values = _weight_values(spec, w, multiplier_codes) * 2.0**spec.byte_exponent
    return (values.to(_expanded_type(spec)).view(torch.uint8),)


def _expanded_type(spec: GemmSpec) -> torch.dtype:
    return torch.int8 if spec.multiplies_integers else torch.float8_e4m3fn


# --- quantizers ------------------------------------------------------------------------------------------------------


def quantize(
    spec: QuantizeSpec, x: Tensor, static_scale: Tensor | None = None, static_zero: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x [M, C] -> operand bytes u8 [M, C] and, unless static, scale f32 [M] of each token."""
    if static_scale is not None and static_zero is not None:
        return (encoded(spec.format, (x.float() - static_zero) / static_scale, spec.integers),)
    return _quantized(spec, x.float())


def gelu_quantize(spec: QuantizeSpec, x: Tensor, **static: Tensor) -> tuple[Tensor, ...]:
    """As `quantize`, of the GELU (tanh form) of x."""
    return quantize(spec, torch.nn.functional.gelu(x.float(), approximate="tanh"), **static)


def norm_modulate_quantize(
    spec: QuantizeSpec, x: Tensor, shift: Tensor, scale: Tensor, tokens: int
) -> tuple[Tensor, ...]:
    """As `quantize`, of LayerNorm(x) * (1 + scale) + shift."""
    gain, offset = (rows.float().repeat_interleave(tokens, 0) for rows in (1 + scale.float(), shift))
    normal = torch.nn.functional.layer_norm(x.double(), (spec.channels,), eps=spec.epsilon)
    return _quantized(spec, (normal * gain + offset).float())


def _quantized(spec: QuantizeSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=ABSMAX_FLOOR) / get_format(spec.format).max_value
    return encoded(spec.format, x / scale, spec.integers), torch.where(finite, scale, torch.nan)[:, 0]


def encoded(name: str, x: Tensor, integers: bool = False) -> Tensor:
    """Operand bytes of the codes nearest to x: ties to even, saturating, -0 folded; NaN has the code 0."""
    grid = _grid(name, x.device, integers)
    magnitude = x.abs().nan_to_num(0.0).clamp(max=float(get_format(name).max_value))
    binade = torch.bucketize(magnitude, grid.thresholds, right=True)
    code = (magnitude / grid.steps[binade]).round().int() + binade.int() * grid.binade_codes
    code = code.clamp(max=len(grid.positive) - 1)
    return torch.where(x < 0, grid.negative[code], grid.positive[code])


@dataclass(frozen=True)
class _Grid:
    """A format's numbers: where each binade begins and its step; operand byte of each magnitude and of its negative."""

    thresholds: Tensor
    steps: Tensor
    binade_codes: int
    positive: Tensor
    negative: Tensor


@cache
def _grid(name: str, device: torch.device, integers: bool) -> _Grid:
    table = attributes("QuantizeActivation", format=name)
    byte_of = torch.from_numpy(operand_bytes(name, integers)).to(device)
    return _Grid(
        thresholds=torch.tensor(table["thresholds"], device=device),
        steps=torch.tensor(table["steps"], device=device),
        binade_codes=table["binade_codes"],
        positive=byte_of[: table["max_code"] + 1],
        negative=byte_of[torch.tensor(table["negative_codes"], device=device)],
    )


# Kernel of the table -> what it computes.
REFERENCES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "packed_gemm": packed_gemm,
    "expanded_gemm": expanded_gemm,
    "pack": pack,
    "expand": expand,
    "quantize": quantize,
    "gelu_quantize": gelu_quantize,
    "norm_modulate_quantize": norm_modulate_quantize,
}
