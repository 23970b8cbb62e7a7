"""What each stage learns from: the autoencoder from drawn scenes, the text encoder from captions, the denoiser from
latents of scenes and captions. All is made in `work_dir`, and what is there is not made again.

The denoiser is a rectified flow: x = (1 - t) data + t noise, target noise - data, timestep 1000 t. No scene of the
held-out ones is trained on, by any part.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d
from transformers import T5Tokenizer

from benchmarks.zoo.pixart_scenes import board, caption_reader, parts, reader
from benchmarks.zoo.pixart_scenes.captions import captions
from benchmarks.zoo.pixart_scenes.stage import Stage, is_done, read_state, run
from benchmarks.zoo.pixart_scenes.text import load_tokenizer, train_tokenizer
from pipeline.files import write_json
from pipeline.progress import track

logger = logging.getLogger(__name__)
KL_WEIGHT = 5e-4
DROP_SHARE = 0.1  # of captions, for classifier-free guidance
LATENTS_IN_FILE = 2000
PLAN_FILE = "plan.json"
Look = Callable[[torch.nn.Module, int], None]


@dataclass(frozen=True)
class Plan:
    """How much is trained and drawn. `latents`: scenes that the denoiser learns from, a multiple of `LATENTS_IN_FILE`.
    `looks`: held-out scenes drawn at each look. `n_steps`: of a picture."""

    reader: Stage
    autoencoder: Stage
    text_encoder: Stage
    denoiser: Stage
    latents: int
    looks: int = 100
    n_steps: int = 20
    save_every_s: float = 180.0


PLAN = Plan(
    reader=Stage("reader", 3000, 64, 2e-3),
    autoencoder=Stage("autoencoder", 3500, 16, 1e-3, every=500),
    text_encoder=Stage("text_encoder", 1000, 128, 1e-3, every=250),
    denoiser=Stage("denoiser", 6000, 32, 6e-4, every=1000),
    latents=40_000,
)


def refuse_other_plan(plan: Plan, work_dir: Path) -> None:
    """Raise ValueError where states in `work_dir` are of another plan, or of one that is not known: its latents, and
    rates of learning, are that plan's."""
    path = work_dir / PLAN_FILE
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if stated is None and not any(work_dir.glob("*.pt")):
        return
    own = asdict(plan)
    if stated != own:
        names = "it is not there" if stated is None else ", ".join(key for key in own if own[key] != stated.get(key))
        raise ValueError(f"{path}: the run in this folder is of another plan ({names}); name another folder")


# --- the parts of a working folder ------------------------------------------------------------------------------------


def tokenizer_of(work_dir: Path, seed: int) -> T5Tokenizer:
    """Trained if it is not there."""
    folder = work_dir / "tokenizer"
    if not folder.is_dir():
        partial_folder = work_dir / "tokenizer.part"
        train_tokenizer(partial_folder, seed)
        partial_folder.rename(folder)
    return load_tokenizer(folder)


def new_denoiser(vocabulary: int) -> torch.nn.ModuleDict:
    """The denoiser and what tells it of captions."""
    return torch.nn.ModuleDict({"text_encoder": parts.text_encoder(vocabulary), "transformer": parts.denoiser()})


def trained(stage: Stage, module: torch.nn.Module, work_dir: Path) -> torch.nn.Module:
    """`module` with the averaged weights of a stage's state, as far as it is."""
    module.load_state_dict(read_state(stage.path(work_dir))["average"])
    return module.eval().requires_grad_(False)


# --- the autoencoder and its latents ----------------------------------------------------------------------------------


