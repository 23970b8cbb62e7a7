"""The calibration methods: one row each, with what it observes and the options it understands.

Light on purpose: recipes are checked against this table without loading torch or any method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from export.errors import RecipeError

PRESETS = ("fast", "full")
Scalar = int | float | str | bool


@dataclass(frozen=True)
class Option:
    """One option of a method: its value in each preset, and what it means. `full` is `fast` unless given."""

    fast: Scalar
    full: Scalar | None = None
    help: str = ""

    def __post_init__(self) -> None:
        if self.full is not None and type(self.full) is not type(self.fast):
            raise ValueError(f"fast={self.fast!r} and full={self.full!r} must have one type")

    def value(self, preset: str) -> Scalar:
        return self.full if preset == "full" and self.full is not None else self.fast

    def read(self, value: object) -> Scalar:
        """`value` as this option's type. Raises ValueError in words; an integer may stand for a number."""
        kind = type(self.fast)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"expected {kind.__name__}, found {value!r}")
        return value


@dataclass(frozen=True)
class MethodRow:
    """`target` is "module:Class", a subclass of pipeline.calibrate.method.Method.

    observes: "weights" (no data: every layer is a unit by itself) or "blocks" (calibration data runs through the
    float model and the quantized one, block by block).
    """

    name: str
    target: str
    observes: Literal["weights", "blocks"]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def resolve(self, preset: str, given: Mapping[str, Any]) -> dict[str, Scalar]:
        """Every option's value. Raises RecipeError for an option that the method does not have, or a wrong type."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise RecipeError(f"calibrate.options: {self.name} has no option {unknown[0]!r}; it has {known}")
        values = {name: option.value(preset) for name, option in self.options.items()}
        for name, value in given.items():
            try:
                values[name] = self.options[name].read(value)
            except ValueError as error:
                raise RecipeError(f"calibrate.options.{name} of {self.name}: {error}") from error
        return values

    def load(self) -> Any:
        """The method's class."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


# Learned rounding. The full presets are the authors'; the rates of the fast ones are measured (adaround_study.py).
_LEARNED = {
    "strength": Option(0.01, help="weight of the regulariser that draws the rounding to 0 or 1"),
    "batch": Option(16, help="samples of one iteration"),
}
_PLAIN_ROUNDING = {
    "iterations": Option(200, 20000, help="for each block"),
    "lr": Option(1e-2, 1e-3, help="learning rate of the rounding variables"),
}

_ROWS = (
    MethodRow(
        "rtn",
        "pipeline.calibrate.rtn:RoundToNearest",
        "weights",
        "round to nearest: scales from the weights alone, no data",
    ),
    MethodRow(
        "fp4dit",
        "pipeline.calibrate.fp4dit:ScaleAwareRounding",
        "blocks",
        "FP4DiT: scale-aware AdaRound, block by block",
        {
            "iterations": Option(200, 2500, help="for each block"),
            "lr": Option(4e-4, 1e-4, help="learning rate of V', in units of the weight"),
        }
        | _LEARNED,
    ),
    MethodRow(
        "fp_adaround",
        "pipeline.calibrate.fp4dit:BlockRounding",
        "blocks",
        "AdaRound on the float grid without scale awareness, block by block",
        _PLAIN_ROUNDING | _LEARNED,
    ),
    MethodRow(
        "adaround",
        "pipeline.calibrate.fp4dit:LayerRounding",
        "blocks",
        "AdaRound, each layer by itself; for INT formats as published",
        {
            "iterations": Option(1000, 20000, help="for each layer"),
            "lr": Option(1e-2, 1e-3, help="learning rate of the rounding variables"),
            "strength": _LEARNED["strength"],
        },
    ),
    MethodRow(
        "brecq",
        "pipeline.calibrate.fp4dit:BlockRounding",
        "blocks",
        "BRECQ: AdaRound block by block; for INT formats as published",
        _PLAIN_ROUNDING | _LEARNED,
    ),
)
METHODS: dict[str, MethodRow] = {row.name: row for row in _ROWS}
