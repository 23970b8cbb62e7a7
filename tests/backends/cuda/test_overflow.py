"""Where FP16 between the steps of a `cuda` engine overflows: found on the CPU, named with its layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.formats.operands import HALF_MAX
from pipeline.backends.cuda.overflow import find_overflow
from pipeline.backends.fused.lower import lower
from pipeline.passes import run_shared
from tests.support.portable import portable, random_linear


def test_the_first_result_beyond_fp16_is_named_with_its_call_and_layer(tmp_path: Path) -> None:
    body = 'h = fpq.QuantizedLinear <layer="a"> (x)\ny = Neg(h)'
    model = portable(body, [random_linear("a", n=64)], outputs="float[B,S,64] y")
    run_shared(model)
    lower(model)
    ir.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    large, beyond = np.sign(x) * np.float32(6e4), np.sign(x) * np.float32(7e4)
    assert find_overflow(tmp_path / "model.onnx", {"a call": {"x": x}}) is None
    call, overflow = find_overflow(tmp_path / "model.onnx", {"a call": {"x": x}, "another": {"x": large}}) or ("", None)
    assert overflow is not None and (call, overflow.layer, overflow.inside) == ("another", "a", True)
    assert overflow.largest > HALF_MAX and str(overflow).startswith("FP16 overflow: the output of a reaches")
    _, overflow = find_overflow(tmp_path / "model.onnx", {"a call": {"x": beyond}}) or ("", None)
    assert overflow is not None and not overflow.inside and "before a, an input reaches 7e+04" in str(overflow)
