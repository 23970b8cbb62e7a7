"""NumPy meanings of the GPU kernels: the ops' meanings (export/dialect/reference.py) with operand bytes for codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.dialect import reference as op_meanings
from plugins.gpu.operands import operand_bytes
from plugins.gpu.spec import QuantizeSpec

Array = NDArray[Any]


def quantize(
    spec: QuantizeSpec, x: Array, static_scale: Array | None = None, static_zero: Array | None = None, **_sizes: int
) -> tuple[Array, ...]:
    """x [M, C] -> operand bytes u8 [M, C], scale f32 [M]: QuantizeActivation; with a static scale QuantizeStatic, which
    has no second output."""
    if static_scale is not None and static_zero is not None:
        (codes,) = op_meanings.quantize_static(x.astype(np.float32), static_scale, static_zero, format=spec.format)
        return (operand_bytes(spec.format, spec.integers)[codes],)
    codes, scale = op_meanings.quantize_activation(x.astype(np.float32), format=spec.format)
    return operand_bytes(spec.format, spec.integers)[codes], scale[:, 0]


def gelu_quantize(spec: QuantizeSpec, x: Array, **static: Any) -> tuple[Array, ...]:
    """As `quantize`, of the GELU (tanh form) of x."""
    with np.errstate(invalid="ignore"):
        return quantize(spec, op_meanings.gelu_tanh(x.astype(np.float32)), **static)


def norm_modulate_quantize(
    spec: QuantizeSpec, x: Array, shift: Array, scale: Array, tokens: int, **_sizes: int
) -> tuple[Array, Array]:
    """x [M, C], shift and scale [M / tokens, C] -> operand bytes u8 [M, C], scale f32 [M]: NormModulateQuantize."""
    x, shift, scale = (a.astype(np.float32) for a in (x, shift, scale))
    codes, a_scale = op_meanings.norm_modulate_quantize(
        x.reshape(len(shift), tokens, spec.channels),
        shift[:, None],
        scale[:, None],
        format=spec.format,
        epsilon=spec.epsilon,
    )
    return operand_bytes(spec.format, spec.integers)[codes].reshape(x.shape), a_scale.reshape(-1)
