"""What a subject is asked to draw, and what its judge sees in the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.quality.metrics import Array
from benchmarks.zoo import judges
from benchmarks.zoo.pixart_scenes import board, reader
from benchmarks.zoo.pixart_scenes.captions import captions
from benchmarks.zoo.pixart_scenes.publish import NAME as SCENES
from benchmarks.zoo.pixart_scenes.publish import READER_FILE
from export.models.sources import ZOO

LABELS = 10_000  # the long list; more pictures than this cannot be asked for
JUDGED_AT_ONCE = 500
HELD_OUT_SCENES, HELD_OUT_SEED = 2000, 99  # the real pictures that distances are taken to


@dataclass(frozen=True)
class Reading:
    """Of N pictures: features [N, F] float64; right and asked, bool [N, slots]: what of each caption its picture shows,
    and whether the caption says anything of it."""

    features: Array
    right: torch.Tensor
    asked: torch.Tensor

    @property
    def all_right(self) -> torch.Tensor:
        """Pictures that show all that their captions say, bool [N]."""
        return (self.right | ~self.asked).all(1)

    @property
    def by_slot(self) -> list[float]:
        """Share of pictures that are right, among those whose captions ask for it."""
        shares: list[float] = ((self.right & self.asked).sum(0).double() / self.asked.sum(0).clamp(min=1)).tolist()
        return shares


class Judging(Protocol):
    """Prompts of one kind of model, and the judge of its pictures. conditions: what the prompts are, in words."""

    @property
    def conditions(self) -> str: ...

    @property
    def judge_path(self) -> Path: ...

    def prompts(self, seed: int) -> tuple[torch.Tensor, list[str]]:
        """The long list: labels [LABELS, ...] int64, and the prompts that say them."""

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] from -1 to 1 -> [N, F]."""

    def right(self, pictures: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a Reading."""

    def real(self) -> torch.Tensor:
        """Held-out real pictures [M, C, H, W]."""


@dataclass(frozen=True)
class Classified:
    """A small bundled model, by the classifier of benchmarks/zoo/judges.py."""

    name: str

    @property
    def conditions(self) -> str:
        return judges.CONDITIONS[self.name]

    @property
    def judge_path(self) -> Path:
        return judges.JUDGES[self.name].path

    @cached_property
    def judge(self) -> judges.Judge:
        return judges.load(self.name)

    def prompts(self, seed: int) -> tuple[torch.Tensor, list[str]]:
        return judges.conditions(self.name, LABELS, seed)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.judge.features(pictures)

    def right(self, pictures: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right = self.judge.read(pictures) == labels
        return right, torch.ones_like(right)

    def real(self) -> torch.Tensor:
        return judges.JUDGES[self.name].test()[1]


@dataclass(frozen=True)
class Scenes:
    """The bundled whole pipeline, by the reader that is published with it."""

    judge_path: Path = ZOO / SCENES / READER_FILE
    conditions: ClassVar[str] = "scenes never trained on"

    @cached_property
    def judge(self) -> reader.Reader:
        judge = reader.Reader()
        judge.load_state_dict(load_file(self.judge_path))
        return judge.eval().requires_grad_(False)

    def prompts(self, seed: int) -> tuple[torch.Tensor, list[str]]:
        labels = board.sample_split(LABELS, torch.Generator().manual_seed(seed), held_out=True)
        return labels, captions(labels)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.judge.features(pictures)

    def right(self, pictures: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reader.right(labels, self.judge.read(pictures))

    def real(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return board.draw(board.sample_split(HELD_OUT_SCENES, generator, held_out=True), generator)


JUDGINGS: dict[str, Judging] = {SCENES: Scenes(), **{name: Classified(name) for name in judges.JUDGES}}


@torch.inference_mode()
def features_of(judging: Judging, pictures: torch.Tensor) -> Array:
    """What the judge sees of pictures [N, C, H, W], which are clipped to [-1, 1] first: [N, F] float64."""
    parts = pictures.clamp(-1, 1).split(JUDGED_AT_ONCE)
    return np.asarray(torch.cat([judging.features(part) for part in parts]).double().numpy())


@torch.inference_mode()
def read(judging: Judging, pictures: torch.Tensor, labels: torch.Tensor) -> Reading:
    """What the judge sees of the pictures [N, C, H, W] of labels [N, ...]."""
    pairs = zip(pictures.clamp(-1, 1).split(JUDGED_AT_ONCE), labels.split(JUDGED_AT_ONCE), strict=True)
    right, asked = zip(*(judging.right(part, own) for part, own in pairs), strict=True)
    return Reading(features_of(judging, pictures), torch.cat(right), torch.cat(asked))
