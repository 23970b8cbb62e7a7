"""The GPU kernels as torch ops, namespace `fpq`: torch.ops.fpq.packed_gemm and its neighbours.

Importing this module registers them. They have fake tensors, so torch.compile and torch.export take them, and allocate
nothing but their results, so a CUDA graph does. Tensors are as plugins/gpu/spec.py says; formats are names.

On a CUDA tensor an op runs the Triton kernel; on a CPU tensor the same kernel under Triton's interpreter where
TRITON_INTERPRET=1, else what the kernel computes in plain torch (plugins/torch_reference.py). No GPU was at hand: on
CUDA tensors the ops are compiled, not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins import torch_reference as reference
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec
from plugins.torch_reference import TORCH_TYPES, TYPE_NAMES

NAMESPACE = "fpq"


def on_kernels(x: Tensor) -> bool:
    """Does an op on `x` run the Triton kernel?"""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


# --- GEMMs ----------------------------------------------------------------------------------------------------------


def gemm_spec(
    a: Tensor,
    w_scales: Tensor,
    activation: str,
    weight: str,
    group_size: int = 0,
    multipliers: Sequence[int] = (1,),
    epilogue: str = "none",
    output: str = "fp16",
    a_zero: Tensor | None = None,
    integers: bool = False,
    **_operands: Any,
) -> GemmSpec:
    """The spec that a GEMM op's arguments amount to. Raises RecipeError or ContractError for what no kernel takes.

    Several real scales in a row of w_scales are scales of groups.
    """
    return GemmSpec(
        activation,
        weight,
        in_features=int(a.shape[1]),
        out_features=int(w_scales.shape[0]),
        group_size=group_size,
        multipliers=tuple(multipliers),
        real_groups=w_scales.shape[1] > 1,
        zero_point=a_zero is not None,
        epilogue=epilogue,  # type: ignore[arg-type]
        output=output,  # type: ignore[arg-type]
        integers=integers,
    )


def packed_gemm(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, *, multiplier_codes: Any = None, **given: Any
) -> Tensor:
    """y [M, N] of operand bytes a [M, K] and packed codes w [N, K / 2], see GemmSpec."""
    spec, operands = gemm_spec(a, w_scales, **given), _operands(given)
    if on_kernels(a):
        from plugins.gpu import launch

        operands["multiplier_codes"] = multiplier_codes
        return launch.packed_gemm(spec, a, a_scale, w, w_scales, bias, **operands)
    values = reference.weight_values(spec, w, multiplier_codes)
    return reference.gemm(spec, a, a_scale, values, w_scales, bias, **operands)


def expanded_gemm(a: Tensor, a_scale: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, **given: Any) -> Tensor:
    """The same with w [N, K] as `expand` gives it, multipliers folded in."""
    spec, operands = gemm_spec(a, w_scales, **given), _operands(given)
    if on_kernels(a):
        from plugins.gpu import launch

        return launch.expanded_gemm(spec, a, a_scale, w, w_scales, bias, **operands)
    return reference.gemm(spec, a, a_scale, reference.expanded_values(spec, w), w_scales, bias, **operands)


def _operands(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors of zero point and epilogue among a GEMM op's arguments."""
    return {key: given[key] for key in ("a_zero", "w_sums", "gate", "residual", "tokens") if key in given}


def _fake_gemm(a: Tensor, a_scale: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, **given: Any) -> Tensor:
    output: str = given.get("output", "fp16")
    return a.new_empty((a.shape[0], w_scales.shape[0]), dtype=TORCH_TYPES[output])


def pack(codes: Tensor) -> Tensor:
    """codes u8 [N, K] below 16, K even -> u8 [N, K / 2], element 2i in the low nibble."""
    if on_kernels(codes):
        from plugins.gpu import launch

        return launch.pack(codes)
    PackSpec(int(codes.shape[1]))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _fake_pack(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], codes.shape[1] // 2))


def expand(
    w: Tensor,
    *,
    activation: str,
    weight: str,
    in_features: int,
    group_size: int = 0,
    multipliers: Sequence[int] = (1,),
    multiplier_codes: Tensor | None = None,
    integers: bool = False,
) -> Tensor:
    """Packed codes [N, K / 2] -> u8 [N, K], E4M3 or INT8 bytes as a GEMM with `activation` reads them."""
    spec = GemmSpec(activation, weight, in_features, int(w.shape[0]), group_size, tuple(multipliers), integers=integers)
    if on_kernels(w):
        from plugins.gpu import launch

        found: Tensor = launch.expand(spec, w, multiplier_codes=multiplier_codes)
        return found
    return reference.expand(spec, w, multiplier_codes)


def _fake_expand(w: Tensor, *, in_features: int, **_given: Any) -> Tensor:
    return w.new_empty((w.shape[0], in_features))


# --- quantizers -----------------------------------------------------------------------------------------------------


