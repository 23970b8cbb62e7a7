"""A build in stages that may be stopped at any moment, and resumed.

The work folder `<output>.partial/` stands beside the destination: `key.json` (a hash of everything that matters),
`stages/NAME.json` (a marker, written when a stage is done, with its files' hashes), `bundle/` (the growing bundle)
and scratch folders. An old work folder is refused unless `resume` goes on with it or `force` replaces it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from typing_extensions import TypedDict

from export.documents import Rules, read_json, sha256
from export.errors import ContractError, RecipeError, UserError
from export.names import inside
from pipeline import machine
from pipeline.files import is_out_of_disk, lock, remove, sha256_json, tree, write_json
from pipeline.progress import heartbeat

logger = logging.getLogger(__name__)
T = TypeVar("T")
Listener = Callable[[dict[str, object]], None]
SAVED = "state saved in "  # how a note on an error begins, before the work folder


@dataclass(frozen=True)
class StageTime:
    """What a stage took; a resumed stage keeps the numbers of the run that did it."""

    name: str
    seconds: float
    peak_memory_bytes: int


class KeyFile(TypedDict):
    """key.json: a hash of everything that decides the build."""

    key: str


class Marker(TypedDict):
    """stages/NAME.json. files: name, relative to the work folder, to sha256."""

    key: str
    files: dict[str, str]
    time: StageTime


MARKER_RULES = Rules(extra="forbid")


@dataclass
class WorkFolder:
    """Context of one build: holds the lock, knows the key, runs stages.

    On leaving with an error: a user error or a full disk removes the folder (nothing is left behind), unless it `keeps`
    finished parts; an interruption, a lack of memory or a bug keeps it for `resume`.
    """

    path: Path
    key: str
    resume: bool = False
    force: bool = False
    listener: Listener = lambda event: None
    times: list[StageTime] = field(default_factory=list)
    keeps: bool = False

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    def scratch(self, name: str) -> Path:
        """A folder for files that do not go into the bundle."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __enter__(self) -> WorkFolder:
        refuse_interrupted(self.path, self.resume, self.force)
        self.made_parents = _make_parents(self.path)
        self.lock = lock(self.path, "build")
        try:
            self._start()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(error)

    def _start(self) -> None:
        if not (self.resume and self._key_matches()):
            for item in self.path.iterdir():
                remove(item)
            write_json(self.path / "key.json", {"key": self.key})
        for folder in (self.bundle, self.path / "stages"):
            folder.mkdir(exist_ok=True)

    def _leave(self, error: BaseException | None) -> None:
        if error is None or ((isinstance(error, UserError) or is_out_of_disk(error)) and not self.keeps):
            remove(self.path)
            for folder in self.made_parents if error else ():
                if not any(folder.iterdir()):
                    folder.rmdir()
        else:
            inner = f"{SAVED}{self.path}{os.sep}"  # of a component, whose build the user has not asked for
            notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith(inner)]
            error.__notes__ = [*notes, f"{SAVED}{self.path}; run the same command again with --resume"]
        os.close(self.lock)

    def _key_matches(self) -> bool:
        path = self.path / "key.json"
        interrupted = read_or_none(path, KeyFile)
        if interrupted is None:
            return False
        if interrupted["key"] != self.key:
            logger.warning("recipe, model, tools or code changed since the interrupted build; starting again")
        return interrupted["key"] == self.key

    def run(
        self,
        name: str,
        outputs: tuple[str, ...],
        work: Callable[[], T],
        reload: Callable[[], T],
        depends: object = None,
    ) -> T:
        """Do a stage, or read its result back if it is done already.

        outputs: files and folders that the stage writes, relative to the work folder. depends: what matters to this
        stage beyond the key of the build (JSON).
        """
        key = sha256_json([self.key, name, depends])
        done = self._finished(name, key)
        if done:
            self.times.append(done)
            logger.info("%s: done before (%.1f s), resumed", name, done.seconds)
            self.listener({"event": "stage", "name": name, "status": "resumed"})
            return reload()
        marker = self._marker(name)
        marker.unlink(missing_ok=True)
        result, spent = timed(name, work, self.listener)
        self.times.append(spent)
        files = {path: sha256(self.path / path) for path in self._list(outputs)}
        write_json(marker, {"key": key, "files": files, "time": asdict(spent)})
        return result

    def _marker(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _list(self, outputs: tuple[str, ...]) -> list[str]:
        files = [output for output in outputs if (self.path / output).is_file()]
        return files + [f"{output}/{name}" for output in outputs for name in tree(self.path / output)]

    def _finished(self, name: str, key: str) -> StageTime | None:
        """The stage's time if its marker has this key and all its files are as they were written."""
        marker = self._marker(name)
        document = read_or_none(marker, Marker)
        if document is None or document["key"] != key:
            return None
        for path, digest in document["files"].items():
            file = inside(self.path, path, marker)
            if not file.is_file() or sha256(file) != digest:
                logger.warning("%s: %s is not as it was written; doing the stage again", name, path)
                return None
        return document["time"]


def refuse_interrupted(path: Path, resume: bool, force: bool) -> None:
    """Raise RecipeError if the work folder at `path` is another process's, or no such folder, or if it holds an
    interrupted build, which only `resume` or `force` may touch."""
    if path.is_dir():
        os.close(lock(path, "build"))  # a build that is at work is told apart from one that was interrupted
    elif path.exists():
        raise RecipeError(f"{path} is no folder of a build; remove it, or choose another --output-dir")
    if path.exists() and not (resume or force):
        remedy = "add --resume to finish it, or --force to start again"
        raise RecipeError(f"{path} holds an interrupted build; {remedy}")


def read_or_none(path: Path, schema: type[T]) -> T | None:
    """State of an interrupted build; None where there is none, or, with a warning, where it is damaged."""
    if not os.path.lexists(path):
        return None
    try:
        return read_json(path, schema, MARKER_RULES)
    except ContractError as error:
        logger.warning("%s; that part is done again", str(error).partition(";")[0])
        return None


def timed(name: str, work: Callable[[], T], listener: Listener = lambda event: None) -> tuple[T, StageTime]:
    """Run `work` with a log line before and after that tells seconds and peak memory."""
    logger.info("%s ...", name)
    listener({"event": "stage", "name": name, "status": "started"})
    machine.reset_peak_memory()
    started = time.monotonic()
    with heartbeat(name):
        result = work()
    spent = StageTime(name, round(time.monotonic() - started, 3), machine.peak_memory_bytes())
    logger.info("%s: %.1f s, peak memory %.2f GiB", name, spent.seconds, spent.peak_memory_bytes / 2**30)
    listener({"event": "stage", "status": "finished", **asdict(spent)})
    return result, spent


def _make_parents(path: Path) -> list[Path]:
    """Make `path` and its parents; returns the parents that were missing, innermost first."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_out_of_disk(error):
            raise
        raise RecipeError(f"cannot write to {path.parent} ({error.strerror}); choose another --output-dir") from error
    return missing
