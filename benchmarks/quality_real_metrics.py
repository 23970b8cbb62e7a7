"""Published metrics of pictures, and what each needs: torchmetrics' FID and CLIP score, ImageReward, HPSv2.

Their packages and weights are optional, and nothing is downloaded. What is missing is said by name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import quality_scorer
from export.errors import EnvironmentLacksError

Pictures = NDArray[np.uint8]  # [N, H, W, 3]
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
CLIP = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Metric:
    """problems(arguments): what is missing, in words. score(pictures, prompts, folder, arguments): one number."""

    problems: Callable[[argparse.Namespace], list[str]]
    score: Callable[[Pictures, list[str], Path, argparse.Namespace], float]


def _packages(names: Sequence[str]) -> list[str]:
    missing = [name for name in names if find_spec(name) is None]
    return [f"package {name} (pip install '.[quality]')" for name in missing]


def fid_problems(arguments: argparse.Namespace) -> list[str]:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    found = _packages(("torchmetrics", "torch_fidelity"))
    found += [] if weights.is_file() else [f"the Inception weights {weights} (of torch-fidelity's releases)"]
    count = len(real_files(arguments))
    if count < arguments.count:
        found.append(f"--real-pictures with {arguments.count} pictures or more, found {count}")
    return found


def real_files(arguments: argparse.Namespace) -> list[Path]:
    folder = arguments.real_pictures
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg")) if folder else []


def fid(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
    """torchmetrics' Frechet distance in Inception's features, of as many real pictures as there are drawn ones."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance()
    for path in real_files(arguments)[: len(pictures)]:
        metric.update(_channels_first(read_picture(path)[None]), real=True)
    for picture in pictures:
        metric.update(_channels_first(picture[None]), real=False)
    return float(metric.compute())


def clip_problems(arguments: argparse.Namespace) -> list[str]:
    from huggingface_hub import try_to_load_from_cache

    found = _packages(("torchmetrics",))
    held = isinstance(try_to_load_from_cache(CLIP, "config.json"), str)
    return found + ([] if held else [f"{CLIP} in the hub's cache (hf download {CLIP})"])


def clip(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
    """torchmetrics' CLIP score, mean over pictures, 0 to 100."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(CLIP)
    for picture, prompt in zip(pictures, prompts, strict=True):
        metric.update(_channels_first(picture[None])[0], prompt)
    return float(metric.compute())


def _scorer(name: str) -> Metric:
    """A metric that another Python computes from the pictures' folder."""

    def problems(arguments: argparse.Namespace) -> list[str]:
        python = arguments.scorer_python
        return [] if python and python.is_file() else [f"--scorer-python, a Python with the package of {name}"]

    def score(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
        command = [str(arguments.scorer_python), quality_scorer.__file__, name, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            told = (done.stderr.strip() or "no message").splitlines()[-1]
            raise EnvironmentLacksError(f"{name}: {arguments.scorer_python} failed ({told}); repair its environment")
        return float(np.mean(json.loads(done.stdout)))

    return Metric(problems, score)


METRICS = {
    "fid": Metric(fid_problems, fid),
    "clip": Metric(clip_problems, clip),
    **{name: _scorer(name) for name in quality_scorer.SCORERS},
}


def _channels_first(pictures: Pictures) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def read_picture(path: Path) -> Pictures:
    """One picture [H, W, 3] of a file."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
