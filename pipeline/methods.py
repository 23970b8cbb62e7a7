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


_ROWS = (
    MethodRow(
        "rtn",
        "pipeline.calibrate.rtn:RoundToNearest",
        "weights",
        "round to nearest: scales from the weights alone, no data",
    ),
)
METHODS: dict[str, MethodRow] = {row.name: row for row in _ROWS}
