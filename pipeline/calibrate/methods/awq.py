"""The method "awq" (AWQ, arXiv 2306.00978): channels that matter get finer weights, by a searched balance.

The input is divided and the weight multiplied by s_c = x_c^a, x_c the mean magnitude of channel c over calibration
tokens, divided by the geometric mean of the largest and the smallest s. a is searched: 0, 1/n, 2/n, ... below 1 (the
authors' n is 20), by the layer's output error. Weights are then rounded to nearest, in the recipe's groups.

As published it is for weights alone, with inputs in float and a search of the weight's clip; here the error counts the
rounded input, and the clip is the recipe's `weights.search`. Layers that read the same tensor share a balance, as the
authors' do of query, key and value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from export.checkpoint import QuantizedLinear
from export.dialect.ops import ABSMAX_FLOOR
from export.errors import RecipeError
from pipeline.calibrate.balance import InputMap
from pipeline.calibrate.balance_search import best_layers
from pipeline.calibrate.memory import BlockSize, Sizes, searched_bytes
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.methods.baseline import Baseline
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import LayerPlan

LEAST, MOST = 1e-4, 1e4  # of the authors' code: s stays a number that float16 holds


class Awq(Baseline):
    """The method "awq"."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.steps = int(context.options["steps"])
        if self.steps <= 0:
            raise RecipeError(f"calibrate.options.steps {self.steps} of awq must be positive")

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        return super().unit_bytes(sizes, block) + searched_bytes(block)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        search = self.context.recipe.weights.search

        def balanced(plan: LayerPlan, to: InputMap) -> QuantizedLinear:
            return to.layer(quantize_linear(to.plan(plan), search))

        return best_layers(unit.observed, unit.plans, self.rows_per_call, self.candidates, balanced)

    def candidates(self, x: torch.Tensor, _: Sequence[LayerPlan]) -> Iterator[InputMap]:
        """The balances of all exponents, for rows x [n, K]; the first leaves the input as it is."""
        means = np.maximum(x.abs().double().mean(0).numpy(), ABSMAX_FLOOR)
        for step in range(self.steps):
            scale = np.clip(means ** (step / self.steps), LEAST, MOST)
            yield InputMap.of_balance(scale / np.sqrt(scale.max() * scale.min()))
