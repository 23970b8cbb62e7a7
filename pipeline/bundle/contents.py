"""Which files a bundle has, and which it may have: data, of known kinds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from typing_extensions import TypedDict

from export.documents import Rules, read_json
from export.errors import ContractError
from export.names import distinct, inside
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.bundle import manifest
from pipeline.bundle.manifest_schema import File, Manifest
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE

# The kernel library as bundles of earlier versions held it.
OLD_LIBRARY = "fpq_native.so"
STRANGE = "is not a file that build makes; do not use this bundle, get it from its source"
# What a build writes beside the files of its targets, which the backends name.
GENERATION_FILES = re.compile(r"generation\.json|[\w-][\w.-]*\.safetensors")
OTHER_FILES = re.compile(
    r"recipe\.toml|config\.json|bench\.json"
    r"|report/(index\.html|parity\.json|layers\.csv|images/[\w-][\w.-]*\.png)"
)
# Of pipeline.json.
PIPELINE_VERSION = 1
# What lies in a pipeline's folder beside its bundles.
PIPELINE_FILES = re.compile(
    r"tokenizer(_\d+)?/tokenizer\.json|scheduler/scheduler_config\.json|prompts\.txt|generation\.json|report/(index\.html|parity\.json)"
)
# What a repository of the hub has beside a bundle, and what its client keeps: never read, so no part of the bundle.
HUB_FILES = re.compile(r"README\.md|\.gitattributes|\.cache/huggingface/.+")


class ListedParts(TypedDict):
    """What is read here of pipeline.json, before it is verified (all of it: pipeline_bundle.py)."""

    schema_version: int
    components: dict[str, object]
    files: dict[str, File]


def listed_files(folder: Path, has: Callable[[str], bool]) -> dict[str, int | None]:
    """Every file of a bundle, or of a pipeline of bundles, and its size where a manifest states one.

    The one place that says so. has: whether there is a file of this name, which then lies in `folder`; asked of
    manifests alone. Raises ContractError for a folder without a manifest, or for a manifest that lists what no build
    makes.
    """
    if has(MANIFEST_FILE):
        return {MANIFEST_FILE: None, **_bundle_files(folder)}
    if not has(PIPELINE_FILE):
        raise ContractError(
            f"{folder} is not a bundle: it has no {MANIFEST_FILE} and no {PIPELINE_FILE}; give one that build wrote"
        )
    path = folder / PIPELINE_FILE
    stated = read_json(path, ListedParts, Rules(version=PIPELINE_VERSION))
    bundles = [name for name in stated["components"] if has(_inside(folder, f"{name}/{MANIFEST_FILE}", path))]
    listed: dict[str, int | None] = {PIPELINE_FILE: None}
    for name in bundles:
        listed[f"{name}/{MANIFEST_FILE}"] = None
        listed |= {f"{name}/{file}": size for file, size in _bundle_files(folder / name).items()}
    for file, row in stated["files"].items():
        _inside(folder, file, path)
        if file not in listed and not PIPELINE_FILES.fullmatch(file):
            raise ContractError(f"{folder / file} {STRANGE}")
        listed.setdefault(file, row["size"])
    distinct(listed, path)
    return listed


def _bundle_files(folder: Path) -> dict[str, int]:
    """Those of a single bundle, by its manifest, which is not among them."""
    document = manifest.read(folder)
    refuse_unknown_targets(document, folder)
    refuse_strange_files(folder, document["files"], document["targets"])
    return {name: row["size"] for name, row in document["files"].items()}


def _inside(folder: Path, name: str, named_in: Path) -> str:
    inside(folder, name, named_in)
    return name


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
            why = STRANGE
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
