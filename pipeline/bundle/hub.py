"""Bundles on the hub: `hf://OWNER/NAME[@REVISION]` is downloaded into its client's cache, a folder is uploaded.

Through huggingface_hub alone, whose settings hold: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, and its own ways to a token.
"""

from __future__ import annotations

import glob
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.errors import ContractError, EnvironmentLacksError, RecipeError, ResourceError, UserError
from pipeline import machine
from pipeline.bundle.contents import PIPELINE_FILE, listed_files
from pipeline.files import MANIFEST_FILE, is_out_of_disk

logger = logging.getLogger(__name__)

# What the extra `hub` installs.
CLIENT = ("huggingface_hub",)
PREFIX = "hf://"
# As a path the prefix has one slash.
SOURCE = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@(.+))?")
CARD = "README.md"
LOG_IN = "log in with: hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """name: OWNER/NAME. revision: a branch, tag or commit; None: the main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def named(source: str | Path) -> Repository | None:
    """The repository that a source names, None for a folder. Raises RecipeError for `hf:` with anything else.

    >>> str(named("hf://me/engine@v1")), named("engines/hf")
    ('hf://me/engine@v1', None)
    """
    text = str(source)
    if not text.startswith("hf:/"):
        return None
    if match := SOURCE.fullmatch(text):
        return Repository(match[1], match[2])
    raise RecipeError(f"{text} names no repository of the hub; give {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION")


@contextmanager
def located(source: str | Path) -> Iterator[Path]:
    """The folder of a source; what a repository has that its manifest lists is downloaded, unless the cache has it.

    Raises RecipeError for a repository or revision that is not there, ContractError for one that holds no bundle,
    EnvironmentLacksError without the client, a connection or the right to see it, and ResourceError where the disk is
    too full. A ContractError from within says how a damaged download is made anew.
    """
    repository = named(source)
    if repository is None:
        yield Path(source)
        return
    machine.require(CLIENT, f"opening {repository}", "hub")
    folder = _downloaded(repository)
    try:
        yield folder
    except ContractError as error:
        error.add_note(f"it came from {repository}; to have it downloaded again, remove {folder.parent.parent}")
        raise


def _downloaded(repository: Repository) -> Path:
    """The folder of a snapshot with all files of the bundle in it."""
    from huggingface_hub import snapshot_download

    with _in_words(repository), _quiet():
        folder, sizes = _listed(repository)
        missing = {file: size or 0 for file, size in sizes.items() if not (folder / file).is_file()}
        if missing:
            refuse_full_disk(folder, sum(missing.values()), str(repository))
            logger.info("%s: %d files, %.1f MB", repository, len(missing), sum(missing.values()) / 1e6)
            patterns = [glob.escape(file) for file in missing]
            snapshot_download(repository.name, revision=folder.name, allow_patterns=patterns)
    logger.info("%s is commit %s", repository, folder.name)
    return folder


