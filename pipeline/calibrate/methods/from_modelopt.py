"""The method "modelopt": the layers of a model that NVIDIA ModelOpt has calibrated, taken over as they are.

It computes nothing of its own: see pipeline/calibrate/modelopt/layers.py for what is taken over and what is refused.
"""

from __future__ import annotations

from pathlib import Path

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.method import Context, Method, Unit
from pipeline.calibrate.modelopt.layers import Taken
from pipeline.calibrate.modelopt.state import read_state, state_sha256


class FromModelopt(Method):
    """Options: checkpoint (a file of mto.save, or a folder of save_pretrained), sha256 (its hash, which decides the
    layers), activations."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        name, expected = (str(context.options[key]) for key in ("checkpoint", "sha256"))
        if not name:
            raise RecipeError(
                "calibrate.options.checkpoint of modelopt is empty: the layers were made in Python; give the folder "
                "that they are in (build --checkpoint DIR)"
            )
        path = Path(name)
        state = read_state(path)
        digest = state_sha256(path)
        if expected and digest != expected:
            raise RecipeError(
                f"{path} has the hash {digest}, not {expected}; take it over anew (calibrate --from-modelopt)"
            )
        self.taken = Taken(context.model, state)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [self.taken.layer(plan.name) for plan in unit.plans]
