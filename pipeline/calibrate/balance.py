"""Balancing: change the scale (and offset) of a layer's input channels, and let weight and bias make up for it.

x' = x * multiplier + offset and W' = W / multiplier, bias' = bias - W' offset give the same product; what differs is
how well x' and W' can be rounded. A balance B as papers write it, x / B and W * B, is the multiplier 1 / B. Layers that
read the same tensor must get the same map, so that they go on sharing a quantizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.dialect.ops import ABSMAX_FLOOR
from export.errors import ContractError, RecipeError
from export.models.families import LAYER_KINDS
from pipeline.calibrate.blocks import Observed
from pipeline.calibrate.methods.rtn import float_weight
from pipeline.calibrate.plan import LayerPlan

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class InputMap:
    """x' = x * multiplier + offset, float32 [K] each; offset None stands for zero."""

    multiplier: F32
    offset: F32 | None = None

    @classmethod
    def of_balance(cls, balance: F64) -> InputMap:
        """The map x' = x / balance."""
        return cls((1 / balance).astype(np.float32))

    def __post_init__(self) -> None:
        for name, value in (("multiplier", self.multiplier), ("offset", self.offset)):
            if value is not None and (value.dtype != np.float32 or not np.isfinite(value).all()):
                raise ContractError(f"input {name} must be finite float32, found {value.dtype} {value}")
        if not (self.multiplier != 0).all():
            channel = int(np.flatnonzero(self.multiplier == 0)[0])
            raise ContractError(f"input multiplier of channel {channel} is 0, so its weight would be infinite")

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x' of x [..., K] float32, in the arithmetic of the quantized layer."""
        scaled = x * torch.from_numpy(self.multiplier)
        return scaled if self.offset is None else scaled + torch.from_numpy(self.offset)

    def plan(self, plan: LayerPlan) -> LayerPlan:
        """The same layer for x' as input: a plan whose linear holds W' and bias', computed in float64."""
        weight = float_weight(plan).astype(np.float64)
        if weight.shape[1:] != self.multiplier.shape:
            raise ContractError(f"{plan.name}: balance of {len(self.multiplier)} channels, K={weight.shape[1]}")
        divided = (weight / self.multiplier).astype(np.float32)
        bias = plan.linear.module.bias
        shifted = None if bias is None else bias.detach().float().numpy()
        if self.offset is not None:
            shifted = (0.0 if shifted is None else shifted) - divided.astype(np.float64) @ self.offset
        return replace(plan, linear=replace(plan.linear, module=linear_of(divided, shifted)))

    def layer(self, layer: QuantizedLinear) -> QuantizedLinear:
        """A layer quantized from `self.plan(...)`, for x as input again."""
        return replace(layer, input_multiplier=self.multiplier, input_offset=self.offset)


def linear_of(weight: F32, bias: NDArray[np.floating] | None) -> torch.nn.Linear:
    """A linear with this weight [N, K], which is not copied, and bias [N]."""
    linear = torch.nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(torch.from_numpy(bias.astype(np.float32)), requires_grad=False)
    return linear


def salience_balance(x: F64, w: F64, alpha: float = 0.5) -> F64:
    """B [K] = x^alpha / w^(1 - alpha) for the channels' largest magnitudes x in the input and w in the weight.

    alpha 0.5 is sqrt(x / w): both sides then have the same largest magnitudes, sqrt(x w). A channel that is zero on
    one side keeps B = 1: there is nothing to balance.
    """
    alive = (x > ABSMAX_FLOOR) & (w > ABSMAX_FLOOR)
    safe_x, safe_w = np.where(alive, x, 1.0), np.where(alive, w, 1.0)
    return safe_x**alpha / safe_w ** (1 - alpha)


def weight_peaks(plans: Sequence[LayerPlan]) -> F64:
    """[K]: largest magnitude of each input channel over all rows of all these layers."""
    return np.max([np.abs(float_weight(plan)).max(axis=0) for plan in plans], axis=0).astype(np.float64)


def input_statistics(observed: Observed, statistic: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, F64]:
    """Layer name -> [calls, ...] of `statistic(input of the layer)` in the float model, from one run of all calls."""
    by_layer = observed.recorded(observed.names, lambda x: statistic(x.float()))
    return {name: torch.stack(values).double().numpy() for name, values in by_layer.items()}


def channel_peaks(x: torch.Tensor) -> torch.Tensor:
    """[K]: largest magnitude of each channel of x [..., K]."""
    return x.abs().flatten(0, -2).amax(0)


def readers(observed: Observed, plans: Sequence[LayerPlan], rows: int) -> list[list[LayerPlan]]:
    """Layers that read the same tensor (query, key and value; key and value of a cross-attention), in order.

    Found by comparing what they read at `rows` tokens of each call.
    """
    groups: dict[bytes, list[LayerPlan]] = {}
    for plan in plans:
        digest = hashlib.sha256()
        for x in observed.layer_inputs(plan.name, rows=rows):
            digest.update(repr(tuple(x.shape)).encode() + x.numpy().tobytes())
        groups.setdefault(digest.digest(), []).append(plan)
    return list(groups.values())


def shared_maps(
    observed: Observed,
    plans: Sequence[LayerPlan],
    rows: int,
    statistic: Callable[[torch.Tensor], torch.Tensor],
    magnitudes: Callable[[F64, F64], F64],
    alpha: float = 0.5,
) -> dict[str, InputMap]:
    """Layer name -> its balance, one for all layers that read the same tensor.

    statistic: as `input_statistics` takes it. magnitudes: the x of `salience_balance` by these statistics [calls, ...]
    and the weight's w [K]. rows: as `readers` takes it.
    """
    if not plans:
        return {}
    statistics, maps = input_statistics(observed, statistic), dict[str, InputMap]()
    for group in readers(observed, plans, rows):
        w = weight_peaks(group)
        balance = InputMap.of_balance(salience_balance(magnitudes(statistics[group[0].name], w), w, alpha))
        maps |= {plan.name: balance for plan in group}
    return maps


def kinds(text: str) -> tuple[str, ...]:
    """Layer kinds of an option such as "attn.qkv, ff.in"; "all" for every kind, "" for none."""
    names = LAYER_KINDS if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in LAYER_KINDS]
    if unknown:
        raise RecipeError(f"calibrate.options: layer kind {unknown[0]!r} is unknown; use {', '.join(LAYER_KINDS)}")
    return names
