"""Where a model comes from: a folder or file, the bundled zoo, or the hub's local cache (nothing is downloaded)."""

from __future__ import annotations

import re
from pathlib import Path

from export.errors import EnvironmentLacksError, ModelError
from export.models.weights import NOT_READ, weights_file

ZOO = Path(__file__).parent.parent / "zoo"


def find(source: str) -> tuple[Path, str]:
    """Folder or weights file, and revision ("" but for the hub), of `source`: a folder, a .safetensors file, `zoo:NAME`
    with /FOLDER for a part of a bundled pipeline, or a hub id OWNER/NAME, with /FOLDER for a part of a pipeline other
    than its transformer, and with @REVISION (a branch, tag or commit) where it is not the main branch."""
    if source.startswith("zoo:"):
        return _zoo_folder(source.removeprefix("zoo:")), ""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, ""
    if path.is_file():
        weights_file(path)  # refuses what is no weights file
        return path, ""
    if source.endswith((*NOT_READ, ".safetensors")):
        raise ModelError(f"model {source!r} is not a file here; check the path")
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(\w+))?(?:@((?!.*\.\.)[\w./-]+))?", source):
        return _from_cache(match[1], match[3], match[2])
    raise ModelError(
        f"model {source!r} is not a folder here and not a hub id; give a folder, a .safetensors file, OWNER/NAME, "
        "OWNER/NAME/text_encoder, OWNER/NAME@REVISION or zoo:NAME"
    )


def zoo_models() -> list[str]:
    """Names of the models, and of the pipelines, that come with the package."""
    return sorted(
        {path.parent.name for index in ("config.json", "model_index.json") for path in ZOO.glob(f"*/{index}")}
    )


def _zoo_folder(source: str) -> Path:
    """source: NAME, or NAME/FOLDER."""
    bundled, (name, slash, part) = zoo_models(), source.partition("/")
    if name not in bundled:
        raise ModelError(f"zoo:{name} is not a bundled model; use one of {', '.join(f'zoo:{row}' for row in bundled)}")
    parts = sorted(path.parent.name for path in (ZOO / name).glob("*/config.json"))
    if slash and part not in parts:
        remedy = f"use one of {', '.join(f'zoo:{name}/{row}' for row in parts)}" if parts else f"use zoo:{name}"
        raise ModelError(f"zoo:{source} is no part of a bundled model; {remedy}")
    return ZOO / name / part


def _from_cache(repository: str, revision: str | None, part: str | None = None) -> tuple[Path, str]:
    """part: the folder of the repository, None for itself or its transformer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = repository + (f"/{part}" if part else "") + (f"@{revision}" if revision else "")
    missing = f"model {name} is not in the local cache and no folder of that name exists"
    wanted = part or "transformer"
    command = f'hf download {repository} --include "{wanted}/*"' + (f" --revision {revision}" if revision else "")
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise EnvironmentLacksError(f"{missing}; run: {command}") from error
    except (HFValidationError, OSError) as error:  # a name that no repository can have, or no file system
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ModelError(
            f"model {name!r} is not a hub id ({reason}); give OWNER/NAME or OWNER/NAME@REVISION"
        ) from error
    if not any((folder / place / "config.json").is_file() for place in ((part,) if part else ("", wanted))):
        raise EnvironmentLacksError(f"the cached {name} has no {wanted}; run: {command}")
    return folder / part if part else folder, folder.name
