"""The reference in PyTorch: the quantized model with dequantized weights and fake-quantized activations.

In float64 it is the oracle that engines are compared with; its own float32 run tells how far rounding alone leads.
Weights stay integers (1 byte each) and are dequantized at every call, so no float copy of the model is held; of a model
beyond MOST_UNPACKED even these are unpacked at every call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear, shared_router
from export.dialect.ops import ABSMAX_FLOOR
from export.errors import ContractError
from export.formats.attention import WEIGHT_MAX, AttentionFormats
from export.formats.format import Format, get_format
from export.formats.operands import FP32_BITS, SUM_UNIT, float32_sums
from export.models.attention_calls import attention_calls
from export.models.load import LARGE_ELEMENTS, LoadedModel
from export.models.torch_modules import Denoiser, UpcastLinear, stated_config
from export.router import Router
from pipeline.backends import feeds
from pipeline.backends.base import Arrays
from pipeline.progress import raise_if_stopped

# Of each float type: the integer type of its size, and the mask of its exponent field.
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
# Parameters up to which integers are kept: several references of one model, a byte for each weight and each of them.
MOST_UNPACKED = 1_000_000_000
# Arrays of a layer that the reference computes with in its own float type.
FLOAT_ARRAYS = (
    "scales", "bias", "activation_scale", "activation_zero", "input_multiplier", "input_offset", "lora_down", "lora_up",
)  # fmt: skip


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
    scale = token_scale(fmt, x)
    return round_to_format(fmt, x / scale) * scale


def token_scale(fmt: Format, x: torch.Tensor) -> torch.Tensor:
    """[..., 1]: the scale at which the absmax of each token of x [..., K] is the format's largest value."""
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=ABSMAX_FLOOR) / fmt.max_value


def fake_quantize_groups(fmt: Format, x: torch.Tensor, group: int) -> torch.Tensor:
    """As `fake_quantize`, with one scale for each token and group of `group` input channels."""
    return fake_quantize(fmt, x.unflatten(-1, (-1, group))).flatten(-2)


