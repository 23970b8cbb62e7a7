"""What `verify --polygraphy` writes, run by Polygraphy itself."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends.tensorrt.plan_file import read_engine_file
from pipeline.verify.__main__ import verify_bundle
from pipeline.verify.report import Report
from tests.support import tiny_text, tiny_vae
from tests.support.environments import without_xdist
from tests.support.quick_build import build_unproven

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install '.[polygraphy]'")
pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.process]
ROOT = Path(__file__).parents[2]
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
TOOL = "run_polygraphy.py"
TARGETS = "cpu,cuda,ort_cuda" + ",rtx" * HAS_RTX


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_unproven(tmp_path_factory.mktemp("bundles") / "b", "--target", TARGETS)


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_for(bundle, tmp_path_factory.mktemp("work"))


def write_for(bundle: Path, work: Path) -> Path:
    """As `verify` writes it into `work`/out; no gate is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.verify.proof.verify", lambda *_: Report())
        verify_bundle(bundle, work / "report", threads=1, polygraphy_dir=work / "out")
    return work / "out"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which this package is installed with the entry points that pyproject.toml has now."""
    place = tmp_path_factory.mktemp("installed")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = place / f"ditc-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ditc\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {where}" for name, where in rows.items()) for group, rows in groups
        )
    )
    (place / TOOL).write_text("from polygraphy.tools import main\nraise SystemExit(main())\n")
    return place


def polygraphy_run(script: Path, installed: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = without_xdist() | variables
    environment |= {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment["POLYGRAPHY"] = f"{sys.executable} {installed / TOOL}"
    command = ("sh", str(script), *words)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def compared(output: str) -> list[str]:
    return [line for line in output.splitlines() if "min required" in line]


@pytest.mark.parametrize(
    ("target", "comparisons"), [("cpu", 4), ("cuda", 2), ("ort_cuda", 2), ("onnx", 4 + 40), ("rtx", 2)]
)
def test_each_target_is_within_its_limits_in_polygraphy(
    target: str, comparisons: int, folder: Path, installed: Path
) -> None:
    """Two calls of an engine or of its last graph each, and every quantized linear of the portable model in one."""
    if target == "rtx" and not HAS_RTX:
        pytest.skip("tensorrt-rtx is not installed")
    done = polygraphy_run(folder / f"{target}.sh", installed)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = compared(done.stdout)
    assert len(rows) == comparisons and all(row.endswith("| PASSED") for row in rows)


@pytest.mark.parametrize(
    ("make", "engine", "comparisons"),
    [(tiny_text.clip_folder, "clip_w4a8", 3 * 4), (tiny_vae.vae_folder, "vae_decoder", 4)],
    ids=["text encoder", "autoencoder"],
)
def test_other_parts_of_a_pipeline_are_looked_at_too(
    make: Callable[[Path], Path], engine: str, comparisons: int, installed: Path, tmp_path: Path
) -> None:
    """Every output of two calls, of the engine and of its graph."""
    flags = ("--engine", engine, "-m", str(make(tmp_path)), "--target", "cpu")
    write_for(build_unproven(tmp_path / "b", *flags), tmp_path)
    done = polygraphy_run(tmp_path / "out/cpu.sh", installed)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = compared(done.stdout)
    assert len(rows) == comparisons and all(row.endswith("| PASSED") for row in rows)


def test_polygraphy_builds_an_engine_of_the_kept_graph(bundle: Path, folder: Path, installed: Path) -> None:
    """The same GEMMs in the same types, from the graph that the bundle's engine was built from."""
    if not HAS_RTX:
        pytest.skip("tensorrt-rtx is not installed")
    done = polygraphy_run(folder / "rtx.sh", installed, RTX="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    again, first = read_engine_file(folder / "rtx.engine"), read_engine_file(bundle / "rtx/model.engine")
    assert again.gemm_types == first.gemm_types and again.sms == first.sms and again.bounds == first.bounds


def test_wrong_weights_fail(bundle: Path, folder: Path, installed: Path, tmp_path: Path) -> None:
    """Of another place of the bundle, in which the weights of the engine are others."""
    shutil.copytree(bundle, tmp_path / "other")
    data = tmp_path / "other/model.onnx.data"
    weights = np.fromfile(data, np.uint8)
    weights[len(weights) // 4 : len(weights) // 2] ^= 0x11
    weights.tofile(data)
    done = polygraphy_run(folder / "onnx.sh", installed, str(tmp_path / "other"))
    assert done.returncode != 0 and any(row.endswith("| FAILED") for row in compared(done.stdout))


def test_a_bundle_that_was_changed_is_refused(bundle: Path, folder: Path, installed: Path, tmp_path: Path) -> None:
    """The runner verifies what it runs, as everything does that opens a bundle."""
    shutil.copytree(bundle, tmp_path / "other")
    with (tmp_path / "other/cpu/model.onnx.data").open("r+b") as file:
        file.write(b"other")
    done = polygraphy_run(folder / "cpu.sh", installed, str(tmp_path / "other"))
    assert done.returncode != 0 and "differs from the manifest" in done.stdout + done.stderr


def test_the_table_of_layers_has_every_target_and_the_worst_first(folder: Path) -> None:
    with (folder / "layers.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    targets = [*TARGETS.split(","), "onnx"]
    margins = [min(float(row[f"{t}_db"]) - float(row[f"{t}_limit_db"]) for t in targets) for row in rows]
    assert len(rows) == 40 and margins[0] > 0
    assert all(later > earlier - 0.03 for earlier, later in pairwise(margins)), "beyond what rounding to 0.01 dB does"
    assert all(row["weight x activation"] == "E2M1 x E2M3" for row in rows)


def test_an_engine_runs_beside_the_portable_model_in_python(bundle: Path, folder: Path) -> None:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc
    from polygraphy.json import load_json

    from pipeline.polygraphy.runners import DitcRunner, EngineFromBundle

    portable = OnnxrtRunner(SessionFromOnnx(str(bundle / "model.onnx")))
    engine = DitcRunner(EngineFromBundle(bundle, "cpu", threads=1), name="ours")
    results = Comparator.run([portable, engine], data_loader=load_json(str(folder / "inputs.json")))
    expected = RunResults.load(str(folder / "expected.json"))
    assert len(results["ours"]) == len(expected["float64 reference"]) == 2 and not engine.is_active
    results["float64 reference"] = expected["float64 reference"]
    assert bool(Comparator.compare_accuracy(results, compare_func=SnrCompareFunc(snr_threshold=30.0)))


def test_gpu_commands_are_told_apart(folder: Path) -> None:
    """They stand behind a variable, so that what a machine without a GPU runs is what was run."""
    text = (folder / "cuda.sh").read_text(encoding="utf-8")
    before, behind = text.split('if [ -n "${GPU:-}" ]; then')
    assert "not run" in before and "--ditc-target cuda" in behind and "--ditc-target" not in before
    assert (folder / "run.sh").read_text(encoding="utf-8").count("sh ") == len(TARGETS.split(",")) + 1
