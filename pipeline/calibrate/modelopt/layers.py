"""Layers of ours from what ModelOpt calibrated: codes, scales, balance and low-rank branches, nothing computed anew.

Where a quantizer is one of our backend's, or E4M3, every number of the weight is the one that ModelOpt multiplies with,
to the bit. Its integers have the same codes; it divides by what we multiply with, so their values differ in the last
bit. Its activations are multiplied by the scale's inverse before they are rounded, ours divided by the scale: a number
that lies within a rounding of a midpoint may get the code beside. All that has no equal is refused, before anything is
computed, with the quantizer's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    weight_rounding,
)
from pipeline.calibrate.modelopt.state import Settings, State
from pipeline.calibrate.plan import Activation
from pipeline.recipe import Formats, Recipe, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from export.models.load import LinearRef, LoadedModel

F32 = NDArray[np.float32]
R = TypeVar("R", WeightRounding, InputRounding)
WEIGHT, INPUT = "weight_quantizer", "input_quantizer"
METHOD = "modelopt"
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
        activation = self._read(f"{name}.{INPUT}", input_rounding)
        self._amax(f"{name}.{WEIGHT}")
        if activation.scaling == "per_tensor":
            self._amax(f"{name}.{INPUT}")
        return TakenLinear(linear, weight, activation)

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
            scale = self.state.tensor(path, "_pre_quant_scale")
            if scale is not None and not (path in taken and path.endswith(INPUT)):
                raise RecipeError(f"{self.state.source}: {path} has a pre_quant_scale; only inputs of linears have one")

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
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ModelError(f"{self.state.source}: {name}.{key} is {found}; the model has floats of shape {shape}")
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
    """What is not quantized must be the model's own: calibration changes the weights of quantized linears alone."""
    changed = {f"{linear.name}.weight" for linear in model.linears()}
    for name, own in model.module.state_dict().items():
        theirs = state.tensors.get(name)
        if name in changed:
            continue
        if theirs is None or theirs.shape != own.shape or not bool((own.to(theirs.dtype) == theirs.cpu()).all()):
            fault = "is not in it" if theirs is None else "is another there"
            raise ModelError(
                f"{state.source}: {name} of {model.source} {fault}; give the model that ModelOpt quantized"
            )


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
