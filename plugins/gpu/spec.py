"""What is known of a kernel when it is compiled: frozen, hashable, checked. Tensors come at run time.

Operand bytes are how the kernels hold activation codes, one byte for each value. An FP8 tensor core multiplies E4M3
bytes. A format that embeds in E4M3 is therefore stored as the E4M3 byte of value * 2^shift, and no kernel decodes it;
an integer format, and on request any that embeds in INT8, as its integer, value * 2^shift, which an INT8 tensor core
multiplies; the rest (E3M4) as its own code, which becomes FP16 by moving bits. A GPU without FP8 decodes E4M3 bytes to
FP16, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from export.errors import ContractError, RecipeError
from export.formats.format import Format, encode, fold_negative_zero, get_format
from export.formats.operands import INT8_MAX, INT32_MAX, embeds, weight_exponent

E4M3, INT8 = "E4M3", "INT8"


@dataclass(frozen=True)
class OperandByte:
    """What one byte stands for: value * 2^shift of a format, a number of the type `kind`.

    kind: "E4M3", "INT8", or the format's own name where codes are stored as they are.
    """

    kind: str
    shift: int = 0


@cache
def operand_of(name: str, integers: bool = False) -> OperandByte:
    """The operand byte of format `name`; integers: INT8 in any case. Raises RecipeError if no kernel takes it.

    >>> operand_of("E2M3"), operand_of("INT6"), operand_of("E3M4")
    (OperandByte(kind='E4M3', shift=0), OperandByte(kind='INT8', shift=0), OperandByte(kind='E3M4', shift=0))
    >>> operand_of("E2M3", integers=True)
    OperandByte(kind='INT8', shift=3)
    """
    fmt = get_format(name)
    if integers and not embeds(name, INT8):
        raise RecipeError(f"format {name} does not embed in INT8 (its largest integer is {fmt.kmax}); use FP8 operands")
    exponent = weight_exponent(name, E4M3)
    if exponent is not None and not (fmt.is_integer or integers):
        return OperandByte(E4M3, exponent + fmt.fraction_bits)
    if embeds(name, INT8):
        return OperandByte(INT8, fmt.fraction_bits)
    if embeds(name, "FP16") and fmt.bits <= 8:
        return OperandByte(name)
    raise RecipeError(f"format {name} fits neither E4M3 nor FP16 exactly; the GPU kernels take formats that do")


@cache
def operand_bytes(name: str, integers: bool = False) -> NDArray[np.uint8]:
    """Code of format `name` -> its operand byte, [2^bits]; minus zero becomes zero."""
    fmt, operand = get_format(name), operand_of(name, integers)
    codes = fold_negative_zero(fmt, np.arange(2**fmt.bits, dtype=np.uint8))
    if operand.kind == INT8:
        return fmt.integers[codes].astype(np.int8).view(np.uint8)
    if operand.kind != E4M3:
        return codes
    return encode(get_format(E4M3), fmt.values[codes] * 2.0**operand.shift)


# --- specs ----------------------------------------------------------------------------------------------------------

Epilogue = Literal["none", "gate_residual"]
FloatType = Literal["fp16", "bf16", "fp32"]
Before = Literal["none", "gelu", "norm_modulate"]
EPILOGUES, FLOATS, BEFORE = get_args(Epilogue), get_args(FloatType), get_args(Before)
# Epilogue -> tiles of outputs that a program holds for it beside the sum.
HELD_TILES: dict[Epilogue, int] = {"none": 0, "gate_residual": 2}


def weight_problem(weight: str) -> str | None:
    """Why no kernel takes weights in this format, None if they do."""
    if get_format(weight).bits == 4:
        return None
    return f"weights in {weight}: the GPU kernels take 4-bit weights, packed two per byte"


def format_problems(weights: Iterable[str], activation: str) -> list[str]:
    """One message for each of these formats that no kernel takes."""
    problems = [problem for name in sorted(set(weights)) if (problem := weight_problem(name))]
    try:
        operand_of(activation)
    except RecipeError as error:
        problems.append(str(error))
    return problems


@dataclass(frozen=True)
class GemmSpec:
    """y [M, N] = epilogue((sum of products * w_scale) * a_scale + a_zero * w_sum + bias), N = out_features.

    Tensors, row-major and contiguous:
      a        u8 [M, K]            operand bytes of `activation`
      a_scale  f32 [M]              of each token; a static scale is repeated
      w        u8 [N, K / 2]        codes of `weight`, element 2i in the low nibble; expanded_gemm: u8 [N, K], INT8
                                    or E4M3 bytes of value * multiplier
      w_scales f32 [N, scale_groups]
      multiplier_codes u8 [N, ceil(groups / 2)]  nibbles, indices into `multipliers`; absent without multipliers
      bias     f32 [N]
      a_zero   f32 [M], w_sums f32 [N]  with `zero_point` only: zero of each token, sum of weights of each channel
      gate     `output` [M / tokens, N], residual `output` [M, N]  with gate_residual only: y = residual + gate * y;
               `tokens` rows share a gate (a run-time integer)
    group_size: input channels that share a multiplier, or with `real_groups` a real scale; 0: the whole row.
    integers: operands are INT8, for INT8 tensor cores; those of integer formats are anyway, where weights fit.
    """

    activation: str
    weight: str
    in_features: int
    out_features: int
    group_size: int = 0
    multipliers: tuple[int, ...] = (1,)
    real_groups: bool = False
    zero_point: bool = False
    epilogue: Epilogue = "none"
    output: FloatType = "fp16"
    integers: bool = False

    def __post_init__(self) -> None:
        if problem := weight_problem(self.weight):
            raise RecipeError(problem)
        _check(self.in_features > 0 and self.in_features % 2 == 0, f"in_features {self.in_features} must be even")
        _check(self.out_features > 0, f"out_features {self.out_features} must be positive")
        fits = self.group_size == 0 or (self.group_size > 0 and self.in_features % self.group_size == 0)
        _check(fits, f"group_size {self.group_size} does not divide in_features {self.in_features}")
        _check(
            self.groups == 1 or self.group_size % 2 == 0, f"group_size {self.group_size} must be even: a byte has one"
        )
        _check(1 <= len(self.multipliers) <= 16, f"{len(self.multipliers)} multipliers; a nibble indexes 1 to 16")
        _check(not (self.real_groups and self.group_size == 0), "real_groups needs a group_size")
        _check(self.epilogue in EPILOGUES, f"epilogue {self.epilogue!r}; use one of {EPILOGUES}")
        _check(self.output in FLOATS, f"output {self.output!r}; use one of {FLOATS}")
        operand_of(self.activation, self.integers)
        if self.integers and not self.multiplies_integers:
            raise RecipeError(
                f"weights in {self.weight} times {max(self.multipliers)}, {self.in_features} input channels: INT8 "
                f"operands take integers up to {INT8_MAX} and sums below 2^31; use FP8 operands"
            )
        for m in self.multipliers:
            if not embeds(self.weight, "E4M3", m):
                raise RecipeError(
                    f"multiplier {m} takes {self.weight} out of E4M3, in which the GPU kernels hold weights; "
                    "quantize with multipliers that embed in both INT8 and E4M3"
                )

    @property
    def activation_format(self) -> Format:
        return get_format(self.activation)

    @property
    def weight_format(self) -> Format:
        return get_format(self.weight)

    @property
    def operand(self) -> OperandByte:
        return operand_of(self.activation, self.integers)

    @property
    def multiplies_integers(self) -> bool:
        """Whether INT8 tensor cores multiply: both operands fit INT8 and no sum leaves INT32."""
        a, w = self.activation_format, self.weight_format
        largest = w.largest_integer * max(self.multipliers)
        sums_fit = self.in_features * a.largest_integer * largest <= INT32_MAX
        return self.operand.kind == INT8 and largest <= INT8_MAX and sums_fit

    @property
    def byte_exponent(self) -> int:
        """e of the bytes of expanded weights, INT8 with `multiplies_integers`, else E4M3: value * multiplier * 2^e."""
        fmt = self.weight_format
        if self.multiplies_integers:
            return fmt.fraction_bits
        return -9 if fmt.is_integer else fmt.bias - 7

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def scale_groups(self) -> int:
        return self.groups if self.real_groups else 1

    @property
    def has_multipliers(self) -> bool:
        return self.multipliers != (1,)

    @property
    def has_gate(self) -> bool:
        return self.epilogue == "gate_residual"

    @cached_property
    def dims(self) -> dict[str, int]:
        """Sizes of tensors that are known before they come, by the names that the kernel table gives them."""
        n, k = self.out_features, self.in_features
        per_channel = {"scale groups": self.scale_groups, "multiplier bytes": -(-self.groups // 2)}
        return {"N": n, "K": k, "K / 2": k // 2, **per_channel}


@dataclass(frozen=True)
class PackSpec:
    """codes u8 [N, K] of a 4-bit format, K = in_features -> u8 [N, K / 2], element 2i in the low nibble."""

    in_features: int

    def __post_init__(self) -> None:
        _check(self.in_features > 0 and self.in_features % 2 == 0, f"in_features {self.in_features} must be even")

    @property
    def dims(self) -> dict[str, int]:
        """As GemmSpec.dims."""
        return {"K": self.in_features, "K / 2": self.in_features // 2}


@dataclass(frozen=True)
class QuantizeSpec:
    """x [M, C] -> codes u8 [M, C], operand bytes of `format`, and scale f32 [M] of each token.

    before: what happens to a token first. "none"; "gelu" (tanh form); "norm_modulate": LayerNorm without affine
    parameters, then * (1 + scale) + shift with shift and scale `input` [M / tokens, C]. `tokens` rows share them.
    integers: operand bytes are INT8, for a GemmSpec with `integers`. static: codes of (x - zero) / scale with scale and
    zero f32 [1] that are given, the same for all tokens; no scales are written. Not behind a norm.
    """

    format: str
    channels: int
    before: Before = "none"
    input: FloatType = "fp16"
    epsilon: float = 1e-6
    integers: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        operand_of(self.format, self.integers)
        _check(self.channels > 0, f"channels {self.channels} must be positive")
        _check(self.before in BEFORE, f"before {self.before!r} is no step of a quantizer")
        _check(self.input in FLOATS, f"input {self.input!r}; use one of {FLOATS}")
        _check(self.epsilon >= 0, f"epsilon {self.epsilon} must not be negative")
        _check(not self.static or self.before != "norm_modulate", "a quantizer behind a norm has a scale per token")

    @property
    def operand(self) -> OperandByte:
        return operand_of(self.format, self.integers)

    @property
    def dims(self) -> dict[str, int]:
        """As GemmSpec.dims."""
        return {"C": self.channels}


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ContractError(message)
