"""What an engine is verified and measured on: pictures of a denoiser by prompts, noise and sampler, or prompts that a
text encoder is called with. An autoencoder, which is measured alone by it, is called with random numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.models.description import NO_CELLS, Cells, Description, sample_inputs
from export.models.families import STEP_INPUTS
from pipeline.backends.base import Arrays, only
from pipeline.generate.conditioning import GENERATION_FILE, Conditioning, Generation, load_generation
from pipeline.generate.sampling import make_sampler, sample, take_samples
from pipeline.generate.scene_grammar import ALONE, NONE
from pipeline.progress import raise_if_stopped
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LoadedModel

Run = Callable[[Arrays], Arrays]
DType = TypeVar("DType", bound=np.generic)
# A model below this size is verified on at least SMALL_PICTURES pictures, each of several steps, or on SMALL_PROMPTS
# prompts; a larger one on the recipe's batch. Flips hit few samples of a small model: the median of four says little.
SMALL_PARAMETERS, SMALL_PICTURES, SMALL_PROMPTS = 50_000_000, 4, 16


@dataclass(frozen=True)
class Case:
    """How the pictures of a verification are made; `output` is "pixels" or "latents".

    shared: names of the conditioning's inputs that have no batch axis. size: height and width of the latents, where
    the shape of the noise does not end with them: of tokens that a pipeline makes of them first.
    """

    prompts: tuple[str, ...]
    conditioning: tuple[Arrays, Arrays]
    noise: NDArray[np.float32]
    sampler: str
    timestep_scale: float
    n_steps: int
    guidance_scale: float
    output: str
    shared: frozenset[str] = frozenset()
    size: Cells | None = None
    makes_pictures: ClassVar[bool] = True

    @property
    def cells(self) -> Cells:
        """Height and width of the latents."""
        height, width = self.size or self.noise.shape[-2:]
        return height, width

    def draw(self, run: Run, on_step: Callable[[int, Arrays, Arrays], None] | None = None) -> NDArray[np.float32]:
        """Pictures (or latents) [B, C, H, W] by this denoiser."""
        sampler = make_sampler(self.sampler, self.n_steps, self.timestep_scale)

        def watched(inputs: Arrays) -> Arrays:
            raise_if_stopped()
            return run(inputs)

        return sample(watched, self.conditioning, self.noise, sampler, self.guidance_scale, on_step, self.shared)

    def shown(self, output: NDArray[DType]) -> NDArray[DType]:
        """The part of a denoiser's output that the sampler uses: a learned sigma is dropped."""
        return output[:, : self.noise.shape[1]]

    def first(self, count: int) -> Case:
        """The case of the first `count` pictures alone."""
        prompted, plain = (take_samples(part, slice(count), self.shared) for part in self.conditioning)
        return replace(self, prompts=self.prompts[:count], conditioning=(prompted, plain), noise=self.noise[:count])


@dataclass(frozen=True)
class TextCase:
    """What a text encoder is called with: one call for all prompts. call: its inputs [prompts, tokens].

    It is one step of a way of one step, whose end is the embeddings [prompts, tokens, C].
    """

    prompts: tuple[str, ...]
    call: Arrays
    shared: frozenset[str] = frozenset()
    makes_pictures: ClassVar[bool] = False
    n_steps: ClassVar[int] = 1
    cells: ClassVar[Cells] = NO_CELLS

    def draw(self, run: Run, on_step: Callable[[int, Arrays, Arrays], None] | None = None) -> NDArray[np.float32]:
        """The embeddings of all prompts by this encoder."""
        raise_if_stopped()
        outputs = run(self.call)
        if on_step is not None:
            on_step(0, self.call, outputs)
        return only(outputs)

    def shown(self, output: NDArray[DType]) -> NDArray[DType]:
        """All of an output."""
        return output

    def first(self, count: int) -> TextCase:
        """The case of the first `count` prompts alone."""
        return replace(self, prompts=self.prompts[:count], call=take_samples(self.call, slice(count), self.shared))


AnyCase = Case | TextCase


def make_case(model: LoadedModel, recipe: Recipe, pictures: int = 0) -> AnyCase:
    """As `described_case`. pictures: 0 for as many as a verification of this model needs."""
    least, small = recipe.sampling.batch_size, SMALL_PICTURES if model.family.steps else SMALL_PROMPTS
    return described_case(model, recipe, pictures or (least if is_large(model) else max(least, small)))


def described_case(model: Description, recipe: Recipe, count: int) -> AnyCase:
    """As `picture_case`; of a text encoder random ids of as many prompts, of random lengths, of an autoencoder as many
    random inputs."""
    if model.family.steps:
        return picture_case(model, recipe, count)
    return TextCase(("random",) * count, sample_inputs(model, count, recipe.sampling.seed), model.shared)


def picture_case(model: Description, recipe: Recipe, count: int) -> Case:
    """Prompts, noise and sampler of `count` pictures by the recipe; a model without generation.json gets random
    conditioning."""
    sampling, seed = recipe.sampling, recipe.sampling.seed
    drawn = sample_inputs(model, count, seed, sampling.height, sampling.width)
    noise = np.random.default_rng(seed).standard_normal(drawn["hidden_states"].shape).astype(np.float32)
    steps, guidance = sampling.n_steps, sampling.guidance_scale
    if not (model.folder / GENERATION_FILE).is_file():
        others = sample_inputs(model, count, seed + 1, sampling.height, sampling.width)
        both, prompts = (_conditioning(drawn), _conditioning(others)), ("random",) * count
        recordings = model.family.recordings
        sampler, scale = ("ddim", 1000.0) if recordings is None else recordings.sampler
        if recordings is not None and recordings.is_told_guidance:
            guidance = 1.0
        cells = model.cells(sampling.height, sampling.width)
        return Case(prompts, both, noise, sampler, scale, steps, guidance, "latents", model.shared, cells)
    stated = load_generation(model.folder)
    prompts = tuple(example_prompts(stated, count, seed))
    both, scale = stated.encode(list(prompts)), stated.timestep_scale
    return Case(prompts, both, noise, stated.sampler, scale, steps, guidance, stated.output, model.shared)


def is_large(model: LoadedModel) -> bool:
    """Is the model too large to be run many times?"""
    return model.parameters > SMALL_PARAMETERS


def _conditioning(inputs: Arrays) -> Arrays:
    return {name: value for name, value in inputs.items() if name not in STEP_INPUTS}


def example_prompts(generation: Generation, count: int, seed: int) -> list[str]:
    """Prompts that the model understands, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [_example(generation.conditioning, rng, index) for index in range(count)]


def _example(conditioning: Conditioning, rng: np.random.Generator, index: int) -> str:
    if conditioning["kind"] == "synthetic":
        return f"prompt {index}"
    if conditioning["kind"] == "classes":
        return conditioning["names"][int(rng.integers(len(conditioning["names"])))]
    chosen = {}
    for slot in conditioning["slots"]:
        words = [word for word in slot["words"] if word not in (ALONE, NONE)]
        chosen[slot["name"]] = words[rng.integers(len(words))]
    sentence = "a {colour} {shape} {relation} a {second colour} {second shape} on {background}".format_map(chosen)
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)
