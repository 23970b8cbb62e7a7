"""Python environments of their own for packages that the project's is without, made once and kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

from export.cache_folder import cache_folder

WAITED_S = 900


def python_with(module: str, requirement: str) -> str | Path:
    """A Python that imports `module` and all that this one does: itself, or one of an environment with `requirement`
    beside. Raises LookupError, with the reason, where that cannot be installed."""
    if importlib.util.find_spec(module):
        return sys.executable
    key = hashlib.sha256(f"{sys.version} {sys.executable} {requirement}".encode()).hexdigest()[:12]
    folder = cache_folder("tests", f"{module}-{key}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if (folder / "whole").exists():
            return python
        venv.create(folder, with_pip=False, clear=True)
        [packages] = folder.glob("lib/python*/site-packages")
        beside = [path for path in sys.path if Path(path).name == "site-packages"]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in beside]
        packages.joinpath("beside.pth").write_text("".join(lines))
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAITED_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise LookupError(f"{requirement} was not installed within {WAITED_S} s") from error
        if done.returncode != 0:
            raise LookupError(f"{requirement} cannot be installed: {(done.stderr.strip() or 'no reason')[-300:]}")
        (folder / "whole").touch()
    return python


def without_xdist() -> dict[str, str]:
    """This process's environment for programs that are no tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
