"""The calibrated checkpoint: what calibration hands to export, reference and engines.

One `QuantizedLinear` for each quantized layer, saved as safetensors (codes, scales, multipliers, bias, and what a
method has learned about the layer's input) plus one JSON of formats. It is all that is needed to rebuild the layer; the
float weight is not kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import numpy as np
from annotated_types import Ge, Le, MinLen
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from typing_extensions import TypedDict

from export.documents import Rules, open_file, read_json, whole_file
from export.errors import ContractError
from export.formats.format import get_format, looked_up, packed_size, unpack
from export.formats.operands import exact_multipliers
from export.router import ARRAYS as ROUTER_ARRAYS
from export.router import Router

Number = TypeVar("Number", np.float64, np.integer)
SCHEMA_VERSION = 2
Granularity = Literal["per_channel", "exact_group", "group"]
ActivationScaling = Literal["per_token", "per_tensor", "token_group"]
WEIGHTS_FILE, LAYERS_FILE = "quantized.safetensors", "quantized.json"


@dataclass(frozen=True)
class QuantizedLinear:
    """y = Q(x * input_multiplier + input_offset) @ W.T + bias + lora_up[h] @ (lora_down[h] @ x).

    W [N, K] is stored as codes, W[n, k] = value(code) * multiplier * scale. codes: packed uint8
    [N, ceil(K * bits / 8)]. scales: float32 [N, 1], or [N, K / group_size] for "group". multipliers: uint8
    [N, K / group_size], small integers, for "exact_group" only. bias: float32 [N] or None.

    Q rounds x to activation_format times a scale. activation_scaling: "per_token": of the token, found at run time;
    "token_group": the same for each group of `activation_group` input channels; "per_tensor": activation_scale [1], and
    for an unsigned format x ~ activation_zero [1] + value(code) * scale. input_multiplier, input_offset: float32 [K]
    or None; weight and bias already make up for them (channel balancing of PTQ4DiT, RepQ-ViT and ViDiT-Q).

    lora_down [H, R, K], lora_up [H, N, R]: float32 or None, branches of which the router, one for all layers, picks
    h by the timestep of each sample (TALoRA of MSFP); without a router there is one, H = 1, for every sample
    (SVDQuant). They read the layer's own input x, unbalanced and unrounded.
    """

    name: str
    kind: str
    in_features: int
    weight_format: str
    activation_format: str
    granularity: Granularity
    group_size: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    multipliers: NDArray[np.uint8] | None = None
    bias: NDArray[np.float32] | None = None
    activation_scaling: ActivationScaling = "per_token"
    activation_group: int = 0
    activation_scale: NDArray[np.float32] | None = None
    activation_zero: NDArray[np.float32] | None = None
    input_multiplier: NDArray[np.float32] | None = None
    input_offset: NDArray[np.float32] | None = None
    lora_down: NDArray[np.float32] | None = None
    lora_up: NDArray[np.float32] | None = None
    router: Router | None = None

    def __post_init__(self) -> None:
        """Raises ContractError naming the layer."""
        for key, kinds in (("granularity", Granularity), ("activation_scaling", ActivationScaling)):
            if getattr(self, key) not in get_args(kinds):
                raise ContractError(f"{self.name}: {key} {getattr(self, key)!r}; use one of {get_args(kinds)}")
        if self.granularity != "per_channel" and (self.group_size <= 0 or self.in_features % self.group_size):
            raise ContractError(
                f"{self.name}: K={self.in_features} is not a multiple of group_size {self.group_size}; use a divisor"
            )
        get_format(self.activation_format)
        self._check_weight()
        self._check_activation_group()
        self._check_static()
        self._check_low_rank()
        for key in ("input_multiplier", "input_offset"):
            self._check_learned(key, (self.in_features,))

    def _check_weight(self) -> None:
        """Presence, dtype, shape and numbers of the arrays of weight and bias."""
        if self.codes.ndim != 2:
            raise ContractError(f"{self.name}: codes have shape {self.codes.shape}; expected [N, packed bytes]")
        n, fmt = self.out_features, get_format(self.weight_format)
        grouped = self.granularity == "exact_group"
        self._check_presence("multipliers", grouped, self.granularity, "they go with exact_group only")
        expected = {
            "codes": (np.uint8, (n, packed_size(fmt.bits, self.in_features))),
            "scales": (np.float32, (n, self.groups if self.granularity == "group" else 1)),
            "multipliers": (np.uint8, (n, self.groups)),
            "bias": (np.float32, (n,)),
        }
        for key, (dtype, shape) in expected.items():
            array = getattr(self, key)
            if array is not None and (array.dtype != dtype or array.shape != shape):
                raise ContractError(
                    f"{self.name}: {key} are {array.dtype} {array.shape}; {self.weight_format} {self.granularity} "
                    f"with K={self.in_features} needs {np.dtype(dtype)} {shape}"
                )
        if not np.isfinite(self.scales).all():
            raise ContractError(f"{self.name}: a weight scale is NaN or Inf; the float weight is broken")
        if not (self.scales > 0).all():
            smallest = float(self.scales.min())
            raise ContractError(f"{self.name}: a weight scale is {smallest:g} and must be above 0; calibrate again")
        if self.bias is not None and not np.isfinite(self.bias).all():
            raise ContractError(f"{self.name}: the bias holds NaN or Inf; the float model is broken")
        finite = np.isfinite(fmt.values)
        if not (finite.all() or finite[self.unpacked_codes()].all()):
            raise ContractError(f"{self.name}: a {self.weight_format} code is NaN or Inf; the float weight is broken")
        allowed = exact_multipliers(self.weight_format, ("INT8",))
        if self.multipliers is not None and not np.isin(self.multipliers, allowed).all():
            inexact = sorted(set(np.unique(self.multipliers).tolist()) - set(allowed))
            raise ContractError(
                f"{self.name}: multipliers {inexact} would not be exact; {self.weight_format} allows {allowed}"
            )

    def _check_activation_group(self) -> None:
        group, k = self.activation_group, self.in_features
        if self.activation_scaling != "token_group":
            if group:
                fault = f"{self.activation_scaling} with activation_group {group}"
                raise ContractError(f"{self.name}: {fault}; it goes with token_group only, use 0")
        elif group <= 0 or k % group:
            raise ContractError(f"{self.name}: K={k} is not a multiple of activation_group {group}; use a divisor")
        elif not get_format(self.activation_format).sign_bits:
            raise ContractError(
                f"{self.name}: token_group with the unsigned format {self.activation_format}; "
                f"a zero point needs per_tensor, so use a signed format or per_tensor"
            )

    def _check_static(self) -> None:
        """Scale and zero of a static activation."""
        static, fmt = self.activation_scaling == "per_tensor", get_format(self.activation_format)
        rule = "per_tensor needs one, the others have none"
        self._check_presence("activation_scale", static, self.activation_scaling, rule)
        rule = "a zero goes with per_tensor and an unsigned format such as UE2M2, and only there"
        shifted = static and not fmt.sign_bits
        self._check_presence("activation_zero", shifted, f"{self.activation_scaling} {fmt.name}", rule)
        for key in ("activation_scale", "activation_zero"):
            self._check_learned(key, (1,))
        if self.activation_scale is not None and not self.activation_scale[0] > 0:
            fault = f"activation_scale {self.activation_scale[0]:g} is not above 0"
            raise ContractError(f"{self.name}: {fault}; calibrate with data that reaches this layer")

    def _check_low_rank(self) -> None:
        """Both matrices of low-rank branches are there and fit, and a router where there are several branches."""
        parts = {key: getattr(self, key) is not None for key in ("lora_down", "lora_up")}
        if not any(parts.values()) and self.router is None:
            return
        if not all(parts.values()):
            missing = next(key for key, present in parts.items() if not present)
            raise ContractError(f"{self.name}: {missing} is missing; low-rank branches need lora_down and lora_up")
        assert self.lora_down is not None
        if self.router is None and self.lora_down.shape[:1] != (1,):
            fault = f"lora_down has shape {self.lora_down.shape} and there is no router"
            raise ContractError(f"{self.name}: {fault}; only one branch, [1, R, K], needs none")
        branches = 1 if self.router is None else self.router.branches
        rank = self.lora_down.shape[1] if self.lora_down.ndim == 3 else 0
        self._check_learned("lora_down", (branches, rank, self.in_features))
        self._check_learned("lora_up", (branches, self.out_features, rank))

    def _check_presence(self, key: str, expected: bool, kind: str, rule: str) -> None:
        """Of an array that layers of some kinds have, and of others have not."""
        if (getattr(self, key) is not None) != expected:
            raise ContractError(f"{self.name}: {kind} {'without' if expected else 'with'} {key}; {rule}")

    def _check_learned(self, key: str, shape: tuple[int, ...]) -> None:
        """Of an array that a method may have learned: float32, of this shape, finite."""
        array = getattr(self, key)
        if array is None:
            return
        if array.dtype != np.float32 or array.shape != shape:
            raise ContractError(f"{self.name}: {key} is {array.dtype} {array.shape}; it must be float32 {shape}")
        if not np.isfinite(array).all():
            raise ContractError(f"{self.name}: {key} has NaN or Inf; calibrate again")

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def size_bytes(self) -> int:
        """Bytes of codes, scales, multipliers (4 bits each), balance of input channels and low-rank branches as stored
        in the portable model."""
        multiplier_bytes = 0 if self.multipliers is None else self.out_features * packed_size(4, self.groups)
        balance = (array.nbytes for array in (self.input_multiplier, self.input_offset) if array is not None)
        branches = (half_where_exact(array).nbytes for array in (self.lora_down, self.lora_up) if array is not None)
        return self.codes.nbytes + self.scales.nbytes + multiplier_bytes + sum(balance) + sum(branches)

    @property
    def activation_groups(self) -> int:
        """Scales of one token: K / activation_group for "token_group", else 1."""
        return self.in_features // self.activation_group if self.activation_group else 1

    def unpacked_codes(self) -> NDArray[np.uint8]:
        """[N, K] uint8, one code per element."""
        return unpack(self.codes, get_format(self.weight_format).bits, self.in_features)

    def integers(self) -> NDArray[np.integer]:
        """[N, K]: integers of the codes with group multipliers folded in (exact), in the smallest signed type that
        holds them and their magnitudes: int8 up to 127."""
        fmt = get_format(self.weight_format)
        largest = fmt.largest_integer * (1 if self.multipliers is None else int(self.multipliers.max()))
        return self._with_multipliers(fmt.integers.astype(np.min_scalar_type(-largest - 1)))

    def dequantized(self) -> NDArray[np.float64]:
        """[N, K] float64: the weight that the quantized layer stands for."""
        value = self._with_multipliers(get_format(self.weight_format).values)
        grouped = value.reshape(self.out_features, self.scales.shape[1], -1)
        grouped *= self.scales[..., None]
        return value

    def _with_multipliers(self, of_code: NDArray[Number]) -> NDArray[Number]:
        """[N, K]: `of_code` [2^bits] looked up and multiplied in place, so that one array of that size is made."""
        values: NDArray[Number] = looked_up(of_code, self.codes, self.in_features)
        if self.multipliers is not None:
            grouped = values.reshape(self.out_features, self.groups, -1)
            grouped *= self.multipliers[..., None].astype(values.dtype)
        return values


def half_where_exact(array: NDArray[np.float32]) -> NDArray[np.floating]:
    """The array as float16 if that changes no number, else as it is: how low-rank branches are stored in a graph.

    A method that rounds what it learned to float16 gets half the bytes; nothing learned in float32 is lost.
    """
    half = array.astype(np.float16)
    return half if (half == array).all() else array


ARRAYS = (
    "codes", "scales", "multipliers", "bias", "activation_scale", "activation_zero", "input_multiplier",
    "input_offset", "lora_down", "lora_up",
)  # fmt: skip
Size = Annotated[int, Ge(0), Le(2**24)]


class LayerRow(TypedDict):
    """What is not an array of a QuantizedLinear."""

    name: Annotated[str, MinLen(1)]
    kind: str
    in_features: Size
    weight_format: str
    activation_format: str
    granularity: Granularity
    group_size: Size
    activation_scaling: ActivationScaling
    activation_group: Size


class LayersFile(TypedDict):
    """quantized.json."""

    schema_version: int
    layers: list[LayerRow]


REMEDY = "the checkpoint is damaged or incomplete, calibrate again"
RULES = Rules(remedy=REMEDY, version=SCHEMA_VERSION, version_remedy="calibrate again", extra="forbid")


def save(layers: list[QuantizedLinear], folder: Path) -> None:
    """Write the checkpoint into `folder`; if interrupted, `load` finds no checkpoint there and says so.

    Raises ContractError if layers have different routers.
    """
    (folder / LAYERS_FILE).unlink(missing_ok=True)
    arrays = {f"{layer.name}/{key}": getattr(layer, key) for layer in layers for key in ARRAYS}
    router = shared_router(layers)
    arrays |= {f"router/{key}": getattr(router, key, None) for key in ROUTER_ARRAYS}
    present = {key: np.ascontiguousarray(value) for key, value in arrays.items() if value is not None}
    with whole_file(folder / WEIGHTS_FILE) as part:
        save_file(present, part)
    rows = [{key: getattr(layer, key) for key in LayerRow.__annotations__} for layer in layers]
    text = json.dumps({"schema_version": SCHEMA_VERSION, "layers": rows}, indent=1)
    with whole_file(folder / LAYERS_FILE) as part:
        part.write_text(text, encoding="utf-8")


def shared_router(layers: Sequence[QuantizedLinear]) -> Router | None:
    """The one router of all layers, None without low-rank branches. Raises ContractError if there are several."""
    first: dict[Router, str] = {}
    for layer in layers:
        if layer.router is not None:
            first.setdefault(layer.router, layer.name)
    if len(first) > 1:
        names = " and ".join(list(first.values())[:2])
        raise ContractError(f"{names} have different routers; all layers of a model share one, calibrate again")
    return next(iter(first), None)


def load(folder: Path) -> list[QuantizedLinear]:
    """Read a checkpoint; its layers share one Router. Raises ContractError if it is missing, damaged or written by
    another schema."""
    rows = _read_rows(folder / LAYERS_FILE)
    path = folder / WEIGHTS_FILE
    open_file(path, remedy=REMEDY).close()  # refuses what is no file, for which safe_open would wait
    try:
        with safe_open(path, framework="np") as tensors:
            names = set(tensors.keys())
            router = _load_router(tensors, names)
            return [_load_layer(row, tensors, names, router) for row in rows]
    except (OSError, SafetensorError) as error:
        raise ContractError(f"{path}: cannot be read ({error}); {REMEDY}") from error


def _read_rows(path: Path) -> list[LayerRow]:
    rows = read_json(path, LayersFile, RULES)["layers"]
    names = Counter(row["name"] for row in rows)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ContractError(f"{path}: layer {repeated[0]} stands there twice; {REMEDY}")
    return rows


def _load_router(tensors: safe_open, names: set[str]) -> Router | None:
    keys = {key: f"router/{key}" for key in ROUTER_ARRAYS}
    missing = [name for name in keys.values() if name not in names]
    if len(missing) == len(keys):
        return None
    if missing:
        raise ContractError(f"{WEIGHTS_FILE}: tensor {missing[0]} is missing; {REMEDY}")
    return Router(**{key: tensors.get_tensor(name) for key, name in keys.items()})


def _load_layer(row: LayerRow, tensors: safe_open, names: set[str], router: Router | None) -> QuantizedLinear:
    keys = {key: f"{row['name']}/{key}" for key in ARRAYS}
    missing = [keys[key] for key in ("codes", "scales") if keys[key] not in names]
    if missing:
        raise ContractError(f"{WEIGHTS_FILE}: tensor {missing[0]} is missing; {REMEDY}")
    arrays = {key: tensors.get_tensor(name) for key, name in keys.items() if name in names}
    return QuantizedLinear(**row, **arrays, router=router_of(arrays.get("lora_down"), router))


def router_of(lora_down: NDArray[np.float32] | None, router: Router | None) -> Router | None:
    """The model's router, for a layer with branches [H, R, K] that it chooses among; None for any other layer, also for
    one with a single branch where the router chooses among several."""
    if lora_down is None or router is None or (router.branches > 1 and lora_down.shape[:1] == (1,)):
        return None
    return router
