"""Measure the float bundled models: `python -m benchmarks.zoo.judge pixart_mini dit_mini`.

Pictures of held-out captions (or of the ten classes in turn) are drawn with the bundled sampler and read by a
classifier trained on the same data (`benchmarks/zoo/judges.py`). Writes benchmarks/results/zoo_NAME.json, and a sheet
of the first pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import record
from benchmarks.quality.drawing import Subject, draw, float_engine
from benchmarks.quality.judging import features_of
from benchmarks.quality.metrics import frechet, gaussian
from benchmarks.quality.painters import PixelPainter
from benchmarks.record import Json
from benchmarks.zoo import judges
from benchmarks.zoo.publish import ZOO
from export.models.load import load
from pipeline.generate.conditioning import load_generation

SHEET_COLUMNS, SHEET_COUNT, SHEET_ZOOM = 10, 60, 3
# The slots that the mean and the joint accuracy of a captioned scene are taken over.
ATTRIBUTES = ("colour", "shape", "second colour", "second shape", "background")


def accuracy(name: str, labels: torch.Tensor, read: torch.Tensor) -> dict[str, float]:
    """Share of right pictures by slot; for scenes also the mean over the attributes and all of them at once."""
    task, right = judges.JUDGES[name], labels == read
    if name == "dit_mini":
        return judges.by_slot(task, right)
    chosen = right[:, [list(task.slots).index(attribute) for attribute in ATTRIBUTES]]
    return judges.by_slot(task, right) | {
        "shape, colour and background (mean)": chosen.double().mean().item(),
        "shape, colour and background (all of a picture)": chosen.all(1).double().mean().item(),
        "everything in the caption": right.all(1).double().mean().item(),
    }


def save_sheet(pictures: torch.Tensor, path: Path) -> None:
    """The first pictures as a PNG, ten in a row, three times enlarged."""
    from PIL import Image

    pictures = pictures[:SHEET_COUNT]
    blank = torch.ones(-len(pictures) % SHEET_COLUMNS, *pictures.shape[1:])  # the last row is whole, too
    shown = torch.cat([pictures, blank]).clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    grid = shown.reshape(-1, SHEET_COLUMNS, *shown.shape[1:]).transpose(0, 3, 1, 4, 2)
    rows, height, columns, width, channels = grid.shape
    image = np.broadcast_to(grid.reshape(rows * height, columns * width, channels), (rows * height, columns * width, 3))
    size = (columns * width * SHEET_ZOOM, rows * height * SHEET_ZOOM)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(path)


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> tuple[Json, torch.Tensor]:
    """The JSON document of one model, and its pictures."""
    generation = load_generation(folder)
    generation = replace(generation, guidance_scale=arguments.guidance_scale or generation.guidance_scale)
    model, (labels, prompts) = load(str(folder)), judges.conditions(name, arguments.count, arguments.seed)
    size = model.config["sample_size"]
    shape = (len(prompts), model.config["in_channels"], size, size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(arguments.seed)).numpy()
    subject = Subject(name, model, PixelPainter(generation, noise), labels, prompts, arguments.seed)
    pictures = torch.from_numpy(draw(subject, float_engine(subject).run, f"{name} pictures"))
    real, read = features_of(subject.judging, subject.judging.real()), judges.load(name).read(pictures)
    document = {
        "model": name,
        "training": record.read(folder / "training.json"),
        "conditions": judges.CONDITIONS[name],
        "count": len(labels),
        "sampler": generation.sampler,
        "n_steps": generation.n_steps,
        "guidance_scale": generation.guidance_scale,
        "seed": arguments.seed,
        "accuracy": accuracy(name, labels, read),
        "frechet_distance_to_held_out": frechet(gaussian(features_of(subject.judging, pictures)), gaussian(real)),
        "held_out_count": len(real),
        "judge_test_accuracy": judges.own_accuracy(judges.JUDGES[name], judges.load(name)),
    }
    return document, pictures


def main() -> None:
    parser = record.parser("benchmarks.zoo.judge", __doc__, judges.JUDGES)
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder of the published models")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=0.0, help="default: that of generation.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=record.RESULTS)
    parser.add_argument("--sheet-dir", type=Path, default=Path("work/zoo"))
    arguments = record.parsed(parser)
    for name in arguments.names:
        document, pictures = measure(name, arguments.zoo / name, arguments)
        save_sheet(pictures, arguments.sheet_dir / f"{name}.png")
        print(record.write(f"zoo_{name}", document, arguments.output_dir), document["accuracy"])


if __name__ == "__main__":
    main()
