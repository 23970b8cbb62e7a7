"""The pictures that an engine is verified and measured on: prompts, noise and sampler."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.models.description import Description, sample_inputs
from pipeline.backends.base import Arrays
from pipeline.generate.conditioning import GENERATION_FILE, Generation, load_generation
from pipeline.generate.sampling import make_sampler, sample, take_samples
from pipeline.progress import raise_if_stopped
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from export.models.load import LoadedModel

Run = Callable[[Arrays], Arrays]
# A model below this size is verified on at least SMALL_PICTURES pictures, a larger one on the recipe's batch.
SMALL_PARAMETERS, SMALL_PICTURES = 50_000_000, 4


@dataclass(frozen=True)
class Case:
    """How the pictures of a verification are made; `output` is "pixels" or "latents".

    shared: names of the conditioning's inputs that have no batch axis.
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

    def draw(self, run: Run, on_step: Callable[[int, Arrays, Arrays], None] | None = None) -> NDArray[np.float32]:
        """Pictures (or latents) [B, C, H, W] by this denoiser."""
        sampler = make_sampler(self.sampler, self.n_steps, self.timestep_scale)

        def watched(inputs: Arrays) -> Arrays:
            raise_if_stopped()
            return run(inputs)

        return sample(watched, self.conditioning, self.noise, sampler, self.guidance_scale, on_step, self.shared)

    def shown(self, output: NDArray[Any]) -> NDArray[Any]:
        """The part of a denoiser's output that the sampler uses: a learned sigma is dropped."""
        return output[:, : self.noise.shape[1]]

    def first(self, count: int) -> Case:
        """The case of the first `count` pictures alone."""
        prompted, plain = (take_samples(part, slice(count), self.shared) for part in self.conditioning)
        return replace(self, prompts=self.prompts[:count], conditioning=(prompted, plain), noise=self.noise[:count])


def make_case(model: LoadedModel, recipe: Recipe, pictures: int = 0) -> Case:
    """As `described_case`. pictures: 0 for as many as a verification of this model needs."""
    least = recipe.sampling.batch_size
    return described_case(model, recipe, pictures or (least if is_large(model) else max(least, SMALL_PICTURES)))


def described_case(model: Description, recipe: Recipe, count: int) -> Case:
    """Prompts, noise and sampler of `count` pictures by the recipe; a model without generation.json gets random
    conditioning."""
    sampling = recipe.sampling
    drawn = sample_inputs(model, count, sampling.seed, sampling.height, sampling.width)
    noise = np.random.default_rng(sampling.seed).standard_normal(drawn["hidden_states"].shape).astype(np.float32)
    case = _conditioned(model, recipe, count)
    case = replace(case, noise=noise, shared=model.shared)
    return replace(case, n_steps=sampling.n_steps, guidance_scale=sampling.guidance_scale)


def _conditioned(model: Description, recipe: Recipe, count: int) -> Case:
    """Prompts, conditioning and sampler; the rest is filled in by `described_case`."""
    size, seed, empty = (recipe.sampling.height, recipe.sampling.width), recipe.sampling.seed, np.zeros(0, np.float32)
    if not (model.folder / GENERATION_FILE).is_file():
        drawn = [_conditioning(sample_inputs(model, count, seed + i, *size)) for i in range(2)]
        return Case(("random",) * count, (drawn[0], drawn[1]), empty, "ddim", 1000.0, 1, 1.0, "latents")
    generation = load_generation(model.folder)
    prompts = example_prompts(generation, count, seed)
    encoded = generation.encode(prompts)
    return Case(
        tuple(prompts), encoded, empty, generation.sampler, generation.timestep_scale, 1, 1.0, generation.output
    )


def is_large(model: LoadedModel) -> bool:
    """Is the model too large to be run many times?"""
    return model.parameters > SMALL_PARAMETERS


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
