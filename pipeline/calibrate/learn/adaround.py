"""AdaRound: learn for every weight whether it goes to the grid value below or above, on any number format.

Plain (arXiv 2004.10568): W = low + gap * h(V), h(V) = clip(1.2 * sigmoid(V) - 0.1, 0, 1); `gap` is the grid's step.
Scale-aware (FP4DiT, arXiv 2503.15465): h'(V') = clip(1.2 * sigmoid(V' / s) - 0.1, 0, 1) with s the step at that
weight. A float grid has steps of many sizes in one tensor; dW/dV' = 1.2 * sigmoid'(V' / s) is free of them, where
dW/dV is proportional to the step. In units of V = V' / s, Adam with the rate lr moves each weight by lr / s a step.

`low` and `low + gap` are neighbours on the grid: above the top of a binade comes the first value of the next. A
weight that lies on the grid, or is clipped to its end, has gap 0 and nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from export.checkpoint import QuantizedLinear
from export.formats.format import get_format, pack, quantize
from pipeline.backends.reference import local_step
from pipeline.progress import track

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid, so that 0 and 1 are reached at finite V
STRETCH = ZETA - GAMMA


@dataclass(frozen=True)
class Schedule:
    """`iterations` steps; the first `warmup` share without regulariser, then its exponent beta falls linearly."""

    iterations: int
    warmup: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def beta(self, iteration: int) -> float | None:
        """The exponent at this iteration (0 is the first); None while there is no regulariser."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        left = 1 - (iteration - start) / (self.iterations - start)
        return self.last_beta + (self.first_beta - self.last_beta) * left


