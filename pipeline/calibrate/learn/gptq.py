"""GPTQ (arXiv 2210.17323): weights rounded one input channel after the other, the rest making up for each error.

The squared error of a layer's output over the calibration rows x is tr(D H D^T), with D [N, K] the weight's error and
H = sum x x^T [K, K]. When input channel j is rounded, the channels behind it move so that this grows least (Optimal
Brain Quantization); GPTQ does so for all output channels in one order, with the Cholesky factor of the inverse of H.

As Q-DiT has it (arXiv 2406.17343, released code): damping of 1 % of H's mean diagonal, lazy updates in blocks of 128
channels, no reordering, scales of a group fitted when its turn comes. Any format of the table is a grid here, and the
group of an exact multiplier is fitted like a real one: the channel's scale is settled at the start, its multiplier when
the group's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.checkpoint import Granularity, QuantizedLinear
from export.errors import ModelError, RecipeError
from export.formats.format import Format, get_format, quantize
from pipeline.calibrate.methods.rtn import float_weight
from pipeline.calibrate.plan import Activation, LayerPlan
from pipeline.calibrate.scales import F32, SEARCHES, RoundingErrors, find_scales, in_blocks
from pipeline.methods import Scalar
from pipeline.recipe import Recipe

F64 = NDArray[np.float64]
DAMPING, BLOCK = 0.01, 128
RANGES = (*SEARCHES, "recipe")


@dataclass(frozen=True)
class Grid:
    """What a weight [N, K] may become: format, and scales as in `LayerPlan`. group_size 0 stands for all of K."""

    format: Format
    granularity: Granularity = "per_channel"
    group_size: int = 0
    multipliers: tuple[int, ...] = (1,)
    search: str = "absmax"


class Rounded(NamedTuple):
    """codes [N, K] uint8, scales [N, 1 or groups] float32, multipliers [N, groups] uint8, 1 where none are chosen."""

    codes: NDArray[np.uint8]
    scales: F32
    multipliers: NDArray[np.uint8]


def learned_linear(
    plan: LayerPlan,
    inputs: Iterable[ArrayLike],
    recipe: Recipe,
    options: Mapping[str, Scalar],
    **activation: Unpack[Activation],
) -> QuantizedLinear:
    """The layer of a plan by GPTQ on its inputs [rows, K], as the options damping, act_order and range say.

    activation: see `LayerPlan.layer`.
    """
    search = clip_search(recipe, options)
    grid = Grid(get_format(plan.weight_format), plan.granularity, plan.group_size, plan.multipliers, search)
    matrix = hessian(inputs, plan.linear.module.in_features)
    damping, act_order = float(options["damping"]), bool(options["act_order"])
    rounded = gptq(float_weight(plan), matrix, grid, damping=damping, act_order=act_order, name=plan.name)
    return plan.layer(*rounded, **activation)


def clip_search(recipe: Recipe, options: Mapping[str, Scalar]) -> str:
    """How weight scales are found: the option "range", or the recipe's search if it says so."""
    choice = str(options["range"])
    if choice not in RANGES:
        raise RecipeError(f"calibrate.options.range {choice!r}; use one of {', '.join(RANGES)}")
    return recipe.weights.search if choice == "recipe" else choice


def hessian(inputs: Iterable[ArrayLike], k: int) -> F64:
    """sum x x^T over the rows of all arrays or tensors [rows, K]: [K, K] float64 (each part's product in float32)."""
    total = np.zeros((k, k))
    for part in inputs:
        rows = np.asarray(part, np.float32)
        total += rows.T @ rows
    return total


