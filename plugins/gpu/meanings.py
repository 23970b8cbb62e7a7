"""NumPy meanings of the GPU kernels: the ops' meanings (export/op_meanings.py) with operand bytes for codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import op_meanings
from plugins.gpu.operands import operand_bytes
from plugins.gpu.specs import QuantizeSpec

Array = NDArray[Any]


def quantize(spec: QuantizeSpec, x: Array, **_sizes: int) -> tuple[Array, Array]:
    """x [M, C] -> operand bytes u8 [M, C], scale f32 [M]: QuantizeActivation."""
    codes, scale = op_meanings.quantize_activation(x.astype(np.float32), format=spec.format)
    return operand_bytes(spec.format, spec.integers)[codes], scale[:, 0]


def gelu_quantize(spec: QuantizeSpec, x: Array, **_sizes: int) -> tuple[Array, Array]:
    """As `quantize`, of the GELU (tanh form) of x."""
    codes, scale = op_meanings.gelu_quantize(x.astype(np.float32), format=spec.format)
    return operand_bytes(spec.format, spec.integers)[codes], scale[:, 0]


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