def quantize(x: Tensor, *, format: str, integers: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, C] -> operand bytes u8 [M, C], scale f32 [M] of each token."""
    return _quantize(QuantizeSpec(format, int(x.shape[1]), "none", _type_of(x), integers=integers), x)


def gelu_quantize(x: Tensor, *, format: str, integers: bool = False) -> tuple[Tensor, Tensor]:
    """The same of GELU(x), tanh form."""
    return _quantize(QuantizeSpec(format, int(x.shape[1]), "gelu", _type_of(x), integers=integers), x)


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, *, format: str, integers: bool = False) -> Tensor:
    """x [M, C] -> operand bytes u8 [M, C] of (x - zero) / scale, both f32 [1]."""
    spec = QuantizeSpec(format, int(x.shape[1]), "none", _type_of(x), integers=integers, static=True)
    return _quantize_static(spec, x, scale, zero)


def gelu_quantize_static(x: Tensor, scale: Tensor, zero: Tensor, *, format: str, integers: bool = False) -> Tensor:
    """The same of GELU(x), tanh form."""
    spec = QuantizeSpec(format, int(x.shape[1]), "gelu", _type_of(x), integers=integers, static=True)
    return _quantize_static(spec, x, scale, zero)


def _quantize_static(spec: QuantizeSpec, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if on_kernels(x):
        from plugins.gpu import launch

        return launch.quantize_static(spec, x, scale, zero)
    return reference.quantize_static(spec, x, scale, zero)


def _fake_quantize_static(x: Tensor, scale: Tensor, zero: Tensor, **_given: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def norm_modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, *, format: str, epsilon: float, tokens: int, integers: bool = False
) -> tuple[Tensor, Tensor]:
    """The same of LayerNorm(x) * (1 + scale) + shift, both [M / tokens, C] of x's type."""
    spec = QuantizeSpec(format, int(x.shape[1]), "norm_modulate", _type_of(x), epsilon, integers)
    return _quantize(spec, x, shift=shift, scale=scale, tokens=tokens)


def _quantize(spec: QuantizeSpec, x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    if on_kernels(x):
        from plugins.gpu import launch

        found: tuple[Tensor, Tensor] = launch.quantize(spec, x, **given)
        return found
    return reference.quantize(spec, x, **given)


def _fake_quantize(x: Tensor, *_inputs: Tensor, **_given: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((x.shape[0],), dtype=torch.float32)


def _type_of(x: Tensor) -> Any:
    return TYPE_NAMES[x.dtype]


# --- registration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchOp:
    """One op: its schema without the name, what runs it, and its fake tensors."""

    name: str
    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]


_GEMM_INPUTS = "Tensor a, Tensor a_scale, Tensor w, Tensor w_scales, Tensor bias, *"
_WEIGHT = "int group_size=0, int[] multipliers=[1]"
_GEMM = (
    f"str activation, str weight, {_WEIGHT}, str epilogue='none', str output='fp16', Tensor? a_zero=None, "
    "Tensor? w_sums=None, Tensor? gate=None, Tensor? residual=None, SymInt tokens=0, bool integers=False"
)
_CODES = "(Tensor codes, Tensor scale)"
_QUANTIZE = f"(Tensor x, *, str format, bool integers=False) -> {_CODES}"
_STATIC = "(Tensor x, Tensor scale, Tensor zero, *, str format, bool integers=False) -> Tensor"

OPS = (
    TorchOp(
        "packed_gemm",
        f"({_GEMM_INPUTS}, Tensor? multiplier_codes=None, {_GEMM}) -> Tensor",
        packed_gemm,
        _fake_gemm,
    ),
    TorchOp("expanded_gemm", f"({_GEMM_INPUTS}, {_GEMM}) -> Tensor", expanded_gemm, _fake_gemm),
    TorchOp("pack", "(Tensor codes) -> Tensor", pack, _fake_pack),
    TorchOp(
        "expand",
        f"(Tensor w, *, str activation, str weight, int in_features, {_WEIGHT}, Tensor? multiplier_codes=None, "
        "bool integers=False) -> Tensor",
        expand,
        _fake_expand,
    ),
    TorchOp("quantize", _QUANTIZE, quantize, _fake_quantize),
    TorchOp("gelu_quantize", _QUANTIZE, gelu_quantize, _fake_quantize),
    TorchOp("quantize_static", _STATIC, quantize_static, _fake_quantize_static),
    TorchOp("gelu_quantize_static", _STATIC, gelu_quantize_static, _fake_quantize_static),
    TorchOp(
        "norm_modulate_quantize",
        "(Tensor x, Tensor shift, Tensor scale, *, str format, float epsilon, SymInt tokens, bool integers=False) -> "
        f"{_CODES}",
        norm_modulate_quantize,
        _fake_quantize,
    ),
)


def _register() -> None:
    for op in OPS:
        name = f"{NAMESPACE}::{op.name}"
        torch.library.define(name, op.schema)
        torch.library.impl(name, ("cpu", "cuda"), op.run)
        torch.library.register_fake(name, op.fake)


_register()
