"""A few calls of a model, what its float64 reference gives in them, and how far from that a right engine may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.models.description import end_prompts
from pipeline.backends.base import Arithmetic, Arrays
from pipeline.distance import sqnr_db
from pipeline.generate.case import Case, TextCase, is_large, make_case
from pipeline.generate.sampling import Trajectory, make_sampler, take_samples
from pipeline.recipe import Recipe
from pipeline.verify.autoencoder import SIZES, make_inputs
from pipeline.verify.gates import FACTOR_DB, ROUNDED_DB
from pipeline.verify.reference_hooks import ARITHMETICS, hooked, jittered, operations_jittered
from pipeline.verify.segments import JITTER_ULPS
from pipeline.verify.study import HIT_DB, HITTING_ULPS, QUANTIZER_ULPS

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel
    from export.models.torch_modules import Denoiser
    from pipeline.backends.reference import FakeQuantLinear

# Float32 runs of the reference that each limit is the worst of; of a large model one takes minutes. How much a single
# flip does to an output differs from flip to flip, so that the worse of two runs is too good for some right engines.
SEEDS, SEEDS_OF_LARGE = 8, 2
# A limit below this is of runs that a flipped code has hit.
HIT_LIMIT_DB = HIT_DB - FACTOR_DB


@dataclass
class Limits:
    """The least SQNR in dB against the reference: of every output in all calls, of every quantized linear's output in
    the first."""

    outputs: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)


@dataclass
class ReferenceCalls:
    """inputs: of each call, the first of one sample. outputs: of the reference in each, float32. layers: what every
    quantized linear gives in the first, in the order of computation; low_rank: what its low-rank branch adds to that,
    where it has one. limits: of a target that computes so."""

    inputs: list[Arrays]
    outputs: list[Arrays] = field(default_factory=list)
    layers: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    low_rank: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    limits: dict[Arithmetic, Limits] = field(default_factory=dict)


def reference_calls(
    model: LoadedModel, layers: Sequence[QuantizedLinear], recipe: Recipe, arithmetics: Iterable[Arithmetic]
) -> ReferenceCalls:
    """Make the calls. layers: none of an autoencoder. arithmetics: those that limits are asked for.

    A limit is found as a gate's on steps is (verify/gates.py): the worst of some float32 runs of the reference whose
    quantizers' inputs are moved at random until flipped codes show in all outputs, FACTOR_DB lower, and at most
    ROUNDED_DB; of an autoencoder all operations are moved.
    """
    import torch

    calls = ReferenceCalls(make_calls(model, recipe))
    _run_exact(calls, Reference.make(model, layers, recipe, torch.float64))
    for arithmetic in sorted(set(arithmetics)):
        single = Reference.make(model, layers, recipe, torch.float32)
        with ARITHMETICS[arithmetic].context(single.module):
            calls.limits[arithmetic] = _limits(calls, single, SEEDS_OF_LARGE if is_large(model) else SEEDS)
    return calls


def make_calls(model: LoadedModel, recipe: Recipe) -> list[Arrays]:
    """One of a single sample, and one of several: of a denoiser the first step of pictures, of a text encoder prompts
    without padding, whose rows nobody reads, of an autoencoder sizes that its gates look at."""
    if model.family.half is not None:
        return [make_inputs(model, size, seed) for seed, size in enumerate(SIZES[:2])]
    case = make_case(model, recipe)
    if isinstance(case, TextCase):
        whole = {name: array.copy() for name, array in case.call.items()}
        assert model.family.counted is not None
        whole[model.family.counted][:] = 1
        end_prompts(model, whole)
        whole = take_samples(whole, slice(2), case.shared)
    else:
        whole = first_step(case.first(1 if is_large(model) else 2))
    return [take_samples(whole, slice(1), case.shared), whole]


def first_step(case: Case) -> Arrays:
    """What a denoiser is called with in the first step."""
    seen: list[Arrays] = []

    def run(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        return {"sample": np.zeros_like(inputs["hidden_states"])}

    sampler = make_sampler(case.sampler, case.n_steps, case.timestep_scale)
    Trajectory(run, case.conditioning, case.noise, sampler, case.guidance_scale, case.shared).step()
    return seen[0]


@dataclass(frozen=True)
class Reference:
    """The quantized model as a module, in float64 or float32."""

    module: Denoiser
    dtype: torch.dtype

    @classmethod
    def make(
        cls, model: LoadedModel, layers: Sequence[QuantizedLinear], recipe: Recipe, dtype: torch.dtype
    ) -> Reference:
        from export.models.torch_modules import set_resolution
        from pipeline.backends.reference import fake_quant, reference_module

        if not layers:
            return cls(reference_module(model, {}, dtype), dtype)
        module = cast("Denoiser", fake_quant(model, layers, dtype, recipe.attention.formats))
        set_resolution(module, *model.cells(recipe.sampling.height, recipe.sampling.width))
        return cls(module, dtype)

    @property
    def quantizes(self) -> bool:
        return any(hasattr(part, "layer_name") for part in self.module.modules())

    def run(self, inputs: Arrays, after: Callable[..., None] | None = None) -> Arrays:
        """Outputs of a call, float32; `after(linear, inputs, output)` sees every quantized linear."""
        from pipeline.backends.reference import ReferenceEngine

        with hooked(self.module, lambda *_: None, after):
            outputs = ReferenceEngine(self.module, self.dtype).run(inputs)
        return {name: array.astype(np.float32) for name, array in outputs.items()}

    def moved(self, seed: int, ulps: float) -> AbstractContextManager[None]:
        """Within, its quantizers' inputs are moved at random by up to so much; without any, all operations are."""
        return jittered(self.module, seed, ulps) if self.quantizes else operations_jittered(seed, JITTER_ULPS)


