"""What an engine is measured against: pictures, steps and layer inputs of the reference in float64, and how far the
reference's own float32 runs and the float model are from them.

Rounding makes a float32 run flip a code wherever a quantizer's input lies within rounding error of a midpoint, and a
flip changes everything after it. So the tolerance is measured, not set: REALISATIONS float32 runs of the reference,
each with its quantizers' inputs moved at random by up to JITTER_ULPS, are equally right ways of computing one model. A
target that computes parts in FP16 is measured against float32 runs that round the same parts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from pipeline.backends.base import Arrays
from pipeline.conditioning import GENERATION_FILE, Generation, load_generation
from pipeline.gates import ROUNDING, sqnr_db
from pipeline.recipe import Recipe
from pipeline.sampling import make_sampler, sample

if TYPE_CHECKING:
    import torch

    from export.models import LoadedModel

logger = logging.getLogger(__name__)
Run = Callable[[Arrays], Arrays]
# A model below this size is verified on at least SMALL_PICTURES pictures, and on up to REALISATIONS float32 runs until
# ENOUGH_SAMPLES samples are seen. A larger one on the recipe's batch and one run, which has thousands of flips.
SMALL_PARAMETERS, SMALL_PICTURES, REALISATIONS, ENOUGH_SAMPLES = 50_000_000, 4, 2, 100
# Between two quantizers lie about ten float32 operations, each rounding once and in an order of the runtime's choice:
# inputs of two correct runs differ by a few units in the last place.
JITTER_ULPS = 2.0
# Flips are rare in small models: some samples have none, and what one flip does varies widely. For limits on the worst
# sample the jitter grows until most samples are hit (their SQNR is below what float operations alone leave).
HITTING_ULPS = (8.0, 32.0, 128.0, 512.0)
HIT_DB, HIT_SHARE = 100.0, 0.75
# The rtx lowering gives unquantized linears of this many weights FP16 operands, where the recipe lets it.
HALF_LINEAR_ELEMENTS = 2**20


@dataclass(frozen=True)
class Case:
    """How the pictures of a verification are made; `output` is "pixels" or "latents"."""

    prompts: tuple[str, ...]
    conditioning: tuple[Arrays, Arrays]
    noise: NDArray[np.float32]
    sampler: str
    timestep_scale: float
    n_steps: int
    guidance_scale: float
    output: str

    def draw(self, run: Run, on_step: Callable[[int, Arrays, Arrays], None] | None = None) -> NDArray[np.float32]:
        """Pictures (or latents) [B, C, H, W] by this denoiser."""
        sampler = make_sampler(self.sampler, self.n_steps, self.timestep_scale)
        return sample(run, self.conditioning, self.noise, sampler, self.guidance_scale, on_step)

    def shown(self, output: NDArray[Any]) -> NDArray[Any]:
        """The part of a denoiser's output that the sampler uses: a learned sigma is dropped."""
        return output[:, : self.noise.shape[1]]


@dataclass(frozen=True)
class StepErrors:
    """A denoiser against the float64 reference on every step's inputs: SQNR in dB of each step, and of each sample of
    each step (prompted and unprompted, [n_steps * batch]); how many output values are not finite."""

    steps_db: list[float]
    samples_db: list[float]
    nonfinite: int


@dataclass
class Realisations:
    """Float32 runs of the reference in one arithmetic.

    errors, images: of the plain runs; layer_db: by layer the worst run's SQNR of its input in the probed steps.
    hit_errors, hit_images: of runs in which flips hit most samples (the plain ones where they do).
    """

    errors: list[StepErrors] = field(default_factory=list)
    images: list[NDArray[Any]] = field(default_factory=list)
    layer_db: dict[str, float] = field(default_factory=dict)
    hit_errors: list[StepErrors] = field(default_factory=list)
    hit_images: list[NDArray[Any]] = field(default_factory=list)


@dataclass
class Study:
    """Results of the reference. Steps run on the same inputs `calls`, the float64 reference's trajectory.

    exact, plain: outputs of the float64 reference and of the float model per step. images: final pictures of the runs
    "reference" and "float". float32: the reference's float32 runs by arithmetic. probed: the steps whose
    layers are looked at; layer_inputs: float64 reference's input of each linear in them, [rows, K] float32.
    """

    case: Case
    calls: list[Arrays] = field(default_factory=list)
    exact: list[NDArray[Any]] = field(default_factory=list)
    plain: list[NDArray[Any]] = field(default_factory=list)
    images: dict[str, NDArray[Any]] = field(default_factory=dict)
    float32: dict[str, Realisations] = field(default_factory=dict)
    probed: tuple[int, ...] = ()
    layer_inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    @property
    def quant_db(self) -> list[float]:
        """Reference against float model, per step."""
        pairs = zip(self.plain, self.exact, strict=True)
        return [sqnr_db(self.case.shown(plain), self.case.shown(exact)) for plain, exact in pairs]

    def errors(self, run: Run) -> StepErrors:
        """Run a denoiser on every step's inputs."""
        outputs = [self.case.shown(run(call)["sample"]) for call in self.calls]
        pairs = [(self.case.shown(exact), output) for exact, output in zip(self.exact, outputs, strict=True)]
        return StepErrors(
            [sqnr_db(exact, output) for exact, output in pairs],
            [sqnr_db(one, other) for exact, output in pairs for one, other in zip(exact, output, strict=True)],
            sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs),
        )


