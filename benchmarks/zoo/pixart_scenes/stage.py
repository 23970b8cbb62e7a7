"""One stage of the training: steps that can be stopped anywhere and go on to the same weights.

The batch of a step is drawn from a generator seeded by (seed, step), and a state holds all else: weights, averaged
weights, the optimiser and the step. States are written by the clock; which steps they were written at changes nothing.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import Json
from pipeline.progress import track

logger = logging.getLogger(__name__)
WARM_UP = 200
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Stage:
    """Settings of one. `every`: steps between looks at what it has learned, 0 for none."""

    name: str
    steps: int
    batch_size: int
    peak_lr: float
    every: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.peak_lr) <= 0:
            raise ValueError(f"{self.name}: steps, batch_size and peak_lr must be positive")

    def learning_rate(self, step: int) -> float:
        """Warm-up, constant to 60 % of the steps, then a cosine down to 1 % of the peak."""
        share = step / self.steps
        tail = max(0.01, 0.5 * (1 + math.cos(math.pi * (share - 0.6) / 0.4))) if share > 0.6 else 1.0
        return self.peak_lr * min(1.0, (step + 1) / WARM_UP) * tail

    def path(self, work_dir: Path) -> Path:
        return work_dir / f"{self.name}.pt"


def generator_of(seed: int, step: int) -> torch.Generator:
    """Of the batch that belongs to `step`."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def read_state(path: Path) -> Json:
    state: Json = torch.load(path, weights_only=True)
    return state


def is_done(stage: Stage, work_dir: Path) -> bool:
    """Whether its last step was taken."""
    path = stage.path(work_dir)
    return path.is_file() and read_state(path)["step"] >= stage.steps


def _write(path: Path, state: Json) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def run(
    stage: Stage,
    module: torch.nn.Module,
    loss_at: Callable[[torch.nn.Module, torch.Generator], torch.Tensor],
    work_dir: Path,
    seed: int,
    save_every_s: float,
    look: Callable[[torch.nn.Module, int], None] | None = None,
) -> None:
    """Train `module` to the last step, from where its state in `work_dir` is.

    loss_at: the loss of a module on the batch of a generator. look: called with the averaged module and the number of
    steps taken, every `stage.every` steps and at the end; it must leave torch's own generator as it was.
    """
    average = copy.deepcopy(module).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=stage.peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    path, first, cpu_hours, running = stage.path(work_dir), 0, 0.0, float("nan")
    if path.is_file():
        state = read_state(path)
        if state["seed"] != seed:
            raise ValueError(f"{path} was made with seed {state['seed']}, not {seed}; name another folder")
        for part, key in ((module, "module"), (average, "average"), (optimiser, "optimiser")):
            part.load_state_dict(state[key])
        first, cpu_hours, running = state["step"], state["cpu_hours"], state["loss"]
        logger.info("%s: on from step %d after %.2f hours of one core", stage.name, first, cpu_hours)
    # Of the cores, not of the clock: other work may share the machine, and a run may stand still.
    started, saved = time.process_time(), time.monotonic()
    for step in track(range(first, stage.steps), stage.steps, stage.name, first, every_s=60):
        for group in optimiser.param_groups:
            group["lr"] = stage.learning_rate(step)
        loss = loss_at(module, generator_of(seed, step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        _follow(average, module, min(EMA_DECAY, (1 + step) / (10 + step)))
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        last, now = step + 1 == stage.steps, time.monotonic()
        if last or now - saved >= save_every_s:
            state = dict(module=module.state_dict(), average=average.state_dict(), optimiser=optimiser.state_dict())
            spent, saved = cpu_hours + (time.process_time() - started) / 3600, now
            _write(path, dict(state, step=step + 1, cpu_hours=spent, loss=running, seed=seed))
            logger.info("%s: step %d, loss %.4f, %.2f hours of one core", stage.name, step + 1, running, spent)
        if look is not None and (last or (stage.every and (step + 1) % stage.every == 0)):
            look(average, step + 1)


def _follow(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights towards those of now; what is counted (batch norms' statistics) is copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        for kept, buffer in zip(average.buffers(), module.buffers(), strict=True):
            kept.copy_(buffer)
