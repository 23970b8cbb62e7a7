"""What an engine is measured against: pictures, steps and layer inputs of the reference in float64, and how far the
reference's own float32 runs and the float model are from them.

Rounding makes a float32 run flip a code wherever a quantizer's input lies within rounding error of a midpoint, and a
flip changes everything after it. So the tolerance is measured, not set: REALISATIONS float32 runs of the reference,
each with its quantizers' inputs moved at random by up to JITTER_ULPS, are equally right ways of computing one model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
# A model below this size is verified on SMALL_PICTURES pictures and REALISATIONS runs, a larger one on the recipe's
# batch and one run: its codes are so many that one run already averages over thousands of flips.
SMALL_PARAMETERS, SMALL_PICTURES, REALISATIONS = 50_000_000, 4, 2
# Between two quantizers lie about ten float32 operations, each rounding once and in an order of the runtime's choice:
# inputs of two correct runs differ by a few units in the last place.
JITTER_ULPS = 2.0


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
class Study:
    """Results of the reference. Steps run on the same inputs `calls`, the float64 reference's trajectory.

    exact, plain: outputs of the float64 reference and of the float model per step. images: final pictures by run:
    "reference", "float", "fp32 0", ... fp32: one for each realisation. probed: the steps whose layers are looked at;
    layer_inputs: float64 reference's input of each linear in these steps, [rows, K] float32; layer_db: the worst
    float32 run's, by layer.
    """

    case: Case
    calls: list[Arrays] = field(default_factory=list)
    exact: list[NDArray[Any]] = field(default_factory=list)
    plain: list[NDArray[Any]] = field(default_factory=list)
    images: dict[str, NDArray[Any]] = field(default_factory=dict)
    fp32: list[StepErrors] = field(default_factory=list)
    probed: tuple[int, ...] = ()
    layer_inputs: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    layer_db: dict[str, float] = field(default_factory=dict)

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
    return "a {colour} {shape} {relation} a {second colour} {second shape} on {background}".format_map(chosen)


def _class(conditioning: Mapping[str, Any], rng: np.random.Generator, index: int) -> str:
    return str(conditioning["names"][int(rng.integers(len(conditioning["names"])))])


def _numbered(conditioning: Mapping[str, Any], rng: np.random.Generator, index: int) -> str:
    return f"prompt {index}"


PROMPTS: dict[str, Callable[[Mapping[str, Any], np.random.Generator, int], str]] = {
    "vocabulary": _scene,
    "classes": _class,
    "synthetic": _numbered,
}


def study(model: LoadedModel, layers: Sequence[QuantizedLinear], recipe: Recipe) -> Study:
    """Run float64 reference, float32 realisations and float model, one after the other, each freed before the next."""
    import torch

    from export.torch_modules import Denoiser, set_resolution, with_modules
    from pipeline.backends.reference import ReferenceEngine, fake_quant

    def engine(module: Any, dtype: torch.dtype) -> ReferenceEngine:
        set_resolution(module, *found.case.noise.shape[2:])
        return ReferenceEngine(module.to(dtype) if dtype == torch.float64 else module, dtype)

    found = Study(make_case(model, recipe))
    found.probed = tuple(sorted({0, found.case.n_steps // 2, found.case.n_steps - 1}))
    _run_exact(found, engine(fake_quant(model, layers, torch.float64), torch.float64))
    for index in range(1 if _is_large(model) else REALISATIONS):
        _run_realisation(found, engine(fake_quant(model, layers, torch.float32), torch.float32), index)
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


def _run_realisation(found: Study, engine: Any, index: int) -> None:
    with jittered(engine.module, seed=index):
        found.images[f"fp32 {index}"] = found.case.draw(engine.run)
        with recording(engine.module) as record:
            found.fp32.append(found.errors(_recorded(engine.run, record, found.probed)))
    for name, inputs in record.inputs.items():
        worst = layer_input_db(found.layer_inputs[name], inputs)
        found.layer_db[name] = min(worst, found.layer_db.get(name, np.inf))


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
def jittered(module: Any, seed: int) -> Iterator[None]:
    """Move every quantizer's input by up to JITTER_ULPS: of the number itself, and of its row's root mean square (what
    an error made before a cancellation leaves)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def move(part: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return (x + noise * size * (JITTER_ULPS * ROUNDING), *arguments[1:])

    with _hooked(module, move):
        yield


@contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "layer_name"):
                stack.callback(part.register_forward_pre_hook(hook).remove)
        yield
