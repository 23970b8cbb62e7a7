"""Kernels of the denoiser benchmark without a GPU: their NumPy references in place of what is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.quantized_denoiser import QuantizedLinear
from plugins.gpu.launch import KERNEL_OF
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import kernel


class ReferenceKernels:
    """The NumPy references, on tensors of the CPU, the output rounded to its type."""

    def quantize(self, spec: QuantizeSpec, x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        found = kernel(KERNEL_OF[spec.before]).reference(spec, x.float().numpy(), **_arrays(given))
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def gemm(self, linear: QuantizedLinear, a: Tensor, a_scale: Tensor, **given: Any) -> Tensor:
        packed = linear.packed
        inputs = {"a": a, "a_scale": a_scale, "w": packed.codes, "w_scales": packed.scales, "bias": linear.bias}
        inputs |= {} if packed.multiplier_codes is None else {"multiplier_codes": packed.multiplier_codes}
        (y,) = kernel("packed_gemm").reference(linear.spec, **_arrays({**inputs, **given}))
        return torch.from_numpy(y).to(TORCH[linear.spec.output])


TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _arrays(given: dict[str, Any]) -> dict[str, Any]:
    wide = {key: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    return {key: x.numpy() if isinstance(x, Tensor) else x for key, x in wide.items()}
