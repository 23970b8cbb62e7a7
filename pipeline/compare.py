"""`python -m pipeline.compare A B`: two bundles side by side: formats, gates, sizes, speed, and on a page pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from export.errors import RegressionError
from pipeline import machine
from pipeline.command import Answer, Parser, Part, Table, parser, run
from pipeline.files import refuse_unwritable
from pipeline.signals import leave
from pipeline.verify.baseline import Comparison, compare, load_tolerances
from pipeline.verify.beside import Beside, beside
from pipeline.verify.record import AnyBundle, open_any, stored_record
from pipeline.verify.report import number

BUNDLE = "a folder that build wrote, or hf://OWNER/NAME[@REVISION]"


@dataclass(frozen=True)
class Compared:
    """Two verified bundles and all that was found of them."""

    a: AnyBundle
    b: AnyBundle
    parts: Sequence[Beside]
    comparison: Comparison

    def document(self) -> dict[str, object]:
        """For JSON. components: facts, formats, layers and recipe of each; numbers: with the verdict on B."""
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "components": [asdict(part) for part in self.parts],
            "failed_gates": {"a": self.comparison.baseline.failures, "b": self.comparison.record.failures},
            **self.comparison.document(),
        }


def make_parser() -> Parser:
    """All flags of `compare`."""
    flags = parser("compare", "Show two bundles side by side: formats, gates, bytes, speed, pictures; nothing is run.")
    flags.add_argument("a", metavar="A", help=f"the baseline: {BUNDLE}")
    flags.add_argument("b", metavar="B", help="likewise; said is where it is worse than A")
    flags.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write a page with the pictures of both")
    flags.add_argument(
        "--tolerances", type=Path, metavar="FILE.toml", help="by how much B may be worse (default: see docs/ci.md)"
    )
    flags.add_argument("--check", action="store_true", help="exit with 6 where B is worse than A by more than that")
    return flags


def compare_bundles(a: str | Path, b: str | Path, tolerances: Path | None = None) -> Compared:
    """Verify the files of both and compare what they say. Raises UserError subclasses.

    a, b: bundles of a model or of a whole pipeline, both of the same kind.
    """
    allowed = load_tolerances(tolerances)
    first, second = open_any(a), open_any(b)
    parts = beside(first, second)
    return Compared(first, second, parts, compare(stored_record(first), stored_record(second), allowed))


def tables(compared: Compared) -> list[Part]:
    """What was found, for people: what differs, and every number."""
    rows = [
        (_named(part.component, pair.name), pair.a, pair.b)
        for part in compared.parts
        for pair in (*part.facts, *part.formats, *part.recipe)
        if pair.differs
    ]
    layers = sum(len(part.layers) for part in compared.parts)
    numbers = [
        (
            row.name,
            "-" if row.baseline is None else number(row.baseline.value),
            "-" if row.value is None else number(row.value.value),
            row.verdict,
        )
        for row in compared.comparison.rows
    ]
    differing: list[Part] = [Table(("", "A", "B"), rows)] if rows else ["Both say the same of themselves."]
    count = [f"Layers of other formats or sizes: {layers}."] if layers else []
    return [*differing, *count, Table(("number", "A", "B", "B is"), numbers), *compared.comparison.notes]


def _named(component: str, name: str) -> str:
    return f"{component}: {name}" if component else name


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Compare, write the page, and answer with what differs."""
    if args.output:
        machine.require(("jinja2",), "writing a page", "build")
        refuse_unwritable(args.output, False, "--output")
    compared = compare_bundles(args.a, args.b, args.tolerances)
    if args.output:
        from pipeline.verify.beside_page import write_beside_page

        write_beside_page(args.output, compared.a, compared.b, compared.parts, compared.comparison)
    answer.document(
        {"event": "compare", **compared.document()}, *tables(compared), f"B is {compared.comparison.sentence()}."
    )
    if args.check and compared.comparison.worse:
        raise RegressionError(f"{args.b} is {compared.comparison.sentence()}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
