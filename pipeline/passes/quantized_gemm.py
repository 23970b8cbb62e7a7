"""The quantized linear that a PackedGemm node stands for: its weight in every form that a target stores, its probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from export.dialect.graph import attribute, constant, inputs_of, low_rank_of, unbalanced
from export.dialect.ops import DOMAIN
from export.errors import ContractError
from export.formats.format import FORMATS, Format, encode, get_format, looked_up, unpack
from pipeline.passes.probes import ProbeRow

PACKED_GEMMS = ("PackedGemm", "PackedGroupGemm")
# Hardware number -> element type of a constant that stores it.
STORED = {
    "E4M3": ir.DataType.FLOAT8E4M3FN,
    "INT8": ir.DataType.INT8,
    "INT4": ir.DataType.INT4,
    "FP16": ir.DataType.FLOAT16,
}


@dataclass(frozen=True)
class StoredWeight:
    """Constants of a GEMM as the portable model holds them, mapped from its file and read when needed.

    codes: uint8 [N, packed]. scales: float32 [N, 1 or groups]. multiplier_codes: uint8 [N or 1, ...]. bias: float32
    [N].
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    multiplier_codes: ir.TensorProtocol
    bias: ir.TensorProtocol


@dataclass(frozen=True)
class QuantizedGemm:
    """One quantized linear y[..., N] = a[..., K] @ W + bias, read from a PackedGemm or PackedGroupGemm node.

    group_size: input channels that share a multiplier or scale, 0 for all. multipliers: table of the group multipliers,
    (1,) for none. real_groups: scales are [N, groups]. activation_scale: the constant scale of all activations, None
    where tokens have their own. activation_group: input channels that share a scale of a token, 0 for all.

    The weight's integers are those of its format (value * 2^f) times the multiplier of their group.
    """

    layer: str
    activation: Format
    weight: Format
    in_features: int
    out_features: int
    group_size: int
    multipliers: tuple[int, ...]
    real_groups: bool
    stored: StoredWeight
    activation_scale: np.float32 | None = None
    activation_group: int = 0

    @property
    def weight_groups(self) -> int:
        """Groups of input channels that share a multiplier or a scale of the weight."""
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def weight_kmax(self) -> int:
        """Largest magnitude of the weight's integers."""
        return self.weight.kmax * max(self.multipliers)

    @property
    def scale_groups(self) -> int:
        """Real scales of one channel of the weight."""
        return self.weight_groups if self.real_groups else 1

    @property
    def activation_groups(self) -> int:
        """Scales of one token."""
        return self.in_features // self.activation_group if self.activation_group else 1

    @property
    def sum_groups(self) -> int:
        """Integer sums of one output: within each, no scale changes."""
        return math.lcm(self.scale_groups, self.activation_groups)

    @property
    def sum_length(self) -> int:
        """Number of products in one integer sum."""
        return self.in_features // self.sum_groups

    @property
    def unit(self) -> float:
        """Value of one unit of the integer sum, before scales: 2^-(f_a + f_w)."""
        return 2.0 ** -(self.activation.fraction_bits + self.weight.fraction_bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N), of the weight as a constant."""
        return self.in_features, self.out_features

    # --- scales and bias

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[N, 1 or groups] float32."""
        return np.array(self.stored.scales.numpy())

    @cached_property
    def has_bias(self) -> bool:
        """False where the bias is all zeros, which stands for none."""
        return bool(self.stored.bias.numpy().any())

    def unit_scales(self, exponent: int = 0) -> NDArray[np.float32]:
        """Weight scale times the unit of the integer sum times 2^exponent (exact): [N], or [groups, N].

        A static scale of the activations is folded in, rounded once.
        """
        scales = (self.scales * np.float32(self.unit * 2.0**exponent)).astype(np.float32)
        if self.activation_scale is not None:
            scales = scales * self.activation_scale
        return np.ascontiguousarray(scales.T if self.real_groups else scales[:, 0])

    def channel_units(self) -> NDArray[np.float32]:
        """[N] float32: a bound of each channel's largest |weight|, a power of two times its largest scale.

        With one scale per channel, weight / unit is therefore value * 2^-p and exact in FP16.
        """
        largest = self.weight.max_value * max(self.multipliers)
        scale = np.abs(self.scales).max(axis=1)
        return (np.where(scale > 0, scale, 1) * 2.0 ** np.ceil(np.log2(largest))).astype(np.float32)

    def group_scales_half(self, channel_unit: NDArray[np.float32], unit: float) -> NDArray[np.float16]:
        """[groups, N] float16: real scale of every group in units of the channel's, times `unit`; rounds once."""
        return np.ascontiguousarray((self.scales * (unit / channel_unit[:, None])).T.astype(np.float16))

    # --- the weight, decoded anew at each call

    def codes(self) -> NDArray[np.uint8]:
        """[N, K] uint8, one code per element."""
        return unpack(self.stored.codes.numpy(), self.weight.bits, self.in_features)

    def group_multipliers(self) -> NDArray[np.uint8]:
        """[N or 1, groups] uint8."""
        return np.array(self.multipliers, np.uint8)[unpack(self.stored.multiplier_codes.numpy(), 4, self.weight_groups)]

    def multiplier_rows(self) -> NDArray[np.int8]:
        """[groups, 1, N] int8: multiplier of every group and channel."""
        rows = np.broadcast_to(self.group_multipliers(), (self.out_features, self.weight_groups)).T[:, None, :]
        return np.ascontiguousarray(rows).astype(np.int8)

    def integers(self, dtype: DTypeLike | None = None) -> NDArray[np.number]:
        """[N, K], in a type that holds `weight_kmax`; without one int16 or int32."""
        dtype = dtype or (np.int16 if self.weight_kmax < 2**15 else np.int32)
        integers = self._format_integers(dtype)
        if self.multipliers == (1,):
            return integers
        factors = self.group_multipliers().astype(dtype)[..., None]
        return (integers.reshape(self.out_features, self.weight_groups, -1) * factors).reshape(integers.shape)

    def _format_integers(self, dtype: DTypeLike) -> NDArray[np.number]:
        """[N, K] without multipliers."""
        return looked_up(self.weight.integers.astype(dtype), self.stored.codes.numpy(), self.in_features)

    def turned_integers(self, dtype: DTypeLike = np.int8) -> NDArray[np.number]:
        """`integers` as [K, N], contiguous."""
        return np.ascontiguousarray(self.integers(dtype).T)

    def channel_sums(self) -> NDArray[np.float64]:
        """[N]: sum over K of the weight: exact integer sums per scale group, times their scales."""
        sums = self.integers(np.int64).reshape(self.out_features, self.scales.shape[1], -1).sum(axis=2)
        return (sums * self.scales.astype(np.float64)).sum(axis=1) * 2.0**-self.weight.fraction_bits

    @cached_property
    def largest_row_sum(self) -> int:
        """Largest sum over a channel of |integer|: bounds the integer sum together with the activation's kmax."""
        return int(np.abs(self.integers()).sum(axis=1, dtype=np.int64).max())

    def hardware_numbers(self, kind: str, exponent: int) -> NDArray[np.number]:
        """[K, N] constant of the type E4M3 or INT8: integer * 2^exponent, which the type holds exactly."""
        if kind == "INT8":
            return self.turned_integers(np.int8)
        integers = self.integers()
        low = int(integers.min())
        codes = encode(FORMATS["E4M3"], np.arange(low, int(integers.max()) + 1) * 2.0**exponent)
        return np.ascontiguousarray(codes[integers.T - low]).view(STORED["E4M3"].numpy())

    def signed_indices(self) -> NDArray[np.number]:
        """[K, N] int4: sign and position on the format's grid of magnitudes, -7..7 (4-bit formats only)."""
        grid = np.abs(self.weight.values) if self.weight.is_integer else np.arange(16) % 8
        table = (np.sign(self.weight.values) * grid).astype(np.int8)
        return np.ascontiguousarray(table[self.codes()].T).astype(STORED["INT4"].numpy())

    def dequantized_half(self, channel_unit: NDArray[np.float32]) -> NDArray[np.float16]:
        """[K, N] float16: weight / channel_unit with group scales folded in; rounds at most once."""
        value = self.weight.values[self.codes()].reshape(self.out_features, self.weight_groups, -1)
        scaled = value * self.group_multipliers()[..., None] * (self.scales[..., None] / channel_unit[:, None, None])
        return np.ascontiguousarray(scaled.reshape(self.out_features, -1).T.astype(np.float16))


