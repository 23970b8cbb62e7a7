"""How the pictures of a subject are drawn by any denoiser: by the model's own sampler, or in its diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import Json
from export.models.load import LoadedModel
from pipeline.backends.base import Arrays
from pipeline.generate.conditioning import Generation
from pipeline.generate.diffusers_adapter import EngineTransformer
from pipeline.generate.pipeline_folder import INDEX, identity, open_pipeline, read_index
from pipeline.generate.sampling import make_sampler, sample
from pipeline.generate.schedulers.config import scheduler_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pictures = NDArray[np.float32]
Run = Callable[[Arrays], Arrays]


class Painter(Protocol):
    """facts: what decides the pictures, beside model, prompts and seed."""

    @property
    def facts(self) -> Json: ...

    def draw(self, run: Run, prompts: Sequence[str], first: int) -> Pictures:
        """Of the prompts that begin with number `first`, by the denoiser `run`: [B, C, H, W] from about -1 to 1."""


@dataclass(frozen=True)
class PixelPainter:
    """Of a model of pixels. noise: of every picture, [N, C, H, W]."""

    generation: Generation
    noise: Pictures

    @property
    def facts(self) -> Json:
        own = self.generation
        return {"sampler": own.sampler, "n_steps": own.n_steps, "guidance_scale": own.guidance_scale}

    def draw(self, run: Run, prompts: Sequence[str], first: int) -> Pictures:
        """As of a Painter."""
        own = self.generation
        sampler = make_sampler(own.sampler, own.n_steps, own.timestep_scale)
        noise = self.noise[first : first + len(prompts)]
        return sample(run, own.encode(list(prompts)), noise, sampler, own.guidance_scale)


@dataclass(frozen=True)
class PipelinePainter:
    """Of a model of latents, in the pipeline at `root`, whose other parts are float32. Each picture has a seed of its
    own."""

    root: Path
    model: LoadedModel
    n_steps: int
    guidance_scale: float
    seed: int

    @property
    def facts(self) -> Json:
        settings = {"n_steps": self.n_steps, "guidance_scale": self.guidance_scale}
        return {"sampler": scheduler_class(read_index(self.root / INDEX)), **settings, "parts": identity(self.root)}

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        pipeline = open_pipeline(self.root, EngineTransformer(Running(_nothing), self.model.family, self.model.config))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, run: Run, prompts: Sequence[str], first: int) -> Pictures:
        """As of a Painter."""
        self.pipeline.transformer.engine = Running(run)
        seeds = range(self.seed + first, self.seed + first + len(prompts))
        pictures: torch.Tensor = self.pipeline(
            list(prompts), num_inference_steps=self.n_steps, guidance_scale=self.guidance_scale, output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], use_resolution_binning=False,
            clean_caption=False,
        ).images  # fmt: skip
        return (pictures.float() * 2 - 1).numpy()


@dataclass(frozen=True)
class Running:
    """An engine that is a function."""

    run: Run

    def close(self) -> None:
        """Nothing is held."""


def _nothing(inputs: Arrays) -> NoReturn:
    raise RuntimeError("no denoiser is in the pipeline yet")
