"""`python -m pipeline.bench BUNDLE`: measure a bundle's engines on this machine."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bundle import load_bundle
from pipeline.command import Answer, Parser, add_model_flags, parser, run
from pipeline.compiler import load_model, opened
from pipeline.files import write_json
from pipeline.recipe import ModelFlags, with_model
from pipeline.stages import timed


def make_parser() -> Parser:
    """All flags of `bench`."""
    made = parser("bench", "Measure the engines of a bundle on this machine, against the float model.")
    made.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    add_model_flags(made, "the float model, if it moved since the build")
    made.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the numbers here too")
    return made


def bench_bundle(path: Path, flags: ModelFlags = (None, None, None)) -> dict[str, Any]:
    """Verify the files, then measure every engine that runs here. Raises UserError subclasses.

    flags: another model, variant and configuration than the bundle was built from, None for the same.
    """
    from pipeline.bench import bench

    bundle, _ = timed("files", lambda: load_bundle(path))
    model, _ = timed("model", lambda: load_model(with_model(bundle.recipe, *flags)))
    with opened(path, bundle.targets) as engines, tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        document, _ = timed("bench", lambda: bench(model, engines, bundle.recipe, path, Path(folder)))
    return document


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Measure and answer with the numbers."""
    document = bench_bundle(args.bundle, (args.model, args.variant, args.config))
    if args.output:
        write_json(args.output, document)
    answer.document({"event": "bench", **document}, json.dumps(document, indent=1))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)
