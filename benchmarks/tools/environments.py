"""Environments of their own for packages that this project's is without, made once and kept in the cache by what they
hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from export.cache_folder import cache_folder

WAITED_S = 900


class CannotBeHadError(Exception):
    """A tool cannot be installed here; the message is the reason."""


def python_environment(name: str, requirements: tuple[str, ...], beside: bool = False) -> Path:
    """The Python of an environment with `requirements`, as pip takes them. beside: and all that this one has.

    Raises CannotBeHadError, with the reason, where they cannot be installed.
    """

    places = [path for path in sys.path if Path(path).name == "site-packages"] if beside else []

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=False, clear=True)
        if beside:
            [packages] = folder.glob("lib/python*/site-packages")
            lines = [f"import site; site.addsitedir({path!r})\n" for path in places]
            packages.joinpath("beside.pth").write_text("".join(lines), encoding="utf-8")
        python = folder / "bin" / "python"
        install(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input", *requirements)

    key = " ".join((sys.version, sys.base_prefix, *places, *requirements))
    return kept(name, key, make) / "bin" / "python"


def node_modules(name: str, requirements: tuple[str, ...]) -> Path:
    """A folder node_modules with packages, as npm takes them. Raises CannotBeHadError where it cannot be made."""
    npm = shutil.which("npm")
    if npm is None:
        raise CannotBeHadError("npm is not installed")

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        quiet = ("--silent", "--ignore-scripts", "--no-audit", "--no-fund")
        install(npm, "install", *quiet, "--prefix", folder, *requirements)

    return kept(name, " ".join(requirements), make) / "node_modules"


def kept(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of `key` in the cache, made by the first process that asks for it; a half one is made again."""
    folder = cache_folder("tests", f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "whole").exists():
            make(folder)
            (folder / "whole").touch()
    return folder


def install(*words: object) -> None:
    """Run an installer. Raises CannotBeHadError with what it says."""
    command = [str(word) for word in words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=WAITED_S, check=False, env=without_xdist()
        )
    except subprocess.TimeoutExpired as error:
        raise CannotBeHadError(f"{command[-1]} was not installed within {WAITED_S} s") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "no reason"
        raise CannotBeHadError(f"{command[-1]} cannot be installed: {said[-300:]}")


def without_xdist() -> dict[str, str]:
    """This process's environment for programs that are no tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
