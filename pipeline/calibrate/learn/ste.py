"""Fake quantizers with gradients: the activation quantizers of `pipeline.backends.reference`, straight through.

Forward, the values are the reference's, bit for bit. Backward, rounding counts as the identity inside the range and as
a constant outside, as in LSQ (arXiv 1902.08153): a static scale or zero that is a parameter gets LSQ's gradient,
(rounded - u) per element inside and the bound outside. The scale of a dynamic quantizer is a function of x through the
element of largest magnitude only; no gradient flows that way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from export.errors import ContractError
from export.formats.format import Format
from pipeline.backends.reference import fake_quantize, round_to_format


class _RoundToFormat(torch.autograd.Function):
    """`round_to_format` with the gradient of clamp."""

    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, fmt: Format) -> Tensor:
        bound = fmt.max_value
        ctx.save_for_backward((u >= (-bound if fmt.sign_bits else 0.0)) & (u <= bound))
        return round_to_format(fmt, u)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _Dynamic(torch.autograd.Function):
    """Absmax scale over the last axis and rounding; nothing is out of range, so the gradient is the identity."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, fmt: Format) -> Tensor:
        return fake_quantize(fmt, x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def round_straight_through(fmt: Format, u: Tensor) -> Tensor:
    """Nearest value of the format for every number; gradient 1 within its range and 0 outside. u: any shape."""
    return _RoundToFormat.apply(u, fmt)


def per_token(fmt: Format, x: Tensor) -> Tensor:
    """x [..., K] -> fake-quantized x, one scale per row: its absmax / max_value."""
    _check_sign(fmt, signed=True)
    return _Dynamic.apply(x, fmt)


def per_tensor(fmt: Format, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """x -> zero + value(code) * scale with one static scale [1] (and zero [1], for unsigned formats)."""
    _check_sign(fmt, signed=zero is None)
    if zero is None:
        return round_straight_through(fmt, x / scale) * scale
    return round_straight_through(fmt, (x - zero) / scale) * scale + zero


def _check_sign(fmt: Format, signed: bool) -> None:
    if bool(fmt.sign_bits) != signed:
        remedy = "use a signed format or give a zero" if signed else "use an unsigned format such as UE2M2"
        raise ContractError(f"activation format {fmt.name} does not go with {'no' if signed else 'a'} zero; {remedy}")
