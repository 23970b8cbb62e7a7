"""What a lowering says of each quantized linear: what it chose, why, and where the parity gates find its tensors. Of
a quantized attention its one node says that.

A backend publishes rows of what it can run; lowering gets them as data. An engine reads them, too: no ONNX here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Name of a capability: products of bytes are summed in 32 bits (x86 VNNI, Arm dot product), never in saturating 16.
WIDE_SUM = "int32_dot_product"


@dataclass(frozen=True)
class GemmRow:
    """One way a target can run a quantized GEMM; lowering takes the first row that fits.

    limbs: into how many hardware numbers an activation's integer may be split. path: the name shown to people.
    sum_type: what products are added in.
    """

    path: str
    activation_type: str
    weight_type: str
    limbs: int = 1
    real_groups: bool = False
    sum_type: Literal["FP32", "INT32"] = "FP32"


@dataclass(frozen=True)
class Choice:
    """What lowering chose for one quantized linear, and why; refusals name the rule and the culprit."""

    layer: str
    path: str
    why: str


@dataclass(frozen=True)
class ProbeRow:
    """Where the parity gate finds one quantized linear inside a lowered ONNX graph (names of tensors).

    x: the float tensor that the linear reads, before it is balanced channel by channel.
    codes: the hardware numbers that hold the activation's integers,
        integer = sum_i limb_weights[i] * (codes[i] * codes_unit - codes_offset).
    act_scale: the per-token scale, value = integer * 2^-f * act_scale; of groups, one after the other; None for a
        static scale, which is part of the GEMM's.
    gemm: the GEMM's result, which must equal float32(integer sum * gemm_unit) * gemm_scale, with gemm_scale the name
        of a float32 initializer [N], or None for none.
    exact: False only where the path is not an integer embedding (then `why` of the choice says so).
    output: the linear's float result, scaled and with its bias added (it proves weight scales and bias).
    half_roundings: how often such a path rounds a factor or the sum of a product to FP16.
    low_rank: the result of its low-rank branch, which `output` includes; None without one.
    gemm_groups: above 1 the GEMM's result is [groups, M, N], the sums of as many parts of K.
    gemm_columns: (first, count) of the layer's own columns in it; None for all.
    codes_format: the codes are those of this number format, not integers; None for integers.
    operands: the dequantized activation and weight [K, N], zero point included, where the GEMM multiplies float32
        values that are already scaled; else ().
    """

    layer: str
    path: str
    x: str
    codes: tuple[str, ...]
    limb_weights: tuple[float, ...]
    codes_unit: float
    codes_offset: float
    act_scale: str | None
    gemm: str
    gemm_unit: float
    gemm_scale: str | None
    exact: bool
    output: str
    half_roundings: int = 0
    low_rank: str | None = None
    gemm_groups: int = 1
    gemm_columns: tuple[int, int] | None = None
    codes_format: str | None = None
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionRow:
    """Where the parity gate finds one quantized attention inside a lowered ONNX graph (names of tensors), and the
    domain of the op that computes it. mask: a tensor or an initializer."""

    layer: str
    path: str
    q: str
    k: str
    v: str
    mask: str
    output: str