def _run_exact(calls: ReferenceCalls, exact: Reference) -> None:
    def keep(linear: FakeQuantLinear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.layers[linear.layer_name] = output.float().numpy()
        if linear.lora_down is not None:
            calls.low_rank[linear.layer_name] = linear.low_rank(inputs[0]).float().numpy()

    first, *others = calls.inputs
    calls.outputs = [exact.run(first, keep), *map(exact.run, others)]


def _limits(calls: ReferenceCalls, single: Reference, seeds: int) -> Limits:
    """Of so many runs by the least move that shows in an output, or a layer: one that no run hit may still be hit by a
    right engine. What no move hits has the limit of roundings."""
    limits = Limits()
    for ulps in (QUANTIZER_ULPS, *HITTING_ULPS):
        runs = [_errors(calls, single, seed, ulps) for seed in range(seeds)]
        for name in ("outputs", "layers"):
            settled: dict[str, float] = getattr(limits, name)
            moved = _worst([getattr(run, name) for run in runs])
            settled |= {key: db for key, db in moved.items() if not settled.get(key, math.inf) < HIT_LIMIT_DB}
        if not single.quantizes or all(db < HIT_LIMIT_DB for db in (*limits.outputs.values(), *limits.layers.values())):
            break
    return limits


def _errors(calls: ReferenceCalls, single: Reference, seed: int, ulps: float) -> Limits:
    """SQNR of one run, in the worst call."""
    errors = Limits()

    def compare(linear: FakeQuantLinear, _: object, output: torch.Tensor) -> None:
        errors.layers[linear.layer_name] = sqnr_db(calls.layers[linear.layer_name], output.numpy())

    with single.moved(seed, ulps):
        for place, (inputs, expected) in enumerate(zip(calls.inputs, calls.outputs, strict=True)):
            outputs = single.run(inputs, None if place else compare)
            for name, output in outputs.items():
                value = sqnr_db(expected[name], output)
                errors.outputs[name] = float(np.minimum(value, errors.outputs.get(name, math.inf)))  # nan stays nan
    return errors


def _worst(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name the limit: of runs that overflow, nan, which give no tolerance, ROUNDED_DB."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        name: ROUNDED_DB if any(map(math.isnan, dbs)) else min(min(dbs) - FACTOR_DB, ROUNDED_DB)
        for name, dbs in values.items()
    }
