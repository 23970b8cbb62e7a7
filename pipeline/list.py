"""`python -m pipeline.list`: recipes, what their number widths buy, calibration methods, models and targets."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from typing_extensions import TypedDict

from export.formats.format import get_format
from export.formats.operands import HARDWARE, embeds, exact_in
from export.models.sources import zoo_models
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.command import Answer, Parser, Part, Table, parser, run
from pipeline.methods import METHODS, PRESETS, MethodRow, Option
from pipeline.recipe import Attention, Recipe
from pipeline.signals import leave

# What the bits of a weight and of an activation buy, as measured and not as hoped.
WEIGHTS_BUY = {
    4: "a quarter of the fp16 weight memory, shorter loading",
    6: "three eighths of the fp16 weight memory",
    8: "half of the fp16 weight memory",
}
ACTIVATIONS_BUY = {
    4: "twice the FP8 rate on GPUs with FP4 x FP4 units (Blackwell) and nowhere else",
    6: "no speed over 8-bit activations, which run on the same INT8 or FP8 units; the published recipe, less traffic",
    8: "the full INT8 or FP8 rate with the least loss",
}
WIDE_BUYS = "the published recipe; wider than INT8 and E4M3, so two 8-bit GEMMs instead of one: slower than W4A6"


def worth(recipe: Recipe) -> str:
    """What the widths of a recipe buy, in one sentence."""
    if recipe.half is not None:
        return "Weights are fp16 on disk where they fit, sums float32."
    weight, activation = get_format(recipe.formats.weight), get_format(recipe.formats.activation)
    fits = exact_in(weight.name, activation.name)
    wide = not any(embeds(activation.name, name) for name in ("INT8", "E4M3"))
    buys = WIDE_BUYS if wide else ACTIVATIONS_BUY[activation.bits]
    exact = f"exact in {', '.join(fits)}" if fits else f"exact in none of {', '.join(HARDWARE)}"
    return f"W{weight.bits}: {WEIGHTS_BUY[weight.bits]}. A{activation.bits}: {buys}; {exact}."


class TargetRow(TypedDict):
    """A target: can it be built here, and what to do if not."""

    target: str
    available: bool
    note: str


def target_rows() -> list[TargetRow]:
    rows: list[TargetRow] = []
    for name, backend in BACKENDS.items():
        here, tool = find_spec(backend.package) is not None, machine.distribution(backend.package)
        note = f"{tool} {machine.tool_version(backend.package)}" if here else f"pip install {tool}"
        rows.append({"target": name, "available": here, "note": note})
    return rows


def method_row(method: MethodRow) -> dict[str, object]:
    """A calibration method with its options and their values in both presets."""
    options = {
        name: {"fast": option.value("fast"), "full": option.value("full"), "help": option.help}
        for name, option in method.options.items()
    }
    return {"name": method.name, "data": _data(method), "summary": method.summary, "options": options}


def _data(method: MethodRow) -> str:
    return "none" if method.observes == "weights" else "sampled"


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Answer with everything there is to choose from."""
    bundled = [recipes.load(name) for name in recipes.recipe_names()]
    document = {
        "recipes": [{**recipe.document(), "worth": worth(recipe)} for recipe in bundled],
        "models": [f"zoo:{name}" for name in zoo_models()],
        "targets": target_rows(),
        "methods": [method_row(method) for method in METHODS.values()],
    }
    answer.document(document, *tables(bundled))
    return 0


def tables(bundled: Sequence[Recipe]) -> list[Part]:
    """The answer for people."""
    recipe_rows = [(row.name, row.model, _formats(row), _scales(row)) for row in bundled]
    notes = [(row.name, f"{row.description}. {worth(row)}") for row in bundled]
    methods = [(row.name, _data(row), row.summary) for row in METHODS.values()]
    options = [(row.name, _options(row.options)) for row in METHODS.values() if row.options]
    targets = [(row["target"], "yes" if row["available"] else "no", row["note"]) for row in target_rows()]
    return [
        Table(("recipe", "model", "weights x activations", "weight scales"), recipe_rows),
        Table(("recipe", "what it is for, and what its widths buy"), notes),
        Table(("method", "data", "what it does (--set method=...)"), methods),
        "Options, fast/full (--set 'calibrate.options={name = value}', --set preset=full):",
        Table(("method", "options"), options),
        "bundled models: " + ", ".join(f"zoo:{name}" for name in zoo_models()),
        Table(("target", "here", "note"), targets),
    ]


def _options(options: Mapping[str, Option]) -> str:
    """Every option of a method with the values of both presets, once if they are equal."""
    shown = []
    for name, option in options.items():
        values = dict.fromkeys(str(option.value(preset)) or '""' for preset in PRESETS)
        shown.append(f"{name} {'/'.join(values)}")
    return ", ".join(shown)


def _formats(recipe: Recipe) -> str:
    if recipe.half is not None:
        return "not quantized"
    formats = recipe.formats
    special = "".join(f", {kind} {name}" for kind, name in formats.weight_of.items())
    attention = "" if recipe.attention == Attention() else f", attention {recipe.attention.text()}"
    return f"{formats.weight} x {formats.activation}{special}{attention}"


def _scales(recipe: Recipe) -> str:
    return recipe.weights.scales_text() if recipe.half is None else "-"


def make_parser() -> Parser:
    """All flags of `list`."""
    return parser("list", "Show recipes, calibration methods, bundled models and targets.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
