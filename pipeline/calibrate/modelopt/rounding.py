"""How a quantizer of ModelOpt rounds, as formats of ours: read from its settings, or refused by name.

Two kinds can be said in our formats: ModelOpt's own E4M3 and integers, and those of our backend (backend.py), which are
all of ours. Everything else has no equal here, and the message says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import Granularity
from export.errors import RecipeError
from export.formats.format import Format, get_format, quantize
from export.formats.operands import exact_multipliers
from pipeline.calibrate.modelopt.state import Settings
from pipeline.calibrate.plan import group_multipliers
from pipeline.calibrate.scales import absmax_scales

F32 = NDArray[np.float32]
BACKEND = "ditc"
ROLE, WEIGHT, INPUT = "role", "weight", "input"  # of our backend's arguments
# ModelOpt takes an absmax of at most this, the least that fp16 has, for zero.
ZERO = np.float32(2.0**-24)
INTEGERS = {4: "INT4", 6: "INT6", 8: "INT8"}
E4M3 = (4, 3)
LAST_AXIS = (-1, 1)  # of a weight [N, K]


@dataclass(frozen=True)
class WeightRounding:
    """own: in the arithmetic of our backend; False: in that of ModelOpt. multipliers: (1,) unless "exact_group"."""

    format: Format
    granularity: Granularity
    group_size: int
    multipliers: tuple[int, ...] = (1,)
    own: bool = False
    narrow: bool = True

    @property
    def bits_per_weight(self) -> float:
        """Of the codes, and of scales (32 bits) or multipliers (4 bits) of groups; a channel's scale is not counted."""
        group_bits = {"group": 32, "exact_group": 4}.get(self.granularity, 0)
        return self.format.bits + (group_bits / self.group_size if group_bits else 0)

    def codes(self, weight: F32, amax: F32, name: str) -> tuple[NDArray[np.uint8], F32, NDArray[np.uint8]]:
        """Codes [N, K], scales [N, 1 or groups] and multipliers [N, groups] of a weight [N, K] whose absmax, of the
        tensor, of each channel or of each group in order, is `amax`. Raises RecipeError naming the layer."""
        n, k = weight.shape
        size = self.group_size or k
        groups = k // size
        real = groups if self.granularity == "group" else 1
        expected = n * (1 if self.granularity == "per_channel" else groups)
        if amax.size not in (1, expected) or k % size:
            shape = f"{n} x {k} in groups of {size}"
            raise RecipeError(f"{name}: {amax.size} values of amax do not fit its weight of {shape}; calibrate again")
        amax = np.broadcast_to(amax.reshape(-1), (expected,))
        blocks = weight.reshape(n, groups, size)
        if self.own:
            scales, multipliers = own_scales(amax.reshape(n, -1), self)
            step = _by_group(scales, groups) * multipliers.astype(np.float32)
            return quantize(self.format, blocks / step[..., None]).reshape(n, k), scales, multipliers
        factor = largest_quotient(self.format, amax)
        scaled = blocks * _by_group(factor.reshape(n, real), groups)[..., None]
        if self.format.is_integer and not self.narrow:
            _refuse_lowest(scaled, self.format, name)
        return quantize(self.format, scaled).reshape(n, k), _inverse(factor).reshape(n, real), _ones(n, groups)


def own_scales(amax: F32, rounding: WeightRounding) -> tuple[F32, NDArray[np.uint8]]:
    """Scales [N, 1 or groups] and multipliers [N, groups] at which no absmax, amax [N, 1 or groups], is clipped."""
    n, groups = amax.shape
    rows = (n, groups, 1) if rounding.granularity == "exact_group" else (n * groups, 1, 1)
    scales, multipliers = absmax_scales(amax.reshape(rows), rounding.format, rounding.multipliers)
    return scales.reshape(n, -1), multipliers.reshape(n, -1)


def largest_quotient(fmt: Format, amax: F32) -> F32:
    """What ModelOpt multiplies with before it rounds: the format's largest number through amax, in float32.

    Of floats it is a product with the inverse, as torch divides a number by a tensor; of integers a quotient.
    """
    dead, largest = amax <= ZERO, np.float32(fmt.max_value)
    alive = np.where(dead, np.float32(1), amax)
    factor = largest / alive if fmt.is_integer else (1 / alive) * largest
    return np.asarray(np.where(dead & fmt.is_integer, 0, factor), np.float32)


def _inverse(factor: F32) -> F32:
    """Scales: float32 [...]. Where nothing but zeros is left any would do."""
    return np.asarray(1 / np.where(factor == 0, np.float32(1), factor), np.float32)


def _by_group(scales: F32, groups: int) -> F32:
    return np.broadcast_to(scales, (len(scales), groups))


