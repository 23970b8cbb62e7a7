"""The reference in PyTorch: the quantized model with dequantized weights and fake-quantized activations.

In float64 it is the oracle that engines are compared with; its own float32 run tells how far rounding alone leads.
Weights stay integer images (1 byte each) and are dequantized at every call, so no float copy of the model is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.formats import Format, get_format
from export.ops import ABSMAX_FLOOR
from pipeline.backends.base import Arrays

if TYPE_CHECKING:
    from export.models import LoadedModel

# Of each float type: the integer type of its size, and the mask of its exponent field.
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def round_to_format(fmt: Format, u: torch.Tensor) -> torch.Tensor:
    """Nearest value of the format for every number, ties to even, bounded by +-max_value, zero always +0.

    u: float32 or float64, any shape. The same values as decode(encode(u)), in u's own arithmetic.
    """
    bound = fmt.max_value
    bounded = u.clamp(-bound if fmt.sign_bits else 0.0, bound)
    step = 1.0 if fmt.is_integer else local_step(fmt, bounded)
    return torch.round(bounded / step) * step + 0.0  # -0 + 0 is +0


def local_step(fmt: Format, u: torch.Tensor) -> torch.Tensor:
    """Distance of the format's values around each number of `u`: a power of two."""
    integer, mask = EXPONENT[u.dtype]
    binade = (u.contiguous().view(integer) & mask).view(u.dtype)  # 2^floor(log2 |u|); 0 for 0
    return binade.clamp(min=2.0**fmt.min_exponent) * 2.0**-fmt.mantissa_bits


def fake_quantize(fmt: Format, x: torch.Tensor) -> torch.Tensor:
    """DequantizeActivation(QuantizeActivation(x)), x [..., K], in x's own float type."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=ABSMAX_FLOOR) / fmt.max_value
    return round_to_format(fmt, x / scale) * scale


class FakeQuantLinear(nn.Module):
    """One quantized linear. `layer_name` finds it again, for example in a hook that records its input."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_name, self.in_features, self.out_features = layer.name, layer.in_features, layer.out_features
        self.activation_format = get_format(layer.activation_format)
        self.unit = 2.0 ** -get_format(layer.weight_format).fraction_bits
        image = layer.image()
        smallest = np.min_scalar_type(-int(np.abs(image).max(initial=1)))  # int8 for every embedded format
        self.register_buffer("image", torch.from_numpy(image.astype(smallest)), persistent=False)
        self.register_buffer("scales", torch.from_numpy(layer.scales).to(dtype), persistent=False)
        bias = None if layer.bias is None else torch.from_numpy(layer.bias).to(dtype)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], dequantized now, in the type of `scales`; only the product with the scale rounds."""
        image, scales = self.get_buffer("image"), self.get_buffer("scales")
        grouped = (image.to(scales.dtype) * self.unit).unflatten(1, (scales.shape[1], -1))
        return (grouped * scales[..., None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(fake_quantize(self.activation_format, x), self.weight, self.bias)


def fake_quant(model: LoadedModel, layers: Sequence[QuantizedLinear], dtype: torch.dtype) -> nn.Module:
    """The quantized model as a module with `denoiser`'s inputs and output, computing in float32 or float64.

    Unquantized tensors are shared with `model` (copied where `dtype` differs); `model` itself is not changed.
    """
    from export.models import denoiser

    if not layers:
        raise ContractError("no quantized layer was given; calibrate the model first, or run the float model itself")
    module: nn.Module = denoiser(model, {layer.name: FakeQuantLinear(layer, dtype) for layer in layers})
    for part in module.modules():
        if not isinstance(part, FakeQuantLinear):
            _convert(part, dtype)
    return module


def _convert(part: nn.Module, dtype: torch.dtype) -> None:
    """Give this module (not its children) float tensors of `dtype`, without touching tensors shared with others."""
    for name, value in list(part.named_parameters(recurse=False)):
        part.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=False))
    for name, value in list(part.named_buffers(recurse=False)):
        if value.is_floating_point():
            setattr(part, name, value.to(dtype))


class ReferenceEngine:
    """A torch denoiser (`denoiser(model)` for the float model, `fake_quant(...)` for the quantized) as an engine."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.module, self.dtype = module, dtype

    def run(self, inputs: Arrays) -> Arrays:
        """Float inputs are converted to the engine's type; the output has that type."""
        tensors = {name: self._tensor(value) for name, value in inputs.items()}
        with torch.inference_mode():
            return {"sample": self.module(**tensors).numpy()}

    def _tensor(self, value: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def close(self) -> None:
        """Nothing is held open."""