def read_gemm(node: ir.Node) -> QuantizedGemm:
    """The linear of a packed node. Raises ContractError if its weight is not stored in the model."""
    scale, layer = constant(inputs_of(node).a_scale), attribute(node, "layer")
    keys = {"codes": "w_codes", "scales": "w_scales", "multiplier_codes": "multiplier_codes", "bias": "bias"}
    stored = StoredWeight(**{key: _tensor(inputs_of(node).get(port), layer, port) for key, port in keys.items()})
    return QuantizedGemm(
        layer=layer,
        activation=get_format(attribute(node, "activation_format")),
        weight=get_format(attribute(node, "weight_format")),
        in_features=attribute(node, "in_features"),
        out_features=int(stored.codes.shape[0]),  # type: ignore[arg-type]
        group_size=attribute(node, "group_size"),
        multipliers=tuple(attribute(node, "multipliers")),
        real_groups=int(stored.scales.shape[1]) > 1,  # type: ignore[arg-type]
        stored=stored,
        activation_scale=None if scale is None else np.float32(scale[0]),
        activation_group=attribute(node, "activation_group", 0),
    )


def _tensor(value: ir.Value | None, layer: str, port: str) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        origin = "nothing" if value is None else f"the computed tensor {value.name}"
        raise ContractError(
            f"{layer}: PackedGemm reads its {port} from {origin}; expected an initializer, export again"
        )
    return tensor


