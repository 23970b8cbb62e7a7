"""Large unquantized linears as FP16 GEMMs on `rtx`: what is converted, what it costs, what the engine stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.dialect.graph import drop_unused
from pipeline.backends.tensorrt.build import build_engine
from pipeline.backends.tensorrt.half import LARGE_ELEMENTS, halve_large_linears
from pipeline.backends.tensorrt.plan_file import read_engine_file
from tests.backends.rtx.test_rtx_lowering import run

SIZE = 1024
GEMM = "h = Gemm <transB = 1> (x, w, b)"
FORMS = {
    "gemm": GEMM,
    "matmul": "wt = Transpose <perm = [1, 0]> (w) m = MatMul (x, wt) h = Add (m, b)",
    "no_bias": "wt = Transpose <perm = [1, 0]> (w) h = MatMul (x, wt)",
}


def model(form: str, rows: int = SIZE, scale: float = 0.03) -> ir.Model:
    """y = |x W' + b| with W [rows, SIZE] stored as FP16."""
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[batch, {SIZE}] x) => (float[batch, {rows}] y)
    {{ w = Cast <to = 1> (stored) {FORMS.get(form, form)} y = Abs (h) }}"""
    parsed = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    stored = (rng.normal(size=(rows, SIZE)) * scale).astype(np.float16)
    for name, array in (("stored", stored), ("b", rng.normal(size=rows).astype(np.float32))):
        value = next((v for node in parsed.graph for v in node.inputs if v is not None and v.name == name), None)
        if value is not None:
            value.const_value = ir.tensor(array, name=name)
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
            parsed.graph.register_initializer(value)
    for node in parsed.graph:
        node.name = str(node.outputs[0].name)
    return parsed


def inputs() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(3, SIZE)).astype(np.float32)}


@pytest.mark.parametrize("form", FORMS)
def test_input_and_product_are_rounded_once_and_the_bias_is_not(form: str) -> None:
    source, converted = model(form), model(form)
    assert halve_large_linears(converted) == ["h" if form != "matmul" else "m"]
    drop_unused(converted)
    assert len([n for n in converted.graph if n.op_type == "Cast"]) == 2  # in and out; the weight's is gone
    x = inputs()["x"]
    weight = source.graph.initializers["stored"].const_value.numpy().astype(np.float64)
    bias = source.graph.initializers["b"].const_value.numpy() if form != "no_bias" else 0
    product = x.astype(np.float16).astype(np.float64) @ weight.T
    got = run(ir.to_proto(converted), {"x": x})["y"]
    # 2^-12 of the product for its rounding; float32 sums of 1024 terms are below 2^-14 of the largest here.
    assert np.abs(got - np.abs(product + bias)).max() <= (2.0**-12 + 2.0**-14) * np.abs(product).max()
    assert not np.array_equal(got, run(ir.to_proto(source), {"x": x})["y"])


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("gemm", LARGE_ELEMENTS // SIZE - 1),  # small
        ("h = Gemm <transB = 1, alpha = 0.5> (x, w, b)", SIZE),  # scaled
        ("v = Mul (w, w) h = Gemm <transB = 1> (x, v, b)", SIZE),  # not the stored weight itself
    ],
)
def test_other_linears_are_left_alone(form: str, rows: int) -> None:
    source = model(form, rows)
    before = ir.to_proto(source).SerializeToString()
    assert halve_large_linears(source) == []
    assert ir.to_proto(source).SerializeToString() == before


@pytest.mark.rtx
@pytest.mark.parametrize("form", ["gemm", "matmul"])
def test_the_engine_keeps_sixteen_bits(form: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    constant_bytes = {}
    for name in ("half", "single"):
        graph = model(form)
        if name == "half":
            halve_large_linears(graph)
            drop_unused(graph)
        onnx.save(ir.to_proto(graph), tmp_path / f"{name}.onnx")
        build_engine("tensorrt_rtx", tmp_path / f"{name}.onnx", tmp_path / name, (89, 120), 1)
        constant_bytes[name] = read_engine_file(tmp_path / name).constant_bytes
    assert constant_bytes["half"]["half"] == 2 * SIZE**2 and constant_bytes["single"]["float"] >= 4 * SIZE**2
