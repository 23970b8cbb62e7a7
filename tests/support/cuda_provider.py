"""onnxruntime's CUDA execution provider on a machine without a GPU: it opens over a CUDA runtime that computes nothing
(cuda_stand_in.c), and says which nodes it takes. No result of it means anything.

`python -m tests.support.cuda_provider` prints, for graphs that are named on standard input, where each node was placed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from benchmarks.tools.environments import WAITED_S, CannotBeHadError
from export.cache_folder import cache_folder
from tests.support.environments import without_xdist

SOURCE = Path(__file__).with_name("cuda_stand_in.c")
ROOT = SOURCE.parents[2]
# A library that needs no function of it, one of the driver, and what it is asked for.
LEAST: dict[str, tuple[str, ...]] = {"libcurand.so.10": (), "libcuda.so.1": ("cuTensorMapEncodeTiled", "cuInit")}


def installed(version: str) -> Path:
    """A folder with that release of onnxruntime-gpu and nothing else, made once. Raises CannotBeHadError, with the
    reason, where it cannot."""
    for tool in ("cc", "objdump"):
        if shutil.which(tool) is None:
            raise CannotBeHadError(f"no {tool} on this machine")
    folder = cache_folder("tests", f"onnxruntime-gpu-{version}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            requirement = f"onnxruntime-gpu=={version}"
            command = [*(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:")]
            command += ["--target", str(folder), requirement]
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAITED_S, check=False)
            if done.returncode != 0:
                raise CannotBeHadError(
                    f"{requirement} cannot be installed: {(done.stderr.strip() or 'no reason')[-300:]}"
                )
            make_stand_ins(folder)
            (folder / "whole").touch()
    return folder


def make_stand_ins(folder: Path) -> None:
    """The libraries that the provider in `folder` is linked with, of the functions it calls, in `folder`/stand-in."""
    provider = folder / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    listed = subprocess.run(["objdump", "-T", str(provider)], capture_output=True, text=True, check=True).stdout
    names: dict[str, set[str]] = defaultdict(set, {name: set(functions) for name, functions in LEAST.items()})
    for library, function in re.findall(r"UND\*.*\((lib(?:cu)\w+\.so\.\d+)\)\s+(\w+)$", listed, re.MULTILINE):
        names[library].add(function)
    defined = set(re.findall(r"(\w+)\(", SOURCE.read_text(encoding="utf-8")))
    (folder / "stand-in").mkdir()
    for library, functions in names.items():
        path = folder / "stand-in" / library
        others = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(functions - defined))
        path.with_suffix(".c").write_text(f'#include "{SOURCE}"\n{others}', encoding="utf-8")
        path.with_suffix(".map").write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        linked = (f"-Wl,-soname,{library}", f"-Wl,--version-script={path.with_suffix('.map')}")
        command = ["cc", "-w", "-shared", "-fPIC", "-O1", str(path.with_suffix(".c")), "-o", str(path), *linked]
        subprocess.run(command, check=True)


def placements(folder: Path, graphs: Sequence[Path]) -> list[dict[str, str] | str]:
    """For each graph: execution provider by node name; or onnxruntime's refusal in words."""
    done = python(folder, "-m", "tests.support.cuda_provider", asked=json.dumps([str(path) for path in graphs]))
    assert done.returncode == 0, done.stderr[-2000:]
    answer: list[dict[str, str] | str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def python(folder: Path, *words: str, asked: str = "", cuda: bool = True) -> subprocess.CompletedProcess[str]:
    """A Python that has this onnxruntime-gpu; cuda: with the libraries that stand in for CUDA's, or without any."""
    environment = without_xdist() | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    environment |= {"LD_LIBRARY_PATH": str(folder / "stand-in")} if cuda else {}
    return subprocess.run(
        [sys.executable, *words],
        input=asked,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=WAITED_S,
        check=False,
    )


def placed(path: str) -> dict[str, str] | str:
    """Of one graph, as it stands: nothing is fused or folded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CUDAExecutionProvider"])
    except Exception as error:
        return str(error)
    parts = session.get_provider_graph_assignment_info()
    return {node.name: part.ep_name for part in parts for node in part.get_nodes()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps([placed(path) for path in json.load(sys.stdin)]) + "\n")
