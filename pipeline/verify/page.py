"""report/index.html: one page without any link to the outside that shows what verification found.

Its HTML and its style are page.html, page_parts.html and report_style.css; here is what stands in it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from pipeline import machine
from pipeline.backends import tool_versions
from pipeline.bench.measure import Document, conditions, summary
from pipeline.generate.case import Case
from pipeline.methods import activation_scalings
from pipeline.recipe import Recipe, to_toml
from pipeline.verify.pictures import Column, gallery
from pipeline.verify.plots import Plot, Series
from pipeline.verify.report import LayerResult, Report, SegmentResult, StepResult, number
from pipeline.verify.study import Study

if TYPE_CHECKING:
    from export.models.load import LoadedModel

# Where the page of a bundle says what was measured, which happens after verification.
MEASURED_SLOT = "<!-- measured -->"
LINE_STYLES = ("line1", "line2", "line3", "line4")
FAINT_STYLES = ("faint", "faint2", "faint", "faint2")
WORST_STRETCHES = 8
Facts = Mapping[str, str]
Row = TypeVar("Row", LayerResult, SegmentResult, StepResult)


@dataclass(frozen=True)
class Page:
    """What the page shows. facts: sections of label -> text. prompts: one for each picture of a column."""

    title: str
    subtitle: str
    report: Report
    facts: Mapping[str, Facts]
    recipe: str
    prompts: Sequence[str]
    columns: Sequence[Column]
    pictures_note: str


def write_page(
    report: Report,
    model: LoadedModel,
    recipe: Recipe,
    study: Study,
    engines: Mapping[str, NDArray[np.float32]],
    out_dir: Path,
) -> None:
    """Write index.html and images/*.png into `out_dir`."""
    columns, note = _pictures(study, engines)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for column in columns:
        for row, png in enumerate(column.pngs):
            (out_dir / "images" / column.file_name(row)).write_bytes(png)
    page = Page(
        title=recipe.name,
        subtitle=recipe.description,
        report=report,
        facts=_facts(model, recipe, study.case.n_steps),
        recipe=to_toml(recipe),
        prompts=study.case.prompts if columns else (),
        columns=columns,
        pictures_note=note,
    )
    (out_dir / "index.html").write_text(render(page), encoding="utf-8")


def write_plain_page(report: Report, model: LoadedModel, recipe: Recipe, out_dir: Path) -> None:
    """Write index.html of a model of which nothing is quantized, and which draws nothing by itself."""
    note = f"None: a {model.family.noun} draws nothing by itself, and what it gives is compared as numbers below."
    page = Page(recipe.name, recipe.description, report, _facts(model, recipe), to_toml(recipe), (), (), note)
    (out_dir / "index.html").write_text(render(page), encoding="utf-8")


def _pictures(study: Study, engines: Mapping[str, NDArray[np.float32]]) -> tuple[list[Column], str]:
    """The columns of pictures, and how they were made; none of a text encoder."""
    case = study.case
    if not isinstance(case, Case):
        return [], "None: a text encoder gives embeddings, which are compared as numbers below."
    pixels = case.output == "pixels"
    note = "Pictures as the model makes them" if pixels else "First three latent channels (no image decoder here)"
    note += f": {case.n_steps} steps of {case.sampler}, guidance {case.guidance_scale:g}, same noise."
    return gallery(study.pictures, engines, pixels), note


def _facts(model: LoadedModel, recipe: Recipe, n_steps: int | None = None) -> dict[str, Facts]:
    """n_steps: None of a model of which nothing is quantized, nor asked for by the recipe."""
    here = machine.facts()
    count = sum(tensor.numel() for tensor in model.module.parameters())
    named = [f"{each.path.name} ({each.sha256[:16]}) at scale {each.scale!r}" for each in model.adapters]
    adapters = {"merged adapters": ", ".join(named)} if named else {}
    return {
        "Model": {
            "source": model.source,
            "revision": model.revision or "local files",
            "family": model.family.name,
            "parameters": f"{count / 1e6:.1f} M",
            "sha256": model.sha256[:16],
            **adapters,
        },
        "Recipe": {"weights": "fp16 where they fit, else fp32"} if n_steps is None else _quantization(recipe, n_steps),
        "Machine": {
            "processor": here["cpu"],
            "cores": str(here["cpus"]),
            "memory": f"{here['memory_bytes'] / 2**30:.0f} GiB",
            "instructions": ", ".join(here["cpu_flags"]),
        },
        "Versions": tool_versions(),
    }


def _quantization(recipe: Recipe, n_steps: int) -> Facts:
    calibrate = recipe.calibrate
    others = activation_scalings(calibrate.method, calibrate.preset, calibrate.options)
    scalings = " or ".join(dict.fromkeys((*others, "per_token")))
    return {
        "weights": f"{recipe.formats.weight}, {recipe.weights.scales_text()}",
        "activations": f"{recipe.formats.activation}, {scalings}",
        "attention": recipe.attention.text(),
        "exceptions": ", ".join(f"{kind} {name}" for kind, name in recipe.formats.weight_of.items()) or "none",
        "calibration": f"{calibrate.method}, {recipe.weights.search} search",
        "steps": str(n_steps),
    }


# --- rendering ------------------------------------------------------------------------------------------------------


def render(page: Page) -> str:
    """The page as one HTML document."""
    report = page.report
    return TEMPLATES.get_template("page.html").render(
        page=page,
        report=report,
        cards=_cards(report),
        plots={
            "steps": _steps_plot(_by_target(report.steps)),
            "layers": _layers_plot(_by_target(report.layers)),
            "stretches": _stretches_plot(_by_target(report.segments)),
        },
        worst_stretches=sorted(report.segments, key=lambda row: -row.error)[:WORST_STRETCHES],
        measured_slot=MEASURED_SLOT,
    )


def measured_section(document: Document) -> str:
    """What stands at MEASURED_SLOT in the page of a bundle. document: of bench.json, which lies beside the report."""
    header, rows = summary(document)
    template = TEMPLATES.get_template("page_measured.html")
    return template.render(header=header, rows=rows, conditions=conditions(document))


def percent(share: float) -> str:
    """A share with as many digits as keep it apart from 100 %."""
    digits = 0 if share in (0, 1) or math.isnan(share) else max(1, math.ceil(-math.log10(1 - share)) - 1)
    return f"{100 * share:.{digits}f} %"


def data_uri(png: bytes) -> str:
    """A picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


# What a template is given is escaped, and a name that it is not given is an error.
TEMPLATES = Environment(
    loader=PackageLoader("pipeline", "verify"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters |= {"number": number, "data_uri": data_uri}


def _cards(report: Report) -> list[tuple[str, str]]:
    """(figure, what it is) of the row of large figures."""
    gates = [(f"{sum(gate.passed for gate in report.gates)} of {len(report.gates)}", "gates passed")]
    first = next(iter(_by_target(report.layers).values()), [])
    psnr = [gate.value for gate in report.gates if gate.name == "final_psnr_fp_db"]
    share = [gate.value for gate in report.gates if gate.name.endswith("/codes_equal")]
    if not (first or psnr or share):  # nothing is quantized
        return gates
    return [
        (f"{len(first)}", "linears quantized"),
        (f"{sum(row.size_bytes for row in first) / 1e6:.1f} MB", "quantized weights"),
        *gates,
        (percent(min(share)) if share else "-", "activation codes equal"),
        (f"{number(psnr[0])} dB" if psnr else "-", "PSNR to the float model"),
    ]


def _steps_plot(rows: Mapping[str, list[StepResult]]) -> Plot:
    first = next(iter(rows.values()), [])
    quantization = "reference against the float model (quantization)"
    series = [
        *_series(rows, "sqnr_db", "{} engine"),
        *_runs(rows, "reference_fp32_db"),
        Series(quantization, "quant", _column(first, "quant_sqnr_db")),
    ]
    steps = [str(row.step) for row in first]
    return Plot(series, steps, steps, "denoising step", "SQNR in dB (higher is closer)")


def _layers_plot(rows: Mapping[str, list[LayerResult]]) -> Plot:
    names = [row.name for row in next(iter(rows.values()), [])]
    series = [*_series(rows, "input_sqnr_db", "{} engine"), *_runs(rows, "input_limit_db")]
    return Plot(series, names, _block_ticks(names), "block of the linear", "SQNR of its input in dB")


def _stretches_plot(rows: Mapping[str, list[SegmentResult]]) -> Plot:
    names = [row.layer or row.output or "output" for row in next(iter(rows.values()), [])]
    series = _series(rows, "error", "{}: error over its limit")
    title = "stretch that ends at the linears of a block"
    return Plot(series, names, _block_ticks(names), title, "1 is the limit")


def _by_target(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of the report by target, in its order."""
    targets = dict.fromkeys(row.target for row in rows)
    return {target: [row for row in rows if row.target == target] for target in targets}


def _series(rows: Mapping[str, list[Row]], key: str, name: str) -> list[Series]:
    """A line for each target: a field of its rows. name: with {} for the target."""
    styled = zip(rows.items(), LINE_STYLES, strict=False)
    return [Series(name.format(target), style, _column(of_target, key)) for (target, of_target), style in styled]


def _runs(rows: Mapping[str, list[Row]], key: str) -> list[Series]:
    """A faint line for the reference's float32 runs in each arithmetic that occurs: a field of its targets' rows."""
    targets_of: dict[tuple[float, ...], list[str]] = {}
    for target, of_target in rows.items():
        targets_of.setdefault(_column(of_target, key), []).append(target)
    name = "reference, worst float32 run as {} computes"
    styled = zip(targets_of.items(), FAINT_STYLES, strict=False)
    return [Series(name.format(" and ".join(targets)), style, values) for (values, targets), style in styled]


def _column(rows: Sequence[Row], key: str) -> tuple[float, ...]:
    return tuple(getattr(row, key) for row in rows)


def _block_ticks(names: Sequence[str]) -> list[str]:
    """The number of the block where it begins, "" at its other linears."""
    blocks = [next((part for part in name.split(".") if part.isdigit()), name) for name in names]
    return [block if i == 0 or blocks[i - 1] != block else "" for i, block in enumerate(blocks)]
