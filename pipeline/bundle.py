"""A bundle: the folder that `build` wrote, opened only after every file has been verified."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import machine, manifest, recipe
from pipeline.backends import cuda_run, trt_run
from pipeline.backends.base import Engine
from pipeline.backends.rtx_run import machine_problem, release
from pipeline.files import is_hub_link, sha256, tree

logger = logging.getLogger(__name__)

# Fastest first: `engine("auto")` takes the first that the machine can run.
SPEED_ORDER = ("trt", "cuda", "rtx", "cpu")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["engine"])

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.manifest["targets"])

    @property
    def recipe(self) -> recipe.Recipe:
        return recipe.from_dict(dict(self.manifest["recipe"]), str(self.path / manifest.FILE_NAME))

    def problem(self, target: str) -> str:
        """Why this machine cannot run `target` of the bundle, with a remedy; '' if it can."""
        if target not in self.targets:
            return (
                f"{self.path} has no target {target}, only {', '.join(self.targets)}; build it with --target {target}"
            )
        return FITNESS[target](self.manifest) if target in FITNESS else ""

    def choose(self, target: str = "auto") -> str:
        """The target to run: the named one, or the fastest that fits. Raises EnvironmentLacksError or RecipeError."""
        if target != "auto" and target not in self.targets:
            raise RecipeError(self.problem(target))
        wanted = [name for name in SPEED_ORDER if name in self.targets] if target == "auto" else [target]
        problems = {name: self.problem(name) for name in wanted}
        for name, problem in problems.items():
            if not problem:
                return name
            logger.info("target %s does not fit this machine: %s", name, problem)
        raise EnvironmentLacksError("; ".join(problems.values()) or f"{self.path} has no target that can run")

    def engine(self, target: str = "auto") -> Engine:
        """Load the engine of `target`, or of the fastest target that fits this machine."""
        from pipeline.backends import BACKENDS

        return BACKENDS[self.choose(target)].load(self.path)

    def as_diffusers(self, target: str = "auto") -> Any:
        """A drop-in for the `transformer` of a diffusers pipeline."""
        from pipeline.diffusers_adapter import as_diffusers

        return as_diffusers(self, target)


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle: form, file names, links, sizes and hashes are verified before anything is deserialized.

    Raises ContractError for a bundle that is damaged, not a bundle, or of another version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ContractError(
            f"{folder} is not a folder; give the folder that build wrote, for example engines/pixart_w4a6"
        )
    document = manifest.read(folder)
    verify_files(folder, document["files"])
    return Bundle(folder, document)


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the folder with the manifest's table of files. Raises ContractError naming the first difference."""
    found = tree(folder)
    links = (name for name in found if (folder / name).is_symlink())
    foreign = [name for name in links if not is_hub_link(folder / name, folder)]
    if foreign:
        raise ContractError(f"{folder / foreign[0]} is a link; a bundle has plain files only, copy it with cp -rL")
    names = set(found) - {manifest.FILE_NAME}
    for text, differing in (("is missing", set(files) - names), ("is not in the manifest", names - set(files))):
        if differing:
            raise ContractError(f"{folder / min(differing)} {text}; copy or build the bundle again")
    for name, row in files.items():
        _verify_file(folder / name, row)


def _verify_file(path: Path, row: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != row["size"]:
        raise ContractError(f"{path} has {size} bytes, the manifest says {row['size']}; copy or build the bundle again")
    if sha256(path) != row["sha256"]:
        raise ContractError(f"{path} differs from the manifest (sha256); copy or build the bundle again")


# --- does a target fit this machine? -------------------------------------------------------------------------------


def _cpu_problem(document: Mapping[str, Any]) -> str:
    if not machine.tool_version("onnxruntime"):
        return "target cpu needs onnxruntime; install with: pip install onnxruntime"
    built, found = (
        release(version) for version in (document["tools"]["onnxruntime"], machine.tool_version("onnxruntime"))
    )
    if tuple(map(int, found)) < tuple(map(int, built)):
        versions = f"verified with onnxruntime {'.'.join(built)}, this is {'.'.join(found)}"
        return f"target cpu was {versions}; upgrade onnxruntime or rebuild"
    lacking = _lacking(document["targets"]["cpu"])
    return (
        f"target cpu needs {', '.join(lacking)}, which this processor lacks; build it on this machine"
        if lacking
        else ""
    )


def _lacking(row: Mapping[str, Any]) -> list[str]:
    """Operations that the cpu engine relies on and this processor does not have."""
    from pipeline.backends import BACKENDS

    required = set(row.get("metadata", {}).get("requires", ()))
    return sorted(required - BACKENDS["cpu"].capabilities.ops) if required else []


def _rtx_problem(document: Mapping[str, Any]) -> str:
    found = machine.tool_version("tensorrt_rtx")
    if not found:
        return "target rtx needs tensorrt-rtx; install with: pip install tensorrt-rtx"
    return machine_problem(document["targets"]["rtx"]["metadata"], found, cuda_sm())


def _cuda_problem(document: Mapping[str, Any]) -> str:
    metadata = document["targets"]["cuda"]["metadata"]
    return cuda_run.machine_problem(metadata, cuda_sm(), machine.tool_version("triton"))


def _trt_problem(document: Mapping[str, Any]) -> str:
    return trt_run.machine_problem(document["targets"]["trt"]["metadata"], machine.tool_version("tensorrt"), cuda_sm())


FITNESS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cpu": _cpu_problem,
    "rtx": _rtx_problem,
    "cuda": _cuda_problem,
    "trt": _trt_problem,
}


def cuda_sm() -> int:
    """Compute capability of the first GPU, for example 89, asked of the driver; 0 if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return 0
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for value, attribute in ((major, 75), (minor, 76)):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return major.value * 10 + minor.value
