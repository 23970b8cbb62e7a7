"""Line plots as inline SVG: no library, colours from the page's style sheet, so they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
GRID_LINES, MOST_TICKS = 6, 24
NICE_STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500)


@dataclass(frozen=True)
class Series:
    """One line: its name, a class of the style sheet, and a value for each position (not finite: a gap)."""

    name: str
    style: str
    values: Sequence[float]


def line_plot(
    series: Sequence[Series], labels: Sequence[str], x_title: str, y_title: str, ticks: Sequence[str] = ()
) -> str:
    """An <svg> with one line per series over the positions `labels`, and a legend above it.

    ticks: what stands below each position where that is not its label ("" for nothing).
    """
    shown = [value for row in series for value in row.values if math.isfinite(value)]
    if not shown:
        return "<p class='muted'>nothing to plot</p>"
    axis = Axis.around(min(shown), max(shown))
    parts = [_grid(axis), _x_labels(ticks or labels, x_title), _y_title(y_title)]
    parts += [_line(row, labels, axis) for row in series]
    body = "".join(parts)
    svg = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(y_title)}'>{body}</svg>"
    return f"{_legend(series)}<div class='scroll'>{svg}</div>"


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

    def y(self, value: float) -> float:
        """Vertical position in the drawing."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / count


def _grid(axis: Axis) -> str:
    lines = []
    for index in range(round((axis.high - axis.low) / axis.step) + 1):
        value = axis.low + index * axis.step
        y = axis.y(value)
        lines.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        lines.append(f"<text class='tick' x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>")
    return "".join(lines)


def _x_labels(labels: Sequence[str], title: str) -> str:
    y, named = HEIGHT - BOTTOM + 16, [(i, text) for i, text in enumerate(labels) if text]
    every = max(1, math.ceil(len(named) / MOST_TICKS))
    shown = [(_x(i, len(labels)), escape(text)) for i, text in named[::every]]
    marks = [f"<text class='tick' x='{x:.1f}' y='{y}' text-anchor='middle'>{text}</text>" for x, text in shown]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        "".join(marks) + f"<text class='axis' x='{middle}' y='{HEIGHT - 6}' text-anchor='middle'>{escape(title)}</text>"
    )


def _y_title(title: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f"<text class='axis' transform='translate(13 {middle}) rotate(-90)' text-anchor='middle'>{escape(title)}</text>"
    )


def _line(row: Series, labels: Sequence[str], axis: Axis) -> str:
    points = [(_x(i, len(labels)), value, labels[i]) for i, value in enumerate(row.values)]
    path, drawing = "", False
    for x, value, _ in points:
        finite = math.isfinite(value)
        path += f"{'L' if drawing else 'M'}{x:.1f} {axis.y(value):.1f}" if finite else ""
        drawing = finite
    dots = "".join(
        f"<circle class='{row.style}' cx='{x:.1f}' cy='{axis.y(value):.1f}' r='2.6'>"
        f"<title>{escape(label)}: {escape(row.name)} {value:.1f}</title></circle>"
        for x, value, label in points
        if math.isfinite(value)
    )
    return f"<path class='{row.style}' d='{path}'/>{dots}"


def _legend(series: Sequence[Series]) -> str:
    items = "".join(f"<span><i class='{row.style}'></i>{escape(row.name)}</span>" for row in series)
    return f"<p class='legend'>{items}</p>"
