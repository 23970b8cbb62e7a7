"""The flags of commands whose jobs a Ray cluster may do, and the runner that they choose."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from export.errors import RecipeError
from pipeline import machine
from pipeline.jobs.jobs import Runner, in_turn

MOST_UNITS = 1000  # processors or GPUs of a job


def add_flags(flags: argparse.ArgumentParser, cpus: int | None = None) -> None:
    """--ray, --cpus-per-job and --gpus-per-job. cpus: that a job takes where the second is not given, None for a whole
    machine."""
    text = "do the jobs on the Ray cluster at HOST:PORT, or auto for the one that this machine is part of"
    flags.add_argument("--ray", metavar="ADDRESS", help=text)
    default = "all of the smallest machine, to measure undisturbed" if cpus is None else cpus
    text = f"with --ray: processors that each takes (default: {default})"
    flags.add_argument("--cpus-per-job", type=int, metavar="N", help=text)
    flags.add_argument(
        "--gpus-per-job", type=float, metavar="X", help="with --ray: that each takes, 0.5 for a half (default: 0)"
    )


@contextmanager
def chosen(args: argparse.Namespace, what: str, cpus: int | None = None) -> Iterator[Runner]:
    """What does the jobs. what: needs them, "a sweep"; cpus: as of `add_flags`. Raises RecipeError for flags that do
    not go together, EnvironmentLacksError where Ray or its cluster is not there."""
    if args.ray is None:
        if flags := [name for name in ("cpus_per_job", "gpus_per_job") if getattr(args, name) is not None]:
            raise RecipeError(f"--{flags[0].replace('_', '-')} without --ray; this process does one job at a time")
        yield in_turn
        return
    gpus = args.gpus_per_job or 0.0
    if args.cpus_per_job is not None and not 1 <= args.cpus_per_job <= MOST_UNITS:
        raise RecipeError(f"--cpus-per-job {args.cpus_per_job}; use 1 to {MOST_UNITS}")
    if not (0 <= gpus <= MOST_UNITS and (gpus <= 1 or gpus.is_integer())):
        raise RecipeError(f"--gpus-per-job {gpus:g}; use 0, a part of one as 0.5, or a whole number")
    machine.require(machine.RAY, f"{what} with --ray", "ray")
    from pipeline.jobs.ray_jobs import Cluster, whole_machines
    from pipeline.serve.cluster import joined

    with joined(args.ray):
        yield Cluster(whole_machines(args.cpus_per_job or cpus, gpus))
