"""A whole pipeline: text encoders, a denoiser of latents and a decoder, each an engine, in NumPy.

What a drawing does stands in the order in which it is done: prompts are encoded, latents denoised, pictures decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np

from export.errors import ContractError, ModelError, RecipeError
from export.models.families import FAMILIES, Input, pixels_per_latent, scale_and_shift, shared_names
from pipeline.backends.base import Arrays
from pipeline.generate.components import Components, PipelineSource, timed
from pipeline.generate.draw import Drawing, DrawRequest, Picture, first_noise
from pipeline.generate.latent_preview import LatentPreview
from pipeline.generate.pipeline_classes import (
    DECODER,
    ENCODER,
    TRANSFORMER,
    TextEncoder,
    class_names,
    class_number,
    find_pipeline_class,
)
from pipeline.generate.sampling import FloatArray, Trajectory, take_samples
from pipeline.generate.schedulers.base import Scheduler, SchedulerOptions, SeededNoise
from pipeline.generate.schedulers.config import read_scheduler_config, scheduler_class
from pipeline.generate.tiles import Tiles
from pipeline.generate.tokenizer import PromptTokenizer

# Prompts that a text encoder is called with at a time.
ENCODED_AT_ONCE = 8
# Enough of a scheduler's steps to see what kind it is, and within any distillation.
FEW_STEPS = 4
# Prompts that people are shown.
EXAMPLES = 6


class ScheduledSteps:
    """A scheduler's steps as a Trajectory takes them, with their noise."""

    def __init__(self, scheduler: Scheduler, noise: SeededNoise) -> None:
        self.scheduler, self.noise = scheduler, noise

    @property
    def timesteps(self) -> FloatArray:
        return self.scheduler.timesteps

    def scaled(self, x: FloatArray, i: int) -> FloatArray:
        """As the model was trained on it."""
        return self.scheduler.scale_model_input(x, i)

    def step(self, x: FloatArray, prediction: FloatArray, i: int) -> tuple[FloatArray, FloatArray]:
        """As of Steps."""
        after = self.scheduler.step(prediction, x, i, self.noise)
        assert self.scheduler.data is not None
        return after, self.scheduler.data

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone."""
        self.scheduler.keep(rows)
        self.noise.keep(rows)


class LatentModel:
    """A PictureModel; its components are loaded when they are needed, and let go in turn unless keep_loaded.

    latent_shape: of a picture's latents, [C, h, w]. shift, factor: latents of the autoencoder are those of the denoiser
    / factor + shift. conditions: inputs of the denoiser that are the same in every call. class_count: without the null
    class, which is numbered behind them.
    """

    batches = 4
    channels = 3

    def __init__(self, source: PipelineSource, keep_loaded: bool = False) -> None:
        """Nothing is loaded yet but tokenizers. Raises ModelError for a pipeline of an unknown kind, or without a
        component that drawing needs, and ContractError for configurations that say too little."""
        self.row = row = find_pipeline_class(source.class_name, source.name)
        needed = (*row.components, *(encoder.tokenizer for encoder in row.encoders))
        if missing := [name for name in needed if name not in {*source.engines, *source.tokenizers}]:
            raise ModelError(
                f"{source.name}: {row.name} draws with {missing[0]}, which it does not have; build that component too"
            )
        self.name, config = source.name, source.transformer
        own = source.settings
        self.n_steps = row.n_steps if own.n_steps is None else own.n_steps
        self.guidance_scale = row.guidance_scale if own.guidance_scale is None else own.guidance_scale
        try:
            self.inputs = _denoiser_inputs(row.denoiser, source)
            cell = pixels_per_latent(source.vae)
            side = config["sample_size"] * cell
            self.height, self.width = source.height or side, source.width or side
            self.latent_shape = (config["in_channels"], self.height // cell, self.width // cell)
            self.factor, self.shift = map(np.float32, scale_and_shift(source.vae))
            self.tiles = Tiles.of_pixels(source.vae)
            self.conditions = row.conditions(config, (self.height, self.width))
            self.class_count = config["num_embeds_ada_norm"] if row.classes else 0
        except KeyError as error:
            raise ContractError(f"{source.name}: its configurations lack {error}; build the bundle again") from error
        self.shared = shared_names(self.inputs)
        self.of_classes, self.classes = bool(row.classes), class_names(source.index)
        self.examples = tuple(list(self.classes)[:EXAMPLES]) or source.prompts[:EXAMPLES]
        self.tokenizers = {
            encoder.component: PromptTokenizer.load(source.tokenizers[encoder.tokenizer], encoder.tokens)
            for encoder in row.encoders
        }
        self.scheduler = read_scheduler_config(source.scheduler, scheduler_class(source.index))
        self._refuse_scheduler(source)
        self.components = Components(source.engines, keep_loaded)
        self.preview = LatentPreview(self.latent_shape[0], cell)
        self.can_encode = ENCODER in source.engines

    def _refuse_scheduler(self, source: PipelineSource) -> None:
        """Raise ModelError for a scheduler that the pipeline's class cannot use."""
        scheduler, channels = self.scheduler.scheduler(SchedulerOptions(FEW_STEPS)), self.latent_shape[0]
        if channels not in scheduler.channels(channels):
            raise ModelError(
                f"{source.scheduler}: its variance_type is learned, and {self.row.name} takes no variance from the "
                "model; use a fixed one"
            )
        if self.row.unit_noise and scheduler.init_noise_sigma != 1:
            raise ModelError(
                f"{source.scheduler}: it begins with noise of deviation {scheduler.init_noise_sigma:g}, and "
                f"{self.row.name} with 1, as in diffusers, which draws nothing that way; use DDIM, DDPM or DPM-Solver++"
            )

    # --- as of PictureModel ------------------------------------------------------------------------------------------

    def check(self, request: DrawRequest) -> None:
        """Raise RecipeError for what it cannot draw, without computing anything."""
        if not request.prompts:
            raise RecipeError("no prompt was given; give at least one")
        if self.row.classes:
            for prompt in (*request.prompts, *(text or "" for text in request.negative_prompts)):
                self._class_number(prompt)
        if request.images and not self.can_encode:
            raise RecipeError(
                f"{self.name} has no {ENCODER}, which a picture is read with; build it with --component {ENCODER}"
            )
        if not self._scale(request.guidance_scale) > 1 and any(request.negative_prompts):
            scale = f"a guidance scale of {request.guidance_scale}"
            raise RecipeError(
                f"a negative prompt has no effect at {scale}, for {self.row.name} is guided above 1 alone"
            )
        request.refuse_noise(self.latent_shape)
        self._scheduler(request.n_steps, request.strength if request.images else 1.0)

    def warnings(self, request: DrawRequest) -> tuple[str, ...]:
        """As of PictureModel: on prompts of which a text encoder does not take all, which is named if there are more
        of them."""
        negative = request.negative_prompts if self._scale(request.guidance_scale) > 1 else ()
        names = {encoder.component: f"{encoder.component}: " for encoder in self.row.encoders}
        sentences = []
        for name, of_encoder in names.items():
            for of_kind, asked in (("", request.prompts), ("negative prompt: ", negative)):
                texts = list(dict.fromkeys(self.row.prepare(text) for text in asked if text))
                prefix = ("" if len(names) == 1 else of_encoder) + of_kind
                sentences += [prefix + cut.sentence for cut in self.tokenizers[name].cuts(texts) if cut is not None]
        return tuple(sentences)

    def calls(self, n_steps: int | None = None, strength: float = 1.0) -> int:
        """As of PictureModel."""
        return len(self._scheduler(n_steps, strength).steps)

    def start(
        self,
        batches: Sequence[Sequence[Picture]],
        n_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float = 1.0,
    ) -> list[Drawing]:
        """As of PictureModel. Pictures and prompts of all batches are encoded here."""
        pictures = [picture for batch in batches for picture in batch]
        images = [picture.image for picture in pictures if picture.image is not None]
        scale, seconds = self._scale(guidance_scale), dict[str, float]()
        guided = scale > 1
        latents = self._encode_images(images, seconds) if images else None
        prompts = [picture.prompt for picture in pictures]
        negative = [picture.negative_prompt or "" for picture in pictures] if guided else []
        condition = self._condition([*prompts, *negative], seconds)
        drawings, end = [], 0
        for batch in batches:
            rows = np.arange(end, end := end + len(batch))
            prompted = take_samples(condition, rows, self.shared)
            plain = take_samples(condition, rows + len(prompts), self.shared) if guided else prompted
            noise = SeededNoise([picture.seed for picture in batch])
            steps = ScheduledSteps(self._scheduler(n_steps, strength if images else 1.0), noise)
            begin = steps.scheduler.start(
                first_noise(batch, self.latent_shape, noise), None if latents is None else latents[rows]
            )
            run = timed(partial(self.components.run, TRANSFORMER), TRANSFORMER, seconds)
            trajectory = Trajectory(
                run, (prompted, plain), begin, steps, scale if guided else 1.0, self.shared, first=steps.scheduler.first
            )
            decode, look = partial(self._decode, seconds=seconds), partial(self._look, seconds=seconds)
            drawings.append(Drawing(batch, trajectory, seconds, decode, look))
            seconds = {}
        return drawings

    def turn(self) -> AbstractContextManager[None]:
        """As of PictureModel."""
        return self.components.turn()

    def close(self) -> None:
        """As of PictureModel."""
        self.components.close()

    # --- one after the other -----------------------------------------------------------------------------------------

    def _scheduler(self, n_steps: int | None, strength: float) -> Scheduler:
        return self.scheduler.scheduler(SchedulerOptions(self.n_steps if n_steps is None else n_steps, strength))

    def _scale(self, guidance_scale: float | None) -> float:
        return self.guidance_scale if guidance_scale is None else guidance_scale

    def _class_number(self, prompt: str) -> int:
        return class_number(prompt, self.classes, self.class_count)

    def _condition(self, prompts: Sequence[str], seconds: dict[str, float]) -> Arrays:
        """All inputs of the denoiser but latents and timestep, for B prompts."""
        arrays: Arrays = {}
        if self.row.classes:
            arrays[self.row.classes] = np.array([self._class_number(prompt) for prompt in prompts], np.int64)
        for encoder in self.row.encoders:
            arrays |= self._encode(encoder, [self.row.prepare(prompt) for prompt in prompts], seconds)
        for name, value in self.conditions.items():
            arrays[name] = value if name in self.shared else np.repeat(value, len(prompts), axis=0)
        kinds = {row.name: row.dtype for row in self.inputs}
        return {name: value.astype(kinds[name], copy=False) for name, value in arrays.items() if name in kinds}

    def _encode(self, encoder: TextEncoder, texts: Sequence[str], seconds: dict[str, float]) -> Arrays:
        """States and masks of texts, each of which is encoded once."""
        distinct = list(dict.fromkeys(texts))
        run = timed(partial(self.components.run, encoder.component), encoder.component, seconds)
        states, masks = [], []
        for first in range(0, len(distinct), ENCODED_AT_ONCE):
            tokens = self.tokenizers[encoder.component](distinct[first : first + ENCODED_AT_ONCE])
            outputs = run({"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask})
            states.append(outputs["last_hidden_state"].astype(np.float32, copy=False))
            masks.append(tokens.attention_mask)
        rows = [distinct.index(text) for text in texts]
        return {encoder.states: np.concatenate(states)[rows], encoder.mask: np.concatenate(masks)[rows]}

    def _encode_images(self, images: Sequence[FloatArray], seconds: dict[str, float]) -> FloatArray:
        """Latents [B, C, h, w] of B pictures from -1 to 1: the likeliest ones, as the denoiser knows them."""
        run = timed(partial(self.components.run, ENCODER), ENCODER, seconds)
        moments = self.tiles.encode(run, np.stack(images))
        mean = moments[:, : self.latent_shape[0]]
        return np.asarray((mean - self.shift) * self.factor, np.float32)

    def _decode(self, latents: FloatArray, seconds: dict[str, float]) -> FloatArray:
        """Pictures [B, 3, H, W], about from -1 to 1, of latents; one by one, large ones in tiles, for a decoder takes
        much memory."""
        run = timed(partial(self.components.run, DECODER), DECODER, seconds)
        scaled = latents / self.factor + self.shift
        pictures = self.tiles.decode(run, scaled)
        self.preview.learn(latents, pictures)
        return pictures

    def _look(self, latents: FloatArray, seconds: dict[str, float]) -> FloatArray:
        """The same, roughly and at once; the first ones of all are decoded, for the others to be learned from."""
        return self.preview(latents) if self.preview.is_ready else self._decode(latents, seconds)


def _denoiser_inputs(class_name: str, source: PipelineSource) -> tuple[Input, ...]:
    """What the denoiser takes. Raises ModelError for a configuration of another class."""
    config = source.transformer
    families = (row for row in FAMILIES.values() if row.class_name == class_name and row.matches(config))
    family = next(families, None)
    if family is None:
        raise ModelError(f"{source.name}: no {class_name} is known of its transformer's configuration")
    return family.inputs(config)
