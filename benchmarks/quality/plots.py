"""Plots of the quality results, PNG files beside docs/quality.md: `python -m benchmarks.quality.tables` draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from benchmarks import record
from benchmarks.quality.results import MEASURED, Results
from benchmarks.quality.rows import MODELS, SMALL, TABLES, WIDTHS
from benchmarks.record import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel: TypeAlias = "Callable[[Axes, Json, str], None]"  # draws what a model's document says into its axes
WIDTH_COLOURS = {"w4a8": "#3b6fb6", "w4a6": "#d9822b", "w4a4": "#a83279", "w6a8": "#4a9a5b"}
PART_COLOURS = {"weights": "#3b6fb6", "activations": "#d9822b", "both": "#555555"}
GROUP_STYLES = {
    "none": ("#555555", "s"),
    "power of two": ("#4a9a5b", "v"),
    "exact multiplier": ("#d9822b", "o"),
    "real scale": ("#3b6fb6", "^"),
}
CODE_BITS = 4  # of the weights in the plot of groups
DPI = 110
WIDE_RANGE = 3000  # of a logarithmic axis, beyond which it has room for powers of ten only


def measured(document: Json) -> Json:
    return {name: row for name, row in document["rows"].items() if row["status"] == MEASURED}


def method_dots(axes: Axes, document: Json, model: str, table: str) -> None:
    """Distance to float of every line of a table, one dot for each width, on a logarithmic axis."""
    rows = measured(document)
    lines = [line for line in TABLES[table].lines if any(f"{line.name}-{width}" in rows for width in line.widths)]
    for place, line in enumerate(lines):
        for width in line.widths:
            if row := rows.get(f"{line.name}-{width}"):
                offset = 0.15 * (list(WIDTH_COLOURS).index(width) - 1)  # so that dots do not hide each other
                _dot(axes, row["frechet_to_float"], place + offset, WIDTH_COLOURS[width], width.upper())
    axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
    axes.invert_yaxis()
    _logarithmic(axes)
    axes.set_xlabel("Frechet distance to float's pictures, less is better")
    axes.set_title(model)
    axes.grid(axis="x", alpha=0.3)
    _legend_once(axes)


def _dot(axes: Axes, estimate: Mapping[str, float], place: float, colour: str, label: str) -> None:
    low = max(estimate["low"], estimate["value"] / 1000, 1e-9)  # a logarithmic axis has no zero
    axes.plot([low, estimate["high"]], [place, place], color=colour, linewidth=1, alpha=0.6)
    axes.plot(max(estimate["value"], 1e-9), place, "o", color=colour, markersize=5, label=label)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis, or a word where nothing has been drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axes.has_data():
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        wide = high / low > WIDE_RANGE
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))  # labels may not overlap
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)


def _legend_once(axes: Axes, columns: int = 1, place: Literal["best", "lower left"] = "best") -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(list(unique.values()), list(unique), fontsize=8, loc=place, ncols=columns)


def groups(axes: Axes, document: Json, model: str) -> None:
    """PSNR against bits that scales take, one curve for each kind of group scale; points are group sizes."""
    rows = measured(document)
    points: dict[str, list[tuple[float, dict[str, float], str]]] = {kind: [] for kind in GROUP_STYLES}
    for line in TABLES["groups"].lines:
        kind, _, size = line.label.partition(", ")
        if row := rows.get(f"{line.name}-w4a6"):
            bits = 8 * row["weight_bytes"] / row["weights"] - CODE_BITS
            points[kind].append((bits, row["psnr_db"], size))
    for kind, curve in points.items():
        colour, mark = GROUP_STYLES[kind]
        for bits, psnr, size in curve:
            axes.plot([bits, bits], [psnr["low"], psnr["high"]], color=colour, alpha=0.5)
            axes.annotate(size, (bits, psnr["value"]), textcoords="offset points", xytext=(5, 3), fontsize=8)
        if curve:
            axes.plot([p[0] for p in curve], [p[1]["value"] for p in curve], mark, ls="-", color=colour, label=kind)
    _logarithmic(axes)
    axes.set_xlabel(f"bits per weight for scales, beyond the {CODE_BITS} of a code")
    axes.set_ylabel("PSNR to float, dB (median)")
    axes.set_title(f"{model}, E2M1 weights, E2M3 activations, round to nearest", fontsize=10)
    axes.grid(alpha=0.3)
    _legend_once(axes)


def steps(axes: Axes, document: Json, model: str) -> None:
    """SQNR of the denoiser's output by step, FP solid and INT dashed."""
    rows = measured(document)
    for numbers, style in (("fp-channel", "-"), ("int-channel", "--")):
        for width in WIDTHS:
            if row := rows.get(f"rtn-{numbers}-{width}"):
                label = f"{numbers.partition('-')[0].upper()} {width.upper()}"
                axes.plot(row["step_sqnr_db"], style, color=WIDTH_COLOURS[width], label=label)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("denoising step (0: pure noise)")
    axes.set_ylabel("SQNR of the step's output, dB")
    axes.set_title(f"{model}, round to nearest per channel, on float's trajectory", fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)  # room for the legend below the lines
    _legend_once(axes, columns=2, place="lower left")


def sensitivity(axes: Axes, document: Json, model: str) -> None:
    """Noise that each kind of layer adds at FP W4A4, as a share of the output's power."""
    rows = [row for row in document.get("sensitivity", []) if row["row"] == "fp-w4a4"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for offset, (part, colour) in enumerate(PART_COLOURS.items()):
        shares = [
            10 ** (-row["sqnr_db"] / 10) for kind in kinds for row in rows if (row["kind"], row["part"]) == (kind, part)
        ]
        axes.barh([place + 0.27 * (offset - 1) for place in range(len(kinds))], shares, 0.25, color=colour, label=part)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    _logarithmic(axes)
    axes.set_xlabel("noise of the denoiser's output / its power")
    axes.set_title(f"{model}, one kind of layer quantized, FP W4A4")
    axes.grid(axis="x", alpha=0.3)
    _legend_once(axes)


# Name -> what is drawn for each model, and the size of one model's panel in inches.
PLOTS: dict[str, tuple[Panel, tuple[float, float]]] = {
    "methods": (partial(method_dots, table="methods"), (6.5, 5.0)),
    "fp_or_int": (partial(method_dots, table="fp_or_int"), (6.5, 3.2)),
    "qdit": (partial(method_dots, table="qdit"), (6.5, 3.2)),
    "msfp": (partial(method_dots, table="msfp"), (6.5, 2.8)),
    "groups": (groups, (5.5, 4.0)),
    "steps": (steps, (5.5, 3.6)),
    "sensitivity": (sensitivity, (5.5, 3.8)),
}


def draw_all(folder: Path) -> list[Path]:
    """Write every plot for which something has been measured; returns the files."""
    documents = {model: Results(model, record.RESULTS).read() for model in MODELS}
    paths = []
    for name in PLOTS:
        models = TABLES[name].models if name in TABLES else SMALL
        if panels := {model: documents[model] for model in models if documents[model]["rows"]}:
            paths.append(draw(name, panels, folder))
    return paths


def draw(name: str, documents: Mapping[str, Json], folder: Path) -> Path:
    """One PNG with a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    make, (width, height) = PLOTS[name]
    figure, panels = pyplot.subplots(1, len(documents), figsize=(width * len(documents), height), squeeze=False)
    for axes, (model, document) in zip(panels[0], documents.items(), strict=True):
        make(axes, document, model)
    figure.tight_layout()
    path = folder / f"quality_{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # equal results give equal bytes
    pyplot.close(figure)
    return path
