"""Weights and activations on a number format's grid in plain torch: inputs of the GPU benchmark and its reference.

The compiler's calibration chooses better scales; the time of a GEMM does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import Granularity
from export.formats.format import get_format
from export.formats.operands import exact_multipliers


@dataclass(frozen=True)
class Packed:
    """One quantized weight [N, K]: codes u8 [N, K / 2], scales f32 [N, scale groups], multiplier_codes u8 or None."""

    weight: str
    granularity: Granularity
    codes: Tensor
    scales: Tensor
    multiplier_codes: Tensor | None

    @property
    def size_bytes(self) -> int:
        tensors = [self.codes, self.scales, *([] if self.multiplier_codes is None else [self.multiplier_codes])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantize_weight(w: Tensor, weight: str, granularity: Granularity) -> Packed:
    """w [N, K] to nearest codes of the 4-bit format `weight` under absmax scales."""
    size = granularity.group_size or w.shape[1]
    groups = w.float().reshape(len(w), -1, size)
    group_scales = groups.abs().amax(-1).clamp(min=1e-12) / get_format(weight).max_value
    if granularity.real or granularity.group_size == 0:
        codes = nearest_codes(groups / group_scales[..., None], weight).reshape(w.shape)
        return Packed(weight, granularity, _nibbles(codes), group_scales.contiguous(), None)
    table = torch.tensor(exact_multipliers(weight), dtype=torch.float32, device=w.device)
    scale = group_scales.amax(1, keepdim=True) / table[-1]
    reach = (group_scales / scale).clamp(max=float(table[-1]))
    index = torch.bucketize(reach, table)  # the least multiplier that reaches
    codes = nearest_codes(groups / (scale * table[index])[..., None], weight).reshape(w.shape)
    return Packed(weight, granularity, _nibbles(codes), scale.contiguous(), _nibbles(index.to(torch.uint8)))


def nearest_codes(x: Tensor, weight: str) -> Tensor:
    """u8 codes of the values nearest to x, saturating."""
    values = get_format(weight).values
    order = np.argsort(values, kind="stable")
    order = order[np.append(True, np.diff(values[order]) > 0)]  # of plus and minus zero the first, plus
    middles = torch.tensor((values[order][1:] + values[order][:-1]) / 2, dtype=x.dtype, device=x.device)
    return torch.from_numpy(order.astype(np.uint8)).to(x.device)[torch.bucketize(x, middles)]


def _nibbles(codes: Tensor) -> Tensor:
    """u8 [N, count] below 16 -> u8 [N, ceil(count / 2)], element 2i in the low nibble."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (even[:, 0::2] | (even[:, 1::2] << 4)).contiguous()


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :count].long()


def dequantized(packed: Packed) -> Tensor:
    """The weight f32 [N, K] that the codes stand for."""
    count = 2 * packed.codes.shape[1]
    values = torch.tensor(get_format(packed.weight).values, dtype=torch.float32, device=packed.codes.device)
    groups = values[_unpacked(packed.codes, count)].reshape(
        len(packed.codes), -1, packed.granularity.group_size or count
    )
    scale = packed.scales
    if packed.multiplier_codes is not None:
        table = torch.tensor(exact_multipliers(packed.weight), dtype=torch.float32, device=scale.device)
        scale = scale * table[_unpacked(packed.multiplier_codes, groups.shape[1])]
    return (groups * scale[..., None]).reshape(len(packed.codes), count)


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, over all numbers."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def fake_quantize(x: Tensor, name: str) -> Tensor:
    """x [..., C] -> value of its code times its token's scale, in float32: what a quantizer and a dequantizer give."""
    fmt = get_format(name)
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / fmt.max_value
    q = wide / scale
    lowest = 0 if fmt.is_integer else fmt.min_exponent
    exponent = torch.frexp(q).exponent - 1
    exponent = torch.full_like(exponent, lowest) if fmt.is_integer else exponent.clamp(min=lowest)
    step = torch.ldexp(torch.ones_like(q), exponent - fmt.mantissa_bits * (not fmt.is_integer))
    floor = -fmt.max_value if fmt.sign_bits else 0.0
    return ((q / step).round() * step).clamp(floor, fmt.max_value) * scale