def inverse_factor(matrix: F64, damping: float, name: str) -> F64:
    """Upper triangular U [K, K] with U^T U = (H + damping * mean(diag H) * 1)^-1.

    U[j, j]^2 is the first diagonal element, and U[j, j:] * U[j, j] the first row, of the inverse of H[j:, j:]. An H of
    zeros (a layer whose input was always zero) counts as the identity: nothing is known, so nothing is made up for.
    """
    if not np.isfinite(matrix).all():
        raise ModelError(f"{name}: calibration gave it inputs that are NaN or Inf; run the float model to find where")
    mean = float(np.trace(matrix)) / len(matrix)
    damped = matrix / mean if mean > 0 else np.zeros_like(matrix)
    damped = damped + np.eye(len(matrix)) * (damping if mean > 0 else 1.0)
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(
    weight: F32, matrix: F64, grid: Grid, *, damping: float = DAMPING, act_order: bool = False, name: str = "weight"
) -> Rounded:
    """Round weight [N, K] to the grid with H = `matrix` [K, K].

    act_order: input channels by falling diag(H) instead of in order; groups then keep the scales of the float weight,
    as their channels do not come one after the other.
    """
    k = weight.shape[1]
    group = grid.group_size or k
    steps = _Steps(weight, grid, fixed=act_order)
    order = np.argsort(-np.diag(matrix), kind="stable") if act_order else np.arange(k)
    upper = inverse_factor(matrix[np.ix_(order, order)], damping, name)
    left = weight.T[order].astype(np.float64)  # [K, N]: what channels not yet rounded have become
    codes = np.empty(left.shape, np.uint8)
    for start, stop in _blocks(k, group):
        errors = np.empty((stop - start, left.shape[1]))
        for j in range(start, stop):
            if j % group == 0:
                steps.fit(j // group, left[j : j + group])
            step = steps.of(order[j] // group)
            codes[order[j]] = code = quantize(grid.format, left[j] / step)
            errors[j - start] = error = (left[j] - grid.format.values[code] * step) / upper[j, j]
            left[j + 1 : stop] -= upper[j, j + 1 : stop, None] * error
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return Rounded(np.ascontiguousarray(codes.T), steps.scales, steps.multipliers)


def _blocks(k: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most BLOCK channels (a group may be longer), such that each group starts up to date: at the start
    of a block or within one that holds all of it.

    >>> list(_blocks(256, 64)), list(_blocks(576, 192))
    ([(0, 128), (128, 256)], [(0, 128), (128, 192), (192, 320), (320, 384), (384, 512), (512, 576)])
    """
    stride = group * max(1, BLOCK // group)
    for start in range(0, k, stride):
        end = min(start + stride, k)
        yield from ((first, min(first + BLOCK, end)) for first in range(start, end, BLOCK))


class _Steps:
    """Scales [N, 1 or groups] and multipliers [N, groups], fitted group by group unless `fixed`."""

    def __init__(self, weight: F32, grid: Grid, fixed: bool) -> None:
        self.grid, self.fixed = grid, fixed
        blocks = in_blocks(weight, grid.granularity, grid.group_size)
        scales, multipliers = find_scales(blocks, grid.format, grid.multipliers, grid.search)
        self.scales, self.multipliers = scales.reshape(len(weight), -1), multipliers.reshape(len(weight), -1)

    def of(self, index: int) -> F64:
        """[N]: distance that the value 1 stands for in group `index`, with the rounding of the stored float32 scale."""
        scale = self.scales[:, index if self.scales.shape[1] > 1 else 0].astype(np.float64)
        return scale * self.multipliers[:, index]

    def fit(self, index: int, part: F64) -> None:
        """Take what group `index` has become, part [g, N], for its scale or multiplier."""
        if self.fixed or self.grid.granularity == "per_channel":
            return
        blocks = np.ascontiguousarray(part.T, np.float32)[:, None]
        if self.grid.granularity == "group":
            self.scales[:, index], _ = find_scales(blocks, self.grid.format, (1,), self.grid.search)
            return
        steps = self.scales[:, :1] * np.array(self.grid.multipliers, np.float32)
        by_multiplier = RoundingErrors(np.abs(blocks), self.grid.format).at(steps)[:, :, 0]
        self.multipliers[:, index] = np.array(self.grid.multipliers, np.uint8)[by_multiplier.argmin(axis=1)]
