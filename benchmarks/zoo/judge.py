"""Measure the float bundled models: `python -m benchmarks.zoo.judge pixart_mini dit_mini`.

Pictures of held-out captions (or of the ten classes in turn) are drawn with the bundled sampler and read by a
classifier trained on the same data (`benchmarks/zoo/judges.py`). Writes benchmarks/results/zoo_NAME.json, and a sheet
of the first pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.record import add_names
from benchmarks.zoo import judges, scenes
from benchmarks.zoo.publish import ZOO
from benchmarks.zoo.tasks import DIGIT_CLASSES, TASKS
from pipeline.backends.base import Arrays
from pipeline.generate.conditioning import load_generation
from pipeline.generate.sampling import make_sampler, sample
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
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    return CLASSES[name].from_pretrained(folder, local_files_only=True).float().eval()


def conditions(name: str, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """What to draw: labels [count, slots] for the judge, and the prompts."""
    if name == "dit_mini":
        classes = torch.arange(count) % DIGIT_CLASSES
        return classes[:, None], [str(int(label)) for label in classes]
    labels = scenes.sample_split(count, torch.Generator().manual_seed(seed), held_out=True)
    return labels, [scenes.caption(label) for label in labels]


def runner(model: torch.nn.Module) -> Callable[[Arrays], Arrays]:
    """The model as the sampler calls it: named arrays in, {"sample": array} out."""
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if hasattr(model, "adaln_single") else {}

    @torch.inference_mode()
    def run(inputs: Arrays) -> Arrays:
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        return {"sample": model(**tensors, **extra, return_dict=False)[0].numpy()}

    return run


def draw(folder: Path, prompts: list[str], scale: float, seed: int) -> torch.Tensor:
    """One picture for each prompt, [count, C, H, W], with the sampler of the folder's generation.json."""
    model, generation = load_model(folder), load_generation(folder)
    shape = (len(prompts), model.config.in_channels, model.config.sample_size, model.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    sampler = make_sampler(generation.sampler, generation.n_steps, generation.timestep_scale)
    starts, drawn = range(0, len(prompts), BATCH_SIZE), []
    for start in track(starts, len(starts), f"{folder.name} pictures"):
        part = slice(start, start + BATCH_SIZE)
        drawn.append(sample(runner(model), generation.encode(prompts[part]), noise[part], sampler, scale))
    return torch.from_numpy(np.concatenate(drawn))


def accuracy(name: str, labels: torch.Tensor, read: torch.Tensor) -> dict[str, float]:
    """Share of right pictures by slot; for scenes also the mean over the attributes and all of them at once."""
    slots = list(judges.JUDGES[name].slots)
    right = (labels == read).double()
    shares = dict(zip(slots, right.mean(0).tolist(), strict=True))
    if name == "dit_mini":
        return shares
    chosen = right[:, [slots.index(attribute) for attribute in ATTRIBUTES]]
    shares["shape, colour and background (mean)"] = chosen.mean().item()
    shares["shape, colour and background (all of a picture)"] = chosen.prod(1).mean().item()
    shares["everything in the caption"] = right.prod(1).mean().item()
    return shares


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
    generation, judge = load_generation(folder), judges.load(name)
    scale = arguments.guidance_scale or generation.guidance_scale
    labels, prompts = conditions(name, arguments.count, arguments.seed)
    pictures = draw(folder, prompts, scale, arguments.seed)
    real_labels, real = judges.JUDGES[name].test()
    document = {
        "model": name,
        "training": json.loads((folder / "training.json").read_text(encoding="utf-8")),
        "conditions": CONDITIONS[name],
        "count": len(labels),
        "sampler": generation.sampler,
        "n_steps": generation.n_steps,
        "guidance_scale": scale,
        "seed": arguments.seed,
        "accuracy": accuracy(name, labels, judge.read(pictures)),
        "frechet_distance_to_held_out": judges.frechet_distance(judge, pictures, real),
        "held_out_count": len(real_labels),
        "judge_test_accuracy": judges.own_accuracy(judges.JUDGES[name], judge),
    }
    return document, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_names(parser, TASKS)
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
