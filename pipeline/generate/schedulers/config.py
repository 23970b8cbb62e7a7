"""scheduler_config.json, read: which scheduler it is, and its keys.

The scheduler of a pipeline is of the class that its model_index.json states, as in diffusers, which passes over the
class that the file was written by.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Protocol

from export.documents import Rules, read_json, shown, validated
from export.errors import ModelError
from pipeline.generate.schedulers.base import Scheduler, SchedulerOptions
from pipeline.generate.schedulers.ddim import DdimConfig
from pipeline.generate.schedulers.ddpm import DdpmConfig
from pipeline.generate.schedulers.dpmsolver import DpmSolverConfig
from pipeline.generate.schedulers.euler import EulerAncestralConfig, EulerConfig
from pipeline.generate.schedulers.flow import FlowEulerConfig
from pipeline.generate.schedulers.heun import HeunConfig
from pipeline.generate.schedulers.lcm import LcmConfig
from pipeline.generate.schedulers.unipc import UniPcConfig

logger = logging.getLogger(__name__)


class SchedulerConfig(Protocol):
    """The keys of a scheduler, frozen, and what makes one."""

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""


# THE table of schedulers: class in diffusers -> its keys here.
SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    "DPMSolverMultistepScheduler": DpmSolverConfig,
    "DDIMScheduler": DdimConfig,
    "DDPMScheduler": DdpmConfig,
    "EulerDiscreteScheduler": EulerConfig,
    "EulerAncestralDiscreteScheduler": EulerAncestralConfig,
    "HeunDiscreteScheduler": HeunConfig,
    "UniPCMultistepScheduler": UniPcConfig,
    "FlowMatchEulerDiscreteScheduler": FlowEulerConfig,
    "LCMScheduler": LcmConfig,
}
# The part of a pipeline that it is, and its file there.
SCHEDULER = "scheduler"
CONFIG_FILE = "scheduler_config.json"
CLASS_NAME = "_class_name"
OWN_KEYS = (CLASS_NAME, "_diffusers_version")
# Keys that files keep from another class, for the pipeline was trained or published with that one; diffusers passes
# over what its class does not have, and so does this.
OTHERS_KEYS = {"skip_prk_steps"}.union(*({field.name for field in fields(row)} for row in SCHEDULERS.values()))  # type: ignore[arg-type]
# diffusers writes lambda_min_clipped as -Infinity, which is no JSON.
RULES = Rules(
    ModelError, "use a pipeline with a supported scheduler, or change its file", extra="forbid", infinite=True
)


def scheduler_class(index: Mapping[str, object]) -> str | None:
    """The class of the scheduler that a model_index.json states; None where it lists none."""
    stated = index.get(SCHEDULER)
    return str(stated[1]) if isinstance(stated, list | tuple) and len(stated) == 2 and stated[1] is not None else None


def read_scheduler_config(path: Path, class_name: str | None = None) -> SchedulerConfig:
    """The scheduler of a pipeline. class_name: that its model_index.json states; None: the file's own.

    Raises ModelError for a class, key or value that is not supported, by name.
    """
    return parse_scheduler_config(read_json(path, dict[str, object], RULES), str(path), class_name)


def parse_scheduler_config(document: dict[str, object], source: str, class_name: str | None = None) -> SchedulerConfig:
    """As `read_scheduler_config`; source: the file's name in messages."""
    written_by = document.get(CLASS_NAME)
    name = written_by if class_name is None else class_name
    schema = SCHEDULERS.get(name) if isinstance(name, str) else None
    if schema is None:
        supported = ", ".join(SCHEDULERS)
        stated = CLASS_NAME if class_name is None else "the class that model_index.json states,"
        raise ModelError(f"{source}: {stated} {shown(name)} is not supported; use one of {supported}")
    if written_by not in (None, name):
        logger.info("%s: of %s, read as %s, which model_index.json states, as in diffusers", source, written_by, name)
    own = {field.name for field in fields(schema)}  # type: ignore[arg-type]
    if others := sorted(document.keys() & OTHERS_KEYS - own):
        logger.info("%s: %s has no %s, as in diffusers", source, name, ", ".join(others))
    keys = {key: value for key, value in document.items() if key not in OWN_KEYS and key not in others}
    config = validated(keys, source, schema, RULES)
    if problem := config.problem():
        raise ModelError(f"{source}: {problem}; {RULES.remedy}")
    return config


def write_scheduler_config(path: Path, class_name: str | None, source: Path) -> None:
    """Put a pipeline's file `source` at `path`, with the class that `read_scheduler_config` takes it for."""
    document = read_json(source, dict[str, object], RULES)
    stated = document if class_name is None else document | {CLASS_NAME: class_name}
    path.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
