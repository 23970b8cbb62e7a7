"""What `doctor` says of the GPU targets' tools, on machines that have them, lack them, or have old ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import doctor, machine
from pipeline.backends import BACKENDS, cuda
from pipeline.backends.base import Check
from pipeline.backends.trt import engine as trt_engine
from plugins.gpu import compile
from plugins.tensorrt.aot import plugin_name
from plugins.tensorrt.plugins import EXAMPLES


def row_of(target: str, name: str) -> Check:
    """The row `name` of what the target says of this machine."""
    (row,) = (row for row in BACKENDS[target].checks() if row.name == name)
    return row


INSTALLED = {"triton": "3.9.0", "tensorrt": "11.1.0.106", "torch": "2.13.0"}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Releases by package: absent ones are not installed. A GPU of SM 90, and assemblers, are there."""
    releases = dict(INSTALLED)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name in releases else None)
    monkeypatch.setattr(machine, "tool_version", lambda name: releases.get(name, ""))
    monkeypatch.setattr(machine, "installed_version", lambda name: releases.get(name, ""))
    monkeypatch.setattr(compile.importlib.metadata, "version", releases.__getitem__)
    monkeypatch.setattr(compile.os, "access", lambda path, mode: True)
    monkeypatch.setattr(machine, "cuda_sm", lambda: 90)
    monkeypatch.setattr(cuda, "torch_cuda", lambda: "13.0")
    return releases


def test_triton_of_a_release_that_is_new_enough(tools: dict[str, str]) -> None:
    row = row_of("cuda", "triton")
    assert row == Check("triton", True, "3.9.0", False, row.remedy)


@pytest.mark.parametrize(
    ("version", "words"), [("3.5.1", "triton 3.5.1 is too old; run: pip install 'triton>=3.6'"), ("", "pip install")]
)
def test_old_or_absent_triton_is_told(version: str, words: str, tools: dict[str, str]) -> None:
    tools["triton"] = version
    if not version:
        del tools["triton"]
    row = row_of("cuda", "triton")
    assert not row.ok and not row.needed and row.found == (version or "not installed") and words in row.remedy


def test_the_target_cuda_is_one_row(tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("cuda", "cuda")
    assert row.ok and row.found == "SM 90, CUDA of torch 13.0, triton 3.9.0"
    monkeypatch.setattr(cuda, "torch_cuda", lambda: "")
    tools["triton"] = "3.5.0"
    row = row_of("cuda", "cuda")
    assert not row.ok and not row.needed and row.found == "SM 90, CUDA of torch none, triton 3.5.0"
    assert "built without CUDA" in row.remedy and "needs triton 3.6 or newer, this is 3.5.0" in row.remedy
    monkeypatch.setattr(machine, "cuda_sm", lambda: 0)
    assert "needs an NVIDIA GPU" in row_of("cuda", "cuda").remedy
    assert row_of("cuda", "cuda") in doctor.target_checks()


def test_the_cuda_of_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert cuda.torch_cuda() == (torch.version.cuda or "")


def registry(names: tuple[str, ...]) -> Any:
    """Stands in for TensorRT: a registry that finds these plugins of version 1 in the namespace fpq."""
    creators = {(name, "1", "fpq"): object() for name in names}
    return SimpleNamespace(get_plugin_registry=lambda: SimpleNamespace(get_creator=lambda *key: creators.get(key)))


@pytest.fixture
def plugin_names(tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    names = tuple(map(plugin_name, EXAMPLES))
    monkeypatch.setattr(trt_engine.plugins, "register", lambda module: names)
    monkeypatch.setattr(trt_engine, "environment_problems", lambda sm: [])
    return names


def test_plugins_of_trt_are_those_that_the_registry_finds(
    plugin_names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engine, "import_module", lambda name: registry(plugin_names))
    row = row_of("trt", "tensorrt")
    assert row.ok and "11.1.0.106; registered in namespace fpq, version 1: Quantize GeluQuantize" in row.found
    monkeypatch.setattr(trt_engine, "import_module", lambda name: registry(plugin_names[1:]))
    row = row_of("trt", "tensorrt")
    assert not row.ok and "version 1: GeluQuantize" in row.found and "missing: Quantize" in row.remedy


def test_without_tensorrt_the_plugins_are_those_of_the_table(
    plugin_names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(module: str) -> Any:
        raise ImportError("libnvinfer.so.11 is missing")

    monkeypatch.setattr(trt_engine.plugins, "register", absent)
    row = row_of("trt", "tensorrt")
    assert not row.ok and "would register in namespace fpq, version 1: Quantize" in row.found
    assert "tensorrt does not load: libnvinfer.so.11 is missing" in row.remedy
    monkeypatch.setattr(trt_engine, "environment_problems", lambda sm: ["target trt needs tensorrt"])
    row = row_of("trt", "tensorrt")
    assert row.remedy == "only needed for the target trt; target trt needs tensorrt" and row.found.endswith("not run")


def test_what_extras_install_is_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"uvicorn", "ray", "modelopt"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in absent else object())
    monkeypatch.setattr(machine, "tool_version", lambda name: "1.2")
    rows = {row.name: row for row in doctor.extra_checks()}
    assert rows["serve"] == Check("serve", False, "no uvicorn", False, "pip install 'ditc[serve]'")
    ray, modelopt = "serve --ray, sweep --ray", "calibrating with ModelOpt"
    assert rows[ray] == Check(ray, False, "no ray", False, "pip install 'ditc[ray]'")
    assert rows[modelopt] == Check(modelopt, False, "no nvidia-modelopt", False, "pip install 'ditc[modelopt]'")
    assert rows["verify --polygraphy"].ok
    absent.clear()
    assert [row.found for row in doctor.extra_checks()] == [
        "fastapi 1.2, prometheus-client 1.2, uvicorn 1.2", "ray 1.2", "huggingface-hub 1.2", "polygraphy 1.2",
        "nvidia-modelopt 1.2",
    ]  # fmt: skip
    assert all(row.ok for row in doctor.extra_checks())


def test_memory_is_what_the_narrowest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.FreeMemory(2**30, " within the limit of `ulimit -v`", "raise that limit")
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    (row,) = (row for row in doctor.machine_checks() if row.name == "memory")
    assert not row.ok and row.found.startswith("1.0 GiB free of ") and row.found.endswith("`ulimit -v`")
    assert row.remedy == "raise that limit: 2 GiB are needed"
