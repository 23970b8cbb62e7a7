"""How far apart equally right engines are: `python -m benchmarks.repeats` builds the default recipe by several seeds of
calibration, in a sweep, and writes every number of the bundles to benchmarks/results/repeats.json.

The tolerances of `verify --baseline` (pipeline/verify/tolerances.toml) lie above these differences, which
tests/benchmarks/test_repeats.py holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Json
from export.documents import plain
from pipeline.bundle.bundle import load_bundle
from pipeline.sweep.__main__ import main as sweep
from pipeline.verify.record import Record, stored_record

NAME = "repeats"
RECIPE = "pixart_w4a6"


def built(seeds: int, folder: Path) -> list[Record]:
    """What the bundle of each seed says. Raises RuntimeError where one is not built."""
    options = "".join(f"[options.seed{seed}]\ncalibrate.seed = {seed}\n" for seed in range(seeds))
    file, out = folder / "sweep.toml", folder / "out"
    file.write_text(f'schema_version = 1\nrecipes = ["{RECIPE}"]\ntargets = "cpu"\n{options}', encoding="utf-8")
    if code := sweep([str(file), "-o", str(out)]):
        raise RuntimeError(f"the sweep ended with {code}")
    return [stored_record(load_bundle(path)) for path in sorted((out / "bundles").iterdir())]


def document(records: Sequence[Record]) -> Json:
    """numbers: by name, the value of each seed, and what kind of number it is."""
    first, *_ = records
    numbers = {
        name: {
            "values": plain([row.numbers[name].value for row in records]),
            "limits": plain([row.numbers[name].limit for row in records]),
            "unit": number.unit,
            "at_most": number.at_most,
        }
        for name, number in first.numbers.items()
    }
    return {"recipe": RECIPE, "seeds": len(records), "numbers": numbers, "timings": dict(first.timings)}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = record.parser("benchmarks.repeats", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=record.RESULTS, metavar="DIR", help="of the JSON")
    arguments = record.parsed(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        print(record.write(NAME, document(built(arguments.seeds, Path(folder))), arguments.output_dir))


if __name__ == "__main__":
    main()
