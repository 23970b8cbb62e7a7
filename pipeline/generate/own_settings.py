"""What a pipeline is meant to be drawn with where its caller says nothing: of a generation.json beside its
model_index.json, and in its bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from export.documents import Rules, read_json
from export.errors import ModelError
from export.models.description import GENERATION_FILE
from pipeline.generate.conditioning import GuidanceScale, StepCount

RULES = Rules(ModelError, "state n_steps, guidance_scale or both, or remove the file", extra="forbid")


class SettingsFile(TypedDict):
    """Keys as in a model's own generation.json; all else of a pipeline is in its parts."""

    n_steps: NotRequired[StepCount]
    guidance_scale: NotRequired[GuidanceScale]


@dataclass(frozen=True)
class OwnSettings:
    """None: those of the pipeline's class."""

    n_steps: int | None = None
    guidance_scale: float | None = None


def own_settings(folder: Path) -> OwnSettings:
    """Of the pipeline in `folder`; none where it has no file. Raises ModelError for one that states anything else."""
    path = folder / GENERATION_FILE
    if not os.path.lexists(path):  # a link that leads nowhere is no file that is not there
        return OwnSettings()
    stated = read_json(path, SettingsFile, RULES)
    return OwnSettings(stated.get("n_steps"), stated.get("guidance_scale"))
