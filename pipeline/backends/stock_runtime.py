"""Stock onnxruntime, which `cpu` and `onnx` run in: is it here, and as new as what a bundle was proven with?"""

from __future__ import annotations

import re
from importlib import import_module

from export.errors import ContractError
from pipeline import machine
from pipeline.backends.base import Check, Manifest

PACKAGE = "onnxruntime"
# Distributions that install that module, each over the other's files.
DISTRIBUTIONS = (PACKAGE, machine.ONNXRUNTIME_GPU)


def packages() -> dict[str, str]:
    """The installed ones of DISTRIBUTIONS, with their versions."""
    versions = {name: machine.installed_version(name) for name in DISTRIBUTIONS}
    return {name: version for name, version in versions.items() if version}


def providers() -> tuple[str, ...]:
    """The execution providers that the installed onnxruntime was built with, whether or not they load here; none where
    it does not load itself."""
    try:
        return tuple(import_module(PACKAGE).get_available_providers())
    except ImportError:
        return ()


def check() -> Check:
    """onnxruntime is imported, because a wheel for another machine installs and then does not load."""
    try:
        runtime = import_module(PACKAGE)
    except ImportError as error:
        return Check(PACKAGE, False, f"does not load: {error}", True, f"pip install {PACKAGE}")
    return Check(PACKAGE, True, f"{runtime.__version__}, runs the targets cpu and onnx", True)


def fitness_problem(manifest: Manifest, target: str) -> str | None:
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
