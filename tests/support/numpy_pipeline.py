"""A whole pipeline whose components are a few lines of NumPy each, and which knows what was done with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.backends.base import Arrays
from pipeline.generate.components import PipelineSource
from pipeline.generate.example_prompts import captions

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "ring", "cat")
CHANNELS, SIDE, CELL, WIDTH = 4, 4, 2, 6
PIXART = {
    "in_channels": CHANNELS, "out_channels": 2 * CHANNELS, "sample_size": SIDE, "patch_size": 2,
    "caption_channels": WIDTH, "cross_attention_dim": 8, "use_additional_conditions": False,
}  # fmt: skip
DIT = {"in_channels": CHANNELS, "sample_size": SIDE, "patch_size": 2, "num_embeds_ada_norm": 10}
VAE = {"block_out_channels": [8, 8], "scaling_factor": 0.5, "shift_factor": 0.1}
LABELS = {"0": "zero, nought", "9": "last"}
# Colours of latents: what the decoder multiplies channels with.
COLOURS = np.array([[0.5, 0.1, -0.2], [0.1, -0.4, 0.3], [-0.2, 0.3, 0.4], [0.1, 0.1, 0.1]], np.float32)


@dataclass
class Part:
    """A component that is loaded: each call's inputs, and whether it has been let go."""

    name: str
    call: Callable[[Arrays], Arrays]
    calls: list[Arrays] = field(default_factory=list)
    closed: bool = False

    def run(self, inputs: Arrays) -> Arrays:
        assert not self.closed, self.name
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        return self.call(inputs)

    def close(self) -> None:
        self.closed = True


@dataclass
class Log:
    """Every component that was loaded, in order."""

    parts: list[Part] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def open(self) -> list[str]:
        return [part.name for part in self.parts if not part.closed]

    def last(self, name: str) -> Part:
        return next(part for part in reversed(self.parts) if part.name == name)

    def loader(self, name: str, call: Callable[[Arrays], Arrays]) -> Callable[[], Part]:
        def load() -> Part:
            self.parts.append(Part(name, call))
            return self.parts[-1]

        return load


def encode_text(inputs: Arrays) -> Arrays:
    ids = inputs["input_ids"][:, :, None]
    return {"last_hidden_state": np.sin(ids * np.arange(1, WIDTH + 1)).astype(np.float32)}


def denoise(inputs: Arrays) -> Arrays:
    """The noise that leads to a flat picture, which the words or the class say, and a sigma that nobody reads."""
    x = inputs["hidden_states"]
    if "class_labels" in inputs:
        level = inputs["class_labels"][:, None] / 10 * np.ones(CHANNELS)
    else:
        mask = inputs["encoder_attention_mask"][:, :, None]
        level = (inputs["encoder_hidden_states"] * mask).sum(axis=1)[:, :CHANNELS] / mask.sum(axis=1)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[inputs["timestep"].astype(int)][:, None, None, None]
    noise = (x - np.sqrt(kept) * level[:, :, None, None]) / np.sqrt(1 - kept)
    return {"sample": np.concatenate([noise, 9 + noise], axis=1).astype(np.float32)}


def decode(inputs: Arrays) -> Arrays:
    colours = np.einsum("bchw,ck->bkhw", inputs["latents"], COLOURS)
    return {"sample": colours.repeat(CELL, axis=2).repeat(CELL, axis=3).astype(np.float32)}


def encode_picture(inputs: Arrays) -> Arrays:
    """Latents that `decode` makes the picture's cells of; their variances are nonsense that nobody reads."""
    picture = inputs["sample"]
    count, _, height, width = picture.shape
    cells = picture.reshape(count, 3, height // CELL, CELL, width // CELL, CELL).mean(axis=(3, 5))
    mean = np.einsum("bkhw,kc->bchw", cells, np.linalg.pinv(COLOURS))
    return {"moments": np.concatenate([mean, 99 + mean], axis=1).astype(np.float32)}


def write_tokenizer(path: Path, length: int = 64) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    tokenizer.enable_truncation(length)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def make_source(folder: Path, log: Log, class_name: str = "PixArtAlphaPipeline", **changes: Any) -> PipelineSource:
    """Its pictures have 8 x 8 pixels. changes: of fields; scheduler: keys of scheduler_config.json."""
    keys = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = folder / "scheduler_config.json"
    scheduler.write_text(json.dumps(keys | changes.pop("scheduler", {})))
    is_dit = class_name == "DiTPipeline"
    calls = {"transformer": denoise, "vae_decoder": decode, "vae_encoder": encode_picture}
    calls |= {} if is_dit else {"text_encoder": encode_text}
    source = PipelineSource(
        name="tiny",
        class_name=class_name,
        index={"id2label": LABELS} if is_dit else {},
        engines={name: log.loader(name, call) for name, call in calls.items()},
        transformer=DIT if is_dit else PIXART,
        vae=VAE,
        tokenizers={} if is_dit else {"tokenizer": write_tokenizer(folder / "tokenizer.json")},
        scheduler=scheduler,
        prompts=captions(),
    )
    return replace(source, **changes)
