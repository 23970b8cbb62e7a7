"""Lowers packed GEMMs and quantizers to ops of onnxruntime's CUDA execution provider: integer GEMMs where the embedding
is exact, QDQ in FP8 or a GEMM of 4-bit weights where it is not.

The provider fuses no QDQ pair into a GEMM of bytes. So an INT8 linear is MatMulInteger itself (s8 x s8, the only pair
of types that it has there), whose int32 sums are exact; its scales follow in float32. An FP8 linear is a float32 GEMM
of numbers that were rounded to FP8: its weights take a byte each, its products no tensor core.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from export.dialect.graph import MICROSOFT
from pipeline.backends.ort_cuda.gemms import emit_gemm, emit_limbs, emit_token
from pipeline.backends.ort_cuda.kernels import has
from pipeline.backends.qdq.lower import LowerQdq
from pipeline.passes.probes import GemmRow

GROUPS_REFUSED = (
    "target ort_cuda runs one GEMM for each linear and has no scale per token and group of input channels; build it "
    "with --target cpu, or calibrate with one scale per token"
)
INTEGER, FP8 = has("MatMulInteger", "INT8", "INT8"), has("QuantizeLinear", "FLOAT", "FLOAT", "FLOAT8E4M3FN")
NBITS, HALF = has("MatMulNBits", "FLOAT16", "UINT8", "FLOAT16", domain=MICROSOFT), has("MatMul", "FLOAT16")
# Ways to run a GEMM, and whether the provider has kernels for it. In order of preference: exact sums on tensor cores,
# exact operands, then real scales per group in the smallest storage.
CANDIDATES = (
    (GemmRow("int8", "INT8", "INT8", sum_type="INT32"), INTEGER),
    (GemmRow("int8, 2 limbs", "INT8", "INT8", limbs=2, sum_type="INT32"), INTEGER),
    (GemmRow("fp8 qdq", "E4M3", "E4M3"), FP8),
    (GemmRow("fp8 qdq, 2 limbs", "E4M3", "E4M3", limbs=2), FP8),
    (GemmRow("fp16, int4 weights", "FP16", "INT4", real_groups=True), NBITS),
    (GemmRow("fp16", "FP16", "FP16", real_groups=True), HALF),
)
GEMMS = tuple(row for row, available in CANDIDATES if available)


class LowerOrtCuda(LowerQdq):
    """With onnxruntime's own ops where they multiply what is stored."""

    groups_refused: ClassVar[str] = GROUPS_REFUSED
    emit_token = staticmethod(emit_token)
    emit_limbs = staticmethod(emit_limbs)
    emit_gemm = staticmethod(emit_gemm)

    def __init__(self) -> None:
        super().__init__(GEMMS)

    def rewrite(self, model: ir.Model) -> None:
        super().rewrite(model)
        if any(node.domain == MICROSOFT for node in model.graph):
            model.opset_imports.setdefault(MICROSOFT, 1)
