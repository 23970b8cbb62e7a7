"""Stock onnxruntime, which the targets `cpu` and `onnx` run in: is it here, and as new as a bundle was verified with?
And its sessions: opened and run with its errors in words of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from export.documents import open_file
from export.errors import ContractError, RecipeError
from pipeline import machine
from pipeline.backends.base import Arrays, Check
from pipeline.backends.runtime_errors import runtime_errors
from plugins.cpu import library

PACKAGE = "onnxruntime"


def check() -> Check:
    """onnxruntime is imported, because a wheel for another machine installs and then does not load."""
    try:
        runtime = import_module(PACKAGE)
    except ImportError as error:
        return Check(PACKAGE, False, f"does not load: {error}", True, f"pip install {PACKAGE}")
    return Check(PACKAGE, True, f"{runtime.__version__}, runs the targets cpu and onnx", True)


def fitness_problem(manifest: Mapping[str, Any], target: str) -> str | None:
    """A runtime that is absent, or older than the one that the target was verified with.

    Raises ContractError for a manifest that names none.
    """
    here = machine.tool_version(PACKAGE)
    if not here:
        return f"target {target} needs onnxruntime; install with: pip install onnxruntime"
    stated = manifest["tools"].get(PACKAGE, "")
    if not re.match(r"\d{1,9}\.\d{1,9}", stated):
        raise ContractError(f"the manifest names no version of onnxruntime ({stated!r}); build the bundle again")
    verified, installed = machine.release(stated), machine.release(here)
    if tuple(map(int, installed)) < tuple(map(int, verified)):
        versions = f"verified with onnxruntime {'.'.join(verified)}, this is {'.'.join(installed)}"
        return f"target {target} was {versions}; upgrade onnxruntime or rebuild"
    return None


# --- sessions -------------------------------------------------------------------------------------------------------


def opened(ort: Any, path: Path, options: Any, without: Sequence[str] = ()) -> Any:
    """onnxruntime's session of a file, `without` some of its optimizers. Raises ContractError where it refuses it."""
    left_out = {"disabled_optimizers": list(without)} if without else {}
    open_file(path).close()  # refuses what is no file
    with runtime_errors(path):
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], **left_out)


def register_needed(options: Any, domains: Iterable[str]) -> None:
    """Give a session the kernel library of this package if one of its graph's op domains is the library's."""
    if library.DOMAIN in domains:
        library.register(options)


def own(array: Any) -> Any:
    """A private copy of an array; what is none is left for the check of inputs to refuse."""
    return np.array(array, order="C") if isinstance(array, np.ndarray) else array


def run_session(session: Any, names: list[str], fed: Arrays) -> Arrays:
    """Outputs of one session. Raises RecipeError where onnxruntime refuses the numbers, such as a class too high."""
    try:
        return dict(zip(names, session.run(names, fed), strict=True))
    except Exception as error:
        if type(error).__name__ != "InvalidArgument":
            raise
        remedy = "give numbers that the model knows, such as classes that it was trained on"
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"the engine cannot run these inputs ({reason}); {remedy}") from error