def make_case(model: LoadedModel, recipe: Recipe) -> Case:
    """Prompts, noise and sampler by the recipe; a model without generation.json gets random conditioning."""
    from export.models import sample_inputs

    wanted = recipe.sampling
    count = wanted.batch_size if _is_large(model) else max(wanted.batch_size, SMALL_PICTURES)
    drawn = sample_inputs(model, count, wanted.seed, wanted.height, wanted.width)
    noise = np.random.default_rng(wanted.seed).standard_normal(drawn["hidden_states"].shape).astype(np.float32)
    made = _conditioned(model, recipe, count)
    return replace(made, noise=noise, n_steps=wanted.n_steps, guidance_scale=wanted.guidance_scale)


def _conditioned(model: LoadedModel, recipe: Recipe, count: int) -> Case:
    """Prompts, conditioning and sampler; the rest is filled in by `make_case`."""
    from export.models import sample_inputs

    size, seed, empty = (recipe.sampling.height, recipe.sampling.width), recipe.sampling.seed, np.zeros(0, np.float32)
    if not (model.folder / GENERATION_FILE).is_file():
        drawn = [_conditioning(sample_inputs(model, count, seed + i, *size)) for i in range(2)]
        return Case(("random",) * count, (drawn[0], drawn[1]), empty, "ddim", 1000.0, 1, 1.0, "latents")
    made = load_generation(model.folder)
    prompts = example_prompts(made, count, seed)
    encoded = made.encode(prompts)
    return Case(tuple(prompts), encoded, empty, made.sampler, made.timestep_scale, 1, 1.0, made.output)


def _is_large(model: LoadedModel) -> bool:
    return sum(tensor.numel() for tensor in model.module.parameters()) > SMALL_PARAMETERS


def _conditioning(inputs: Arrays) -> Arrays:
    return {name: value for name, value in inputs.items() if name not in ("hidden_states", "timestep")}


