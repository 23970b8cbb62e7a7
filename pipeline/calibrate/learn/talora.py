"""TALoRA of MSFP (arXiv 2505.21591): every layer has several low-rank branches, and one router picks by the timestep.

y = Q(x) Wq^T + b + up[h] (down[h] x), with h the same for all layers and all of a sample. The router is an embedding
of the timestep and a two-layer perceptron; its argmax is a one-hot choice whose gradient is that of the softmax
(straight through). The branch reads the layer's float input and stays apart from the weight: merged into it, as in
EfficientDM, every timestep group would need weights of its own.

The paper's text was not seen, so ours: the router's width and its start, the rank (8; the paper's is recalled as 32),
the learning rates and the number of iterations. A branch that the first choice leaves idle gets no gradient, and a
random start may leave one idle for good, so the router's second layer starts as the least-squares fit of equal shares
of the trajectory, early timesteps to the first branch: the coarse-to-fine division that the paper reports as learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from export.formats.format import get_format
from export.router import Router, frequencies
from pipeline.calibrate.learn.ste import per_tensor, per_token

EMBEDDING, HIDDEN = 64, 64  # of the router: D and Hd
INITS = ("zero", "svd")
# The router's start: points of its fit, and ridge as a share of the mean power of its features.
GRID, RIDGE = 1024, 1e-4


@dataclass(frozen=True)
class Branches:
    """count: branches per layer (H); rank: of each; init: "zero" (up is 0, so that tuning starts at the quantized
    model) or "svd" (the best approximation of the weight's quantization error, the same in every branch)."""

    count: int = 2
    rank: int = 8
    init: str = "zero"

    def __post_init__(self) -> None:
        if self.count < 1 or self.rank < 1:
            raise RecipeError(
                f"calibrate.options: lora_count {self.count} and lora_rank {self.rank} must be positive; "
                f"use_lora=false leaves branches out"
            )
        if self.init not in INITS:
            raise RecipeError(f"calibrate.options.lora_init {self.init!r}; use one of {', '.join(INITS)}")


class TimestepRouter(nn.Module):
    """The trainable `export.router.Router`: timesteps [B] -> gates [B, H], one-hot with the softmax's gradient.

    timesteps: those of the trajectory, which the start divides. generator: of the first layer's random weights.
    """

    frequencies: Tensor

    def __init__(self, branches: int, timesteps: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.from_numpy(frequencies(EMBEDDING)))
        self.w1, self.b1 = _normal((HIDDEN, EMBEDDING), generator), nn.Parameter(torch.zeros(HIDDEN))
        w2, b2 = self._divided(branches, timesteps.float())
        self.w2, self.b2 = nn.Parameter(w2), nn.Parameter(b2)

    def hidden(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, Hd]."""
        phase = timesteps.float()[:, None] * self.frequencies
        wave = torch.cat([torch.cos(phase), torch.sin(phase)], dim=1)
        return nn.functional.silu(wave @ self.w1.T + self.b1)

    def logits(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, H]."""
        return self.hidden(timesteps) @ self.w2.T + self.b2

    @torch.no_grad()
    def _divided(self, branches: int, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """w2 [H, Hd], b2 [H]: ridge regression of one-hot shares (less their mean) on a dense grid of timesteps.

        A dense grid, so that timesteps between those of the trajectory fall to the share that they lie in.
        """
        grid = torch.linspace(float(timesteps.min()), float(timesteps.max()), GRID)
        inner = torch.arange(1, branches) / branches
        share = branches - 1 - torch.bucketize(grid, torch.quantile(timesteps, inner), right=False)
        target = nn.functional.one_hot(share, branches).double() - 1 / branches
        features = nn.functional.pad(self.hidden(grid), (0, 1), value=1.0).double()
        gram = features.T @ features
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        solved = torch.linalg.solve(gram + ridge, features.T @ target).T.float()
        return solved[:, :-1].contiguous(), solved[:, -1].contiguous()

    def forward(self, timesteps: Tensor) -> Tensor:
        return one_hot_straight_through(self.logits(timesteps))

    def exported(self) -> Router:
        """The router as engines have it."""
        arrays = (self.frequencies, self.w1, self.b1, self.w2, self.b2)
        return Router(*(value.detach().numpy().copy() for value in arrays))


def one_hot_straight_through(logits: Tensor) -> Tensor:
    """One-hot of the first largest logit, [..., H]; the gradient is that of softmax(logits)."""
    soft = logits.softmax(dim=-1)
    hard = nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    return hard + (soft - soft.detach())


def _normal(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))


class Gates:
    """The gates [B, H] of the call that is running; one object for all layers."""

    def __init__(self) -> None:
        self.now: Tensor = torch.empty(0)


class BranchedLinear(nn.Module):
    """A finished quantized layer with trainable branches: down [H * R, K] and up [N, H * R], branch after branch.

    All branches are computed and the gates multiply what comes out of `down`: the idle ones get no gradient, the
    router gets that of every branch.
    """

    weight: Tensor

    def __init__(self, layer: QuantizedLinear, weight: Tensor, branches: Branches, gates: Gates, seed: int) -> None:
        """weight: the float weight [N, K], for the start."""
        super().__init__()
        self.layer, self.branches, self.gates = layer, branches, gates
        self.register_buffer("weight", torch.from_numpy(layer.dequantized()).float(), persistent=False)
        assert layer.activation_scaling != "token_group", f"{layer.name}: no gradients go through scales of groups"
        arrays = (layer.activation_scale, layer.activation_zero, layer.bias)
        self.scale, self.zero, self.bias = (None if one is None else torch.from_numpy(one) for one in arrays)
        down, up = start(weight - self.weight, branches, torch.Generator().manual_seed(seed))
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        fmt = get_format(self.layer.activation_format)
        rounded = per_token(fmt, x) if self.scale is None else per_tensor(fmt, x, self.scale, self.zero)
        return nn.functional.linear(rounded, self.weight, self.bias) + self.low_rank(x)

    def low_rank(self, x: Tensor) -> Tensor:
        """x [B, ..., K] -> [B, ..., N]: the branch of each sample."""
        gates = self.gates.now.repeat_interleave(self.branches.rank, dim=1)
        between = (1,) * (x.ndim - 2)
        return x @ self.down.T * gates.reshape(len(x), *between, -1) @ self.up.T

    def finished(self, router: Router) -> QuantizedLinear:
        """The layer with its branches, rounded to fp16: half the bytes, and far finer than the quantizers."""
        shape = (self.branches.count, self.branches.rank)
        down = self.down.detach().unflatten(0, shape)
        up = self.up.detach().unflatten(1, shape).movedim(1, 0)
        return replace(self.layer, lora_down=_half(down), lora_up=_half(up), router=router)


def start(error: Tensor, branches: Branches, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(down [H * R, K], up [N, H * R]) before tuning; error [N, K]: float weight less quantized weight."""
    n, k = error.shape
    rows = branches.count * branches.rank
    if branches.init == "zero":
        return torch.randn((rows, k), generator=generator) / math.sqrt(k), torch.zeros(n, rows)
    u, sigma, v = torch.linalg.svd(error, full_matrices=False)
    kept = min(branches.rank, len(sigma))
    root = sigma[:kept].sqrt()
    down, up = torch.zeros(branches.rank, k), torch.zeros(n, branches.rank)
    down[:kept], up[:, :kept] = root[:, None] * v[:kept], u[:, :kept] * root
    return down.repeat(branches.count, 1), up.repeat(1, branches.count)


def _half(value: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(value.half().float().numpy())
