"""How many replicas `ditc serve --ray` has, and what each of them takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from export.errors import RecipeError

MOST_REPLICAS = 1000
# How long more batches must wait than there are replicas before one is added, and how long fewer before one goes.
MORE_AFTER_S, FEWER_AFTER_S = 5.0, 300.0


@dataclass(frozen=True)
class Scale:
    """Replicas: at least and at most, equal where they do not follow the load. cpus: of each, which it computes with;
    gpus: of each, as Ray counts them."""

    least: int = 1
    most: int = 1
    cpus: int = 1
    gpus: float = 0.0

    @property
    def options(self) -> dict[str, object]:
        """Of a deployment of Ray Serve. A replica has one batch at a time, on all of its processors."""
        taken = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        common: dict[str, object] = {"max_ongoing_requests": 1, "ray_actor_options": taken}
        if self.least == self.most:
            return common | {"num_replicas": self.least}
        follows = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": 1,
            "upscale_delay_s": MORE_AFTER_S,
            "downscale_delay_s": FEWER_AFTER_S,
        }
        return common | {"autoscaling_config": follows}


def read_scale(replicas: str, cpus: int, gpus: float) -> Scale:
    """As flags state it: N, or MIN:MAX. Raises RecipeError for what is none.

    >>> read_scale("2", 1, 0), read_scale("1:4", 2, 0.5)
    (Scale(least=2, most=2, cpus=1, gpus=0), Scale(least=1, most=4, cpus=2, gpus=0.5))
    """
    match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", replicas)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= MOST_REPLICAS:
        raise RecipeError(
            f"--replicas {replicas}; use a number from 1 to {MOST_REPLICAS}, or two as in 1:4, the smaller one first"
        )
    if not 1 <= cpus <= MOST_REPLICAS:
        raise RecipeError(f"--cpus-per-replica {cpus}; use 1 to {MOST_REPLICAS}")
    if not 0 <= gpus <= MOST_REPLICAS:
        raise RecipeError(f"--gpus-per-replica {gpus:g}; use 0, a part of one as 0.5, or a whole number")
    return Scale(least, most, cpus, gpus)