def _ones(n: int, groups: int) -> NDArray[np.uint8]:
    return np.ones((n, groups), np.uint8)


def _refuse_lowest(scaled: F32, fmt: Format, name: str) -> None:
    """ModelOpt's integers go one further down than up unless narrow_range is set; ours are symmetric."""
    if (np.rint(scaled) < -fmt.max_value).any():
        lowest = -int(fmt.max_value) - 1
        raise RecipeError(f"{name}.weight_quantizer rounds to {lowest}, which {fmt.name} has not; set narrow_range")


@dataclass(frozen=True)
class InputRounding:
    """As the fields of a `QuantizedLinear`; "per_tensor" goes with a calibrated amax. narrow: whether its numbers
    end where ours do; no input lies beyond an amax that is found at run time. amax_free: of ModelOpt's own that find
    scales at run time, in the place of which it takes an amax wherever there is one; our backend looks at none."""

    format: Format
    scaling: Literal["per_token", "token_group", "per_tensor"]
    group_size: int = 0
    narrow: bool = True
    amax_free: bool = False


class Refused(Exception):
    """Why a quantizer's settings have no equal, in words that follow its name."""


def weight_rounding(settings: Settings) -> WeightRounding:
    """How a weight [N, K] is rounded. Raises Refused."""
    _refuse_strange(settings)
    if settings.get("backend") is not None:
        return own_weight(_own_arguments(settings))
    if settings.get("_dynamic") or (settings.get("_block_sizes") or {}).get("type") == "dynamic":
        raise Refused(f"rounds weights with scales found at run time, {_bits(settings)}, which ModelOpt does with CUDA")
    fmt, blocks = _own_format(settings), _blocks(settings)
    narrow = bool(settings.get("_narrow_range"))
    if not blocks:
        if _axes(settings) not in ((), (0,), (-2,)):
            raise Refused(
                f"has a scale for each of the axes {settings.get('_axis')}; weights have one per channel, axis 0"
            )
        return WeightRounding(fmt, "per_channel", 0, narrow=narrow)
    sizes = {axis: size for axis, size in blocks.items() if size not in (None, 1)}
    if set(sizes) - set(LAST_AXIS) or len(sizes) != 1:
        raise Refused(f"has blocks of {blocks}; weights have groups along their input channels alone, {{-1: size}}")
    (size,) = sizes.values()
    if type(size) is not int or size < 1:
        raise Refused(f"has blocks of {blocks}; give a number of channels, {{-1: 64}} for example")
    return WeightRounding(fmt, "group", size, narrow=narrow)


def input_rounding(settings: Settings, leading: Sequence[int] = (2,)) -> InputRounding:
    """How an input [..., K] is rounded, which has one of `leading` numbers of axes before its channels. Raises
    Refused."""
    _refuse_strange(settings)
    if settings.get("backend") is not None:
        return own_input(_own_arguments(settings))
    fmt, blocks = _own_format(settings), _blocks(settings)
    if settings.get("_dynamic"):
        if not _one_scale_per_token(settings, blocks, leading):
            found = f"(axis {settings.get('_axis')}, blocks {blocks})"
            raise Refused(
                f"finds scales at run time in blocks, or one for all tokens {found}; activations have one per token, "
                "block_sizes={-1: None}"
            )
        return InputRounding(fmt, "per_token", amax_free=True)
    if blocks or _axes(settings):
        raise Refused("has calibrated scales per channel or block of its input; a static activation has one scale")
    return InputRounding(fmt, "per_tensor", narrow=not fmt.is_integer or bool(settings.get("_narrow_range")))


def _one_scale_per_token(settings: Settings, blocks: Mapping[int, int | None], leading: Sequence[int]) -> bool:
    """Blocks as long as the last axis, which ModelOpt replaces in the first call by an axis for each of the others."""
    axis = settings.get("_axis")
    if blocks:
        return blocks == {-1: None}
    return isinstance(axis, (tuple, list)) and list(axis) in [list(range(count)) for count in leading]


def own_weight(arguments: Mapping[str, Any]) -> WeightRounding:
    """Of our backend's arguments for a weight quantizer: format, granularity, group_size and the activation's format,
    which decides the multipliers of "exact_group". Raises Refused."""
    _check_role(arguments, WEIGHT)
    fmt, granularity = _named(arguments), arguments.get("granularity", "per_channel")
    if granularity not in get_args(Granularity):
        raise Refused(f"has granularity {granularity!r}; use one of {get_args(Granularity)}")
    size = arguments.get("group_size", 0)
    if not isinstance(size, int) or (size > 0) is (granularity == "per_channel"):
        raise Refused(f"has group_size {size!r} with {granularity}; groups have a size, channels 0")
    multipliers: tuple[int, ...] = (1,)
    if granularity == "exact_group":
        if not exact_multipliers(fmt.name, ("INT8",)):
            raise Refused(f"has {granularity} with {fmt.name}, whose groups no multiplier keeps exact; use group")
        multipliers = group_multipliers(fmt.name, _named(arguments, "activation").name)
    return WeightRounding(fmt, cast(Granularity, granularity), size, multipliers, own=True)


