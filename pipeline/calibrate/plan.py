"""What a recipe means for each layer: formats, granularity and group multipliers, settled before any work."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from export.checkpoint import ActivationScaling, Granularity, QuantizedLinear
from export.errors import RecipeError
from export.formats.format import get_format, pack, packed_size
from export.formats.operands import embeds, exact_multipliers, pair_limit
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LinearRef

logger = logging.getLogger(__name__)
F32 = NDArray[np.float32]
SCALE_BYTES, MULTIPLIER_BITS = 4, 4
MULTIPLIER_CODES = 2**MULTIPLIER_BITS  # multipliers are stored as indices


class Activation(TypedDict, total=False):
    """The fields of a `QuantizedLinear` that say how its input is rounded."""

    activation_format: str
    activation_scaling: ActivationScaling
    activation_group: int
    activation_scale: F32 | None
    activation_zero: F32 | None


@dataclass(frozen=True)
class LayerPlan:
    """How one linear is to be quantized. `multipliers` is (1,) unless the granularity is "exact_group"."""

    linear: LinearRef
    weight_format: str
    activation_format: str
    granularity: Granularity
    group_size: int
    multipliers: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.linear.name

    @property
    def size_bytes(self) -> int:
        """Of the layer's codes, scales and multipliers, as `QuantizedLinear.size_bytes`."""
        n, k = self.linear.module.out_features, self.linear.module.in_features
        groups = k // self.group_size if self.group_size else 1
        scales = groups if self.granularity == "group" else 1
        multipliers = packed_size(MULTIPLIER_BITS, groups) if self.granularity == "exact_group" else 0
        return n * (packed_size(get_format(self.weight_format).bits, k) + scales * SCALE_BYTES + multipliers)

    def layer(
        self, codes: NDArray[np.uint8], scales: F32, multipliers: NDArray[np.uint8], **activation: Unpack[Activation]
    ) -> QuantizedLinear:
        """The finished layer with codes [N, K], scales [N, 1 or groups] and multipliers [N, groups].

        activation: how its input is rounded where that is not the plan's format, scaled per token.
        """
        bias = self.linear.module.bias
        fields: Activation = {"activation_format": self.activation_format, **activation}
        return QuantizedLinear(
            name=self.name,
            kind=self.linear.kind,
            in_features=codes.shape[1],
            weight_format=self.weight_format,
            codes=pack(codes, get_format(self.weight_format).bits),
            granularity=self.granularity,
            group_size=self.group_size,
            scales=scales,
            multipliers=multipliers if self.granularity == "exact_group" else None,
            bias=None if bias is None else bias.detach().float().numpy().copy(),
            **fields,
        )


def group_multipliers(weight: str, activation: str) -> tuple[int, ...]:
    """Multipliers that keep the GEMM of these formats exact; (1,) if groups can gain nothing.

    Always in INT8, and in E4M3 as well where both formats fit it: then FP8 hardware runs the same weights.

    >>> group_multipliers("E2M1", "E2M3"), group_multipliers("INT4", "INT8"), group_multipliers("E3M0", "E2M3")
    ((1, 2, 3, 4, 5, 6, 8, 10), (1, 2, 3, 4, 5, 6, 7, 8, 9), (1,))
    """
    targets = ("INT8", "E4M3") if embeds(weight, "E4M3") and embeds(activation, "E4M3") else ("INT8",)
    exact = exact_multipliers(weight, targets, pair_limit(activation))
    return exact[:MULTIPLIER_CODES] or (1,)


def make_plans(linears: Sequence[LinearRef], recipe: Recipe) -> list[LayerPlan]:
    """One plan for each linear, in order. Raises RecipeError if the group size does not fit a layer."""
    plans = [_make_plan(linear, recipe) for linear in linears]
    _check_group_size(plans, recipe.weights.group_size)
    if recipe.weights.granularity == "exact_group":
        _log_ungrouped(plans)
    return plans


def _make_plan(linear: LinearRef, recipe: Recipe) -> LayerPlan:
    weight = recipe.formats.weight_of.get(linear.kind, recipe.formats.weight)
    activation = recipe.formats.activation
    granularity: Granularity = recipe.weights.granularity  # type: ignore[assignment]  # the recipe has checked it
    multipliers = group_multipliers(weight, activation) if granularity == "exact_group" else (1,)
    if granularity == "exact_group" and multipliers == (1,):
        granularity = "per_channel"
    group_size = 0 if granularity == "per_channel" else recipe.weights.group_size
    return LayerPlan(linear, weight, activation, granularity, group_size, multipliers)


def _check_group_size(plans: list[LayerPlan], group_size: int) -> None:
    grouped = {plan.name: plan.linear.module.in_features for plan in plans if plan.group_size}
    name = next((name for name, k in grouped.items() if k % group_size), None)
    if name is None:
        return
    common = math.gcd(*grouped.values())
    fitting = next(size for size in range(min(group_size, common), 0, -1) if common % size == 0)
    raise RecipeError(
        f"{name}: weights.group_size {group_size} does not divide its {grouped[name]} input channels; a size that "
        f"divides those of every layer is {fitting} (--set weights.group_size={fitting}), "
        f"or use --set weights.granularity=per_channel"
    )


def _log_ungrouped(plans: list[LayerPlan]) -> None:
    single = Counter((plan.weight_format, plan.linear.kind) for plan in plans if plan.granularity == "per_channel")
    for (weight, kind), count in sorted(single.items()):
        logger.info("%s: %d layers in %s have no exact multipliers but 1: one scale per channel", kind, count, weight)
