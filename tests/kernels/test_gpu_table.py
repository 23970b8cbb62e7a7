"""The table of GPU kernels: every row is whole, and says of its kernel what the kernel's source says."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from export.errors import ContractError
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import KERNELS, Argument, Kernel, kernel

pytest.importorskip("triton", reason="the GPU kernels need triton")
ROLES = ("input", "size", "output")
TYPES = ("*u8", "*fp32", "i32", "*{input}", "*{output}")
QUANTIZERS = {
    "quantize": QuantizeSpec("E2M3", 64),
    "gelu_quantize": QuantizeSpec("E2M3", 64, "gelu", "bf16"),
    "norm_modulate_quantize": QuantizeSpec("E2M3", 64, "norm_modulate", "fp32"),
}


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_row(row: Kernel) -> None:
    """Inputs, sizes, outputs, in this order, as TensorRT's plugins pass them; sent to a process it is the row."""
    names = [argument.name for argument in row.arguments]
    assert len(set(names)) == len(names)
    places = [ROLES.index(argument.role) for argument in row.arguments]
    assert places == sorted(places) and len(set(places)) == 3
    assert {argument.type for argument in row.arguments} <= set(TYPES)
    assert all(argument.is_pointer == (argument.role != "size") for argument in row.arguments)
    assert pickle.loads(pickle.dumps(row)) is row


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_arguments_are_the_functions_own(row: Kernel) -> None:
    """Run-time arguments come first, in the table's order; constants follow."""
    function = row.function()
    names = [argument.name for argument in row.arguments]
    assert function.fn.__name__ == row.name and function.arg_names[: len(names)] == names
    annotations = function.fn.__annotations__
    assert [name for name in function.arg_names if name in annotations] == function.arg_names[len(names) :]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("sm", [0, 80, 90])
def test_constants_are_complete(name: str, sm: int) -> None:
    row, spec = kernel(name), QUANTIZERS[name]
    constants = row.all_constants(spec, row.tile(spec, 100, sm), sm)
    run_time = {argument.name for argument in row.arguments_of(spec)}
    assert set(constants) | run_time == set(row.function().arg_names) and not set(constants) & run_time
    assert row.grid(spec, row.tile(spec, 100, sm), 100) == (100, 1, 1)


def test_names_are_unique_and_found() -> None:
    assert len({row.name for row in KERNELS}) == len(KERNELS)
    assert [kernel(row.name) for row in KERNELS] == list(KERNELS)
    with pytest.raises(ContractError, match="nothing"):
        kernel("nothing")


def test_rows_are_frozen() -> None:
    row: Any = KERNELS[0]
    with pytest.raises(FrozenInstanceError):
        row.name = "other"


def test_types_follow_the_spec() -> None:
    x, rows = Argument("x", "*{input}", "input"), Argument("M", "i32", "size")
    assert [x.type_for(spec) for spec in QUANTIZERS.values()] == ["*fp16", "*bf16", "*fp32"]
    assert rows.type_for(QuantizeSpec("E2M3", 8)) == "i32"


def test_arguments_that_a_spec_does_without() -> None:
    """Compiled away: the constant None takes their place."""
    row = KERNELS[0]
    optional = Argument("bias", "*fp32", "input", ("C",), when="epsilon")
    with_bias = Kernel(**{**vars(row), "arguments": (optional, *row.arguments)})
    tile = row.tile(QuantizeSpec("E2M3", 8), 1, 0)
    for epsilon, there in ((1.0, True), (0.0, False)):
        spec = QuantizeSpec("E2M3", 8, epsilon=epsilon)
        assert (optional in with_bias.arguments_of(spec)) is there
        assert ("bias" not in with_bias.all_constants(spec, tile, 0)) is there


@pytest.mark.process
def test_kernels_need_no_graph_library() -> None:
    """A bare GPU machine has torch, triton, NumPy and ml_dtypes; and the table itself needs no torch and no triton."""
    code = "import sys, plugins.gpu.table, plugins.gpu.compile, plugins.gpu.launch\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'onnx', 'onnxruntime', 'torch', 'triton'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