def example_prompts(generation: Generation, count: int, seed: int) -> list[str]:
    """Prompts that the model understands, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [PROMPTS[generation.conditioning["kind"]](generation.conditioning, rng, index) for index in range(count)]


def _scene(conditioning: Mapping[str, Any], rng: np.random.Generator, _: int) -> str:
    words = {
        slot["name"]: [word for word in slot["words"] if word not in ("alone", "none")]
        for slot in conditioning["slots"]
    }
    chosen = {name: words[name][rng.integers(len(words[name]))] for name in words}
    sentence = "a {colour} {shape} {relation} a {second colour} {second shape} on {background}".format_map(chosen)
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def _class(conditioning: Mapping[str, Any], rng: np.random.Generator, index: int) -> str:
    return str(conditioning["names"][int(rng.integers(len(conditioning["names"])))])


def _numbered(conditioning: Mapping[str, Any], rng: np.random.Generator, index: int) -> str:
    return f"prompt {index}"


PROMPTS: dict[str, Callable[[Mapping[str, Any], np.random.Generator, int], str]] = {
    "vocabulary": _scene,
    "classes": _class,
    "synthetic": _numbered,
}


def study(
    model: LoadedModel, layers: Sequence[QuantizedLinear], recipe: Recipe, arithmetics: Collection[str] = ("fp32",)
) -> Study:
    """Run float64 reference, float32 realisations and float model, one after the other, each freed before the next.

    arithmetics: "fp32", or "fp16" for parts in FP16, as the targets under test have it.
    """
    import torch

    from export.torch_modules import Denoiser, set_resolution, with_modules
    from pipeline.backends.reference import ReferenceEngine, fake_quant

    def engine(module: Any, dtype: torch.dtype) -> ReferenceEngine:
        set_resolution(module, *found.case.noise.shape[2:])
        return ReferenceEngine(module.to(dtype) if dtype == torch.float64 else module, dtype)

    found = Study(make_case(model, recipe))
    found.probed = tuple(sorted({0, found.case.n_steps // 2, found.case.n_steps - 1}))
    _run_exact(found, engine(fake_quant(model, layers, torch.float64), torch.float64))
    single = engine(fake_quant(model, layers, torch.float32), torch.float32)
    for arithmetic in sorted(set(arithmetics)):
        with ARITHMETICS[arithmetic](single.module):
            found.float32[arithmetic] = _realisations(found, single, 1 if _is_large(model) else REALISATIONS)
    del single
    names = tuple(row.name for row in model.inputs)
    _run_float(found, engine(Denoiser(with_modules(model.module, {}), model.family, names), torch.float32))
    return found


def _run_exact(found: Study, engine: Any) -> None:
    """The trajectory in float64; x_t is rounded to float32 at every step, so that all runs get the same inputs."""

    def keep(i: int, inputs: Arrays, outputs: Arrays) -> None:
        found.calls.append(inputs)
        found.exact.append(outputs["sample"])

    with recording(engine.module) as record:
        found.images["reference"] = found.case.draw(_recorded(engine.run, record, found.probed), keep)
        found.layer_inputs = record.inputs


def _recorded(run: Run, record: Recorder, probed: Sequence[int]) -> Run:
    """`run`, with the recorder switched on in the steps `probed`."""
    steps = iter(range(10**9))

    def call(inputs: Arrays) -> Arrays:
        record.active = next(steps) in probed
        return run(inputs)

    return call


def _realisations(found: Study, engine: Any, count: int) -> Realisations:
    made = Realisations()
    for seed in range(count):
        if sum(len(run.samples_db) for run in made.errors) >= ENOUGH_SAMPLES:
            break
        with jittered(engine.module, seed, JITTER_ULPS):
            made.images.append(found.case.draw(engine.run))
            with recording(engine.module) as record:
                made.errors.append(found.errors(_recorded(engine.run, record, found.probed)))
        for name, inputs in record.inputs.items():
            worst = layer_input_db(found.layer_inputs[name], inputs)
            made.layer_db[name] = min(worst, made.layer_db.get(name, np.inf))
    _add_hits(found, engine, made)
    return made


def _add_hits(found: Study, engine: Any, made: Realisations) -> None:
    """Raise the jitter until flips hit most samples."""
    made.hit_errors, made.hit_images = made.errors, made.images
    for ulps in HITTING_ULPS:
        if most_are_hit(made.hit_errors):
            return
        with jittered(engine.module, len(made.errors), ulps):
            made.hit_errors, made.hit_images = [found.errors(engine.run)], [found.case.draw(engine.run)]


def most_are_hit(errors: Sequence[StepErrors]) -> bool:
    """Do flips touch at least HIT_SHARE of all samples?"""
    return float(np.mean([value < HIT_DB for run in errors for value in run.samples_db])) >= HIT_SHARE


def _run_float(found: Study, engine: Any) -> None:
    found.plain = [engine.run(call)["sample"] for call in found.calls]
    found.images["float"] = found.case.draw(engine.run)


def layer_input_db(reference: Sequence[NDArray[Any]], inputs: Sequence[NDArray[Any]]) -> float:
    """SQNR of a layer's inputs over all probed steps; nan where the shapes do not fit."""
    if [item.shape for item in reference] != [item.shape for item in inputs]:
        return float("nan")
    return sqnr_db(np.concatenate(reference), np.concatenate(inputs))


# --- hooks on the reference -----------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Inputs of every quantized linear, [rows, K] float32, one array for each recorded call."""

    active: bool = True
    inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if self.active:
            x = arguments[0].detach()
            self.inputs.setdefault(module.layer_name, []).append(x.reshape(-1, x.shape[-1]).float().numpy().copy())


@contextmanager
def recording(module: Any) -> Iterator[Recorder]:
    """Record what the quantized linears of the reference `module` read."""
    record = Recorder()
    with _hooked(module, record):
        yield record


@contextmanager
def jittered(module: Any, seed: int, ulps: float) -> Iterator[None]:
    """Move every quantizer's input by up to `ulps`: of the number itself, and of its row's root mean square (what
    an error made before a cancellation leaves)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def move(part: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return (x + noise * size * (ulps * ROUNDING), *arguments[1:])

    with _hooked(module, move):
        yield


@contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def half_parts(module: Any) -> Iterator[None]:
    """Attention, and large unquantized linears, round operands and result to FP16; sums and softmax stay float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class HalfAttention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            operands = [argument.half().float() for argument in args[:3]]
            return func(*operands, *args[3:], **(kwargs or {})).half().float()

    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.numel() >= HALF_LINEAR_ELEMENTS:
                stack.callback(part.register_forward_pre_hook(lambda _, inputs: inputs[0].half().float()).remove)
                stack.callback(part.register_forward_hook(lambda _, inputs, output: output.half().float()).remove)
        stack.enter_context(HalfAttention())
        yield


# Arithmetic of a target -> context in which the reference's module computes so.
ARITHMETICS: dict[str, Callable[[Any], Any]] = {"fp32": nullcontext, "fp16": half_parts}
