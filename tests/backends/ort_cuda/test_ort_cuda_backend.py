"""The target `ort_cuda` from a model to a bundle that says what it lacks here, and what it would open on a GPU."""

from __future__ import annotations

import json
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from benchmarks.tools.environments import CannotBeHadError
from export.errors import EnvironmentLacksError
from pipeline import __main__ as cli
from pipeline import doctor, load, machine
from pipeline.backends import BACKENDS, stock_runtime
from pipeline.backends.ort_cuda import engine
from pipeline.backends.ort_cuda.engine import CUDA_PROVIDER, machine_problem
from pipeline.backends.ort_cuda.kernels import ONNXRUNTIME
from pipeline.backends.sessions import CPU_PROVIDER
from tests.support import cuda_provider, tiny
from tests.support.quick_build import measure_little

GPU = (CUDA_PROVIDER, CPU_PROVIDER)
BACKEND = BACKENDS["ort_cuda"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model, all gates passed."""
    folder = tmp_path_factory.mktemp("ort_cuda")
    settings = [*("--set", "method=rtn"), *("--set", "sampling.n_steps=2"), *("--set", "weights.group_size=32")]
    flags = ["--target", "ort_cuda", "-o", str(folder / "bundle"), *settings]
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        assert cli.main(["build", "--engine", "dit_w4a8", "-m", str(tiny.folder("dit", folder)), *flags]) == 0
    return folder / "bundle"


@pytest.mark.torch
def test_a_build_passes_all_gates_and_says_that_it_was_not_run(bundle: Path) -> None:
    metadata = json.loads((bundle / "ort_cuda/metadata.json").read_text())
    assert set(metadata["paths"]) == {"int8"} and metadata["without_known_kernel"] == {}
    assert metadata["proof"].endswith("the CUDA one was not run")
    assert "engine built, not run" in (bundle / "report/index.html").read_text()


@pytest.mark.torch
def test_a_bundle_is_refused_by_name_where_cuda_is_missing(bundle: Path) -> None:
    opened = load(bundle)
    assert opened.choose("auto") == "onnx", "the portable model runs here"
    for refused in (lambda: opened.engine("ort_cuda"), lambda: BACKEND.load(bundle)):
        with pytest.raises(EnvironmentLacksError, match=r"target ort_cuda needs onnxruntime-gpu, .* has only .*CPU"):
            refused()


@pytest.mark.torch
def test_onnxruntime_without_its_libraries_is_no_engine_on_the_cpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls back by itself, with a line in its log: an engine of the GPU would then run unseen on the CPU."""
    asked: dict[str, Any] = {}

    def on_cpu(path: Path, options: Any, providers: Any) -> Any:
        asked["providers"] = providers
        return onnxruntime.InferenceSession(path, options, providers=[CPU_PROVIDER])

    monkeypatch.setattr(engine, "opened", on_cpu)
    monkeypatch.setattr(stock_runtime, "providers", lambda: GPU)
    monkeypatch.setattr(machine, "cuda_sm", lambda: 89)
    with pytest.raises(EnvironmentLacksError, match="does not load its CUDA execution provider here"):
        BACKEND.load(bundle)
    assert asked["providers"] == ((CUDA_PROVIDER, {"use_tf32": "0"}), CPU_PROVIDER)


@pytest.fixture(scope="module")
def onnxruntime_gpu() -> Path:
    """A folder with onnxruntime-gpu, of the release that the table of kernels is of."""
    try:
        return cuda_provider.installed(ONNXRUNTIME)
    except CannotBeHadError as error:
        pytest.skip(f"onnxruntime-gpu: {error}")


@pytest.mark.torch
@pytest.mark.slow
def test_the_cuda_provider_takes_the_graph_but_for_shapes(bundle: Path, onnxruntime_gpu: Path) -> None:
    path = bundle / "ort_cuda/model.onnx"
    (placed,) = cuda_provider.placements(onnxruntime_gpu, [path])
    assert isinstance(placed, dict), placed
    ops = {node.name: node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    left = {ops[name] for name, provider in placed.items() if provider != CUDA_PROVIDER}
    assert len(placed) >= len(ops) and left <= {"Concat"}, "sizes, joined to the shape of a Reshape"


OPEN = """
import sys
from pathlib import Path
from pipeline.backends.ort_cuda.engine import open_session
session = open_session(Path(sys.argv[1]))
sys.exit(session.get_provider_options()[session.get_providers()[0]]["use_tf32"])
"""


@pytest.mark.torch
@pytest.mark.slow
def test_onnxruntime_for_gpus_opens_the_engine_or_says_what_it_lacks(bundle: Path, onnxruntime_gpu: Path) -> None:
    command = ("-c", OPEN, str(bundle / "ort_cuda/model.onnx"))
    opened = cuda_provider.python(onnxruntime_gpu, *command)
    assert opened.stderr.strip() == "0", "the CUDA provider runs it, without TF32"
    lacking = cuda_provider.python(onnxruntime_gpu, *command, cuda=False)
    assert "EnvironmentLacksError: onnxruntime does not load its CUDA execution provider here" in lacking.stderr


@pytest.mark.torch
def test_verify_proves_it_again(bundle: Path) -> None:
    assert cli.main(["verify", str(bundle)]) == 0


@pytest.mark.parametrize(
    ("providers", "sm", "words"),
    [
        ((), 89, "needs onnxruntime-gpu; install with: pip install onnxruntime-gpu"),
        ((CPU_PROVIDER,), 89, "has only CPUExecutionProvider; install with: pip uninstall -y onnxruntime &&"),
        (GPU, 0, "needs an NVIDIA GPU, and none is visible here"),
        (GPU, 61, "needs a GPU of SM75 or newer, here is SM61"),
        (GPU, 75, ""),
        (GPU, 89, ""),
    ],
)
def test_machine_problem(providers: tuple[str, ...], sm: int, words: str) -> None:
    problem = machine_problem(providers, sm)
    assert words in (problem or "") and bool(words) == bool(problem)


def test_doctor_says_what_is_installed_and_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = (row for row in doctor.target_checks() if row.name == "ort_cuda")
    assert not row.ok and not row.needed and f"onnxruntime {onnxruntime.__version__}; providers: " in row.found
    versions = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(machine, "installed_version", lambda name: versions.get(name, ""))
    monkeypatch.setattr(stock_runtime, "providers", lambda: GPU)
    monkeypatch.setattr(machine, "cuda_sm", lambda: 89)
    (row,) = BACKEND.checks()
    assert row.ok
    assert row.found == f"onnxruntime-gpu 1.31.1; providers: {', '.join(GPU)}; built, not run"


def test_the_cpus_targets_run_by_onnxruntime_for_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise packages.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(machine.metadata, "version", version)
    assert machine.tool_version("onnxruntime") == "1.31.1" and machine.tool_version("onnx") == ""
    assert stock_runtime.packages() == versions
    manifest = {"targets": {"cpu": {}}, "tools": {"onnxruntime": "1.31.0"}}
    assert stock_runtime.fitness_problem(manifest, "cpu") is None  # type: ignore[arg-type]
