"""Results of benchmark scripts: one JSON each, with the machine, the versions and the commit they belong to; and their
commands."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pipeline import machine
from pipeline.files import write_json

Json: TypeAlias = dict[str, Any]  # a document, or a row of one
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
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()


def slug(name: str) -> str:
    """Name of a processor or GPU for a file name.

    >>> slug("NVIDIA H100 80GB HBM3"), slug("Intel(R) Xeon(R)")
    ('nvidia_h100_80gb_hbm3', 'intel_r_xeon_r')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write(name: str, document: Json, folder: Path = RESULTS) -> Path:
    """Write `folder`/NAME.json, whole or not at all: the document, then machine, versions and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    stamped = {**document, "machine": machine.facts(), "versions": machine.tool_versions(), "commit": commit()}
    write_json(path, stamped)
    return path


def read(path: Path, absent: Json | None = None) -> Json:
    """The document at `path`; where there is none, what is given in its place. Raises FileNotFoundError without."""
    if absent is not None and not path.is_file():
        return absent
    document: Json = json.loads(path.read_text(encoding="utf-8"))
    return document


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- commands -------------------------------------------------------------------------------------------------------


def parser(module: str, description: str | None, names: Collection[str] = ()) -> argparse.ArgumentParser:
    """Of `python -m MODULE`; with positional NAMEs, each one of `names`, all of them if none is typed."""
    shape = argparse.RawDescriptionHelpFormatter
    script_parser = argparse.ArgumentParser(f"python -m {module}", description=description, formatter_class=shape)

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; use one of {', '.join(names)}")
        return text

    if names:
        # argparse checks `choices` against the whole default list of nargs="*", so the check is a type.
        script_parser.add_argument(
            "names", nargs="*", default=list(names), type=name, metavar="NAME", help="default: all"
        )
    return script_parser


def whole_path(text: str) -> Path:
    """The type of a flag whose path other processes are told of, which may be in another folder."""
    return Path(text).absolute()


def parsed(script_parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed; from then on stderr shows what all packages log."""
    arguments = script_parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return arguments