def fake_quantize_static(fmt: Format, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """value(nearest code of (x - zero) / scale) * scale + zero, with scale and zero of shape [1]; zero None: 0."""
    if zero is None:
        return round_to_format(fmt, x / scale) * scale
    return round_to_format(fmt, (x - zero) / scale) * scale + zero


class Routing:
    """Which low-rank branch each sample uses now; one object for all layers of a model, told before each call."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.chosen: torch.Tensor | None = None

    def tell(self, timesteps: torch.Tensor) -> None:
        """timesteps [B]: that of each sample of the coming call."""
        self.chosen = torch.from_numpy(self.router.choose(timesteps.detach().cpu().numpy()))

    def of_batch(self, samples: int, layer: str) -> torch.Tensor:
        """Branch of each sample, [samples]; a single timestep serves them all. Raises ContractError."""
        if self.chosen is None:
            raise ContractError(f"{layer}: its low-rank branch depends on the timestep; call Routing.tell first")
        if len(self.chosen) not in (1, samples):
            mismatch = f"its input begins with {samples}, the batch has {len(self.chosen)} timesteps"
            raise ContractError(f"{layer}: {mismatch}; low-rank branches need inputs [batch, ...]")
        return self.chosen.expand(samples)


class FakeQuantLinear(nn.Module):
    """One quantized linear. `layer_name` finds it again, for example in a hook that records its input.

    routing: which low-rank branch is active, shared with the other layers (`fake_quant` does so); None: its own.
    unpacked: are its integers kept, or unpacked anew at every call?
    """

    def __init__(
        self, layer: QuantizedLinear, dtype: torch.dtype, routing: Routing | None = None, unpacked: bool = True
    ) -> None:
        super().__init__()
        self.layer_name, self.in_features, self.out_features = layer.name, layer.in_features, layer.out_features
        self.activation_format = get_format(layer.activation_format)
        self.activation_scaling, self.activation_group = layer.activation_scaling, layer.activation_group
        self.routing = None if layer.router is None else routing or Routing(layer.router)
        for key in FLOAT_ARRAYS:
            array = getattr(layer, key)
            value = None if array is None else torch.from_numpy(array).to(dtype)
            self.register_buffer(key, value, persistent=False)
        self.unit = 2.0 ** -get_format(layer.weight_format).fraction_bits
        self.packed = None if unpacked else layer
        kept = None
        if unpacked:
            integers = layer.integers()
            smallest = np.min_scalar_type(-int(np.abs(integers).max(initial=1)))  # int8 for every embedded format
            kept = torch.from_numpy(integers.astype(smallest, copy=False))
        self.register_buffer("kept_integers", kept, persistent=False)
        one_scale = layer.activation_scaling == "per_token" and layer.scales.shape[1] == 1
        largest = get_format(layer.weight_format).largest_integer
        largest *= 1 if layer.multipliers is None else int(layer.multipliers.max())
        exact = self.activation_format.kmax * largest * SUM_UNIT < 2**FP32_BITS
        self.sums_integers = dtype == torch.float64 and one_scale and exact
        self._sums: list[slice] | None = None  # over which channels, once it is asked for

    @property
    def integers(self) -> torch.Tensor:
        """[N, K]: those of the weight's codes, its group multipliers folded in."""
        if self.packed is not None:
            return torch.from_numpy(self.packed.integers())
        return self.get_buffer("kept_integers")

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], dequantized now, in the type of `scales`; only the product with the scale rounds."""
        integers, scales = self.integers, self.get_buffer("scales")
        weight = integers.to(scales.dtype).mul_(self.unit)  # one array of that size, of a copy
        weight.unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None])
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.integer_product(x) if self.sums_integers else self.product(x)
        return y if self.lora_down is None else y + self.low_rank(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantized weight times rounded input, plus bias."""
        return nn.functional.linear(self.rounded_input(x), self.weight, self.bias)

    def integer_product(self, x: torch.Tensor) -> torch.Tensor:
        """`product` by sums of integers, where a token and a channel have one scale each. Float32 adds integers exactly
        below 2^24, twice as fast as float64 adds numbers, so some input channels are added up at a time, most often
        all; float64 rounds only what is done with the sum."""
        fmt, balanced = self.activation_format, self.balanced(x)
        scale = token_scale(fmt, balanced)
        codes = (round_to_format(fmt, balanced / scale) * 2.0**fmt.fraction_bits).float()
        integers = self.integers
        if self._sums is None:
            self._sums = float32_sums(integers.numpy(), fmt.kmax)
        assert self._sums is not None, f"{self.layer_name}: sums of {SUM_UNIT} products are not exact in float32"
        parts = (nn.functional.linear(codes[..., part], integers[:, part].float()).double() for part in self._sums)
        total = reduce(torch.add, parts)
        y = total * (self.unit * 2.0**-fmt.fraction_bits) * scale * self.get_buffer("scales")[:, 0]
        return y if self.bias is None else y + self.bias

    def balanced(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] times and plus what its channels have."""
        balanced = x if self.input_multiplier is None else x * self.input_multiplier
        return balanced if self.input_offset is None else balanced + self.input_offset

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the weight is multiplied with: x [..., K] balanced channel by channel, then rounded."""
        balanced = self.balanced(x)
        if self.activation_scaling == "per_tensor":
            scale = self.get_buffer("activation_scale")
            return fake_quantize_static(self.activation_format, balanced, scale, self.activation_zero)
        if self.activation_scaling == "token_group":
            return fake_quantize_groups(self.activation_format, balanced, self.activation_group)
        return fake_quantize(self.activation_format, balanced)

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """lora_up[h] @ (lora_down[h] @ x) for x [B, ..., K], h by the timestep of each sample, or the only one."""
        if self.routing is None:
            return x @ self.get_buffer("lora_down")[0].mT @ self.get_buffer("lora_up")[0].mT
        chosen = self.routing.of_batch(len(x), self.layer_name)
        down, up = self.get_buffer("lora_down")[chosen], self.get_buffer("lora_up")[chosen]  # [B, R, K], [B, N, R]
        rows = x.reshape(len(x), -1, self.in_features)
        return (rows @ down.mT @ up.mT).reshape(*x.shape[:-1], self.out_features)


