"""Are the outputs of timed GEMMs right at their own shapes? How far each is from the exact result, and may be.

The exact result is the float64 product of the values that codes and scales stand for. Norms are over all outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.weights import Packed, dequantized
from plugins.gpu.promotion import accumulator_bits, promotion_of
from plugins.gpu.spec import GemmSpec, operand_of
from plugins.gpu.tiles import architecture, product_type

if TYPE_CHECKING:
    from torch import Tensor

INSTRUCTION = 32  # products that one step of an FP8 tensor core adds to its running sum
HALF_UNIT_BF16 = 2.0**-8


def exact(spec: GemmSpec, a: Tensor, a_scale: Tensor, packed: Packed) -> Tensor:
    """y float64 [M, N] of E4M3 operand bytes a u8 [M, K] without bias."""
    import torch

    values = a.view(torch.float8_e4m3fn).double() * 2.0 ** -operand_of(spec.activation).shift
    y: Tensor = (values * a_scale[:, None].double()) @ dequantized(packed).double().t()
    return y


def error(y: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of `reference`."""
    return float((y.double() - reference).norm() / reference.norm())


def limit(spec: GemmSpec, sm: int) -> float:
    """What `error` of a right kernel with a bf16 output stays below.

    Rounding to bf16 moves each output by at most half a unit, 2^-8 of it (under the interpreter, which cuts off, by a
    whole one), hence the norm by no more. Besides, an accumulator of b bits may round the running sum by 2^(1-b) of it
    in every step (plugins/gpu/promotion.py); products are independent here, so the running sums' norm is at most the
    whole sums'. Integer sums are exact. A tile left out shows: it moves the norm by the root of its share.
    """
    rounding = (2 if sm == 0 else 1) * HALF_UNIT_BF16
    if spec.multiplies_integers:
        return rounding
    fp8, known = product_type(spec, sm) == "fp8", architecture(sm)
    span = spec.group_size if spec.real_groups else spec.in_features
    span = promotion_of(spec, fp8, known, by_group=spec.real_groups).every or span
    return rounding + span / INSTRUCTION * 2.0 ** (1 - accumulator_bits(fp8, known))
