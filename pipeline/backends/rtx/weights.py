"""Packed weights of a PackedGemm node as constants of the `rtx` graph, converted one layer at a time on writing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ContractError
from export.formats.format import FORMATS, decode, encode, get_format, unpack
from pipeline.backends.rtx.emit import STORED
from pipeline.passes.graph import constant


@dataclass(frozen=True)
class PackedWeight:
    """Weight inputs and attributes of one PackedGemm node. Big arrays are read from the portable file on each use.

    tensors: w_codes [N, packed], w_scales [N, 1 or groups], multiplier_codes [N or 1, ...], bias [N].
    table: multipliers that a code may select; (1,) for none. activation_scale: of all activations, None where tokens
    have their own.
    """

    layer: str
    format: str
    activation_format: str
    in_features: int
    out_features: int
    table: tuple[int, ...]
    groups: int
    tensors: tuple[ir.TensorProtocol, ...]
    activation_scale: np.float32 | None = None

    @property
    def group_size(self) -> int:
        """Input channels per group."""
        return self.in_features // self.groups

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[N, 1 or groups] float32."""
        return np.array(self.tensors[1].numpy())

    @property
    def has_real_groups(self) -> bool:
        """True where a channel has more than one real scale."""
        return self.scales.shape[1] > 1

    @cached_property
    def has_bias(self) -> bool:
        """False where the bias is all zeros, which stands for none."""
        return bool(self.tensors[3].numpy().any())

    def codes(self) -> NDArray[np.uint8]:
        """[N, K] uint8, one code per element."""
        return unpack_rows(self.tensors[0].numpy(), get_format(self.format).bits, self.in_features)

    def multipliers(self) -> NDArray[np.uint8]:
        """[N or 1, groups] uint8."""
        return np.array(self.table, np.uint8)[unpack_rows(self.tensors[2].numpy(), 4, self.groups)]

    def images(self) -> NDArray[np.signedinteger]:
        """[N, K] integer images with group multipliers folded in, int16 where that holds them."""
        fmt = get_format(self.format)
        dtype = np.int16 if fmt.kmax * max(self.table) < 2**15 else np.int32
        grouped = fmt.image.astype(dtype)[self.codes()].reshape(self.out_features, self.groups, -1)
        return (grouped * self.multipliers()[..., None].astype(dtype)).reshape(self.out_features, -1)

    def largest_row_sum(self) -> int:
        """Largest sum over a channel of |image|: bounds the integer sum together with the activation's kmax."""
        return int(np.abs(self.images()).sum(axis=1, dtype=np.int64).max())

    def stored(self, kind: str, exponent: int) -> NDArray[Any]:
        """[K, N] constant of the type: image * 2^exponent, which the type holds exactly."""
        images = self.images()
        if kind == "INT8":
            return np.ascontiguousarray(images.T.astype(np.int8))
        low = int(images.min())
        values = np.arange(low, int(images.max()) + 1) * 2.0**exponent
        codes = encode(FORMATS["E4M3"], values)[images.T - low]
        return np.ascontiguousarray(codes).view(STORED["E4M3"].numpy())

    def signed_indices(self) -> NDArray[Any]:
        """[K, N] int4: sign and position on the format's grid of magnitudes, -7..7 (4-bit formats only)."""
        fmt = get_format(self.format)
        grid = np.abs(fmt.values) if fmt.is_integer else np.arange(16) % 8
        table = (np.sign(fmt.values) * grid).astype(np.int8)
        return np.ascontiguousarray(table[self.codes()].T).astype(STORED["INT4"].numpy())

    def multiplier_rows(self) -> NDArray[Any]:
        """[groups, 1, N] int8: multiplier of every group and channel."""
        rows = np.broadcast_to(self.multipliers(), (self.out_features, self.groups)).T[:, None, :]
        return np.ascontiguousarray(rows).astype(np.int8)

    def channel_units(self) -> NDArray[np.float32]:
        """[N] float32: a bound of each channel's largest |weight|, a power of two times its largest scale.

        With one scale per channel, weight / unit is therefore value * 2^-p and exact in FP16.
        """
        largest = get_format(self.format).max_value * max(self.table)
        scale = np.abs(self.scales).max(axis=1)
        return (np.where(scale > 0, scale, 1) * 2.0 ** np.ceil(np.log2(largest))).astype(np.float32)

    def group_scales_half(self, channel_unit: NDArray[np.float32], unit: float) -> NDArray[np.float16]:
        """[groups, N] float16: real scale of every group in units of the channel's, times `unit`; rounds once."""
        return np.ascontiguousarray((self.scales * (unit / channel_unit[:, None])).T.astype(np.float16))

    def dequantized_half(self, channel_unit: NDArray[np.float32]) -> NDArray[np.float16]:
        """[K, N] float16: weight / channel_unit with group scales folded in; rounds at most once."""
        value = decode(get_format(self.format), self.codes()).reshape(self.out_features, self.groups, -1)
        scaled = value * self.multipliers()[..., None] * (self.scales[..., None] / channel_unit[:, None, None])
        return np.ascontiguousarray(scaled.reshape(self.out_features, -1).T.astype(np.float16))


def packed_weight(node: ir.Node) -> PackedWeight:
    """The weight of a PackedGemm node. Raises ContractError where it is computed instead of stored."""
    attributes = node.attributes
    layer, scale = attributes["layer"].as_string(), constant(node.inputs[1])
    tensors = tuple(_constant(value, layer) for value in node.inputs[2:6])
    return PackedWeight(
        layer=layer,
        format=attributes["weight_format"].as_string(),
        activation_format=attributes["activation_format"].as_string(),
        in_features=attributes["in_features"].as_int(),
        out_features=int(tensors[0].shape[0]),  # type: ignore[arg-type]
        table=tuple(attributes["multipliers"].as_ints()),
        groups=attributes["groups"].as_int(),
        tensors=tensors,
        activation_scale=None if scale is None else np.float32(scale[0]),
    )


def _constant(value: ir.Value | None, layer: str) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        found = "nothing" if value is None else f"the computed tensor {value.name}"
        raise ContractError(f"{layer}: PackedGemm reads its weight from {found}; expected an initializer, export again")
    return value.const_value


def unpack_rows(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """As `export.formats.format.unpack`, without its 8-fold temporary for the common 4-bit case."""
    if bits != 4:
        return unpack(packed, bits, count)
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(len(packed), -1)[:, :count]
