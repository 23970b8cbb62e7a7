"""`python -m pipeline.calibrate`: quantize a model into a checkpoint, without building an engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.command import Answer, Parser, parser, run

DESCRIPTION = "Quantize a model's linears by a recipe and write the checkpoint; a stopped run goes on where it was."


def make_parser() -> Parser:
    """All flags of `calibrate`."""
    made = parser("calibrate", DESCRIPTION)
    made.add_argument("--engine", required=True, metavar="NAME|RECIPE.toml", help="a recipe (see `list`) or a file")
    made.add_argument("-m", "--model", metavar="ID_OR_DIR", help="model folder, hub id or zoo:NAME (default: recipe's)")
    made.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="folder (default: checkpoints/NAME)")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key")
    return made


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Calibrate and say what came out."""
    from export import models
    from pipeline.calibrate import calibrate

    recipe = recipes.with_settings(recipes.load(args.engine), args.set)
    recipe = replace(recipe, model=args.model or recipe.model)
    folder = args.output_dir or Path("checkpoints") / recipe.name
    layers = calibrate(models.load(recipe.model), recipe, folder)
    size_bytes = sum(layer.size_bytes for layer in layers)
    document = {"event": "result", "path": str(folder), "linears": len(layers), "size_bytes": size_bytes}
    answer.document(document, f"{len(layers)} linears, {size_bytes / 1e6:.1f} MB in {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
