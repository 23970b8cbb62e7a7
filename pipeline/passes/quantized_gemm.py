"""What a lowering must know of one PackedGemm, and its weight in the forms that hardware wants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ContractError
from export.formats.format import Format, get_format, unpack
from pipeline.passes.graph import attribute, constant


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the portable model holds it; the tensors are mapped from its file and read when needed."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    multiplier_codes: ir.TensorProtocol


@dataclass(frozen=True)
class GemmSpec:
    """One quantized linear y[..., N] = a[..., K] @ W + bias, read from a PackedGemm or PackedGroupGemm node.

    `multipliers`: table of the group multipliers, (1,) for none. `real_groups`: scales are [N, groups].
    `activation_scale`: the constant scale of all activations, None where tokens have their own. `activation_group`:
    input channels that share a scale of a token, 0 for all.
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
    def groups(self) -> int:
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def weight_kmax(self) -> int:
        """Largest magnitude of the weight's integer image, multipliers included."""
        return self.weight.kmax * max(self.multipliers)

    @property
    def scale_groups(self) -> int:
        """Real scales of one channel of the weight."""
        return self.groups if self.real_groups else 1

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


def read_spec(node: ir.Node) -> GemmSpec:
    """The spec of a packed node. Raises ContractError if its weight is not stored in the model."""
    scale = constant(node.inputs[1])
    stored = StoredWeight(*(_tensor(node, index) for index in (2, 3, 4)))
    return GemmSpec(
        layer=attribute(node, "layer"),
        activation=get_format(attribute(node, "activation_format")),
        weight=get_format(attribute(node, "weight_format")),
        in_features=attribute(node, "in_features"),
        out_features=len(stored.codes.numpy()),
        group_size=attribute(node, "group_size"),
        multipliers=tuple(attribute(node, "multipliers")),
        real_groups=stored.scales.numpy().shape[1] > 1,
        stored=stored,
        activation_scale=None if scale is None else np.float32(scale[0]),
        activation_group=attribute(node, "activation_group", 0),
    )


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        raise ContractError(f"{node.name}: input {index} of PackedGemm must be a constant; export the model again")
    return tensor


def weight_image(spec: GemmSpec, dtype: type = np.int8) -> NDArray:
    """Integer image of the weight with multipliers folded in, [K, N] contiguous. Decoded anew at each call."""
    image = _decode(spec.weight, spec.stored.codes.numpy(), spec.in_features, dtype)
    if spec.multipliers != (1,):
        indices = unpack(spec.stored.multiplier_codes.numpy(), 4, spec.groups)
        factors: NDArray = np.asarray(spec.multipliers, dtype)[indices][..., None]
        image = (image.reshape(len(image), spec.groups, -1) * factors).reshape(image.shape)
    return np.ascontiguousarray(image.T)


def _decode(fmt: Format, codes: NDArray[np.uint8], in_features: int, dtype: type) -> NDArray:
    """packed codes [N, bytes] -> image [N, K]. Two 4-bit codes are looked up at once, by their byte."""
    if fmt.bits == 4:
        byte = np.arange(256)
        pairs: NDArray = np.stack([fmt.image[byte & 15], fmt.image[byte >> 4]], axis=1).astype(dtype)
        return pairs[codes].reshape(len(codes), -1)[:, :in_features]
    return fmt.image.astype(dtype)[unpack(codes, fmt.bits, in_features)]


def unit_scales(spec: GemmSpec, exponent: int = 0) -> NDArray[np.float32]:
    """Weight scale times the unit of the integer sum times 2^exponent (exact): [N], or [groups, N].

    A static scale of the activations is folded in, rounded once.
    """
    found = (spec.stored.scales.numpy() * np.float32(spec.unit * 2.0**exponent)).astype(np.float32)
    if spec.activation_scale is not None:
        found = found * spec.activation_scale
    return np.ascontiguousarray(found.T if spec.real_groups else found[:, 0])
