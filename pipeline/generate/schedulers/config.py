"""scheduler_config.json, read: which scheduler it is, and its keys."""

from __future__ import annotations

import logging
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


def read_scheduler_config(path: Path) -> SchedulerConfig:
    """The scheduler of a pipeline. Raises ModelError for a class, key or value that is not supported, by name."""
    return parse_scheduler_config(read_json(path, dict[str, object], RULES), str(path))


def parse_scheduler_config(document: dict[str, object], source: str) -> SchedulerConfig:
    """As `read_scheduler_config`; source: the file's name in messages."""
    name = document.get(CLASS_NAME)
    schema = SCHEDULERS.get(name) if isinstance(name, str) else None
    if schema is None:
        supported = ", ".join(SCHEDULERS)
        raise ModelError(f"{source}: {CLASS_NAME} {shown(name)} is not supported; use one of {supported}")
    own = {field.name for field in fields(schema)}  # type: ignore[arg-type]
    if others := sorted(document.keys() & OTHERS_KEYS - own):
        logger.info("%s: %s has no %s, as in diffusers", source, name, ", ".join(others))
    keys = {key: value for key, value in document.items() if key not in OWN_KEYS and key not in others}
    config = validated(keys, source, schema, RULES)
    if problem := config.problem():
        raise ModelError(f"{source}: {problem}; {RULES.remedy}")
    return config
