"""report/index.html: one page without any link to the outside that shows what verification found."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pipeline import machine
from pipeline.backends import tool_versions
from pipeline.bench.measure import conditions, summary
from pipeline.methods import activation_scalings
from pipeline.recipe import Recipe, to_toml
from pipeline.verify.pictures import Column, file_name, file_names, gallery
from pipeline.verify.plots import Series, line_plot
from pipeline.verify.report import Gate, LayerResult, Report, SegmentResult
from pipeline.verify.study import Study

if TYPE_CHECKING:
    from export.models.load import LoadedModel

STYLE = resources.files("pipeline.verify") / "report_style.css"
# Files that lie beside the page, and those of the bundle around it, each with what it is.
FILES = {"parity.json": "gates, steps, layers and stretches (parity.json)", "layers.csv": "layers (layers.csv)"}
BUNDLE_FILES = {"../bench.json": "these numbers (bench.json)", "../manifest.json": "everything else (manifest.json)"}
# Where the page of a bundle says what was measured, which happens after verification.
MEASURED_SLOT = "<!-- measured -->"
LINE_STYLES = ("line1", "line2", "line3", "line4")
WORST_STRETCHES = 8
FAINT_STYLES = ("faint", "faint2", "faint", "faint2")
Facts = Mapping[str, str]


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
    engines: Mapping[str, NDArray[Any]],
    out_dir: Path,
) -> None:
    """Write index.html and images/*.png into `out_dir`."""
    pixels = study.case.output == "pixels"
    columns = gallery(study.images, engines, pixels)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for name, data in file_names(columns).items():
        (out_dir / "images" / name).write_bytes(data)
    note = "Pictures as the model makes them" if pixels else "First three latent channels (no image decoder here)"
    note += f": {study.case.n_steps} steps of {study.case.sampler}, guidance {study.case.guidance_scale:g}, same noise."
    page = Page(
        title=recipe.name,
        subtitle=recipe.description,
        report=report,
        facts=_facts(model, recipe, study),
        recipe=to_toml(recipe),
        prompts=study.case.prompts,
        columns=columns,
        pictures_note=note,
    )
    (out_dir / "index.html").write_text(render(page), encoding="utf-8")


def _facts(model: LoadedModel, recipe: Recipe, study: Study) -> dict[str, Facts]:
    here = machine.facts()
    count = sum(tensor.numel() for tensor in model.module.parameters())
    calibrate = recipe.calibrate
    others = activation_scalings(calibrate.method, calibrate.preset, calibrate.options)
    scalings = " or ".join(dict.fromkeys((*others, "per_token")))
    return {
        "Model": {
            "source": model.source,
            "revision": model.revision or "local files",
            "family": model.family.name,
            "parameters": f"{count / 1e6:.1f} M",
            "sha256": model.sha256[:16],
        },
        "Recipe": {
            "weights": f"{recipe.formats.weight}, {recipe.weights.scales_text()}",
            "activations": f"{recipe.formats.activation}, {scalings}",
            "exceptions": ", ".join(f"{kind} {name}" for kind, name in recipe.formats.weight_of.items()) or "none",
            "calibration": f"{recipe.calibrate.method}, {recipe.weights.search} search",
            "steps": str(study.case.n_steps),
        },
        "Machine": {
            "processor": here["cpu"],
            "cores": str(here["cpus"]),
            "memory": f"{here['memory_bytes'] / 2**30:.0f} GiB",
            "instructions": ", ".join(here["cpu_flags"]),
        },
        "Versions": tool_versions(),
    }


# --- rendering ------------------------------------------------------------------------------------------------------


def render(page: Page) -> str:
    """The page as one HTML document."""
    sections = (
        _header(page),
        _figures(page.report),
        _pictures(page),
        MEASURED_SLOT,
        _gates(page.report),
        _steps(page.report),
        _layers_plot(page.report),
        _stretches(page.report),
        _facts_section(page),
        _layers_table(page.report),
    )
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<title>{escape(page.title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    body = f"<body><main>{''.join(sections)}</main></body>"
    return f"<!doctype html><html lang='en'><head>{head}</head>{body}</html>\n"


def measured_section(document: Mapping[str, Any]) -> str:
    """What stands at MEASURED_SLOT in the page of a bundle. document: of bench.json, which lies beside the report."""
    header, rows = summary(document)
    heads = "".join(f"<th class='num'>{escape(title)}</th>" for title in header[1:])
    body = "".join(_measured_row(*row) for row in rows)
    links = ", ".join(_link(name, text) for name, text in BUNDLE_FILES.items())
    files = f"<p class='after muted'>In the bundle: {links}.</p>"
    return _section("Speed and memory", _table(f"<th></th>{heads}", body) + files, conditions(document))


def _measured_row(name: str, *numbers: str) -> str:
    cells = "".join(f"<td class='num'>{escape(number)}</td>" for number in numbers)
    return f"<tr><td class='name'>{escape(name)}</td>{cells}</tr>"


def _section(title: str, body: str, text: str = "") -> str:
    lead = f"<p class='lead muted'>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def _table(heads: str, rows: str, style: str = "", frame: str = "scroll") -> str:
    """A table from the cells of its head and the rows of its body; it scrolls inside its frame."""
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>{rows}</tbody>"
    return f"<div class='{frame}'><table class='{style}'>{head}{body}</table></div>"


def _header(page: Page) -> str:
    passed = page.report.passed
    failed = ", ".join(gate.name for gate in page.report.failures())
    verdict = f"<span class='badge {'good' if passed else 'bad'}'>{'PASSED' if passed else 'FAILED'}</span>"
    reason = "" if passed else f"<p class='bad-text'>Failed: {escape(failed)}</p>"
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in page.report.notes)
    title = f"<h1>{escape(page.title)} {verdict}</h1><p class='muted'>{escape(page.subtitle)}</p>"
    links = ", ".join(_link(name, text) for name, text in FILES.items())
    return f"<header>{title}{reason}{notes}<p class='muted'>The numbers of this page: {links}.</p></header>"


def _link(path: str, text: str) -> str:
    return f"<a href='{escape(path)}'>{escape(text)}</a>"


def _figures(report: Report) -> str:
    targets = list(dict.fromkeys(row.target for row in report.layers))
    first = [row for row in report.layers if row.target == targets[0]] if targets else []
    gates = {gate.name: gate for gate in report.gates}
    share = [gate.value for gate in report.gates if gate.name.endswith("/codes_equal")]
    cards = [
        (f"{len(first)}", "linears quantized"),
        (f"{sum(row.size_bytes for row in first) / 1e6:.1f} MB", "quantized weights"),
        (f"{sum(gate.passed for gate in report.gates)} of {len(report.gates)}", "gates passed"),
        (_percent(min(share)) if share else "-", "activation codes equal"),
        (
            _number(gates["final_psnr_fp_db"].value) + " dB" if "final_psnr_fp_db" in gates else "-",
            "PSNR to the float model",
        ),
    ]
    return (
        "<section class='cards'>" + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards) + "</section>"
    )


def _percent(share: float) -> str:
    """A share with as many digits as keep it apart from 100 %."""
    digits = 0 if share in (0, 1) or math.isnan(share) else max(1, math.ceil(-math.log10(1 - share)) - 1)
    return f"{100 * share:.{digits}f} %"


def _gates(report: Report) -> str:
    rows = "".join(_gate_row(gate) for gate in report.gates)
    heads = "<th></th><th>gate</th><th class='num'>value</th><th class='num'>limit</th><th>why this limit</th>"
    return _section("Gates", _table(heads, rows, "gates"))


def _gate_row(gate: Gate) -> str:
    mark = "<td class='good-text'>&#10003;</td>" if gate.passed else "<td class='bad-text'>&#10007;</td>"
    sign = "&le;" if gate.at_most else "&ge;"
    unit = f" <span class='muted'>{escape(gate.unit)}</span>" if gate.unit else ""
    cells = f"<td class='name'>{escape(gate.name)}</td><td class='num'>{_number(gate.value)}{unit}</td>"
    cells += f"<td class='num'>{sign} {_number(gate.limit)}</td><td class='why'>{escape(gate.why)}</td>"
    return f"<tr>{mark}{cells}</tr>"


def _number(value: float) -> str:
    """Six digits are enough for people; shares close to 1 keep what matters."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "&infin;" if value > 0 else "-&infin;"
    return f"{value:.8f}" if 0.99 < value < 1 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _pictures(page: Page) -> str:
    heads = "".join(f"<th>{escape(column.heading)}</th>" for column in page.columns)
    rows = ""
    for i, prompt in enumerate(page.prompts):
        cells = "".join(_picture(column, i) for column in page.columns)
        rows += f"<tr><th class='prompt'>{escape(prompt)}</th>{cells}</tr>"
    return _section("Pictures", _table(f"<th></th>{heads}", rows, "pictures"), page.pictures_note)


def _picture(column: Column, row: int) -> str:
    """One cell; empty where the engine drew fewer pictures."""
    if row >= len(column.pngs):
        return "<td></td>"
    image = f"<img alt='{escape(column.heading)}' src='{_data_uri(column.pngs[row])}'>"
    return f"<td><a href='images/{escape(file_name(column, row))}'>{image}</a></td>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _steps(report: Report) -> str:
    if not report.steps:
        return ""
    rows = _by_target(report.steps)
    first = next(iter(rows.values()))
    series = [
        *_engine_series(rows, "sqnr_db", "reference_fp32_db"),
        Series("reference against the float model (quantization)", "quant", [row.quant_sqnr_db for row in first]),
    ]
    plot = line_plot(series, [str(row.step) for row in first], "denoising step", "SQNR in dB (higher is closer)")
    return _section(
        "Error by step", plot, "Every step on the same inputs, those of the float64 reference's trajectory."
    )


def _layers_plot(report: Report) -> str:
    if not report.layers:
        return ""
    rows = _by_target(report.layers)
    names = [row.name for row in next(iter(rows.values()))]
    series = _engine_series(rows, "input_sqnr_db", "input_limit_db")
    plot = line_plot(series, names, "block of the linear", "SQNR of its input in dB", _block_ticks(names))
    text = (
        "Inputs of all linears in the running engine against the float64 reference: flipped codes amplify with depth."
    )
    return _section("Error by layer", plot, text)


def _stretches(report: Report) -> str:
    if not report.segments:
        return ""
    rows = _by_target(report.segments)
    first = next(iter(rows.values()))
    names = [row.layer or "output" for row in first]
    series = [
        Series(f"{target}: error over its limit", style, [row.error for row in results])
        for (target, results), style in zip(rows.items(), LINE_STYLES, strict=False)
    ]
    plot = line_plot(
        series, names, "stretch that ends at the linears of a block", "1 is the limit", _block_ticks(names)
    )
    worst = sorted(report.segments, key=lambda row: -row.error)[:WORST_STRETCHES]
    cells = "".join(_stretch_row(row) for row in worst)
    heads = "<th>target</th><th>stretch up to</th><th>worst call</th>"
    heads += "<th class='num'>error / limit</th><th class='num'>rounding, units of 2^-24</th><th>likely cause</th>"
    text = "Embedders, norms, attention, activation functions, gates and residuals against the float64 module, each on "
    text += "the engine's own tensors. The limit is what rounding does in the stretch, measured on the same inputs."
    return _section("Between the linears", plot + _table(heads, cells), text)


def _stretch_row(row: SegmentResult) -> str:
    texts = "".join(f"<td>{escape(text)}</td>" for text in (row.target, row.layer or "the output", row.call))
    numbers = "".join(f"<td class='num'>{_number(number)}</td>" for number in (row.error, row.noise_ulps))
    return f"<tr>{texts}{numbers}<td>{escape(row.diagnosis or 'within its limit')}</td></tr>"


def _by_target(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Rows of the report by target, in its order."""
    targets = dict.fromkeys(row.target for row in rows)
    return {target: [row for row in rows if row.target == target] for target in targets}


def _engine_series(rows: Mapping[str, list[Any]], engine: str, reference: str) -> list[Series]:
    """A line for each engine, and a faint one for the reference's float32 runs in each arithmetic that occurs."""
    lines = [
        Series(f"{target} engine", style, [getattr(row, engine) for row in results])
        for (target, results), style in zip(rows.items(), LINE_STYLES, strict=False)
    ]
    runs: dict[tuple[float, ...], list[str]] = {}
    for target, results in rows.items():
        runs.setdefault(tuple(getattr(row, reference) for row in results), []).append(target)
    lines += [
        Series(f"reference, worst float32 run as {' and '.join(targets)} computes", style, values)
        for (values, targets), style in zip(runs.items(), FAINT_STYLES, strict=False)
    ]
    return lines


def _block_ticks(names: Sequence[str]) -> list[str]:
    """The number of the block where it begins, "" at its other linears."""
    blocks = [next((part for part in name.split(".") if part.isdigit()), name) for name in names]
    return [block if i == 0 or blocks[i - 1] != block else "" for i, block in enumerate(blocks)]


def _facts_section(page: Page) -> str:
    blocks = ""
    for title, rows in page.facts.items():
        items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items())
        blocks += f"<div><h3>{escape(title)}</h3><dl>{items}</dl></div>"
    recipe = f"<details><summary>Resolved recipe</summary><pre>{escape(page.recipe)}</pre></details>"
    return _section("Made from", f"<div class='facts'>{blocks}</div>{recipe}")


def _layers_table(report: Report) -> str:
    titles = ("target", "layer", "kind", "weights", "activations", "path")
    numbers = ("GEMM max diff", "codes equal", "output / bound", "weight SQNR dB", "bytes")
    heads = "".join(f"<th>{title}</th>" for title in titles) + "".join(
        f"<th class='num'>{title}</th>" for title in numbers
    )
    rows = "".join(_layer_row(row) for row in report.layers)
    return _section("Layers", _table(heads, rows, frame="scroll tall"))


def _layer_row(row: LayerResult) -> str:
    weights = f"{row.weight_format} {row.granularity}" + (f" {row.group_size}" if row.group_size else "")
    texts = (row.target, row.name, row.kind, weights, row.activation_format, row.path)
    numbers = (row.gemm_max_abs_diff, row.codes_equal_share, row.output_error, row.weight_sqnr_db)
    cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
    cells += "".join(f"<td class='num'>{_number(number)}</td>" for number in numbers)
    return f"<tr>{cells}<td class='num'>{row.size_bytes:,}</td></tr>"
