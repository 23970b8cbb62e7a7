"""Jobs on a Ray cluster: each on whichever machine has room, and again where its process is lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from export.errors import EnvironmentLacksError
from pipeline.command import set_up_logging
from pipeline.jobs.jobs import Ended, Job, Spread, attempt
from pipeline.progress import heartbeat
from pipeline.serve.cluster import last_line
from pipeline.signals import HEARD_WITHIN_S

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)
# Of a job whose process is lost each time: the third loss is its own doing, memory that runs out for example.
TRIES = 3


@dataclass(frozen=True)
class Share:
    """What a job takes of a machine, as Ray counts it."""

    cpus: int
    gpus: float = 0.0


def whole_machines(cpus: int | None, gpus: float) -> Share:
    """`cpus`, or as many as the smallest machine of the cluster has, so that a job has one for itself and what it
    measures is not measured beside another. Raises EnvironmentLacksError where no machine has any."""
    import ray

    rows = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [row for row in rows if row.get("CPU", 0) > 0 and row.get("GPU", 0) >= gpus]
    if cpus is None and not machines:
        needs = f" with {gpus:g} GPUs" if gpus else ""
        raise EnvironmentLacksError(f"no machine{needs} is in the Ray cluster yet; start one, or give --cpus-per-job")
    share = Share(int(min(row["CPU"] for row in machines)) if cpus is None else cpus, gpus)
    if not any(row["CPU"] >= share.cpus for row in machines):
        words = "no machine of the cluster has %d processors and %g GPUs; jobs wait until one joins"
        logger.warning(words, share.cpus, share.gpus)
    return share


@dataclass
class Cluster(Spread["ObjectRef[Ended]"]):
    """A Runner on the cluster that this process is part of (`pipeline.serve.cluster.joined`)."""

    share: Share

    def send(self, job: Job) -> ObjectRef[Ended]:
        import ray

        # Ray's own retries are off, since nothing tells of them.
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_retries": 0}
        remote: Any = ray.remote(max_calls=1 if job.alone else 0, **options)(attempt_there)
        place: ObjectRef[Ended] = remote.options(name=f"ditc {job.name}").remote(job)
        return place

    def ready(self, places: Sequence[ObjectRef[Ended]]) -> Sequence[ObjectRef[Ended]]:
        import ray

        with heartbeat(f"{len(places)} jobs on the cluster"):
            while not (ready := ray.wait(places, timeout=HEARD_WITHIN_S)[0]):
                pass
        return list(ready)

    def ended(self, job: Job, place: ObjectRef[Ended], tries: int) -> Ended | None:
        import ray
        from ray.exceptions import LocalRayletDiedError, NodeDiedError, ObjectLostError, RayError, WorkerCrashedError
        from ray.exceptions import OutOfMemoryError as KilledForMemory

        try:
            ended: Ended = ray.get(place)
            return replace(ended, tries=tries)
        except (WorkerCrashedError, NodeDiedError, ObjectLostError, LocalRayletDiedError, KilledForMemory) as error:
            reason = last_line(error)
            if tries < TRIES:
                logger.warning("%s: its process was lost (%s); it is done again", job.name, reason)
                return None
            last = f"what it did last is in {job.log or 'the log of Ray'}"
            reason = f"its process was lost {tries} times ({reason}); {last}"
        except RayError as error:  # the work itself raises nothing, so that machine could not even begin it
            reason = f"a machine of the cluster cannot begin it ({last_line(error)}); install the same release on all"
        return Ended(job.name, None, EnvironmentLacksError.exit_code, reason, tries=tries)


def attempt_there(job: Job) -> Ended:
    """`attempt` in a process of the cluster, whose own log Ray keeps."""
    set_up_logging(False, False)
    return attempt(job)
