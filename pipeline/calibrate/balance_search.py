"""Balances that are searched: of a few candidates the one with which layers give the float outputs best.

AWQ and SVDQuant choose so. The error counts what a layer will do, its rounded input and whatever stands beside its
GEMM, on rows that the float model feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from export.checkpoint import QuantizedLinear
from pipeline.backends.reference import FakeQuantLinear
from pipeline.calibrate.balance import InputMap, readers
from pipeline.calibrate.blocks import Observed
from pipeline.calibrate.methods.rtn import float_weight
from pipeline.calibrate.plan import LayerPlan

# Rows [n, K] that layers read, and these layers -> the balances to try, in order; of equals the first is taken.
Candidates = Callable[[torch.Tensor, Sequence[LayerPlan]], Iterable[InputMap]]
Quantize = Callable[[LayerPlan, InputMap], QuantizedLinear]


def best_layers(
    observed: Observed, plans: Sequence[LayerPlan], rows: int, candidates: Candidates, quantize: Quantize
) -> list[QuantizedLinear]:
    """The layers of `plans`, in order, each made by `quantize` with the candidate of the least squared error.

    Layers that read the same tensor get the same balance, and are judged together. rows: of each calibration call.
    """
    layers: dict[str, QuantizedLinear] = {}
    for group in readers(observed, plans, rows):
        x = torch.cat(list(observed.layer_inputs(group[0].name, rows=rows)))
        outputs = [float_output(plan, x) for plan in group]
        tried = ([quantize(plan, to) for plan in group] for to in candidates(x, group))
        layers |= {layer.name: layer for layer in min(tried, key=lambda some: squared_error(some, x, outputs))}
    return [layers[plan.name] for plan in plans]


def float_output(plan: LayerPlan, x: torch.Tensor) -> torch.Tensor:
    """[n, N] without bias, which is no part of the error; x [n, K]."""
    return x @ torch.from_numpy(float_weight(plan)).T


@torch.no_grad()
def squared_error(layers: Sequence[QuantizedLinear], x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> float:
    """Of the layers' results for rows x [n, K] against `outputs` [n, N], summed in float64."""
    errors = []
    for layer, output in zip(layers, outputs, strict=True):
        bias = 0 if layer.bias is None else torch.from_numpy(layer.bias)
        errors.append(float((FakeQuantLinear(layer, torch.float32)(x) - bias - output).double().square().sum()))
    return sum(errors)
