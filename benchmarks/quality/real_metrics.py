"""Published metrics of pictures, and what each needs: torchmetrics' FID and CLIP score, ImageReward, HPSv2.

Their packages and weights are optional, and nothing is downloaded. What is missing is said by name, before anything is
drawn: reward models score one grey picture first, which takes their package and all of their weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality import scorer
from export.errors import EnvironmentLacksError

Pictures = NDArray[np.uint8]  # [N, H, W, 3]
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
CLIP = "openai/clip-vit-base-patch16"
# What its model, tokenizer and preprocessor are loaded from: one file of each row.
CLIP_FILES = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("preprocessor_config.json",),
    ("tokenizer.json", "vocab.json"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the scorers' packages would download


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
    problems = _packages(("torchmetrics", "torch_fidelity"))
    problems += [] if weights.is_file() else [f"the Inception weights {weights} (of torch-fidelity's releases)"]
    count = len(real_files(arguments))
    if count < arguments.count:
        problems.append(f"--real-pictures with {arguments.count} pictures or more, found {count}")
    return problems


def real_files(arguments: argparse.Namespace) -> list[Path]:
    folder = arguments.real_pictures
    if not folder or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))


def fid(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
    """torchmetrics' Frechet distance in Inception's features, of as many real pictures as there are drawn ones."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance().to(arguments.device)
    for path in real_files(arguments)[: len(pictures)]:
        metric.update(_channels_first(read_picture(path)[None]).to(arguments.device), real=True)
    for picture in pictures:
        metric.update(_channels_first(picture[None]).to(arguments.device), real=False)
    return float(metric.compute())


def clip_problems(arguments: argparse.Namespace) -> list[str]:
    from huggingface_hub import try_to_load_from_cache

    def held(name: str) -> bool:
        return isinstance(try_to_load_from_cache(CLIP, name), str)

    problems = _packages(("torchmetrics",))
    missing = [" or ".join(names) for names in CLIP_FILES if not any(map(held, names))]
    return problems + ([f"{', '.join(missing)} of {CLIP} in the hub's cache (hf download {CLIP})"] if missing else [])


def clip(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
    """torchmetrics' CLIP score, mean over pictures, 0 to 100."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(CLIP).to(arguments.device)
    for picture, prompt in zip(pictures, prompts, strict=True):
        metric.update(_channels_first(picture[None])[0].to(arguments.device), prompt)
    return float(metric.compute())


def _scorer(name: str) -> Metric:
    """A metric that another Python computes from the pictures' folder."""

    def problems(arguments: argparse.Namespace) -> list[str]:
        python = arguments.scorer_python
        if not python or not python.is_file():
            return [f"--scorer-python, a Python with the package of {name}"]
        try:
            rehearse(name, python)
        except EnvironmentLacksError as error:
            return [f"a --scorer-python that can score ({error})"]
        return []

    def score(pictures: Pictures, prompts: list[str], folder: Path, arguments: argparse.Namespace) -> float:
        return float(np.mean(scores(name, arguments.scorer_python, folder)))

    return Metric(problems, score)


def rehearse(name: str, python: Path) -> None:
    """Score one grey picture. Raises EnvironmentLacksError if the package cannot be imported or its weights are not
    there."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Image.new("RGB", (64, 64), "grey").save(folder / "0000.png")
        (folder / "prompts.json").write_text(json.dumps(["grey"]), encoding="utf-8")
        scores(name, python, folder)


def scores(name: str, python: Path, folder: Path) -> list[float]:
    """Of the pictures in a folder, by `scorer.py` in `python`, offline. Raises EnvironmentLacksError."""
    command = [str(python), scorer.__file__, name, str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=os.environ | OFFLINE,
    )
    if done.returncode:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EnvironmentLacksError(f"{name}: {python} failed ({message}); repair its environment")
    return [float(value) for value in json.loads(done.stdout)]


METRICS = {
    "fid": Metric(fid_problems, fid),
    "clip": Metric(clip_problems, clip),
    **{name: _scorer(name) for name in scorer.SCORERS},
}


def _channels_first(pictures: Pictures) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def read_picture(path: Path) -> Pictures:
    """One picture [H, W, 3] of a file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
