"""Small classifiers that judge the bundled models' pictures: `python -m benchmarks.zoo.judges` trains and saves them.

A judge learns from the training split of the data its model learned from (`benchmarks/zoo/tasks.py`), slightly moved
and made noisy, and is tested on the held-out split. Its features serve Frechet distances as well, so the weights are
committed: a distance is only comparable in one set of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from benchmarks import record
from benchmarks.zoo import scenes
from benchmarks.zoo.tasks import DIGIT_CLASSES, Batch, digit_batch, digit_split, scene_batch
from pipeline.progress import track

FOLDER = Path(__file__).resolve().parent.parent / "weights"
FEATURES = 64
BATCH_SIZE = 128
PEAK_LR = 3e-3
NOISE = 0.1


@dataclass(frozen=True)
class JudgeTask:
    """One judge: its model, picture channels and size, the words of every slot, and its data.

    `sample(count, generator)` gives training data, `test()` all of the test data. `turn` and `shift` bound the random
    rotation (radians) and translation (share of half the picture) of training pictures.
    """

    name: str
    channels: int
    size: int
    slots: dict[str, tuple[str, ...]]
    sample: Callable[[int, torch.Generator], Batch]
    test: Callable[[], Batch]
    steps: int
    turn: float
    shift: float

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}_judge.safetensors"


class Judge(torch.nn.Module):
    """Four convolutions, 64 features, one linear head for each slot."""

    def __init__(self, task: JudgeTask) -> None:
        super().__init__()
        widths = (task.channels, 16, 32, 64, 64)
        strides = (1, 2, 2, 1 if task.size <= 16 else 2)
        blocks = [_block(*row) for row in zip(widths, widths[1:], strides, strict=False)]
        self.body = torch.nn.Sequential(*blocks, torch.nn.Flatten(), torch.nn.Linear(64 * 16, FEATURES))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(FEATURES, len(words)) for words in task.slots.values())

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[count, C, H, W] in [-1, 1] -> [count, 64]."""
        return self.body(pictures).relu()

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Logits of every slot, each [count, words]."""
        features = self.features(pictures)
        return [head(features) for head in self.heads]

    @torch.inference_mode()
    def read(self, pictures: torch.Tensor) -> torch.Tensor:
        """The labels that the pictures show, [count, slots] int64; pictures are clipped to [-1, 1] first."""
        return torch.stack([logits.argmax(1) for logits in self(pictures.clamp(-1, 1))], 1)


def _block(inputs: int, outputs: int, stride: int) -> torch.nn.Module:
    convolution = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())


def _scene_test() -> Batch:
    return scene_batch(2000, torch.Generator().manual_seed(99), held_out=True)


DIGIT_SLOTS = {"class": tuple(str(digit) for digit in range(DIGIT_CLASSES))}
JUDGES = {
    task.name: task
    for task in (
        JudgeTask("pixart_mini", 3, 32, scenes.SLOTS, scene_batch, _scene_test, 1200, 0.0, 0.0),
        JudgeTask("dit_mini", 1, 16, DIGIT_SLOTS, digit_batch, lambda: digit_split(held_out=True), 2500, 0.2, 0.15),
    )
}
CONDITIONS = {"pixart_mini": "captions never trained on", "dit_mini": "the ten classes in turn"}


def conditions(name: str, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """What to draw: labels [count, slots] for the judge, and the prompts."""
    if name == "dit_mini":
        classes = torch.arange(count) % DIGIT_CLASSES
        return classes[:, None], [str(int(label)) for label in classes]
    labels = scenes.sample_split(count, torch.Generator().manual_seed(seed), held_out=True)
    return labels, [scenes.caption(label) for label in labels]


def _disturb(task: JudgeTask, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures turned, shifted and made noisy at random; background -1 comes in from outside."""
    count = len(pictures)
    if task.turn or task.shift:
        angle = (torch.rand(count, generator=generator) * 2 - 1) * task.turn
        move = (torch.rand(count, 2, generator=generator) * 2 - 1) * task.shift
        rows = torch.stack([angle.cos(), -angle.sin(), move[:, 0], angle.sin(), angle.cos(), move[:, 1]], 1)
        grid = affine_grid(rows.view(count, 2, 3), list(pictures.shape), align_corners=False)
        pictures = grid_sample(pictures + 1, grid, align_corners=False) - 1
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return pictures + strength * torch.randn(pictures.shape, generator=generator)


def train(task: JudgeTask, seed: int = 0) -> Judge:
    """Train a judge from nothing; deterministic for one number of threads."""
    torch.manual_seed(seed)
    judge = Judge(task)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LR, task.steps)
    for _ in track(range(task.steps), task.steps, f"{task.name} judge"):
        labels, pictures = task.sample(BATCH_SIZE, generator)
        logits = judge(_disturb(task, pictures, generator))
        loss = torch.stack([cross_entropy(row, labels[:, slot]) for slot, row in enumerate(logits)]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return judge.eval()


def own_accuracy(task: JudgeTask, judge: Judge) -> dict[str, float]:
    """Share of the held-out pictures that the judge reads rightly, by slot."""
    labels, pictures = task.test()
    return by_slot(task, judge.read(pictures) == labels)


def by_slot(task: JudgeTask, right: torch.Tensor) -> dict[str, float]:
    """Share of pictures by slot; right: bool [count, slots]."""
    return dict(zip(task.slots, right.double().mean(0).tolist(), strict=True))


def load(name: str) -> Judge:
    """The committed judge of a bundled model."""
    task = JUDGES[name]
    judge = Judge(task)
    judge.load_state_dict(load_file(task.path))
    return judge.eval()


def main() -> None:
    parser = record.parser("benchmarks.zoo.judges", __doc__, JUDGES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in arguments.names:
        task = JUDGES[name]
        judge = train(task, arguments.seed)
        save_file(judge.state_dict(), task.path, metadata={"format": "pt"})
        print(f"{name}: {task.path.stat().st_size} bytes, test accuracy {own_accuracy(task, judge)}")


if __name__ == "__main__":
    main()