def own_input(arguments: Mapping[str, Any]) -> InputRounding:
    """Of our backend's arguments for an input quantizer: format, and group_size (0: one scale per token). Raises
    Refused."""
    _check_role(arguments, INPUT)
    size = arguments.get("group_size", 0)
    if not isinstance(size, int) or size < 0:
        raise Refused(f"has group_size {size!r}; use 0 for one scale per token, or channels per scale")
    return InputRounding(_named(arguments), "token_group" if size else "per_token", size)


def _check_role(arguments: Mapping[str, Any], role: str) -> None:
    if arguments.get(ROLE) != role:
        raise Refused(f"has the role {arguments.get(ROLE)!r} of our backend where {role!r} belongs")


def _named(arguments: Mapping[str, Any], key: str = "format") -> Format:
    try:
        fmt = get_format(str(arguments.get(key)))
    except RecipeError as error:
        raise Refused(f"has {key} {arguments.get(key)!r}: {error}") from error
    if not fmt.sign_bits:
        raise Refused(f"has {key} {fmt.name}; the backend takes signed formats")
    return fmt


def _own_arguments(settings: Settings) -> Mapping[str, Any]:
    backend = settings["backend"]
    if backend != BACKEND:
        raise Refused(f"runs the backend {backend!r}, whose rounding is not known here; use {BACKEND!r}, or none")
    arguments = settings.get("backend_extra_args") or {}
    if not isinstance(arguments, Mapping):
        raise Refused(f"has backend_extra_args {arguments!r}; they are a dictionary")
    return arguments


def _own_format(settings: Settings) -> Format:
    """The format of ModelOpt's own rounding."""
    if settings.get("_unsigned"):
        raise Refused("rounds to unsigned integers; set unsigned=False")
    bits = settings.get("_num_bits")
    if isinstance(bits, (tuple, list)) and tuple(bits) == E4M3:
        return get_format("E4M3")
    if isinstance(bits, int) and bits in INTEGERS:
        return get_format(INTEGERS[bits])
    raise Refused(f"rounds to {_bits(settings)}; of ModelOpt's own there are E4M3, INT4, INT6 and INT8 here")


def is_rotated(settings: Settings) -> bool:
    """Does it rotate its tensor? ModelOpt's do so where they are disabled, too."""
    rotation = settings.get("_rotate")
    return bool(rotation.get("enable") if isinstance(rotation, dict) else getattr(rotation, "enable", rotation))


def _refuse_strange(settings: Settings) -> None:
    """What no format says: it changes the tensor, or is done already."""
    blocks = settings.get("_block_sizes") or {}
    if not isinstance(blocks, Mapping):
        raise Refused(f"has block_sizes {blocks!r}; they are a dictionary, {{-1: 64}} for example")
    faults = {
        "is a sequence of quantizers, one behind the other": "is_sequential_quantizer" in settings,
        "rotates its tensor; quantize without rotation": is_rotated(settings),
        "has a bias (affine quantization); quantize without": bool(settings.get("_bias")),
        "holds a compressed weight; save before mtq.compress": settings.get("_fake_quant") is False,
        "has a constant instead of a calibrated amax": bool(settings.get("_use_constant_amax")),
        "learns its scales (LSQ)": bool(settings.get("_lsq")),
        f"has scales that are rounded themselves ({_bits(settings)}, {_scale_bits(blocks)})": "scale_bits" in blocks,
        "does not quantize now; finish the calibration": settings.get("_if_quant") is False
        or bool(settings.get("_if_calib")),
    }
    for words, present in faults.items():
        if present:
            raise Refused(words)


def _bits(settings: Settings) -> str:
    bits = settings.get("_num_bits")
    return f"E{bits[0]}M{bits[1]}" if isinstance(bits, (tuple, list)) else f"{bits} bits"


def _scale_bits(blocks: Mapping[Any, Any]) -> str:
    names = {(4, 3): "NVFP4 and its like", (8, 0): "an MX format"}
    bits = blocks.get("scale_bits")
    return names.get(tuple(bits), str(bits)) if isinstance(bits, (tuple, list)) else str(bits)


def _blocks(settings: Settings) -> dict[int, int | None]:
    """Block sizes by axis."""
    return {key: size for key, size in (settings.get("_block_sizes") or {}).items() if isinstance(key, int)}


def _axes(settings: Settings) -> tuple[int, ...]:
    axis = settings.get("_axis")
    return () if axis is None else tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
