"""The files of onnxruntime-web that the page needs: one version, by its hashes, from npm or from a folder."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from export.cache_folder import cache_folder
from export.documents import sha256, whole_file
from export.errors import EnvironmentLacksError

logger = logging.getLogger(__name__)

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# By their paths in the package: what runs on one thread of a CPU, and nothing for GPUs.
FILES = {
    "dist/ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "dist/ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "dist/ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
WAITED_S = 300
FLAG = "--onnxruntime-web"


def find(folder: Path | None) -> dict[str, Path]:
    """The files by their names. folder: of the package as npm installs it; None: npm fetches it, once for all exports.

    Raises EnvironmentLacksError where they cannot be had, or are not those of VERSION.
    """
    if folder is not None:
        return checked(folder, f"give {FLAG} the folder of {PACKAGE} {VERSION}")
    cache = cache_folder() / PACKAGE / VERSION
    if not all((cache / name).is_file() for name in FILES):
        fetch(cache)
    return checked(cache, f"remove {cache} to have it fetched again")


def checked(folder: Path, remedy: str) -> dict[str, Path]:
    """Those in a folder of the package. Raises EnvironmentLacksError for a file that is missing or another."""
    for name, stated in FILES.items():
        if not (folder / name).is_file():
            raise EnvironmentLacksError(f"{folder / name} is missing; {remedy}")
        if sha256(folder / name) != stated:
            raise EnvironmentLacksError(f"{folder / name} is not that of {PACKAGE} {VERSION} (sha256); {remedy}")
    return {Path(name).name: folder / name for name in FILES}


def fetch(folder: Path) -> None:
    """Have npm fetch the package, and keep the files that are needed."""
    remedy = f"or give {FLAG} the folder of {PACKAGE} {VERSION}"
    npm = shutil.which("npm")
    if npm is None:
        raise EnvironmentLacksError(f"exporting a page needs {PACKAGE}, which npm fetches; install npm, {remedy}")
    logger.info("npm fetches %s %s", PACKAGE, VERSION)
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, encoding="utf-8", timeout=WAITED_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentLacksError(
                f"npm has not fetched {PACKAGE} within {WAITED_S} s; try again, {remedy}"
            ) from error
        archives = list(Path(place).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = " ".join((done.stderr or done.stdout).split())[:200] or f"exit code {done.returncode}"
            raise EnvironmentLacksError(f"npm cannot fetch {PACKAGE} ({reason}); check the connection, {remedy}")
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                keep(archive, name, folder / name, remedy)


def keep(archive: tarfile.TarFile, name: str, path: Path, remedy: str) -> None:
    """Write one file of the package's archive to `path`."""
    try:
        source = archive.extractfile(f"package/{name}")
    except KeyError:
        source = None
    if source is None:
        raise EnvironmentLacksError(f"npm's {PACKAGE} {VERSION} has no {name}; report it, {remedy}")
    with source, whole_file(path, shared=True) as part, part.open("wb") as output:
        shutil.copyfileobj(source, output)
