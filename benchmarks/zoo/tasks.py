"""What the bundled models learn: architecture, data and conditioning, one row of `TASKS` for each.

Both are rectified flows: x_t = (1 - t) * data + t * noise, target noise - data, timestep input 1000 * t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from benchmarks.zoo import scenes

Batch: TypeAlias = tuple[
    torch.Tensor, torch.Tensor
]  # labels [count, slots] int64, pictures [count, C, H, W] in [-1, 1]
CAPTION_CHANNELS = 64
DIGIT_CLASSES = 10
WIDTH, HEADS, LAYERS = 256, 8, 4
COMMON = dict(
    num_attention_heads=HEADS,
    attention_head_dim=WIDTH // HEADS,
    num_layers=LAYERS,
    attention_bias=True,
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
)


@dataclass(frozen=True)
class Task:
    """One bundled model. `sample(count, generator)` gives training data; `condition(labels, dropped [count] bool)` the
    model's inputs, those of no condition where it is dropped."""

    name: str
    build: Callable[[], torch.nn.Module]
    sample: Callable[[int, torch.Generator], Batch]
    condition: Callable[[torch.Tensor, torch.Tensor], dict[str, object]]
    batch_size: int
    steps: int
    peak_lr: float

    def __post_init__(self) -> None:
        if min(self.batch_size, self.steps, self.peak_lr) <= 0:
            raise ValueError(f"{self.name}: batch_size, steps and peak_lr must be positive")


@cache
def token_embedding() -> torch.Tensor:
    """The frozen random caption embedding, [vocabulary, 64]: the model's whole text encoder."""
    generator = torch.Generator().manual_seed(20)
    return torch.randn(scenes.vocabulary_size(), CAPTION_CHANNELS, generator=generator)


def _pixart() -> torch.nn.Module:
    return PixArtTransformer2DModel(
        **COMMON,
        in_channels=3,
        out_channels=3,
        cross_attention_dim=WIDTH,
        caption_channels=CAPTION_CHANNELS,
        sample_size=scenes.RESOLUTION,
        patch_size=4,
        norm_type="ada_norm_single",
        norm_eps=1e-6,
        use_additional_conditions=False,
    )


def scene_batch(count: int, generator: torch.Generator, held_out: bool = False) -> Batch:
    """Drawn scenes of the training captions, or of the held-out ones."""
    labels = scenes.sample_split(count, generator, held_out)
    return labels, scenes.draw(labels, generator)


def _caption_condition(labels: torch.Tensor, dropped: torch.Tensor) -> dict[str, object]:
    return dict(
        encoder_hidden_states=token_embedding()[torch.where(dropped[:, None], 0, scenes.tokens(labels))],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _dit() -> torch.nn.Module:
    return DiTTransformer2DModel(
        **COMMON,
        in_channels=1,
        out_channels=1,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=DIGIT_CLASSES,
        norm_type="ada_norm_zero",
        norm_eps=1e-5,
    )


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1797 handwritten digits: pictures [n, 1, 16, 16] in [-1, 1], classes [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    pictures = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    return pictures, torch.tensor(data.target)


def digit_split(held_out: bool) -> Batch:
    """All digits to train with, or every fifth, which is kept for testing classifiers."""
    pictures, classes = digits()
    rows = (torch.arange(len(classes)) % 5 == 0) == held_out
    return classes[rows][:, None], pictures[rows]


def digit_batch(count: int, generator: torch.Generator) -> Batch:
    """Digits to train with, drawn with replacement."""
    labels, pictures = digit_split(held_out=False)
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return labels[chosen], pictures[chosen]


def _class_condition(labels: torch.Tensor, dropped: torch.Tensor) -> dict[str, object]:
    return dict(class_labels=torch.where(dropped, DIGIT_CLASSES, labels[:, 0]))


TASKS = {
    task.name: task
    for task in (
        Task("pixart_mini", _pixart, scene_batch, _caption_condition, 64, 5000, 1e-3),
        Task("dit_mini", _dit, digit_batch, _class_condition, 64, 4000, 1e-3),
    )
}
