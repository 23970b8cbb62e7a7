"""Where a model comes from: a folder, the bundled zoo, or the local cache of the hub (nothing is downloaded)."""

from __future__ import annotations

import re
from pathlib import Path

from export.errors import EnvironmentLacksError, ModelError

ZOO = Path(__file__).parent / "zoo"


def find(source: str) -> tuple[Path, str]:
    """Folder and revision ("" but for the hub) of `source`: a folder, `zoo:NAME` or a hub id OWNER/NAME."""
    if source.startswith("zoo:"):
        return _zoo_folder(source.removeprefix("zoo:")), ""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser(), ""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return _from_cache(source)
    raise ModelError(f"model {source!r} is not a folder here and not a hub id; give a folder, OWNER/NAME or zoo:NAME")


def _zoo_folder(name: str) -> Path:
    found = sorted(path.parent.name for path in ZOO.glob("*/config.json"))
    if name not in found:
        raise ModelError(f"zoo:{name} is not a bundled model; use one of {', '.join(f'zoo:{row}' for row in found)}")
    return ZOO / name


def _from_cache(repository: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = f"model {repository} is not in the local cache and no folder of that name exists"
    command = f'hf download {repository} --include "transformer/*"'
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise EnvironmentLacksError(f"{missing}; run: {command}") from error
    if not any((folder / part / "config.json").is_file() for part in ("", "transformer")):
        raise EnvironmentLacksError(f"the cached {repository} has no transformer; run: {command}")
    return folder, folder.name
