"""The tiny models of benchmarks/families, by short names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.families import models as families
from benchmarks.families.models import SIZE, draw
from export.models import load as models

__all__ = ["MODELS", "REFUSED", "SIZE", "draw", "save", "saved", "stated"]
NAMES = {
    "sd3": "Stable Diffusion 3", "sd35": "Stable Diffusion 3.5", "flux": "FLUX.1", "sana": "Sana",
    "qwen": "Qwen-Image", "auraflow": "AuraFlow", "cogview4": "CogView4", "wan": "Wan 2.1", "latte": "Latte",
    "zimage": "Z-Image", "hunyuan_video": "HunyuanVideo", "flux2": "FLUX.2",
}  # fmt: skip
MODELS = {name: families.MODELS[title] for name, title in NAMES.items()}
REFUSED = {"lumina2": families.MODELS["Lumina 2"]}


def stated(name: str) -> tuple[str, Mapping[str, Any]]:
    """Class and whole configuration."""
    return families.stated(NAMES[name])


def save(name: str, folder: Path) -> Path:
    """The model with random weights, written into `folder`."""
    return families.save(NAMES[name], folder)


def saved(name: str, folder: Path) -> models.LoadedModel:
    """The model with random weights, through a folder."""
    return models.load(str(save(name, folder / name)))
