"""GPU quantizers under the interpreter: running them, and what their references say of the same tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import QUANTIZER_OF, kernel

U = 2.0**-24  # largest relative error of one float32 rounding
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def expected(spec: QuantizeSpec, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The reference's (operand bytes, scales) of torch tensors."""
    arrays = {name: x.float().numpy() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    codes, scales = kernel(QUANTIZER_OF[spec.before]).reference(spec, **arrays)
    return codes, scales


def assert_equal(result: tuple[torch.Tensor, torch.Tensor], reference: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(result[1].numpy(), reference[1], err_msg="scales")
    np.testing.assert_array_equal(result[0].numpy(), reference[0], err_msg="codes")