def unit_of(layer: QuantizedLinear) -> NDArray[np.float32]:
    """[N, K] float32: what the value 1 of a code stands for, scale * multiplier, as the op `QuantizeWeight` has it."""
    unit = layer.scales if layer.multipliers is None else layer.scales * layer.multipliers.astype(np.float32)
    return np.repeat(unit, layer.in_features // unit.shape[1], axis=1)


@dataclass(frozen=True)
class Neighbours:
    """Where each weight lies on its grid, in units of `unit_of`; all [N, K] float32.

    low: the largest grid value not above it. gap: from there to the smallest not below it, 0 or `step`. step: the
    grid's step around it, a power of two. fraction: how far between, in [0, 1); 0 where gap is 0.
    """

    low: Tensor
    gap: Tensor
    step: Tensor
    fraction: Tensor

    @classmethod
    def of(cls, weight: Tensor, base: QuantizedLinear) -> Neighbours:
        fmt = get_format(base.weight_format)
        u = (weight / torch.from_numpy(unit_of(base))).clamp(-fmt.max_value, fmt.max_value)
        step = torch.ones_like(u) if fmt.is_integer else local_step(fmt, u)
        steps = u / step  # exact, as are the products below: the step is a power of two
        low, high = steps.floor() * step, steps.ceil() * step
        return cls(low, high - low, step, steps - steps.floor())


class SoftRounding(nn.Module):
    """The weight of one layer between its grid neighbours: a parameter `v` for each element [N, K] float32.

    `base` gives scales, multipliers and all else but the codes. `weight` starts as the float weight, but for clipping.
    """

    low: Tensor
    gap: Tensor
    inverse: Tensor

    def __init__(self, weight: Tensor, base: QuantizedLinear, scale_aware: bool) -> None:
        super().__init__()
        self.weight, self.base = weight, base
        unit, near = torch.from_numpy(unit_of(base)), self.neighbours
        step = near.step * unit if scale_aware else torch.ones(1)
        self.register_buffer("low", near.low * unit, persistent=False)
        self.register_buffer("gap", near.gap * unit, persistent=False)
        self.register_buffer("inverse", 1 / step, persistent=False)
        self.v = nn.Parameter(step * -torch.log(STRETCH / (near.fraction - GAMMA) - 1))

    @property
    def neighbours(self) -> Neighbours:
        """Computed anew: learning a large block should not hold them."""
        return Neighbours.of(self.weight, self.base)

    def share_up(self) -> Tensor:
        """h: [N, K] in [0, 1], how far every weight is rounded up."""
        return _RectifiedSigmoid.apply(self.v, self.inverse)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The soft weight [N, K] and the shares h that it is made of."""
        share = self.share_up()
        return torch.addcmul(self.low, self.gap, share), share

    def codes(self) -> NDArray[np.uint8]:
        """[N, K]: the code of the neighbour that each weight has been drawn to; up where v >= 0."""
        near = self.neighbours
        value = torch.where(self.v.detach() >= 0, near.low + near.gap, near.low)
        return quantize(get_format(self.base.weight_format), value.numpy())

    def layer(self) -> QuantizedLinear:
        """The finished layer: `base` with the learned codes."""
        return replace(self.base, codes=pack(self.codes(), get_format(self.base.weight_format).bits))


class _RectifiedSigmoid(torch.autograd.Function):
    """clip(1.2 * sigmoid(v * inverse) - 0.1, 0, 1), written out because autograd would keep every step of it."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, inverse: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(v * inverse)
        ctx.save_for_backward(sigmoid, inverse)
        return (sigmoid * STRETCH).add_(GAMMA).clamp_(0, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        sigmoid, inverse = ctx.saved_tensors
        low, high = -GAMMA / STRETCH, (1 - GAMMA) / STRETCH
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(inverse).mul_(STRETCH)
        slope.mul_((sigmoid >= low) & (sigmoid <= high))
        return slope.mul_(grads[0]), None


class _Undecided(torch.autograd.Function):
    """sum(1 - |2h - 1|^beta)."""

    @staticmethod
    def forward(ctx: FunctionCtx, share: Tensor, beta: float) -> Tensor:
        centred = share * 2 - 1
        power = centred.abs().pow_(beta - 1)
        ctx.beta = beta
        ctx.save_for_backward(torch.copysign(power, centred))
        return share.numel() - (power * centred.abs_()).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (power,) = ctx.saved_tensors
        return power * (-2 * ctx.beta * grads[0]), None


def undecided(share: Tensor, beta: float) -> Tensor:
    """The regulariser sum(1 - |2h - 1|^beta): 0 when every h is 0 or 1. beta > 1."""
    return _Undecided.apply(share, beta)


# --- one layer by itself -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """mean over rows of |W x - W_q y|^2 as a function of W_q: all that the data says about one layer.

    x is the layer's input in the float model, y in the network quantized so far. gram: mean of y y^T, [K, K];
    target: W times the mean of x y^T, [N, K]; constant: mean of |W x|^2.
    """

    gram: Tensor
    target: Tensor
    constant: float

    @classmethod
    def of(cls, weight: Tensor, inputs: list[Tensor], noisy: list[Tensor]) -> Quadratic:
        """weight [N, K]; inputs x and noisy y: rows [rows, K] of each call, in the same order. Sums in float64."""
        k, rows = weight.shape[1], sum(len(x) for x in inputs)
        gram, cross, constant = torch.zeros(k, k).double(), torch.zeros(k, k).double(), 0.0
        for x, y in zip(inputs, noisy, strict=True):
            gram += (y.T @ y).double()
            cross += (x.T @ y).double()
            constant += float((x @ weight.T).double().square().sum())
        return cls((gram / rows).float(), (weight.double() @ (cross / rows)).float(), constant / rows)

    def loss(self, weight: Tensor) -> Tensor:
        """The mean for W_q = `weight` [N, K], differentiable."""
        return _QuadraticForm.apply(weight, self.gram, self.target) + self.constant


class _QuadraticForm(torch.autograd.Function):
    """sum(W * (W gram - 2 target)), with the product used for the gradient as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, gram: Tensor, target: Tensor) -> Tensor:
        half = torch.mm(weight, gram).sub_(target)
        ctx.save_for_backward(half)
        return (weight * (half - target)).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (half,) = ctx.saved_tensors
        return half * (2 * grads[0]), None, None


def learn_layer(
    rounding: SoftRounding, quadratic: Quadratic, schedule: Schedule, learning_rate: float, strength: float
) -> None:
    """Learn `rounding.v` by Adam on the quadratic loss plus `strength` times the regulariser. Deterministic."""
    optimiser = torch.optim.Adam([rounding.v], lr=learning_rate, fused=True)
    for iteration in track(range(schedule.iterations), schedule.iterations, rounding.base.name):
        weight, share = rounding()
        loss = quadratic.loss(weight)
        beta = schedule.beta(iteration)
        if beta is not None:
            loss = loss + strength * undecided(share, beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
