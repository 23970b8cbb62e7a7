"""Which files a bundle may have: data, of known kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from export.errors import ContractError
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.bundle.manifest_schema import Manifest
from pipeline.files import MANIFEST_FILE

# The kernel library as bundles of earlier versions held it.
OLD_LIBRARY = "fpq_native.so"
# What a build writes beside the files of its targets, which the backends name.
GENERATION_FILES = re.compile(r"generation\.json|[\w-][\w.-]*\.safetensors")
OTHER_FILES = re.compile(
    r"recipe\.toml|config\.json|bench\.json"
    r"|report/(index\.html|parity\.json|layers\.csv|images/[\w-][\w.-]*\.png)"
)


def refuse_strange_files(folder: Path, files: Iterable[str], targets: Iterable[str]) -> None:
    """Raise ContractError for the first file that no build makes: a bundle is data, of known kinds."""
    for name in sorted(files):
        if is_made_by_build(name, targets):
            continue
        if name.rpartition("/")[2] == OLD_LIBRARY:
            why = (
                "is compiled code, as bundles of earlier versions held it, and is never loaded; build the bundle again"
            )
        else:
            why = "is not a file that build makes; do not use this bundle, get it from its source"
        raise ContractError(f"{folder / name} {why}")


def is_made_by_build(name: str, targets: Iterable[str]) -> bool:
    """May a bundle with these targets have a file of this name?"""
    known = any(name in BACKENDS[target].files for target in (PORTABLE, *targets))
    return bool(known or GENERATION_FILES.fullmatch(name) or OTHER_FILES.fullmatch(name))


def refuse_unknown_targets(document: Manifest, folder: Path) -> None:
    """Raise ContractError for a target that this version does not have."""
    if unknown := sorted(set(document["targets"]) - set(BACKENDS)):
        raise ContractError(
            f"{folder / MANIFEST_FILE}: target {unknown[0]!r} is unknown to this version, which has "
            f"{', '.join(BACKENDS)}; install the version that built it"
        )
