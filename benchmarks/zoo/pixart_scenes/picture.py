"""Pictures of a working folder: the pipeline of what is trained so far, drawing held-out captions, and reading them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from transformers import T5Tokenizer

from benchmarks.zoo.pixart_scenes import board, caption_reader, parts, reader
from benchmarks.zoo.pixart_scenes.captions import captions
from benchmarks.zoo.pixart_scenes.train import Look, Plan, new_denoiser, tokenizer_of, trained

logger = logging.getLogger(__name__)
GUIDANCE = 2.0  # as recipes have it
BATCH_SIZE = 50
SHEET_COLUMNS, SHEET_COUNT, SHEET_ZOOM = 10, 50, 2


def assemble(
    tokenizer: T5Tokenizer, vae: AutoencoderKL, models: torch.nn.Module, scaling_factor: float
) -> PixArtAlphaPipeline:
    """The diffusers pipeline of these parts."""
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=models["text_encoder"],
        vae=vae,
        transformer=models["transformer"],
        scheduler=parts.scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(plan: Plan, work_dir: Path, seed: int) -> PixArtAlphaPipeline:
    """Of the averaged weights of a working folder, as far as they are trained."""
    tokenizer = tokenizer_of(work_dir, seed)
    vae = trained(plan.autoencoder, parts.autoencoder(), work_dir)
    models = trained(plan.denoiser, new_denoiser(len(tokenizer)), work_dir)
    return assemble(tokenizer, vae, models, json.loads((work_dir / "scaling_factor.json").read_text(encoding="utf-8")))


def draw(
    pipeline: PixArtAlphaPipeline, prompts: list[str], seed: int, n_steps: int, most_tokens: int = 120
) -> torch.Tensor:
    """Pictures in [-1, 1], [prompts, 3, 64, 64] float32; each from a generator of its own."""
    drawn = []
    for first in range(0, len(prompts), BATCH_SIZE):
        part = prompts[first : first + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        pictures = pipeline(
            part, num_inference_steps=n_steps, guidance_scale=GUIDANCE, generator=generators, output_type="pt",
            use_resolution_binning=False, clean_caption=False, max_sequence_length=most_tokens,
        ).images  # fmt: skip
        drawn.append(pictures.float() * 2 - 1)
    return torch.cat(drawn)


def save_sheet(pictures: torch.Tensor, path: Path) -> None:
    """The first pictures as a PNG, ten in a row, twice enlarged."""
    from PIL import Image

    pictures = pictures[:SHEET_COUNT]
    blank = torch.ones(-len(pictures) % SHEET_COLUMNS, *pictures.shape[1:])  # the last row is whole, too
    shown = torch.cat([pictures, blank]).clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    grid = shown.reshape(-1, SHEET_COLUMNS, *shown.shape[1:]).transpose(0, 3, 1, 4, 2)
    rows, height, columns, width, channels = grid.shape
    image = Image.fromarray(np.ascontiguousarray(grid.reshape(rows * height, columns * width, channels)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * SHEET_ZOOM, image.height * SHEET_ZOOM), Image.Resampling.NEAREST).save(path)


def _note(
    work_dir: Path, stage: str, step: int, labels: torch.Tensor, judge: torch.nn.Module, drawn: torch.Tensor
) -> None:
    """A line of progress.jsonl, and a sheet."""
    _log(work_dir, stage, step, reader.accuracy(labels, judge.read(drawn)))
    save_sheet(drawn, work_dir / "sheets" / f"{stage}_{step:06}.png")


def _log(work_dir: Path, stage: str, step: int, shares: dict[str, float]) -> None:
    """A line of progress.jsonl: what is right."""
    with (work_dir / "progress.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"stage": stage, "step": step, **shares}) + "\n")
    logger.info("%s: step %d, %s", stage, step, ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def looks_of(plan: Plan, work_dir: Path, seed: int) -> dict[str, Look]:
    """What is drawn and read while training, on the same held-out scenes each time."""
    labels = board.sample_split(plan.looks, torch.Generator().manual_seed(seed), held_out=True)

    def judge() -> torch.nn.Module:
        return trained(plan.reader, reader.Reader(), work_dir)

    def reader_look(module: torch.nn.Module, step: int) -> None:
        drawn = board.draw(labels, torch.Generator().manual_seed(seed))
        _note(work_dir, plan.reader.name, step, labels, module, drawn)

    @torch.no_grad()
    def autoencoder_look(vae: torch.nn.Module, step: int) -> None:
        drawn = board.draw(labels, torch.Generator().manual_seed(seed))
        decoded = vae.decode(vae.encode(drawn).latent_dist.mean).sample
        _note(work_dir, plan.autoencoder.name, step, labels, judge(), decoded)

    def text_encoder_look(module: torch.nn.Module, step: int) -> None:
        shares = caption_reader.accuracy(module, tokenizer_of(work_dir, seed), plan.looks, seed)
        _log(work_dir, plan.text_encoder.name, step, shares)

    def denoiser_look(models: torch.nn.Module, step: int) -> None:
        vae = trained(plan.autoencoder, parts.autoencoder(), work_dir)
        factor = json.loads((work_dir / "scaling_factor.json").read_text(encoding="utf-8"))
        pipeline = assemble(tokenizer_of(work_dir, seed), vae, models, factor)
        drawn = draw(pipeline, captions(labels), seed, plan.n_steps, most_tokens=40)
        _note(work_dir, plan.denoiser.name, step, labels, judge(), drawn)

    return {
        plan.reader.name: reader_look,
        plan.autoencoder.name: autoencoder_look,
        plan.text_encoder.name: text_encoder_look,
        plan.denoiser.name: denoiser_look,
    }
