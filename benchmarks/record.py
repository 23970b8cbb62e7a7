"""Results of benchmark scripts: one JSON each, with the machine, the versions and the commit they belong to; and the
arguments that several of them share."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pipeline import machine
from pipeline.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def commit() -> str:
    """Commit of the working tree, with "+" if tracked files differ from it; outside a git checkout what the variable
    DITC_COMMIT says, "" without it."""
    root = Path(__file__).resolve().parent
    try:
        head, changes = _git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DITC_COMMIT", "")
    return head + ("+" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=True,
    )
    return done.stdout.strip()


def write(name: str, document: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `folder`/NAME.json, whole or not at all: the document, then machine, versions and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    stamped = {**document, "machine": machine.facts(), "versions": machine.tool_versions(), "commit": commit()}
    write_json(path, stamped)
    return path


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add_names(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """Positional NAMEs, each one of `known`; all of them if none is given."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; use one of {', '.join(known)}")
        return text

    # argparse checks `choices` against the whole default list of nargs="*", so the check is a type.
    parser.add_argument("names", nargs="*", default=list(known), type=name, metavar="NAME", help="default: all")