# Scores that are held at a time, [queries, Tk]: 2 MiB in float64, or what one query has. They stay in the cache, and
# each operation works in place: most time would else go into memory from the system.
SCORES_AT_ONCE = 2**18


def quantized_attention(
    formats: AttentionFormats,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    centre: bool = True,
) -> torch.Tensor:
    """QuantizedAttention of the dialect in the float type of q: q [B, H, Tq, D], k and v [B, H, Tk, D] -> as q.

    centre: take the mean over the tokens out of k, as the op does; studies leave it in. No gradients go through it.
    """
    qk, pv = get_format(formats.qk), get_format(formats.pv)
    centred = k - k.mean(dim=-2, keepdim=True, dtype=torch.float64).to(k.dtype) if centre else k
    (q_value, q_scale), (k_value, k_scale) = _value_and_scale(qk, q), _value_and_scale(qk, centred)
    v_value, v_scale = (part.mT for part in _value_and_scale(pv, v.mT))
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    together = max(1, SCORES_AT_ONCE // max(1, k.shape[-2]))
    bias = None if mask is None else mask.expand(*q.shape[:-1], k.shape[-2])
    for head in product(range(q.shape[0]), range(q.shape[1])):
        keys, of_keys = k_value[head].mT, k_scale[head].mT
        values = v_value[head].double()  # their products with weights are integers, whose sums float32 may not hold
        for first in range(0, q.shape[-2], together):
            part = (*head, slice(first, first + together))
            score = (q_value[part] @ keys).mul_(q_scale[part] * scale).mul_(of_keys)
            score = score if bias is None else score.add_(bias[part])
            weight = score.sub_(score.amax(dim=-1, keepdim=True)).exp_().mul_(WEIGHT_MAX).round_()
            mixed = (weight.double() @ values).to(q.dtype)
            out[part] = mixed * v_scale[head] / weight.sum(dim=-1, keepdim=True)
    return out


def _value_and_scale(fmt: Format, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (the unscaled values of its codes, [..., K]; the scale of each row, [..., 1])."""
    scale = token_scale(fmt, x)
    return round_to_format(fmt, x / scale), scale


class AttentionDenoiser(Denoiser):
    """A denoiser whose attention is computed by quantized_attention, see there for `centre`. before: what q, k and v go
    through first, None for nothing."""

    def __init__(self, denoiser: Denoiser, formats: AttentionFormats, centre: bool = True) -> None:
        super().__init__(denoiser.transformer, denoiser.family, denoiser.names)
        self.formats, self.centre = formats, centre
        self.before: Callable[[Tensor], Tensor] | None = None

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with attention_calls(self.transformer, self._replace):
            return super().forward(*args, **named)

    def _replace(self, _name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> torch.Tensor:
        if self.before is not None:
            q, k, v = map(self.before, (q, k, v))
        return quantized_attention(self.formats, q, k, v, mask, scale, self.centre)


def fake_quant(
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    dtype: torch.dtype,
    attention: AttentionFormats | None = None,
) -> nn.Module:
    """The quantized model as a module with `denoiser`'s inputs and output, computing in float32 or float64.

    attention: its formats, None for attention in `dtype`. Unquantized tensors are shared with `model` (copied where
    `dtype` differs); `model` itself is not changed.
    """
    if not layers:
        raise ContractError("no quantized layer was given; calibrate the model first, or run the float model itself")
    router = shared_router(layers)
    routing = None if router is None else Routing(router)
    linears = {layer.name: FakeQuantLinear(layer, dtype, routing, keeps_integers(model)) for layer in layers}
    module = reference_module(model, linears, dtype)
    if attention is not None:
        module = AttentionDenoiser(module, attention).eval()
    if routing is not None:
        module.register_forward_pre_hook(partial(_tell_timesteps, routing), with_kwargs=True)
    return module


def keeps_integers(model: LoadedModel) -> bool:
    """Does a reference of this model keep its weights' integers, or unpack them at every call?"""
    return model.parameters <= MOST_UNPACKED


def reference_module(model: LoadedModel, linears: Mapping[str, nn.Module], dtype: torch.dtype) -> Denoiser:
    """`denoiser` with `linears` in the places they name, all other tensors in `dtype`; `model` is not changed."""
    from export.models.load import denoiser

    module = denoiser(model, linears)
    inside = {id(part) for linear in linears.values() for part in linear.modules()}
    for part in module.modules():
        if id(part) not in inside:
            _convert(part, dtype)
    return module


def _tell_timesteps(routing: Routing, module: Denoiser, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
    inputs = dict(zip(module.names, args, strict=False)) | named
    if "timestep" not in inputs:
        raise ContractError(f"{module.family.name} has no input timestep, which low-rank branches are routed by")
    routing.tell(inputs["timestep"])


def _convert(part: nn.Module, dtype: torch.dtype) -> None:
    """Give this module (not its children) float tensors of `dtype`, without touching tensors shared with others.

    A large table, such as a vocabulary's, keeps its type, and what is looked up is converted; so does the weight of a
    linear that is upcast at use.
    """
    if isinstance(part, nn.Embedding) and (part.weight.itemsize < 4 or part.weight.numel() >= LARGE_ELEMENTS):
        part.register_forward_hook(lambda _, __, rows: rows.to(dtype))
        return
    kept = ("weight",) if isinstance(part, UpcastLinear) else ()
    for name, value in [row for row in part.named_parameters(recurse=False) if row[0] not in kept]:
        part.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=False))
    for name, value in list(part.named_buffers(recurse=False)):
        if value.is_floating_point():
            setattr(part, name, value.to(dtype))


class ReferenceEngine:
    """A torch denoiser (`denoiser(model)` for the float model, `fake_quant(...)` for the quantized) as an engine.

    A lock lets one of several threads' calls run at a time: the module is told the timesteps of a call before it runs.
    locked: False where the caller sees to that.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, locked: bool = True) -> None:
        self.module, self.dtype = module, dtype
        self.lock: AbstractContextManager[object] = threading.Lock() if locked else nullcontext()
        self.declared = declared_inputs(module)

    def run(self, inputs: Arrays) -> Arrays:
        """Float inputs are converted to the engine's type; the output has that type. Raises RecipeError for inputs that
        do not fit, but takes numbers of any magnitude, as PyTorch does."""
        raise_if_stopped()
        if self.declared:
            feeds.check_feeds(self.declared, inputs, cast=True, bounded=False)
        tensors = {name: self._tensor(value) for name, value in inputs.items()}
        with self.lock, torch.inference_mode():
            if not isinstance(self.module, Denoiser):
                return {"sample": self.module(**tensors).numpy()}
            return {name: output.numpy() for name, output in self.module.outputs(**tensors).items()}

    def _tensor(self, value: NDArray[np.generic]) -> torch.Tensor:
        """A copy, so that the caller may overwrite what it passed."""
        tensor = torch.from_numpy(np.array(value, order="C"))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def close(self) -> None:
        """Nothing is held open."""


def declared_inputs(module: nn.Module) -> tuple[feeds.Declared, ...]:
    """The inputs of a family's denoiser; nothing of a module that is none, or has no configuration to know them by."""
    config = getattr(module.transformer, "config", None) if isinstance(module, Denoiser) else None
    if config is None:
        return ()
    rows = {row.name: row for row in module.family.inputs(stated_config(module.transformer))}
    return tuple(feeds.Declared(name, rows[name].dtype, rows[name].shape) for name in module.names)
