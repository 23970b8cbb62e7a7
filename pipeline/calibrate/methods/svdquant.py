"""The method "svdquant" (SVDQuant, arXiv 2411.05007): a low-rank branch in 16 bits takes what rounds badly.

First a balance moves outliers from the input into the weight: SmoothQuant's max|x|^a / max|w|^(1 - a) with a searched
by the layer's output error, or none, where that is best. Then the largest `rank` singular values of the balanced weight
go into a branch beside the GEMM, and what is left is rounded to nearest in the recipe's format and groups.

The branch is rounded to float16 before the rest is computed, so the rest makes up for that too; it is stored so. It
reads the input before the balance, which is multiplied into its first matrix. The authors round the rest by GPTQ for
some models, and fuse the branch with the quantizer in their kernel; both are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.balance import InputMap, linear_of, salience_balance, weight_peaks
from pipeline.calibrate.balance_search import best_layers
from pipeline.calibrate.memory import BlockSize, Sizes, searched_bytes
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.methods.baseline import Baseline
from pipeline.calibrate.methods.rtn import float_weight, quantize_linear
from pipeline.calibrate.plan import LayerPlan
from pipeline.calibrate.scales import F32


class SvdQuant(Baseline):
    """The method "svdquant"."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.rank, self.steps = (int(context.options[key]) for key in ("rank", "steps"))
        for name, value in (("rank", self.rank), ("steps", self.steps)):
            if value <= 0:
                raise RecipeError(f"calibrate.options.{name} {value} of svdquant must be positive")

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        return super().unit_bytes(sizes, block) + searched_bytes(block)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return best_layers(unit.observed, unit.plans, self.rows_per_call, self.candidates, self.with_branch)

    def candidates(self, x: torch.Tensor, plans: Sequence[LayerPlan]) -> Iterator[InputMap]:
        """No balance, and one for each exponent 1/n to (n - 1)/n; x [n, K]."""
        yield InputMap(np.ones(x.shape[1], np.float32))
        peaks, weights = x.abs().amax(0).double().numpy(), weight_peaks(plans)
        for step in range(1, self.steps):
            yield InputMap.of_balance(salience_balance(peaks, weights, step / self.steps))

    def with_branch(self, plan: LayerPlan, to: InputMap) -> QuantizedLinear:
        """The layer behind the balance `to`, with its branch."""
        balanced = to.plan(plan)
        weight = float_weight(balanced)
        down, up = branch(weight, to.multiplier, self.rank)
        rest = weight - (up.astype(np.float64) @ (down.astype(np.float64) / to.multiplier)).astype(np.float32)
        bias = balanced.linear.module.bias
        module = linear_of(rest, None if bias is None else bias.detach().float().numpy())
        residual = replace(balanced, linear=replace(balanced.linear, module=module))
        layer = to.layer(quantize_linear(residual, self.context.recipe.weights.search))
        return replace(layer, lora_down=down[None], lora_up=up[None])


def branch(weight: F32, multiplier: F32, rank: int) -> tuple[F32, F32]:
    """(down [R, K], up [N, R]), numbers of float16: up @ down / multiplier is next to the best approximation of
    weight [N, K] of that rank, or of its own where that is less."""
    u, values, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    down, up = root[:, None] * vt[:rank] * multiplier, u[:, :rank] * root
    return down.astype(np.float16).astype(np.float32), up.astype(np.float16).astype(np.float32)
