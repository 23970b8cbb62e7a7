"""Command-line arguments that several benchmark scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Collection


def add_names(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    """Positional NAMEs, each one of `known`; all of them if none is given."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; use one of {', '.join(known)}")
        return text

    # argparse checks `choices` against the whole default list of nargs="*", so the check is a type.
    parser.add_argument("names", nargs="*", default=list(known), type=name, metavar="NAME", help="default: all")
