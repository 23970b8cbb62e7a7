"""Line plots as SVG: where everything stands. What draws it is the macro `line_plot` of page_parts.html, in colours of
the page's style sheet, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

GRID_LINES, MOST_TICKS = 6, 24
NICE_STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500)


@dataclass(frozen=True)
class Series:
    """One line: its name, a class of the style sheet, and a value for each position (not finite: a gap)."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """The vertical axis: from `low` to `high` with a line at every `step`."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, low: float, high: float) -> Axis:
        """Round limits that hold both numbers, with about GRID_LINES lines between them."""
        step = next((s for s in NICE_STEPS if (high - low) / s <= GRID_LINES), NICE_STEPS[-1])
        return cls(math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step, step)


@dataclass(frozen=True)
class Plot:
    """One line per series over the positions `labels`. tick_labels: what stands below each position, "" for nothing.

    The drawing is `width` x `height` units; lines lie between `left`, `right`, `top` and `bottom` of it.
    """

    series: Sequence[Series]
    labels: Sequence[str]
    tick_labels: Sequence[str]
    x_title: str
    y_title: str
    width, height = 860, 300
    left, right, top, bottom = 52, width - 12, 14, height - 40

    @cached_property
    def finite(self) -> list[float]:
        """All numbers that can be drawn; without any there is neither an axis nor a drawing."""
        return [value for row in self.series for value in row.values if math.isfinite(value)]

    @cached_property
    def axis(self) -> Axis:
        return Axis.around(min(self.finite), max(self.finite))

    def x(self, index: int) -> float:
        """Where a position stands from left to right."""
        return round(self.left + (self.right - self.left) * (index + 0.5) / len(self.labels), 1)

    def y(self, value: float) -> float:
        """Where a value stands, downwards."""
        from_top = (self.axis.high - value) / (self.axis.high - self.axis.low)
        return round(self.top + (self.bottom - self.top) * from_top, 1)

    def grid(self) -> list[tuple[float, str]]:
        """(y, number) of the lines across the plot."""
        lines = range(round((self.axis.high - self.axis.low) / self.axis.step) + 1)
        values = [self.axis.low + line * self.axis.step for line in lines]
        return [(self.y(value), f"{value:g}") for value in values]

    def ticks(self) -> list[tuple[float, str]]:
        """(x, text) of what stands below the plot, MOST_TICKS at most."""
        named = [(self.x(i), text) for i, text in enumerate(self.tick_labels) if text]
        return named[:: max(1, math.ceil(len(named) / MOST_TICKS))]

    def path(self, row: Series) -> str:
        """A line in SVG's commands, broken where a value is not finite."""
        commands, command = "", "M"
        for i, value in enumerate(row.values):
            finite = math.isfinite(value)
            commands += f"{command}{self.x(i)} {self.y(value)}" if finite else ""
            command = "L" if finite else "M"
        return commands

    def dots(self, row: Series) -> list[tuple[float, float, str]]:
        """(x, y, text) of every finite value."""
        finite = [(i, value) for i, value in enumerate(row.values) if math.isfinite(value)]
        return [(self.x(i), self.y(value), f"{self.labels[i]}: {row.name} {value:.1f}") for i, value in finite]
