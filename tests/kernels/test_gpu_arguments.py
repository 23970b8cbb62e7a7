"""The kernel table is the only list of arguments: one more in a row, and everybody who passes arguments has it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from export.errors import ContractError
from plugins import torch_ops, torch_reference
from plugins.gpu import compile, launch, table
from plugins.gpu.spec import GemmSpec
from plugins.gpu.table import KERNELS, Argument, Kernel, kernel, resolved, run_time_sizes
from plugins.tensorrt.payload import Payload
from plugins.tensorrt.rtx_launcher import Launcher
from plugins.tensorrt.rtx_plugin import ports_of
from tests.kernels.test_rtx_plugin_launcher import RecordingDriver, gemm_shapes
from tests.kernels.test_rtx_plugin_launcher import payload as payload_of
from tests.kernels.test_trt_plugins import FrontEnd, plugins
from tests.support.machine_code import chosen

pytest.importorskip("triton", reason="the GPU kernels need triton")
GATED = GemmSpec("E2M3", "E2M1", 64, 96, 32, (1, 2, 3), epilogue="gate_residual", output="fp32")
PLAIN = replace(GATED, epilogue="none")
# What a new epilogue might read: a factor of each channel.
ADDED = Argument("gain", "*fp32", "input", ("N",), when="has_gate", suffix="Gain")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """packed_gemm with ADDED behind its other inputs."""
    row = kernel("packed_gemm")
    place = next(index for index, argument in enumerate(row.arguments) if argument.role == "size")
    longer = replace(row, arguments=(*row.arguments[:place], ADDED, *row.arguments[place:]))
    monkeypatch.setattr(table, "KERNELS", tuple(longer if one is row else one for one in KERNELS))
    assert kernel("packed_gemm") is longer
    return longer


def test_it_is_compiled(added: Kernel) -> None:
    gated, plain = (chosen(added, spec, 90) for spec in (GATED, PLAIN))
    assert ("gain", "*fp32") in compile.argument_types(gated) and "gain" not in added.all_constants(
        GATED, gated.tile, 90
    )
    assert "gain" not in dict(compile.argument_types(plain))
    assert added.all_constants(PLAIN, plain.tile, 90)["gain"] is None


def inputs(rows: int, samples: int) -> dict[str, torch.Tensor]:
    """Every tensor that GATED's packed_gemm reads, as the table says."""
    row, sizes = kernel("packed_gemm"), run_time_sizes(rows, rows // samples)
    shapes = {one.name: resolved(one.shape_for(GATED), sizes) for one in row.inputs(GATED)}
    types = {one.name: getattr(torch, one.element_for(GATED)) for one in row.inputs(GATED)}
    return {name: torch.ones(shape, dtype=types[name]) for name, shape in shapes.items()}


def test_it_is_launched(added: Kernel, monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(launch, "run", lambda row, spec, tile, rows, sm, arguments: passed.update(arguments))
    tensors = inputs(6, 2)
    launch.packed_gemm(GATED, **tensors, tokens=3, expand_first=False)
    assert passed["gain"] is tensors["gain"] and (passed["M"], passed["tokens"]) == (6, 3)
    with pytest.raises(ContractError, match=r"gain is missing; packed_gemm needs it as float32 \[96\]"):
        launch.packed_gemm(GATED, **{**tensors, "gain": None}, tokens=3, expand_first=False)
    with pytest.raises(ContractError, match="gain given, which packed_gemm does not take for GemmSpec"):
        named = {name: tensor for name, tensor in tensors.items() if name not in ("gate", "residual")}
        launch.packed_gemm(PLAIN, **named, expand_first=False)


def test_the_torch_op_has_it(added: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(op for op in torch_ops.OPS if op.name == "packed_gemm")
    assert (
        "Tensor? gain=None" in op.schema
        and "gain" not in next(op for op in torch_ops.OPS if op.name == "expanded_gemm").schema
    )
    tensors = inputs(6, 2)
    first = tuple(tensors.pop(name) for name in op.inputs[0])
    choices = {"activation": "E2M3", "weight": "E2M1", "group_size": 32, "multipliers": [1, 2, 3]}
    choices |= {"epilogue": "gate_residual", "output": "fp32", "tokens": 3}
    seen: dict[str, Any] = {}
    monkeypatch.setitem(
        torch_reference.REFERENCES, "packed_gemm", lambda spec, **named: (seen.update(named, spec=spec),)
    )
    op.run(*first, **tensors, **choices)
    assert seen["spec"] == GATED and seen["gain"] is tensors["gain"] and seen["tokens"] == 3
    fake = op.fake(*first, **tensors, **choices)
    assert isinstance(fake, torch.Tensor) and fake.shape == (6, 96) and fake.dtype == torch.float32


def test_plugins_pass_it(added: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX: types and the place at launch. TensorRT: the signature, and a name of its own."""
    payload = payload_of("packed_gemm", GATED)
    assert ports_of(payload).inputs[-1] == "float32" and len(ports_of(payload).inputs) == 9
    recording = RecordingDriver(types=payload.variants[0].types)
    launcher = Launcher(payload, recording)
    launcher.prepare([*gemm_shapes(2, 50), (96,)])
    launcher.launch(range(11, 20), [99], stream=0)
    assert recording.launches[0][-1] == (*range(11, 20), 100, 50, 99, 0, 0)
    front_end = FrontEnd()
    plugins._register(object(), front_end, Payload("packed_gemm", GATED, ()))
    ((name, functions),) = front_end.found.items()
    assert name == "fpq::PackedGemmMultipliersGateResidualGain"
    assert [*inspect.signature(functions["register"]).parameters][-2:] == ["gain", "payload"]


@pytest.mark.parametrize("op", torch_ops.OPS, ids=lambda op: op.name)
def test_references_take_what_kernels_take(op: torch_ops.TorchOp) -> None:
    """The NumPy reference and plain torch name the arguments as the table does, in whichever function uses them."""
    names = {argument.name for argument in op.row.arguments if argument.role != "output"} - {"M", "rows"}
    for functions in (
        [op.row.reference, table.reference.expanded_gemm, table.reference._after_sum, table.reference.quantize],
        [torch_reference.REFERENCES[op.kernel], torch_reference._gemm, torch_reference.quantize],
    ):
        takes = {name for function in functions for name in inspect.signature(function).parameters}
        assert names <= takes, f"{names - takes} of {op.name}"
