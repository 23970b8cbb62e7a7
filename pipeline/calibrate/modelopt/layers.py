"""Layers of ours from what ModelOpt calibrated: codes, scales, balance and low-rank branches, nothing computed anew.

Where a quantizer is one of our backend's, or E4M3, every number of the weight is the one that ModelOpt multiplies with,
to the bit. Its integers have the same codes; it divides by what we multiply with, so their values differ in the last
bit. Of a module in half precision it rounds each product to that type in the end, which is not done here. Its
activations are multiplied by the scale's inverse before they are rounded, ours divided by the scale: a number
that lies within a rounding of a midpoint may get the code beside. All that has no equal is refused, before anything is
computed, with the quantizer's name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.errors import ModelError, RecipeError
from export.formats.format import pack
from pipeline.calibrate.modelopt.rounding import (
    InputRounding,
    Refused,
    WeightRounding,
    input_rounding,
    is_rotated,
    weight_rounding,
)
from pipeline.calibrate.modelopt.state import Settings, State
from pipeline.calibrate.plan import Activation
from pipeline.recipe import Formats, Recipe, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from export.models.load import LinearRef, LoadedModel

logger = logging.getLogger(__name__)
F32 = NDArray[np.float32]
R = TypeVar("R", WeightRounding, InputRounding)
WEIGHT, INPUT = "weight_quantizer", "input_quantizer"
METHOD = "modelopt"
FLOAT32_BYTES = 4
# Axes before the channels of a linear's input: tokens have two, batch and place; what modulates has the batch alone.
LEADING = {"adaln": (1,), "other": (1, 2)}
KEEP = "--set 'keep=[\"{}\"]' keeps it in float"


@dataclass(frozen=True)
class TakenLinear:
    """How ModelOpt rounds one linear."""

    linear: LinearRef
    weight: WeightRounding
    activation: InputRounding


class Taken:
    """Every linear of a model, as ModelOpt's state has it; `layer` makes one.

    Raises RecipeError naming the quantizer that has no equal here, ModelError if the state is of another model.
    """

    def __init__(self, model: LoadedModel, state: State) -> None:
        self.state = state
        linears = model.linears()
        self._refuse_floats(linears)
        self.rows = {linear.name: self._row(linear) for linear in linears}
        self._refuse_others(model)
        _refuse_other_model(model, state)
        self._tell_differences()

    def layer(self, name: str) -> QuantizedLinear:
        """The finished layer."""
        row = self.rows[name]
        weight = self._array(name, "weight", tuple(row.linear.module.weight.shape))
        codes, scales, multipliers = row.weight.codes(weight, self._amax(f"{name}.{WEIGHT}"), name)
        multiplier = self._multiplier(name, weight.shape[1])
        down, up = self._low_rank(name, multiplier)
        return QuantizedLinear(
            name=name,
            kind=row.linear.kind,
            in_features=weight.shape[1],
            weight_format=row.weight.format.name,
            codes=pack(codes, row.weight.format.bits),
            granularity=row.weight.granularity,
            group_size=row.weight.group_size,
            scales=np.ascontiguousarray(scales, np.float32),
            multipliers=multipliers if row.weight.granularity == "exact_group" else None,
            bias=self._bias(row.linear),
            input_multiplier=multiplier,
            lora_down=down,
            lora_up=up,
            **self._activation(row),
        )

    def _refuse_floats(self, linears: Sequence[LinearRef]) -> None:
        """Linears that are not quantized at all, as auto_quantize may choose: one setting keeps them all."""
        pairs = {linear.name: [f"{linear.name}.{part}" for part in (WEIGHT, INPUT)] for linear in linears}
        known = self.state.quantizers
        floats = [name for name, pair in pairs.items() if all(known.get(path, {}).get("_disabled") for path in pair)]
        if floats:
            share = f"{len(floats)} of {len(linears)} linears are not quantized"
            keep = ", ".join(f'"{name}"' for name in floats)
            raise RecipeError(f"{self.state.source}: {share}; --set 'keep=[{keep}]' keeps them in float")

    def _row(self, linear: LinearRef) -> TakenLinear:
        name = linear.name
        for part in (WEIGHT, INPUT):
            path = f"{name}.{part}"
            settings = self.state.quantizers.get(path)
            if settings is None:
                raise RecipeError(f"{self.state.source}: there is no quantizer {path}; {KEEP.format(name)}")
            if settings.get("_disabled"):
                both = "a quantized linear has both its weight and its input rounded"
                raise RecipeError(f"{path} is disabled and {both}; enable it, or {KEEP.format(name)}")
        weight = self._read(f"{name}.{WEIGHT}", weight_rounding)
        activation = self._read(f"{name}.{INPUT}", partial(input_rounding, leading=LEADING.get(linear.kind, (2,))))
        self._refuse_uneven(linear, {WEIGHT: weight.group_size, INPUT: activation.group_size})
        self._amax(f"{name}.{WEIGHT}")
        if activation.amax_free and self.state.tensor(f"{name}.{INPUT}", "_amax") is not None:
            fault = f"{name}.{INPUT} finds its scales at run time and has an amax, of a calibration before"
            raise RecipeError(
                f"{self.state.source}: {fault}, with which ModelOpt rounds; quantize the float model anew"
            )
        if activation.scaling == "per_tensor" and (size := self._amax(f"{name}.{INPUT}").size) != 1:
            fault = f"{name}.{INPUT} has {size} values of amax where one belongs"
            raise RecipeError(f"{self.state.source}: {fault}; calibrate it with axis=None")
        return TakenLinear(linear, weight, activation)

    def _refuse_uneven(self, linear: LinearRef, sizes: Mapping[str, int]) -> None:
        """Groups of weight and input, 0 for none, that do not divide the channels: ModelOpt fills the last one up."""
        k = linear.module.weight.shape[1]
        for part, size in sizes.items():
            if size and k % size:
                fault = f"{linear.name}.{part} has groups of {size}, which do not divide its {k} input channels"
                raise RecipeError(f"{self.state.source}: {fault}; quantize with groups of a divisor")

    def _read(self, path: str, rounding: Callable[[Settings], R]) -> R:
        try:
            return rounding(self.state.quantizers[path])
        except Refused as reason:
            raise RecipeError(f"{self.state.source}: {path} {reason}") from reason

    def _refuse_others(self, model: LoadedModel) -> None:
        """Quantizers that are on and belong to no linear of ours: outputs, attention, embedders, a key-value cache."""
        taken = {f"{name}.{part}" for name in self.rows for part in (WEIGHT, INPUT)}
        for path, settings in self.state.quantizers.items():
            if path not in taken and not settings.get("_disabled"):
                known = "inputs and weights of " + ", ".join(list(self.rows)[:2]) + " and the like are taken over"
                raise RecipeError(
                    f"{self.state.source}: {path} is enabled, which has no place here: {known}; disable it"
                )
            if path not in taken and is_rotated(settings):
                raise RecipeError(f"{self.state.source}: {path} rotates its tensor, disabled or not; leave rotate out")
            scale = self.state.tensor(path, "_pre_quant_scale")
            if scale is not None and not (path in taken and path.endswith(INPUT)):
                raise RecipeError(f"{self.state.source}: {path} has a pre_quant_scale; only inputs of linears have one")

    def _tell_differences(self) -> None:
        """What is not the same number here as there, though codes and scales are."""
        source = self.state.source
        if wide := [name for name, row in self.rows.items() if not row.activation.narrow]:
            words = "%s: inputs of %d linears (%s, ...) beyond their amax end one code later there than here; %s"
            logger.warning(words, source, len(wide), wide[0], "calibrate with narrow_range where they matter")
        if half := [name for name in self.rows if self.state.tensors[f"{name}.weight"].element_size() < FLOAT32_BYTES]:
            words = "%s: ModelOpt rounds the weights of %d linears (%s, ...) to %s once more, engines of ours do not"
            logger.warning(words, source, len(half), half[0], self.state.tensors[f"{half[0]}.weight"].dtype)

    def _amax(self, path: str) -> F32:
        amax = self.state.tensor(path, "_amax")
        if amax is None:
            raise RecipeError(f"{self.state.source}: {path} has no amax; calibrate it with a forward loop")
        values = _float32(amax)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ModelError(f"{self.state.source}: {path} has an amax that is negative, NaN or Inf; calibrate again")
        return values

    def _array(self, name: str, key: str, shape: tuple[int, ...]) -> F32:
        tensor = self.state.tensor(name, key)
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            held = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ModelError(f"{self.state.source}: {name}.{key} is {held}; the model has floats of shape {shape}")
        array = _float32(tensor)
        if not np.isfinite(array).all():
            raise ModelError(f"{self.state.source}: {name}.{key} holds NaN or Inf; calibrate again")
        return array

    def _bias(self, linear: LinearRef) -> F32 | None:
        bias = linear.module.bias
        return None if bias is None else self._array(linear.name, "bias", tuple(bias.shape))

    def _multiplier(self, name: str, k: int) -> F32 | None:
        """AWQ's and SmoothQuant's factor of each input channel, [K]; the weight has been divided by it."""
        path = f"{name}.{INPUT}"
        scale = self.state.tensor(path, "_pre_quant_scale")
        if scale is None or self.state.quantizers[path].get("_enable_pre_quant_scale") is False:
            return None
        factors = _float32(scale).reshape(-1)
        if factors.size not in (1, k):
            raise ModelError(f"{self.state.source}: {path} has {factors.size} pre_quant_scales for {k} channels")
        return np.broadcast_to(factors, (k,)).copy()

    def _low_rank(self, name: str, multiplier: F32 | None) -> tuple[F32 | None, F32 | None]:
        """SVDQuant's branch as [1, R, K] and [1, N, R]. ModelOpt's reads the balanced input, ours the input itself, so
        the balance goes into the first matrix: one rounding for each of its numbers."""
        down, up = (self._branch(f"{name}.{WEIGHT}", f"svdquant_lora_{key}") for key in "ab")
        if down is None and up is None:
            return None, None
        if down is None or up is None:
            raise ModelError(f"{self.state.source}: {name}.{WEIGHT} has one of SVDQuant's two matrices; save it again")
        n, k = self.rows[name].linear.module.weight.shape
        shapes = [tuple(getattr(matrix, "shape", ())) for matrix in (down, up)]
        rank = shapes[0][0] if shapes[0] else 0
        if shapes != [(rank, k), (n, rank)]:
            fault = f"{name}.{WEIGHT} has matrices of SVDQuant of the shapes {shapes[0]} and {shapes[1]}"
            raise ModelError(f"{self.state.source}: {fault}; its weight has (rank, {k}) and ({n}, rank), save it again")
        first = _float32(down) if multiplier is None else _float32(down) * multiplier
        return first[None], _float32(up)[None]

    def _branch(self, path: str, key: str) -> Tensor | None:
        """A matrix of SVDQuant: a buffer of the quantizer or, of one with scales per block, a mere attribute."""
        buffer = self.state.tensor(path, f"_{key}")
        return self.state.quantizers[path].get(key) if buffer is None else buffer

    def _activation(self, row: TakenLinear) -> Activation:
        how = row.activation
        fields: Activation = {"activation_format": how.format.name, "activation_scaling": how.scaling}
        if how.scaling == "token_group":
            return {**fields, "activation_group": how.group_size}
        if how.scaling == "per_tensor":
            amax = self._amax(f"{row.linear.name}.{INPUT}").reshape(-1)
            return {**fields, "activation_scale": (amax / np.float32(how.format.max_value)).astype(np.float32)}
        return fields


def _float32(tensor: Tensor) -> F32:
    array: F32 = tensor.detach().float().cpu().numpy()
    return array


def _refuse_other_model(model: LoadedModel, state: State) -> None:
    """What is not quantized must be the model's own: calibration changes the weights of quantized linears alone. And it
    adds none, but to the quantizers."""
    changed = {f"{linear.name}.weight" for linear in model.linears()}
    tensors = model.module.state_dict()
    for name in sorted(state.tensors.keys() - tensors.keys()):
        owner = name.rpartition(".")[0]
        if owner not in state.quantizers and name.partition(".")[0] not in model.family.absent:
            fault = f"{name} is no tensor of {model.source}, nor a quantizer's"
            raise ModelError(f"{state.source}: {fault}; give the model that ModelOpt quantized, adapters merged before")
    for name, own in tensors.items():
        theirs = state.tensors.get(name)
        if name in changed:
            continue
        if theirs is None or theirs.shape != own.shape or not _equal(own, theirs):
            fault = "is not in it" if theirs is None else "is another there"
            raise ModelError(
                f"{state.source}: {name} of {model.source} {fault}; give the model that ModelOpt quantized"
            )


def _equal(own: Tensor, theirs: Tensor) -> bool:
    """In the other's type, which may be narrower, but is of the same kind."""
    same_kind = own.is_floating_point() == theirs.is_floating_point()
    return same_kind and bool((own.to(theirs.dtype) == theirs.cpu()).all())


def recipe_of(recipe: Recipe, taken: Taken, options: dict[str, object]) -> Recipe:
    """The recipe with the formats that most of these linears have, and the method "modelopt" with `options`."""
    rows = list(taken.rows.values())
    weights = Counter((row.weight.granularity, row.weight.group_size) for row in rows)
    (granularity, size), _ = weights.most_common(1)[0]
    formats = Formats(_most(row.weight.format.name for row in rows), _most(row.activation.format.name for row in rows))
    scalings = sorted({row.activation.scaling for row in rows} - {"per_token"}) or ["per_token"]
    options = options | {"activations": ", ".join(scalings)}
    calibrate = replace(recipe.calibrate, method=METHOD, options=options)
    group_size = size or recipe.weights.group_size
    return replace(recipe, formats=formats, weights=Weights(granularity, group_size, "absmax"), calibrate=calibrate)


def _most(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]
