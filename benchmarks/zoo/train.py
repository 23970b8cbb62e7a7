"""Train the bundled models from nothing: `python -m benchmarks.zoo.train pixart_mini dit_mini`.

Every batch is drawn from a generator seeded by (seed, step), so a run that was stopped goes on where it was with the
very batches it would have seen. Two CPU cores need about an hour for each model.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import Json
from benchmarks.zoo.tasks import TASKS, Task
from pipeline.progress import track

logger = logging.getLogger(__name__)
DROP_SHARE = 0.1
EMA_DECAY = 0.999
SAVE_EVERY = 250


def learning_rate(task: Task, step: int) -> float:
    """Warm-up over 300 steps, constant to 60 %, then a cosine down to 1 % of the peak."""
    share = step / task.steps
    tail = max(0.01, 0.5 * (1 + math.cos(math.pi * (share - 0.6) / 0.4))) if share > 0.6 else 1.0
    return task.peak_lr * min(1.0, (step + 1) / 300) * tail


def initialise(model: torch.nn.Module) -> None:
    """Residual branches start small and the output at zero, so that the first steps are stable."""
    blocks = model.transformer_blocks
    std = 0.02 / math.sqrt(2 * len(blocks))
    for name, module in model.named_modules():
        if name.endswith(("to_out.0", "ff.net.2")):
            torch.nn.init.normal_(module.weight, std=std)
            torch.nn.init.zeros_(module.bias)
    final = model.proj_out if hasattr(model, "proj_out") else model.proj_out_2
    torch.nn.init.zeros_(final.weight)
    torch.nn.init.zeros_(final.bias)


def loss_at(task: Task, model: torch.nn.Module, seed: int, step: int) -> torch.Tensor:
    """Rectified-flow loss of the batch that belongs to `step`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    labels, data = task.sample(task.batch_size, generator)
    condition = task.condition(labels, torch.rand(len(labels), generator=generator) < DROP_SHARE)
    t = torch.sigmoid(torch.randn(len(labels), generator=generator))
    noise = torch.randn(data.shape, generator=generator)
    mix = t[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - mix) * data + mix * noise, timestep=t * 1000, return_dict=False, **condition)
    return ((velocity[0].float() - (noise - data)) ** 2).mean()


def _update(model: torch.nn.Module, ema: torch.nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def _save_state(path: Path, state: Json) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def train(task: Task, work_dir: Path, seed: int) -> Path:
    """Train to the end (resuming from `work_dir`) and return the path of the final state."""
    torch.manual_seed(seed)
    model = task.build()
    # diffusers' DiT drops labels by itself in training mode; dropping is done here, alike for both models.
    model.eval()
    initialise(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    path, first, hours, running = work_dir / f"{task.name}.pt", 0, 0.0, float("nan")
    if path.exists():
        state = torch.load(path, weights_only=True)
        for part, key in ((model, "model"), (ema, "ema"), (optimiser, "optimiser")):
            part.load_state_dict(state[key])
        first, hours, running = state["step"], state["hours"], state["loss"]
        logger.info("%s: resumed at step %d after %.2f h", task.name, first, hours)
    started = time.monotonic()
    for step in track(range(first, task.steps), task.steps, task.name, first, every_s=60):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(task, step)
        loss = loss_at(task, model, seed, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        _update(model, ema, optimiser, step)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == task.steps:
            spent = hours + (time.monotonic() - started) / 3600
            state = dict(model=model.state_dict(), ema=ema.state_dict(), optimiser=optimiser.state_dict())
            _save_state(path, dict(state, step=step + 1, hours=spent, loss=running, seed=seed))
            logger.info("%s: step %d, loss %.4f, %.2f h", task.name, step + 1, running, spent)
    return path


def main() -> None:
    parser = record.parser("benchmarks.zoo.train", __doc__, TASKS)
    parser.add_argument("--work-dir", type=Path, default=Path("work/zoo"), help="states of unfinished runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        train(TASKS[name], arguments.work_dir, arguments.seed)


if __name__ == "__main__":
    main()