def autoencoder_loss(vae: torch.nn.Module, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Of drawn scenes: the error of pixels, and a little of the distance between latents and a normal distribution.

    Items cover a few hundredths of a picture, and the least absolute error of all pixels is that of the background
    alone. So squares in which something stands count as much as all the others, and errors are squared as well.
    """
    labels = board.sample_split(batch_size, generator)
    standing = board.place(labels, generator)
    pictures = board.paint(labels, standing, generator).contiguous(memory_format=torch.channels_last)
    latents = vae.encode(pictures).latent_dist
    error = (vae.decode(latents.sample(generator)).sample - pictures).abs()
    of_squares = avg_pool2d((error + error**2).mean(1), board.SQUARE).flatten(1)
    taken = standing >= 0
    divergence = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).mean()
    return of_squares[taken].mean() + of_squares[~taken].mean() + KL_WEIGHT * divergence


def latent_labels(file: int, seed: int) -> tuple[torch.Tensor, torch.Generator]:
    """Labels of the scenes of one file of latents, and the generator that draws them."""
    generator = torch.Generator().manual_seed((seed + 1) * 7_000_003 + file)
    return board.sample_split(LATENTS_IN_FILE, generator), generator


@torch.inference_mode()
def _write_latents(vae: AutoencoderKL, file: int, seed: int, path: Path) -> None:
    labels, generator = latent_labels(file, seed)
    pictures = board.draw(labels, generator)
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(50)])
    incomplete = path.with_suffix(".part")
    with incomplete.open("wb") as stream:
        np.save(stream, means.contiguous().numpy().astype(np.float16))
    os.replace(incomplete, path)


@dataclass(frozen=True)
class Latents:
    """Scenes to train on: labels [count, 14], and latents [count, 4, 16, 16] float16 as the encoder gives them."""

    labels: torch.Tensor
    values: torch.Tensor

    @property
    def scaling_factor(self) -> float:
        """What brings latents to a standard deviation of one, to four digits."""
        return float(f"{1 / self.values[:LATENTS_IN_FILE].float().std().item():.4g}")


def latents_of(work_dir: Path, vae: AutoencoderKL, count: int, seed: int) -> Latents:
    """Encoded if they are not there, file by file."""
    folder = work_dir / "latents"
    folder.mkdir(exist_ok=True)
    files = range(count // LATENTS_IN_FILE)
    paths = [folder / f"{file:03}.npy" for file in files]
    for file in track(files, len(files), "latents"):
        if not paths[file].is_file():
            _write_latents(vae, file, seed, paths[file])
    labels = torch.cat([latent_labels(file, seed)[0] for file in files])
    return Latents(labels, torch.cat([torch.from_numpy(np.load(path)) for path in paths]))


# --- text encoder and denoiser ----------------------------------------------------------------------------------------


def denoiser_loss(
    models: torch.nn.ModuleDict, tokenizer: T5Tokenizer, data: Latents, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Of scenes told at random, some of them not at all."""
    rows = torch.randint(len(data.labels), (batch_size,), generator=generator)
    way = int(torch.randint(2**31, (1,), generator=generator))
    dropped = torch.rand(batch_size, generator=generator) < DROP_SHARE
    told = captions(data.labels[rows], way)
    texts = ["" if drop else text for text, drop in zip(told, dropped, strict=True)]
    tokens = tokenizer(texts, padding="longest", return_tensors="pt")
    hidden = models["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    latents = data.values[rows].float() * data.scaling_factor
    t = torch.sigmoid(torch.randn(batch_size, generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    mix = t[:, None, None, None]
    velocity = models["transformer"](
        (1 - mix) * latents + mix * noise,
        encoder_hidden_states=hidden,
        encoder_attention_mask=tokens.attention_mask,
        timestep=t * 1000,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return ((velocity - (noise - latents)) ** 2).mean()


# --- all of it --------------------------------------------------------------------------------------------------------


def train(plan: Plan, work_dir: Path, seed: int, looks: dict[str, Look]) -> None:
    """All stages, each from where it is. looks: what is called with a stage's averaged module, by its name. Raises
    ValueError for a folder of another plan or seed."""
    refuse_other_plan(plan, work_dir)
    write_json(work_dir / PLAN_FILE, asdict(plan))
    tokenizer = tokenizer_of(work_dir, seed)

    def stage(settings: Stage, module: torch.nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        if not is_done(settings, work_dir):
            run(settings, module, loss, work_dir, seed, plan.save_every_s, looks.get(settings.name))

    torch.manual_seed(seed)
    stage(plan.reader, reader.Reader(), lambda module, batch: reader.loss_at(module, plan.reader.batch_size, batch))
    torch.manual_seed(seed)
    vae = parts.autoencoder()
    stage(plan.autoencoder, vae, lambda module, batch: autoencoder_loss(module, plan.autoencoder.batch_size, batch))
    trained(plan.autoencoder, vae, work_dir)
    data = latents_of(work_dir, vae, plan.latents, seed)
    write_json(work_dir / "scaling_factor.json", data.scaling_factor)
    torch.manual_seed(seed)
    told, batch_size = caption_reader.CaptionReader(len(tokenizer)), plan.text_encoder.batch_size
    stage(plan.text_encoder, told, lambda module, batch: caption_reader.loss_at(module, tokenizer, batch_size, batch))
    trained(plan.text_encoder, told, work_dir)
    torch.manual_seed(seed)
    models = new_denoiser(len(tokenizer))
    models["text_encoder"].load_state_dict(told.text_encoder.state_dict())
    # As in larger pipelines it stays as it is: what asks it which colour is whose is its own training's loss.
    models["text_encoder"].requires_grad_(False)
    stage(
        plan.denoiser,
        models,
        lambda models, batch: denoiser_loss(models, tokenizer, data, plan.denoiser.batch_size, batch),
    )
