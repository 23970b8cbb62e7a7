"""`python -m benchmarks.tools BUNDLE`: the bundle's portable model through every tool of the matrix, with functions and
without; writes benchmarks/results/tools.json. A tool that cannot be had here has a row with the reason."""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Json
from benchmarks.tools.browser import PageError
from benchmarks.tools.environments import CannotBeHadError
from benchmarks.tools.limit import limit_db, run
from benchmarks.tools.matrix import FORMS, FUNCTIONS, INLINED, TOOLS, feeds_of, input_shapes, ran
from export.inline import write_inlined
from export.onnx_files import load_model
from pipeline import load
from pipeline.backends.base import DATA, MODEL

logger = logging.getLogger(__name__)
NAME = "tools"


def measured(bundle_path: str) -> Json:
    """All rows, and what they are judged by."""
    bundle = load(bundle_path)
    with bundle.copied({MODEL, DATA}.__contains__) as private, tempfile.TemporaryDirectory() as folder:
        places = {FUNCTIONS: private.path, INLINED: Path(folder)}
        write_inlined(private.path / MODEL, places[INLINED] / MODEL)
        model = load_model(private.path / MODEL)
        feeds = feeds_of(input_shapes(model))
        reference = run(model, feeds)
        sizes = {form: sum((place / name).stat().st_size for name in (MODEL, DATA)) for form, place in places.items()}
        document: Json = {
            "bundle": bundle.name,
            "bytes": sizes,
            "limit_db": round(limit_db(private.path / MODEL, feeds, reference), 1),
            "rows": [],
        }
        for tool in TOOLS:
            for form in FORMS:
                row: Json = {"tool": tool.name, "form": form}
                try:
                    row |= ran(tool, places[form], feeds, reference)
                except CannotBeHadError as error:
                    row |= {"version": "-", "absent": str(error)}
                # Of one tool, not of the others.
                except (ChildProcessError, PageError, subprocess.TimeoutExpired) as error:
                    row |= {"version": "-", "refuses": str(error)}
                logger.info("%s", row)
                document["rows"].append(row)
    return document


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = record.parser("benchmarks.tools", __doc__)
    parser.add_argument("bundle", metavar="BUNDLE", help="what `build` wrote, with its portable model")
    parser.add_argument("--output-dir", type=Path, default=record.RESULTS, metavar="DIR", help="of the JSON")
    args = record.parsed(parser, argv)
    logger.info("%s", record.write(NAME, measured(args.bundle), args.output_dir))


if __name__ == "__main__":
    main()