def quantizer_of(node: ir.Node) -> ir.Node:
    """The quantizer of the codes that a packed node reads. Raises ContractError where something else makes them."""
    producer = inputs_of(node).a_codes.producer()
    if producer is None or not producer.domain.startswith(DOMAIN):
        origin = producer.op_type if producer else "a graph input"
        raise ContractError(f"{attribute(node, 'layer')}: activation codes come from {origin}; expected a quantizer")
    return producer


def refuse_groups(graph: ir.Graph, remedy: str) -> None:
    """Raise ContractError with the remedy where activations have a scale per token and group of input channels."""
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == "PackedGroupGemm"]
    if nodes:
        count = f"activation_group {attribute(nodes[0], 'activation_group')} ({len(nodes)} layers)"
        raise ContractError(f"{attribute(nodes[0], 'layer')}: {count}; {remedy}")


def refuse_unpacked(graph: ir.Graph) -> None:
    """Raise ContractError where a lowering has left a node of the dialect."""
    left = [node for node in graph if node.domain == DOMAIN]
    if left:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in left[:5])
        raise ContractError(f"{len(left)} nodes of domain {DOMAIN} were not packed and cannot be lowered: {names}")


def probe_of(
    layer: str,
    path: str,
    *,
    x: ir.Value,
    codes: Sequence[ir.Value],
    act_scale: ir.Value | None,
    gemm: ir.Value,
    result: ir.Value,
    limb_weights: Sequence[float] = (1.0,),
    codes_unit: float = 1.0,
    codes_offset: float = 0.0,
    gemm_unit: float = 1.0,
    gemm_scale: ir.Value | None = None,
    exact: bool = True,
    half_roundings: int = 0,
    gemm_groups: int = 1,
    codes_format: str | None = None,
    operands: Sequence[ir.Value] = (),
) -> ProbeRow:
    """The row of a linear, from the values of the lowered graph.

    x: what the quantizer reads; what balances it is left out. result: the linear's own; where a low-rank branch is
    added to it, `output` is the sum.
    """
    branch, output = low_rank_of(result) or (None, result)
    return ProbeRow(
        layer=layer,
        path=path,
        x=_name(unbalanced(x)),
        codes=tuple(_name(value) for value in codes),
        limb_weights=tuple(float(weight) for weight in limb_weights),
        codes_unit=codes_unit,
        codes_offset=codes_offset,
        act_scale=None if act_scale is None else _name(act_scale),
        gemm=_name(gemm),
        gemm_unit=gemm_unit,
        gemm_scale=None if gemm_scale is None else _name(gemm_scale),
        exact=exact,
        output=_name(output),
        half_roundings=half_roundings,
        low_rank=None if branch is None else _name(branch),
        gemm_groups=gemm_groups,
        codes_format=codes_format,
        operands=tuple(_name(value) for value in operands),
    )


def _name(value: ir.Value) -> str:
    return str(value.name)