def _listed(repository: Repository) -> tuple[Path, dict[str, int | None]]:
    """The folder of the snapshot that a revision means, with its manifests in it, and what they list.

    Raises ContractError for a repository that holds no bundle, or one that lists what no build makes.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = repository.name, repository.revision
    # Whichever of the two is there names the commit, at which everything else is read.
    try:
        path = _fetched(name, MANIFEST_FILE, revision) or _fetched(name, PIPELINE_FILE, revision)
    except LocalEntryNotFoundError:
        cached = try_to_load_from_cache(name, PIPELINE_FILE, revision=revision)
        if not isinstance(cached, str):
            raise
        path = Path(cached)
    if path is None:
        raise ContractError(
            f"{repository} holds no bundle: it has no {MANIFEST_FILE} and no {PIPELINE_FILE}; `push` puts one there"
        )
    folder = path.parent

    def has(file: str) -> bool:
        """At this commit, of which the cache also knows what is not there."""
        if file == MANIFEST_FILE:
            return file == path.name
        cached = try_to_load_from_cache(name, file, revision=folder.name)
        return isinstance(cached, str) or (cached is None and _fetched(name, file, folder.name) is not None)

    return folder, listed_files(folder, has)


def _fetched(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository in the cache, None where the repository has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError:  # an EntryNotFoundError, too: neither the hub nor the cache could be asked
        raise
    except EntryNotFoundError:
        return None


def refuse_full_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise ResourceError where so much does not fit beside `folder`."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ResourceError(
            f"{what} takes {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}; free some space, or "
            "set HF_HOME to a folder on another disk"
        )


# --- upload -----------------------------------------------------------------------------------------------------------


def upload(repository: Repository, files: Mapping[str, Path], card: str, private: bool) -> str:
    """Put files, by their names there, and the card into one commit; what an earlier bundle had besides goes. Returns
    the address of the commit.

    The repository and the branch are made where they are not there. private: of a repository that is made. Raises as
    `located` does, and EnvironmentLacksError where there is no token, or none that may write there.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise EnvironmentLacksError(f"uploading to {repository} needs a token of the hub; {LOG_IN}")
    api = HfApi(library_name=machine.PROGRAM, library_version=machine.own_version())
    with _in_words(repository, writing=True), _quiet():
        api.create_repo(repository.name, private=private, exist_ok=True)
        if repository.revision is not None:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
        former = _former_files(repository) - set(files)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(name, str(path.resolve())) for name, path in files.items()),
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationDelete(name) for name in sorted(former)),
        ]
        message = f"Bundle of {machine.PROGRAM} {machine.own_version()}"
        commit = api.create_commit(repository.name, operations, commit_message=message, revision=repository.revision)
    return str(commit.commit_url)


def _former_files(repository: Repository) -> set[str]:
    """What the bundle that is there lists; nothing where there is none, or none that this version reads."""
    try:
        return set(_listed(repository)[1])
    except ContractError as error:
        logger.debug("no file of an earlier bundle is removed: %s", error)
        return set()


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the client draws its bars on a terminal alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _in_words(repository: Repository, writing: bool = False) -> Iterator[None]:
    """Within, what the client raises becomes a sentence of ours; errors of the disk stay as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if is_out_of_disk(cause):
                raise
            if (told := _told(cause, repository, writing)) is not None:
                raise told from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _told(error: BaseException, repository: Repository, writing: bool) -> UserError | None:
    """What one of the client's errors means, None for what is no error of its own."""
    from huggingface_hub import errors

    reason = " ".join(str(error).split())[:200].rstrip(".")
    if isinstance(error, errors.GatedRepoError):
        return EnvironmentLacksError(f"{repository} is gated; ask for access on its page, and {LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RecipeError(
            f"{repository} is not on the hub, or is private and this login may not see it; check the name, or {LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RecipeError(f"{repository}: the hub has no such revision; give a branch, tag or commit that it has")
    if isinstance(error, errors.HFValidationError):
        return RecipeError(f"{repository} is no name that a repository can have ({reason}); give OWNER/NAME")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return EnvironmentLacksError(f"{repository} needs a token of the hub; {LOG_IN}")
    if isinstance(error, errors.BadRequestError):
        return RecipeError(f"{repository}: the hub refuses it ({reason})")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            right = "write to" if writing else "read"
            return EnvironmentLacksError(f"{repository}: this login may not {right} it (HTTP {status}); {LOG_IN}")
        return EnvironmentLacksError(f"{repository}: the hub answers with HTTP {status}; try again later")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) or _is_of_network(error):
        cache = "" if writing else ", and the cache does not have all of it"
        return EnvironmentLacksError(
            f"{repository}: the hub cannot be reached{cache}; check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.FileMetadataError) or (isinstance(error, OSError) and "onsistency" in reason):
        return EnvironmentLacksError(f"{repository}: the download was cut short or is damaged ({reason}); try again")
    return None


def _is_of_network(error: BaseException) -> bool:
    """Of the library by which the client speaks HTTP, or a time-out."""
    return type(error).__module__.partition(".")[0].startswith("httpx") or isinstance(error, TimeoutError)
