"""What a calibration method is: what it gets to see, and what it hands back.

A new method is one file with a subclass of `Method` and one row in pipeline/methods.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint import QuantizedLinear
from pipeline.calibrate.plan import LayerPlan
from pipeline.methods import Scalar
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LoadedModel
    from pipeline.calibrate.blocks import Observed
    from pipeline.calibrate.data import CalibrationData
    from pipeline.calibrate.memory import BlockSize, Sizes


@dataclass(frozen=True)
class Context:
    """What a method is made from. options: every option of its row, resolved. folder: for state of its own, kept while
    the run may be resumed. data: None for a method that observes weights alone."""

    model: LoadedModel
    recipe: Recipe
    options: Mapping[str, Scalar]
    folder: Path
    data: CalibrationData | None = None

    @property
    def seed(self) -> int:
        return self.recipe.calibrate.seed


@dataclass(frozen=True)
class Unit:
    """Layers that are learned together: those of one repeated block, or a single one. block: what is observed of it,
    None for a method that observes weights alone."""

    name: str
    plans: list[LayerPlan]
    block: Observed | None = None

    @property
    def observed(self) -> Observed:
        assert self.block is not None, f"{self.name}: the method's row must say that it observes blocks"
        return self.block


class Method:
    """One calibration method. The same context and units give the same bytes.

    Layers scale their inputs per token, or as the method's row declares (`MethodRow.activations`).
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plans to follow, for methods that choose formats or group sizes. Before any unit; cheap when resumed."""
        return plans

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        """The finished layers of one unit, one for each plan, in order."""
        raise NotImplementedError(f"{type(self).__name__}.quantize")

    def unit_bytes(self, sizes: Sizes, block: BlockSize) -> int:
        """Bytes that `quantize` holds for a block beside its calls; asked before there are data."""
        return 0

    def apart_bytes(self, sizes: Sizes, plans: list[LayerPlan]) -> int:
        """Bytes that `plan` or `finish` holds, whichever is more; asked before there are data."""
        return 0

    def finish(self, layers: list[QuantizedLinear]) -> list[QuantizedLinear]:
        """All layers once more, for methods that tune the whole model end to end."""
        return layers
