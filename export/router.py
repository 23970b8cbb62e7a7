"""The router of timestep-dependent low-rank branches: which of a layer's H branches is active at a timestep.

One router serves all layers of a model (MSFP's TALoRA, arXiv 2505.21591): sinusoidal embedding of the timestep, a
two-layer perceptron, and the branch with the largest logit. Its width and depth were not published; one hidden layer
with SiLU, as in the models' own timestep embedders, is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.errors import ContractError
from export.formats.operands import ROUNDING

ARRAYS = ("frequencies", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, eq=False)
class Router:
    """logits = w2 @ silu(w1 @ [cos(t f), sin(t f)] + b1) + b2, and the branch is the first with the largest logit.

    frequencies: float32 [D / 2]. w1 [Hd, D], b1 [Hd], w2 [H, Hd], b2 [H]: float32, H branches. Cosines come first, as
    in diffusers' embedding of timesteps (flip_sin_to_cos). Two routers are equal if all their numbers are.
    """

    frequencies: NDArray[np.float32]
    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]

    def __post_init__(self) -> None:
        half, hidden, branches = self.frequencies.size, len(self.w1), len(self.w2)
        expected = ((half,), (hidden, 2 * half), (hidden,), (branches, hidden), (branches,))
        for key, shape in zip(ARRAYS, expected, strict=True):
            array = getattr(self, key)
            if array.dtype != np.float32 or array.shape != shape:
                raise ContractError(f"router: {key} is {array.dtype} {array.shape}; it must be float32 {shape}")
            if not np.isfinite(array).all():
                raise ContractError(f"router: {key} has NaN or Inf; train it again with a smaller learning rate")

    @property
    def branches(self) -> int:
        """H, how many low-rank branches a layer has to choose from."""
        return len(self.w2)

    @cached_property
    def digest(self) -> str:
        """Hash of all numbers and shapes."""
        parts = [np.ascontiguousarray(getattr(self, key)) for key in ARRAYS]
        return sha256(b"".join(repr(part.shape).encode() + part.tobytes() for part in parts)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Router) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def logits(self, timesteps: ArrayLike) -> NDArray[np.float64]:
        """[B] -> [B, H], in float64."""
        hidden = self._layers(timesteps)[2]
        return hidden @ self.w2.T.astype(np.float64) + self.b2

    def choose(self, timesteps: ArrayLike) -> NDArray[np.int64]:
        """[B] -> [B]: the branch that is active at each timestep, the first one on ties."""
        return self.logits(timesteps).argmax(axis=1)

    def undecided(self, timesteps: ArrayLike) -> NDArray[np.bool_]:
        """[B] -> [B]: may float32 roundings, as engines have them, choose another branch?

        Bounds, first order, u = 2^-24: the phase t f is off by u |t f| and its cosine by 2 u more; a sum of n products
        by n u times the sum of their magnitudes; SiLU has a slope below 1.1 and adds 4 u of its value. Twice the
        result covers the second order and both logits of a pair.
        """
        phase, wave, hidden = self._layers(timesteps)
        w1, w2 = np.abs(self.w1).astype(np.float64), np.abs(self.w2).astype(np.float64)
        wave_error = np.tile(np.abs(phase) + 2, 2)
        sums = (self.w1.shape[1] + 1) * (np.abs(wave) @ w1.T + np.abs(self.b1))
        hidden_error = 1.1 * (wave_error @ w1.T + sums) + 4 * np.abs(hidden)
        sums = (self.w2.shape[1] + 1) * (np.abs(hidden) @ w2.T + np.abs(self.b2))
        error = 2 * ROUNDING * (hidden_error @ w2.T + sums)
        logits = self.logits(timesteps)
        if self.branches == 1:
            return np.zeros(len(logits), bool)
        rivals = np.where(np.arange(self.branches) == logits.argmax(1)[:, None], -np.inf, logits + error)
        return rivals.max(axis=1) >= (logits - error).max(axis=1)

    def _layers(self, timesteps: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(phase [B, D/2], wave [B, D], hidden [B, Hd] behind SiLU)."""
        phase = np.asarray(timesteps, np.float64).reshape(-1, 1) * self.frequencies.astype(np.float64)
        wave = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
        before = wave @ self.w1.T.astype(np.float64) + self.b1.astype(np.float64)
        with np.errstate(over="ignore"):  # exp of more than 709 is inf, and SiLU rightly zero
            return phase, wave, before / (1 + np.exp(-before))


def frequencies(dimension: int) -> NDArray[np.float32]:
    """[dimension / 2]: 10000^(-i / (dimension / 2)), the table of diffusers' timestep embedding (downscale shift 0).

    >>> frequencies(4)
    array([1.  , 0.01], dtype=float32)
    """
    half = dimension // 2
    return np.power(10000.0, -np.arange(half) / half).astype(np.float32)
