"""Tables of the quality results: `python -m benchmarks.quality.tables` writes docs/quality.md and the plots beside it.

README.md's table comes from here, too (`benchmarks/readme.py`). Nothing is stated that is not in the JSON: a row
that was not measured says why, and the sentences below a table are computed from its intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from benchmarks import record
from benchmarks.quality import adaround_table, attention_table
from benchmarks.quality.answers import ANSWERS, sensitivity_answers
from benchmarks.quality.results import FLOAT, MEASURED, Results
from benchmarks.quality.rows import MODELS, PARTS, SMALL, TABLES, WIDTHS, Table
from benchmarks.record import Json, markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quality.md"
# What draws, as records call it, and in words.
DRAWERS = {
    "cpu engine": "the proven `cpu` engine",
    "cuda engine": "the `cuda` engine, whose graph is proven in onnxruntime",
    "reference": "the PyTorch reference",
}
AGREEMENT = "engine_against_reference_sqnr_db"  # of a row's proof


@dataclass(frozen=True)
class Column:
    """`show`: the cell of a measured record; float's own cell is "-" where `of_float` is False."""

    title: str
    show: Callable[[Json], str]
    of_float: bool = True


def estimate(key: str, form: str) -> Callable[[Json], str]:
    """Value and interval of an estimate."""

    def show(row: Json) -> str:
        value, low, high = (format(row[key][part], form) for part in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    return show


COLUMNS = (
    Column("Frechet distance to float", estimate("frechet_to_float", ".3g"), of_float=False),
    Column("to real data", estimate("frechet_to_real", ".3g")),
    Column("more than float's", estimate("frechet_increase", "+.2f"), of_float=False),
    Column("right", estimate("accuracy", ".1%")),
    Column("PSNR to float, dB", estimate("psnr_db", ".1f"), of_float=False),
    Column("SSIM", lambda row: f"{row['ssim']['value']:.4f}", of_float=False),
    Column("bits per weight", lambda row: f"{8 * row['weight_bytes'] / row['weights']:.3f}"),
    Column("weights, MB", lambda row: f"{row['weight_bytes'] / 1e6:.2f}"),
    Column("calibration, min", lambda row: f"{row['calibration_minutes']:.1f}", of_float=False),
)


# --- docs/quality.md ------------------------------------------------------------------------------------------------


def table_text(table: Table, model: str, by_name: Mapping[str, Json]) -> str:
    """One Markdown table for each width that has a line in `table`, the float model first, and what they answer."""
    widths = [width for width in ("w6a8", *WIDTHS) if any(width in line.widths for line in table.lines)]
    parts = [f"### {model}"]
    for width in widths:
        lines = [line for line in table.lines if width in line.widths]
        rows = [["float", *cells(by_name.get(FLOAT), is_float=True)]]
        rows += [[line.label, *cells(by_name.get(f"{line.name}-{width}"))] for line in lines]
        parts += [f"{width.upper()}:", markdown(["", *(column.title for column in COLUMNS)], rows)]
    answers = [answer(by_name) for answer in ANSWERS[table.name]]
    return "\n\n".join([*parts, *chain.from_iterable(answers)])


def cells(row: Json | None, is_float: bool = False) -> list[str]:
    """A measured row's numbers, or one cell that says why there are none."""
    if row is None or row["status"] != MEASURED:
        return [absence(row), *[""] * (len(COLUMNS) - 1)]
    return [column.show(row) if column.of_float or not is_float else "-" for column in COLUMNS]


def absence(row: Json | None) -> str:
    return "not measured yet" if row is None else f"{row['status']}: {row['reason']}".replace("|", "/")


def page() -> str:
    """The whole of docs/quality.md."""
    parts = ["# Quality of quantized models", PREFACE]
    known = {model: Results(model, record.RESULTS).read() for model in MODELS}
    parts += [subject_text(model, document) for model, document in known.items() if document["rows"]]
    parts += [
        "## All methods in one table",
        "Frechet distance to the float model's pictures, and the median PSNR to them.",
        short_table(),
    ]
    for table in TABLES.values():
        parts += [f"## {table.question}"]
        shown = {model: known[model]["rows"] for model in known if model in table.models and known[model]["rows"]}
        if table.models != SMALL and shown:
            models = ", ".join(f"`{name}`" for name in shown)
            parts += [f"Measured on {models} alone; the first table has both models of pixels."]
        parts += picture(table.name)
        parts += [table_text(table, model, rows) for model, rows in shown.items()]
        parts += [search_text()] if table.name == "qdit" else []
    parts += ["## Which layers cost most, and in which steps?", *picture("sensitivity"), *picture("steps")]
    parts += [sensitivity_text(model, document.get("sensitivity", [])) for model, document in known.items()]
    parts += [adaround_table.study_text(), attention_table.study_text()]
    return "\n\n".join(part for part in parts if part) + "\n"


def search_text() -> str:
    """What `benchmarks.quality.search_groups` found with pictures as the judge; nothing before it has been run."""
    path = record.RESULTS / "search_groups.json"
    if not path.is_file():
        return ""
    document = record.read(path)
    origin, own = document["origin"], document["unsearched_cost"]
    compared = "not scored" if own is None else f"{own:.4g}, so x {document['cost'] / own:.3f}"
    return (
        "Searched by pictures instead of the denoiser's error (`python -m benchmarks.quality.search_groups`, "
        f"{document['recipe']}, {origin['score']}, {origin['count']} pictures for each of {document['scored']} "
        f"candidates, {document['seconds'] / 60:.0f} min, {document['machine']['cpu']}, commit {document['commit']}): "
        f"distance {document['cost']:.4g} with {document['group_sizes']} in {document['size_bytes']:,} bytes; with the "
        f"recipe's own size in {document['budget_bytes']:,} bytes {compared}."
    )


PREFACE = """Written by `python -m benchmarks.quality.tables` from `benchmarks/results/quality_*.json`; measured by
`python -m benchmarks.quality`. All rows of a model draw the same prompts from the same noise. Small models trained on
drawn scenes and handwritten digits: the numbers compare methods and formats, and stand in for no published number.

- Frechet distances are taken in the features of a small judge (64, of `pixart_scenes` 128), not of Inception. They
  fall with the number of pictures: compare within a table only. A distance to real data may fall below float's:
  guidance makes pictures cleaner than data, and noise undoes some of it. The distance to the float model's pictures has
  no such excuse.
- Attention is in float in all rows but those that name its formats, whatever the recipe has for it.
- "right": the judge reads in the picture everything that the prompt asks for.
- PSNR and SSIM compare each picture with float's of the same noise; medians. A picture that took another course early
  is a bad match and may be a good picture, so read them beside the distances.
- Weights are those of the quantized linears with all scales, multipliers, balances of inputs and low-rank branches;
  float's row counts 2 bytes for each.
- A row's proof covers its linears: every code, integer sum, scale and output of each, against the oracle, on calls of
  three steps of two pictures. Whole steps and pictures are compared with the float32 reference on one call alone, whose
  agreement stands below; `pipeline.verify` has gates for them, by float64 runs that these rows have not made.
- Calibration minutes are of the machine named below, with whatever else it was doing. Calibration data are collected
  by the first row that needs them, and shared."""


def subject_text(model: str, document: Json) -> str:
    subject, machine = document["subject"], document["machine"]
    rows = [row for row in document["rows"].values() if row["status"] == MEASURED]
    drawn = Counter(row["drawn_by"].partition(",")[0] for row in rows if "drawn_by" in row)
    by = ", ".join(f"{drawn[name]} by {title}" for name, title in DRAWERS.items() if drawn[name])
    agreement = [row["proof"][AGREEMENT] for row in rows if AGREEMENT in row.get("proof", {})]
    agreed = f" Engine and reference agree on their call to {min(agreement):.1f} dB or better." if agreement else ""
    return (
        f"**{model}**: {subject['count']} pictures ({subject['prompts']}), {subject['n_steps']} steps of "
        f"{subject['sampler']}, guidance {subject['guidance_scale']:g}, seed {subject['seed']}; {machine['cpu']}, "
        f"{machine['cpus']} CPUs. Rows drawn: {by}.{agreed} Intervals: {document['intervals']}."
    )


def picture(name: str) -> list[str]:
    """A link to the plot, if it has been drawn."""
    path = PAGE.parent / f"quality_{name}.png"
    return [f"![{name}]({path.name})"] if path.is_file() else []


def sensitivity_text(model: str, rows: Sequence[Json]) -> str:
    """SQNR of the denoiser's output with one kind of layer quantized; lower costs more."""
    if not rows:
        return ""
    names, kinds = dict.fromkeys(row["row"] for row in rows), dict.fromkeys(row["kind"] for row in rows)
    at = {(row["row"], row["kind"], row["part"]): f"{row['sqnr_db']:.1f}" for row in rows}
    header = ["dB", *(f"{name}, {part}" for name in names for part in PARTS)]
    body = [[f"`{kind}`", *(at[name, kind, part] for name in names for part in PARTS)] for kind in kinds]
    return "\n\n".join([f"### {model}", markdown(header, body), *sensitivity_answers(rows)])


# --- README.md ------------------------------------------------------------------------------------------------------


# Of README.md: round to nearest, what papers compare with, and the methods of the recipes.
SHORT = (
    "rtn-int-channel", "rtn-fp-exact64", "brecq-int-channel", "ptq4dit-int-channel", "qdit-int-group128",
    "fp4dit-fp-exact64", "msfp-fp",
)  # fmt: skip


def short_table(names: Sequence[str] = ()) -> str:
    """Methods by width, for both models of pixels: distance to float, PSNR. names: of the lines shown, else all."""
    by_model = {model: Results(model, record.RESULTS).read()["rows"] for model in SMALL}
    if not any(by_model.values()):
        return "Not measured yet: run `python -m benchmarks.quality`."
    header = ["method", *(f"`{model}` {width.upper()}" for model in SMALL for width in WIDTHS)]
    labels = {line.name: line.label for line in TABLES["methods"].lines}
    columns = [(by_model[model], width) for model in SMALL for width in WIDTHS]
    cells = {name: [short_cell(rows.get(f"{name}-{width}")) for rows, width in columns] for name in names or labels}
    return markdown(header, [[labels[name], *cells[name]] for name in cells])


def short_cell(row: Json | None) -> str:
    if row is None or row["status"] != MEASURED:
        return "-"
    return f"{row['frechet_to_float']['value']:.3g}; {row['psnr_db']['value']:.1f} dB"


def main() -> None:
    from benchmarks.quality.plots import draw_all

    for path in draw_all(PAGE.parent):
        print(path)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
