"""The emitter of the `rtx` lowering: rounding to a tensor-core type on top of plain standard nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from pipeline.passes.emit import Emitter

STORED = {
    "E4M3": ir.DataType.FLOAT8E4M3FN,
    "INT8": ir.DataType.INT8,
    "INT4": ir.DataType.INT4,
    "FP16": ir.DataType.FLOAT16,
}


class RtxEmitter(Emitter):
    """Emitter whose `quantize_dequantize` is the form that the engine builder turns into tensor-core operands."""

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        """As `Emitter.op`, without a type for the output: that of QuantizeLinear follows from its zero point."""
        output = super().op(op_type, *inputs, name=name, domain=domain, **attributes)
        output.type = None
        return output

    def quantize_dequantize(self, x: ir.Value, kind: str, name: str) -> ir.Value:
        """x rounded to the type's nearest number, ties to even, saturating; float32 again."""
        one, zero = self.constant(1.0), self.constant(0, STORED[kind].numpy())
        codes = self.op("QuantizeLinear", x, one, zero, name=f"{name}_q")
        return self.op("DequantizeLinear", codes, one, name=name)

    def cast(self, x: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return self.op("Cast", x, name=name, to=to.value)

    def ones(self, width: int) -> ir.Value:
        """float32 [width] of ones."""
        return self.lazy(f"constant/ones/{width}", ir.DataType.FLOAT, (width,), lambda: np.ones(width, np.float32))
