"""Measure the float bundled models: `python -m benchmarks.judge_zoo pixart_mini dit_mini`.

Pictures of held-out captions (or of the ten classes in turn) are drawn with the bundled sampler and read by a
classifier trained on the same data (`benchmarks/judges.py`). Writes benchmarks/results/zoo_NAME.json, and a sheet of
the first pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from numpy.typing import NDArray

from benchmarks import judges, record, scenes
from benchmarks.publish_zoo import ZOO
from benchmarks.zoo_tasks import DIGIT_CLASSES, TASKS, Task
from pipeline.progress import track

logger = logging.getLogger(__name__)
BATCH_SIZE = 50
SHEET_COLUMNS, SHEET_COUNT, SHEET_ZOOM = 10, 60, 3
CLASSES = {cls.__name__: cls for cls in (DiTTransformer2DModel, PixArtTransformer2DModel)}
CONDITIONS = {"pixart_mini": "captions never trained on", "dit_mini": "the ten classes in turn"}
# The slots that the mean and the joint accuracy of a captioned scene are taken over.
ATTRIBUTES = ("colour", "shape", "second colour", "second shape", "background")


def load_model(folder: Path) -> torch.nn.Module:
    """The float32 model of a published folder."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return CLASSES[name].from_pretrained(folder, local_files_only=True).float().eval()


def conditions(name: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What to draw: labels [count, slots] for the judge, and the model's condition (token ids, or classes)."""
    if name == "dit_mini":
        classes = torch.arange(count) % DIGIT_CLASSES
        return classes[:, None], classes
    labels = scenes.sample_split(count, torch.Generator().manual_seed(seed), held_out=True)
    return labels, scenes.tokens(labels)


@torch.inference_mode()
def draw(task: Task, model: torch.nn.Module, wanted: torch.Tensor, noise: torch.Tensor, scale: float, steps: int):
    """Pictures [count, C, H, W] by Euler's rule from t = 1 (noise) to 0, with classifier-free guidance."""
    times = np.linspace(1.0, 0.0, steps + 1)
    both = task.condition(torch.cat([wanted, task.drop(wanted, torch.ones(len(wanted), dtype=torch.bool))]))
    picture = noise
    for now, then in itertools.pairwise(times):
        timestep = torch.full((2 * len(wanted),), float(now) * 1000)
        velocity = model(torch.cat([picture, picture]), timestep=timestep, return_dict=False, **both)[0]
        wished, free = velocity.chunk(2)
        picture = picture + float(then - now) * (free + scale * (wished - free))
    return picture


def draw_all(task: Task, model: torch.nn.Module, wanted: torch.Tensor, scale: float, steps: int, seed: int):
    """Pictures of all conditions, in batches."""
    shape = (len(wanted), model.config.in_channels, model.config.sample_size, model.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    parts = list(zip(wanted.split(BATCH_SIZE), noise.split(BATCH_SIZE), strict=True))
    drawn = [draw(task, model, *part, scale, steps) for part in track(parts, len(parts), f"{task.name} pictures")]
    return torch.cat(drawn)


def accuracy(name: str, labels: torch.Tensor, read: torch.Tensor) -> dict[str, float]:
    """Share of right pictures by slot; for scenes also the mean over the attributes and all of them at once."""
    slots = list(judges.JUDGES[name].slots)
    right = (labels == read).double()
    found = dict(zip(slots, right.mean(0).tolist(), strict=True))
    if name == "dit_mini":
        return found
    chosen = right[:, [slots.index(attribute) for attribute in ATTRIBUTES]]
    found["shape, colour and background (mean)"] = chosen.mean().item()
    found["shape, colour and background (all of a picture)"] = chosen.prod(1).mean().item()
    found["everything in the caption"] = right.prod(1).mean().item()
    return found


def save_sheet(pictures: torch.Tensor, path: Path) -> None:
    """The first pictures as a PNG, ten in a row, three times enlarged."""
    from PIL import Image

    shown = pictures[:SHEET_COUNT].clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    grid: NDArray[Any] = shown.reshape(-1, SHEET_COLUMNS, *shown.shape[1:]).transpose(0, 3, 1, 4, 2)
    rows, height, columns, width, channels = grid.shape
    image = np.broadcast_to(grid.reshape(rows * height, columns * width, channels), (rows * height, columns * width, 3))
    size = (columns * width * SHEET_ZOOM, rows * height * SHEET_ZOOM)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(path)


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """The JSON document of one model, and its pictures."""
    settings = json.loads((folder / "generation.json").read_text())
    steps, scale = settings["n_steps"], arguments.guidance_scale or settings["guidance_scale"]
    labels, wanted = conditions(name, arguments.count, arguments.seed)
    pictures = draw_all(TASKS[name], load_model(folder), wanted, scale, steps, arguments.seed)
    judge = judges.load(name)
    document = {
        "model": name,
        "training": json.loads((folder / "training.json").read_text()),
        "conditions": CONDITIONS[name],
        "count": len(labels),
        "sampler": settings["sampler"],
        "n_steps": steps,
        "guidance_scale": scale,
        "seed": arguments.seed,
        "accuracy": accuracy(name, labels, judge.read(pictures)),
        "judge_test_accuracy": judges.own_accuracy(judges.JUDGES[name], judge),
    }
    return document, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder of the published models")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=0.0, help="default: that of generation.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=record.RESULTS)
    parser.add_argument("--sheet-dir", type=Path, default=Path("work/zoo"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        document, pictures = measure(name, arguments.zoo / name, arguments)
        save_sheet(pictures, arguments.sheet_dir / f"{name}.png")
        print(record.write(f"zoo_{name}", document, arguments.output_dir), document["accuracy"])


if __name__ == "__main__":
    main()
