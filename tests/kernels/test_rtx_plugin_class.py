"""The IPluginV3 class itself, called as TensorRT-RTX calls it, with a driver that records its launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.tensorrt import rtx_loader, rtx_plugin
from plugins.tensorrt.payload import FIELD, NAMESPACE, PLUGINS, VERSION, Payload
from tests.kernels.test_rtx_plugin_launcher import RecordingDriver, gemm_shapes, payload

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = [pytest.mark.rtx, pytest.mark.fast]
GEMM = GemmSpec("E2M3", "E2M1", 64, 96, 32, (1, 2, 3), epilogue="gate_residual", output="fp32")


def created(payload: Payload, phase: str) -> Any:
    """A plugin from the registry's creator, as parser and runtime make it; the parser ends texts with a zero."""
    trt = rtx_loader.load()
    rtx_plugin.creators()
    creator = trt.get_plugin_registry().get_creator(PLUGINS[payload.kernel], VERSION, NAMESPACE)
    kept = np.frombuffer(payload.to_text().encode() + b"\0" * (phase == "BUILD"), np.int8)
    field = trt.PluginField(FIELD, kept, trt.PluginFieldType.CHAR)
    return creator.create_plugin("layer", trt.PluginFieldCollection([field]), getattr(trt.TensorRTPhase, phase))


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_a_plugin_is_made_from_its_field_alone_and_gives_it_back(phase: str) -> None:
    gemm = payload("packed_gemm", GEMM)
    plugin = created(gemm, phase)
    (field,) = plugin.get_fields_to_serialize()
    assert field.name == FIELD and rtx_plugin.text_of(field) == gemm.to_text()
    assert (plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace) == ("PackedGemm", "1", "fpq")
    assert plugin.clone().payload == plugin.payload == gemm


def test_types_and_formats_are_those_of_the_kernel() -> None:
    trt, plugin = rtx_loader.load(), created(payload("packed_gemm", GEMM), "BUILD")
    assert plugin.get_output_data_types([]) == [trt.float32] and plugin.num_outputs == 1
    types = ["int8", "float32", "int8", "float32", "int8", "float32", "float32", "float32", "float32"]

    def fits(position: int, kind: str, layout: Any = trt.TensorFormat.LINEAR) -> bool:
        descriptors = [SimpleNamespace(desc=SimpleNamespace(format=layout, type=getattr(trt, kind)))] * len(types)
        return bool(plugin.supports_format_combination(position, descriptors, 8))

    assert all(fits(index, kind) for index, kind in enumerate(types))
    assert not fits(0, "uint8") and not fits(2, "float32") and not fits(0, "int8", trt.TensorFormat.CHW32)
    quantizer = created(payload("quantize", QuantizeSpec("E2M3", 64)), "BUILD")
    assert quantizer.get_output_data_types([]) == [trt.int8, trt.float32]
    assert plugin.get_workspace_size([], []) == 0 and plugin.get_valid_tactics() == []


def test_enqueue_is_one_launch_on_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = payload("packed_gemm", GEMM)
    recording = RecordingDriver(types=gemm.variants[0].types)
    monkeypatch.setattr(rtx_plugin, "cuda_driver", lambda: recording)
    attached = created(gemm, "RUNTIME").attach_to_context(None)
    loaded = len(recording.loaded)
    for batch in (1, 2):
        attached.on_shape_change([SimpleNamespace(dims=shape) for shape in gemm_shapes(batch, 50)], [])
        attached.enqueue([], [], list(range(11, 19)), [99], 0, 7)
    assert loaded == len(recording.loaded) == 2
    assert [launch[4] for launch in recording.launches] == [7, 7]
    assert [launch[-1][8:11] for launch in recording.launches] == [(50, 50, 99), (100, 50, 99)]


def test_a_plugin_that_is_not_attached_says_so() -> None:
    plugin = created(payload("packed_gemm", GEMM), "RUNTIME")
    with pytest.raises(AssertionError, match="not attached"):
        plugin.enqueue([], [], [], [], 0, 0)
