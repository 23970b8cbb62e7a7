"""`python -m pipeline.push DIR OWNER/NAME`: a bundle, with a card of what it is, becomes a commit on the hub."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from export.errors import ContractError, RecipeError
from pipeline import machine
from pipeline.bundle import card, hub
from pipeline.bundle.contents import listed_files
from pipeline.command import Answer, Parser, parser, run
from pipeline.signals import leave

logger = logging.getLogger(__name__)

DESCRIPTION = "Upload a bundle whose gates passed, with a card, to the hub; hf://OWNER/NAME then loads it anywhere."


def make_parser() -> Parser:
    """All flags of `push`."""
    flags = parser("push", DESCRIPTION)
    flags.add_argument("bundle", type=Path, help="folder that build wrote")
    flags.add_argument("repository", metavar="OWNER/NAME", help="of the hub; made where it is not there")
    flags.add_argument("--private", action="store_true", help="of a repository that is made: others do not see it")
    flags.add_argument("--revision", metavar="BRANCH", help="made where it is not there (default: the main branch)")
    text = "the model's, as the hub names it, for example mit (default: what the model's own card says; unknown)"
    flags.add_argument("--license", metavar="ID", help=text)
    flags.add_argument("--dry-run", action="store_true", help="check everything, show the card, upload nothing")
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Verify the bundle, write its card, and upload both."""
    repository = hub.named(f"{hub.PREFIX}{args.repository}" + (f"@{args.revision}" if args.revision else ""))
    assert repository is not None
    if args.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise RecipeError(f"--license {args.license!r}; use an identifier of the hub such as apache-2.0 or other")
    machine.require(hub.CLIENT, "uploading a bundle", "hub")
    if not args.bundle.is_dir():
        raise ContractError(f"{args.bundle} is not a folder; give the folder that build wrote")
    parts = card.read_parts(args.bundle)
    for name, source in card.sources(parts).items():
        logger.warning("the manifest of %s names %s, from which its model was read; others will see that", name, source)
    text = card.compose(parts, repository, card.License(args.license) if args.license else None)
    if args.dry_run:
        answer.document({"event": "card", "card": text}, text)
        return 0
    names = listed_files(args.bundle, lambda name: (args.bundle / name).is_file())
    address = hub.upload(repository, {name: args.bundle / name for name in names}, text, args.private)
    answer.document(
        {"event": "result", "repository": str(repository), "commit": address, "files": len(names)},
        f"{repository}: {len(names)} files, {address}",
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
