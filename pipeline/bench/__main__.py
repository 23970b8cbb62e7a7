"""`python -m pipeline.bench BUNDLE`: measure a bundle's engines on this machine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.errors import RecipeError
from pipeline import machine
from pipeline.backends import opened
from pipeline.bundle.bundle import load_bundle
from pipeline.bundle.stages import timed
from pipeline.command import Answer, Parser, Table, add_model_flags, add_threads, parser, run
from pipeline.compiler import parse_targets
from pipeline.files import refuse_unwritable, write_json
from pipeline.recipe import ModelFlags, load_model, with_model
from pipeline.signals import leave


def make_parser() -> Parser:
    """All flags of `bench`."""
    made = parser("bench", "Measure the engines of a bundle on this machine, against the float model.")
    made.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    add_model_flags(made, "the float model, if it moved since the build")
    made.add_argument(
        "--target",
        default="auto",
        help="one of the bundle's, or several with commas; auto: all but onnx, the portable model, which is slow",
    )
    made.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the numbers here too")
    add_threads(made)
    return made


def bench_bundle(
    path: Path, flags: ModelFlags = (None, None, None), target: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Verify the files, then measure every engine of `target` that runs here, and what it is compared with, with as
    many threads. Raises UserError subclasses.

    flags: another model, variant and configuration than the bundle was built from, None for the same.
    """
    from pipeline.bench.measure import bench, measured

    bundle, _ = timed("files", lambda: load_bundle(path, threads))
    targets = measured(bundle.targets) if target == "auto" else parse_targets(target)
    for missing in [name for name in targets if name not in bundle.targets]:
        raise RecipeError(bundle.problem(missing))
    model, _ = timed("model", lambda: load_model(with_model(bundle.recipe, *flags)))
    count, recipe = machine.threads(threads), bundle.recipe
    with (
        bundle.copied() as private,
        opened(private.path, targets, count) as engines,
        tempfile.TemporaryDirectory(prefix="ditc-") as folder,
    ):
        document, _ = timed("bench", lambda: bench(model, engines, recipe, private.path, Path(folder), count))
    return document


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Measure and answer with the numbers."""
    from pipeline.bench.measure import conditions, summary

    if args.output:
        refuse_unwritable(args.output, False, "--output")
    document = bench_bundle(args.bundle, (args.model, args.variant, args.config), args.target, args.threads)
    if args.output:
        write_json(args.output, document)
    answer.document({"event": "bench", **document}, Table(*summary(document)), conditions(document))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
