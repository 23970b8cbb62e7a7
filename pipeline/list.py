"""`python -m pipeline.list`: recipes, what their number widths buy, calibration methods, models and targets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from typing import Any

from export.formats.format import get_format
from export.formats.operands import HARDWARE, embeds
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.command import Answer, Parser, Part, Table, parser, run
from pipeline.methods import METHODS
from pipeline.recipe import Recipe
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
    weight, activation = get_format(recipe.formats.weight), get_format(recipe.formats.activation)
    fits = [name for name in HARDWARE if embeds(weight.name, name) and embeds(activation.name, name)]
    wide = not any(embeds(activation.name, name) for name in ("INT8", "E4M3"))
    buys = WIDE_BUYS if wide else ACTIVATIONS_BUY[activation.bits]
    exact = f"exact in {', '.join(fits)}" if fits else f"exact in none of {', '.join(HARDWARE)}"
    return f"W{weight.bits}: {WEIGHTS_BUY[weight.bits]}. A{activation.bits}: {buys}; {exact}."


def zoo_models() -> list[str]:
    """Names of the models that come with the package."""
    folder = resources.files("export") / "zoo"
    return sorted(item.name for item in folder.iterdir() if (item / "config.json").is_file()) if folder.is_dir() else []


def target_rows() -> list[dict[str, Any]]:
    """Each target: can it be built here, and what to do if not."""
    rows = []
    for name, backend in BACKENDS.items():
        here, tool = find_spec(backend.package) is not None, machine.distribution(backend.package)
        note = f"{tool} {machine.tool_version(backend.package)}" if here else f"pip install {tool}"
        rows.append({"target": name, "available": here, "note": note})
    return rows


def recipe_rows() -> list[dict[str, Any]]:
    """Each recipe with its model, formats, granularity and what they buy."""
    bundled = [recipes.load(name) for name in recipes.recipe_names()]
    return [{**recipe.document(), "worth": worth(recipe)} for recipe in bundled]


def method_rows() -> list[dict[str, Any]]:
    """Each calibration method with its options and their values in both presets."""
    return [
        {
            "name": row.name,
            "data": "none" if row.observes == "weights" else "sampled",
            "summary": row.summary,
            "options": {
                name: {"fast": option.value("fast"), "full": option.value("full"), "help": option.help}
                for name, option in row.options.items()
            },
        }
        for row in METHODS.values()
    ]


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Answer with everything there is to choose from."""
    document = {"recipes": recipe_rows(), "models": [f"zoo:{name}" for name in zoo_models()], "targets": target_rows()}
    document["methods"] = method_rows()
    answer.document(document, *tables(document))
    return 0


def tables(document: dict[str, Any]) -> list[Part]:
    """The document for people."""
    recipe_rows = [(row["name"], row["model"], _formats(row), _groups(row["weights"])) for row in document["recipes"]]
    notes = [(row["name"], f"{row['description']}. {row['worth']}") for row in document["recipes"]]
    methods = [(row["name"], row["data"], row["summary"]) for row in document["methods"]]
    options = [(row["name"], _options(row["options"])) for row in document["methods"] if row["options"]]
    targets = [(row["target"], "yes" if row["available"] else "no", row["note"]) for row in document["targets"]]
    return [
        Table(("recipe", "model", "weights x activations", "weight scales"), recipe_rows),
        Table(("recipe", "what it is for, and what its widths buy"), notes),
        Table(("method", "data", "what it does (--set method=...)"), methods),
        "Options, fast/full (--set 'calibrate.options={name = value}', --set preset=full):",
        Table(("method", "options"), options),
        "bundled models: " + ", ".join(document["models"]),
        Table(("target", "here", "note"), targets),
    ]


def _options(options: dict[str, Any]) -> str:
    """Every option of a method with the values of both presets."""
    return ", ".join(f"{name} {_shown(option)}" for name, option in options.items())


def _shown(option: dict[str, Any]) -> str:
    """Both presets' values, once if they are equal."""
    values = dict.fromkeys(str(option[preset]) or '""' for preset in ("fast", "full"))
    return "/".join(values)


def _formats(row: dict[str, Any]) -> str:
    formats = row["formats"]
    special = "".join(f", {kind} {name}" for kind, name in formats["weight_of"].items())
    return f"{formats['weight']} x {formats['activation']}{special}"


def _groups(weights: dict[str, Any]) -> str:
    if weights["granularity"] == "per_channel":
        return "per_channel"
    return f"{weights['granularity']}({weights['group_size']})"


def make_parser() -> Parser:
    """All flags of `list`."""
    return parser("list", "Show recipes, calibration methods, bundled models and targets.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
