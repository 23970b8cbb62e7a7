"""Half-precision attention of the `rtx` target: what it rounds, what it leaves alone, and that it fuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pipeline.backends.tensorrt.build import build_engine
from pipeline.backends.tensorrt.half import LOWEST_MASK, SPLITTER, halve_attention
from pipeline.backends.tensorrt.plan_file import read_engine_file
from tests.backends.rtx.test_rtx_lowering import run

HEADS, HEAD_WIDTH, TOKENS = 2, 64, 16
HEADER = '<ir_version: 10, opset_import: ["": 21]>'
INPUTS = f"float[b, {HEADS}, {TOKENS}, {HEAD_WIDTH}]"
MASKED = f"""{HEADER} attention ({INPUTS} q, {INPUTS} k, {INPUTS} v, float[b, 1, 1, {TOKENS}] mask) => ({INPUTS} y)
{{
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  scores = MatMul (q, kt)
  masked = Add (scores, mask)
  p = Softmax <axis = -1> (masked)
  mixed = MatMul (p, v)
  y = Identity (mixed)
}}"""


def parsed(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(2, HEADS, TOKENS, HEAD_WIDTH)).astype(np.float32) for name in "qkv"}
    arrays["q"] /= np.float32(np.sqrt(HEAD_WIDTH))
    keep = np.ones((2, 1, 1, TOKENS), bool)
    keep[1, ..., 5:] = False
    return arrays | {"mask": np.where(keep, 0, -np.inf).astype(np.float32)}


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float64)


def expected(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float64 attention on operands rounded to FP16."""
    scores = half(arrays["q"]) @ half(arrays["k"]).swapaxes(-1, -2) + np.maximum(arrays["mask"], LOWEST_MASK)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ half(arrays["v"])


def test_operands_and_result_are_rounded_to_eleven_bits_in_any_runtime() -> None:
    model = parsed(MASKED)
    assert halve_attention(model) == 1
    arrays = inputs()
    got = run(ir.to_proto(model), arrays)["y"]
    assert np.array_equal(got, half(got))
    exact = expected(arrays)
    # The result's own rounding is half an ulp of 11 bits; float32 sums of 64 and of 16 terms and the exponential add
    # far less than another 2^-12 of the largest value.
    assert np.abs(got - exact).max() <= (2.0**-12 + 2.0**-12) * np.abs(arrays["v"]).max()


def test_the_splitter_rounds_as_a_cast_to_half_does() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=10000) * 10.0 ** rng.uniform(-4, 4, 10000)).astype(np.float32)
    x = x[np.abs(x) > 2.0**-14]  # FP16's normal numbers; smaller ones have fewer bits
    large = x * np.float32(SPLITTER)
    ties = np.abs(x.astype(np.float64)) * 2.0 ** (11 - np.frexp(x)[1]) % 1 == 0.5
    assert np.array_equal((large - (large - x))[~ties], half(x)[~ties])


def test_a_fully_masked_row_is_finite() -> None:
    model = parsed(MASKED)
    halve_attention(model)
    arrays = inputs()
    arrays["mask"][:] = -np.inf
    assert np.isfinite(run(ir.to_proto(model), arrays)["y"]).all()


@pytest.mark.parametrize(
    "body",
    [
        "p = Softmax <axis = -1> (q) y = Identity (p)",
        "p = Softmax <axis = -1> (q) kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (p, kt) y = MatMul (s, v)",
        # The scores are read by something else as well.
        """kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) p = Softmax <axis = -1> (s)
        m = MatMul (p, v) r = ReduceMax (s) y = Add (m, r)""",
        # The softmax is the right operand.
        "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (s, p)",
    ],
)
def test_what_is_not_an_attention_is_left_alone(body: str) -> None:
    model = parsed(f"{HEADER} g ({INPUTS} q, {INPUTS} k, {INPUTS} v) => (float[b, h, t, w] y) {{ {body} }}")
    before = ir.to_proto(model).SerializeToString()
    assert halve_attention(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_a_mask_is_converted_once_for_all_layers() -> None:
    twice = MASKED.replace(
        "y = Identity (mixed)",
        """scores2 = MatMul (mixed, kt) masked2 = Add (mask, scores2) p2 = Softmax <axis = -1> (masked2)
        mixed2 = MatMul (p2, v) y = Identity (mixed2)""",
    )
    model = parsed(twice)
    assert halve_attention(model) == 2
    assert len([node for node in model.graph if node.op_type == "Max"]) == 1
    assert np.isfinite(run(ir.to_proto(model), inputs())["y"]).all()


@pytest.mark.rtx
def test_the_builder_fuses_it_and_not_the_float32_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    fused = []
    for name, convert in (("half", True), ("single", False)):
        model = parsed(MASKED)
        if convert:
            halve_attention(model)
        onnx.save(ir.to_proto(model), tmp_path / f"{name}.onnx")
        build_engine("tensorrt_rtx", tmp_path / f"{name}.onnx", tmp_path / name, (89, 120), 1)
        steps = read_engine_file(tmp_path / name).steps
        fused.append(sum("gemm_mha" in step.name for step in steps))
    assert fused == [1, 0]
