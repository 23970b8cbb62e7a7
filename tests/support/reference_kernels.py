"""Kernels of the denoiser benchmark without a GPU: their NumPy references in place of what is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.table import QUANTIZER_OF, kernel

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class ReferenceKernels:
    """In place of plugins.gpu.launch: tensors of the CPU, outputs rounded to their type."""

    def quantize(self, spec: QuantizeSpec, x: Tensor, **named: Any) -> tuple[Tensor, ...]:
        outputs = kernel(QUANTIZER_OF[spec.before]).reference(spec, x.float().numpy(), **_arrays(named))
        return tuple(map(torch.from_numpy, outputs))

    def expand(self, spec: GemmSpec, w: Tensor, **named: Any) -> Tensor:
        return torch.from_numpy(kernel("expand").reference(spec, w.numpy(), **_arrays(named))[0])

    def packed_gemm(self, spec: GemmSpec, **named: Any) -> Tensor:
        return self._gemm("packed_gemm", spec, named)

    def expanded_gemm(self, spec: GemmSpec, **named: Any) -> Tensor:
        return self._gemm("expanded_gemm", spec, named)

    def _gemm(self, name: str, spec: GemmSpec, named: dict[str, Any]) -> Tensor:
        return torch.from_numpy(kernel(name).reference(spec, **_arrays(named))[0]).to(TORCH[spec.output])


def _arrays(named: dict[str, Any]) -> dict[str, Any]:
    """NumPy arrays of the tensors, floats as float32; those that are None are left out."""
    wide = {key: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in named.items()}
    return {key: x.numpy() if isinstance(x, Tensor) else x for key, x in wide.items() if x is not None}
