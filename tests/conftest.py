"""Which tests are run in which order, and what they share.

Among it Triton's interpreter for the tests of the GPU kernels, on a machine without a GPU. Triton decides when it is
imported whether its functions are interpreted. So it is imported here, before any test, with TRITON_INTERPRET set and
unset again: what reads the variable later finds it only in tests that use `interpreter`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.costs import COSTS, few, has_fast_tests
from tests.support.reach import pytest_runtest_protocol, pytest_sessionfinish, pytest_testnodedown  # noqa: F401

# Processes that test side by side share the cores: one thread each, which must be said before PyTorch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch and its kin hold some hundred thousand objects for ever; Python would go through all of them again and again.
gc.set_threshold(50_000, 20, 50)

VARIABLE = "TRITON_INTERPRET"
# Every module with @triton.jit functions.
KERNEL_MODULES = ("decode", "gemm", "quantize", "repack")


def pytest_configure(config: pytest.Config) -> None:
    """Triton is imported by each process that runs tests: not by the first of several, which only hands them out."""
    if importlib.util.find_spec("triton") and (config.option.dist == "no" or "PYTEST_XDIST_WORKER" in os.environ):
        os.environ[VARIABLE] = "1"
        for name in KERNEL_MODULES:
            importlib.import_module(f"plugins.gpu.{name}")
        del os.environ[VARIABLE]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m fast` does not even import files all of whose tests are dear."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and config.option.markexpr == "fast" and not has_fast_tests(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`fast` is what bears no mark of cost, and of its cases a few, besides what is called so. Files with the dearest
    tests come first, so that no process is left alone with one of them when the others are done."""
    ranks: dict[Path, int] = {}
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        rank = next((i for i, cost in enumerate(COSTS) if item.get_closest_marker(cost)), len(COSTS))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
        if rank == len(COSTS) and not item.get_closest_marker("fast"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for item in (one for of_test in cases.values() for one in few(of_test)):
        item.add_marker("fast")
    items.sort(key=lambda item: ranks[item.path])


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a longer run than the usual one looks at."""
    parser.addoption("--all-faults", action="store_true", help="plant every fault in every model, some 15 minutes")
    parser.addoption("--reach", action="store_true", help="fail unless all modules are reached")
    parser.addoption(
        "--fuzz-cases", type=int, help="damaged documents that tests/cli/test_fuzz.py tries, if not each once"
    )


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run on CPU tensors, interpreted; NumPy's warnings about NaN and Inf in them mean nothing."""
    import numpy as np

    pytest.importorskip("triton", reason="the GPU kernels need triton")
    monkeypatch.setenv(VARIABLE, "1")
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all processes of this run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def one_trace_for_each_model(shared_folder: Path) -> Iterator[None]:
    """Exports take an earlier trace where there is one, see tests/support/traces.py."""
    from export import to_onnx
    from tests.support import traces

    (shared_folder / "traces").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(traces.VARIABLE, str(shared_folder / "traces"))
        patch.setattr(to_onnx, "_traced", traces.traced)
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports trace as they do outside of tests: for what is said of tracing itself."""
    from export import to_onnx
    from tests.support.traces import TRACE

    monkeypatch.setattr(to_onnx, "_traced", TRACE)


@pytest.fixture(scope="session")
def scenes_bundle(shared_folder: Path) -> Path:
    """The bundled pipeline, built whole and proven; see tests/support/scenes_bundle.py. To be copied, not changed; made
    by the first process that asks for it, for all."""
    from filelock import FileLock

    from tests.support import scenes_bundle

    folder = shared_folder / "scenes_bundle"
    with FileLock(folder.with_name("scenes_bundle.lock")):
        return folder if folder.exists() else scenes_bundle.build(folder)


@pytest.fixture(scope="session")
def victims(shared_folder: Path) -> Path:
    """Whole folders of every kind that the verbs read, see tests/support/hostile.py. To be copied, not changed; made by
    the first process that asks for them, for all."""
    from filelock import FileLock

    from tests.support import hostile

    folder = shared_folder / "hostile"
    with FileLock(folder.with_name("hostile.lock")), pytest.MonkeyPatch.context() as patch:
        if not (folder / "whole").exists():
            folder.mkdir()
            hostile.make_all(folder, patch)
            (folder / "whole").touch()
    return folder
