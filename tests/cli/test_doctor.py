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


def check(target: str, name: str) -> Check:
    """The row `name` of what the target says of this machine."""
    (row,) = (row for row in BACKENDS[target].checks() if row.name == name)
    return row


INSTALLED = {"triton": "3.9.0", "tensorrt": "11.1.0.106", "torch": "2.13.0"}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Releases by package: absent ones are not installed. A GPU of SM 90, and assemblers, are there."""
    found = dict(INSTALLED)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name in found else None)
    monkeypatch.setattr(machine, "tool_version", lambda name: found.get(name, ""))
    monkeypatch.setattr(compile.importlib.metadata, "version", found.__getitem__)
    monkeypatch.setattr(compile.os, "access", lambda path, mode: True)
    monkeypatch.setattr(machine, "cuda_sm", lambda: 90)
    monkeypatch.setattr(cuda, "torch_cuda", lambda: "13.0")
    return found


def test_triton_of_a_release_that_is_new_enough(tools: dict[str, str]) -> None:
    found = check("cuda", "triton")
    assert found == Check("triton", True, "3.9.0", False, found.remedy)


@pytest.mark.parametrize(
    ("version", "words"), [("3.5.1", "triton 3.5.1 is too old; run: pip install 'triton>=3.6'"), ("", "pip install")]
)
def test_old_or_absent_triton_is_told(version: str, words: str, tools: dict[str, str]) -> None:
    tools["triton"] = version
    if not version:
        del tools["triton"]
    found = check("cuda", "triton")
    assert not found.ok and not found.needed and found.found == (version or "not installed") and words in found.remedy


def test_the_target_cuda_is_one_row(tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = check("cuda", "cuda")
    assert found.ok and found.found == "SM 90, CUDA of torch 13.0, triton 3.9.0"
    monkeypatch.setattr(cuda, "torch_cuda", lambda: "")
    tools["triton"] = "3.5.0"
    found = check("cuda", "cuda")
    assert not found.ok and not found.needed and found.found == "SM 90, CUDA of torch none, triton 3.5.0"
    assert "built without CUDA" in found.remedy and "needs triton 3.6 or newer, this is 3.5.0" in found.remedy
    monkeypatch.setattr(machine, "cuda_sm", lambda: 0)
    assert "needs an NVIDIA GPU" in check("cuda", "cuda").remedy
    assert check("cuda", "cuda") in doctor.target_checks()


def test_the_cuda_of_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert cuda.torch_cuda() == (torch.version.cuda or "")


def registry(found: tuple[str, ...]) -> Any:
    """Stands in for TensorRT: a registry that finds these plugins of version 1 in the namespace fpq."""
    creators = {(name, "1", "fpq"): object() for name in found}
    return SimpleNamespace(get_plugin_registry=lambda: SimpleNamespace(get_creator=lambda *key: creators.get(key)))


@pytest.fixture
def wanted(tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    names = tuple(map(plugin_name, EXAMPLES))
    monkeypatch.setattr(trt_engine.plugins, "register", lambda module: names)
    monkeypatch.setattr(trt_engine, "environment_problems", lambda sm: [])
    return names


def test_plugins_of_trt_are_those_that_the_registry_finds(
    wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engine, "import_module", lambda name: registry(wanted))
    found = check("trt", "tensorrt")
    assert found.ok and "11.1.0.106; registered in namespace fpq, version 1: Quantize GeluQuantize" in found.found
    monkeypatch.setattr(trt_engine, "import_module", lambda name: registry(wanted[1:]))
    found = check("trt", "tensorrt")
    assert not found.ok and "version 1: GeluQuantize" in found.found and "missing: Quantize" in found.remedy


def test_without_tensorrt_the_plugins_are_those_of_the_table(
    wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(module: str) -> Any:
        raise ImportError("libnvinfer.so.11 is missing")

    monkeypatch.setattr(trt_engine.plugins, "register", absent)
    found = check("trt", "tensorrt")
    assert not found.ok and "would register in namespace fpq, version 1: Quantize" in found.found
    assert "tensorrt does not load: libnvinfer.so.11 is missing" in found.remedy
    monkeypatch.setattr(trt_engine, "environment_problems", lambda sm: ["target trt needs tensorrt"])
    found = check("trt", "tensorrt")
    assert found.remedy == "only needed for the target trt; target trt needs tensorrt" and found.found.endswith(
        "not run"
    )
