"""Replicas of an engine on a Ray cluster, for the server of this process.

Ray Serve starts them, spreads them over the machines, checks their health, starts new ones in the place of those that
end, and adds and takes away by load. The address stays this process's, with its queue, batches, limits, pictures by url
and metrics: a proxy of Ray Serve answers 500 where a replica ends under a request, and could not give its pictures to
another.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from export.errors import EnvironmentLacksError
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.pipeline_bundle import PipelineBundle, manifest_sha256
from pipeline.serve.jobs import Row
from pipeline.serve.remote import RemoteBatch, Stream
from pipeline.serve.replica import Order, Progress, Replica
from pipeline.serve.scale import Scale
from pipeline.signals import HEEDED

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from pipeline.serve.metrics import Metrics

logger = logging.getLogger(__name__)
AUTO = "auto"  # the cluster that this machine is part of
# Tries to start a replica before it is said that none starts.
STARTS = 2
ONE = Scale()


class Replicas:
    """Draws batches by whichever replica is free."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
        from ray.serve.exceptions import ReplicaUnavailableError

        self.handle = handle.options(stream=True)
        self.ended = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)

    def start_batch(self, rows: list[Row], metrics: Metrics) -> RemoteBatch:
        """A Start of workers."""
        return RemoteBatch(rows, self._send, self.ended, metrics.batches_again.inc)

    def _send(self, order: Order) -> Stream:
        return ReplicaStream(self.handle.draw.remote(order))


class ReplicaStream:
    """The answers of a replica, which raises what it raised there."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers

    def __next__(self) -> Progress:
        from ray.exceptions import RayTaskError

        try:
            progress: Progress = next(self.answers)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        return progress

    def cancel(self) -> None:
        self.answers.cancel()


@contextmanager
def joined(address: str | None, scale: Scale = ONE) -> Iterator[None]:
    """Within, this process is part of a cluster: at `address`, else of the one that this machine is part of, else of
    one that is started here, large enough for `scale`, and ends with this context. Raises EnvironmentLacksError where
    that cannot be."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody; for a cluster that is started here
    handlers = {number: signal.getsignal(number) for number in HEEDED}
    # Not to the driver: what replicas print would stand among the answers of this program.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address is None and "RAY_ADDRESS" not in os.environ:
            try:
                ray.init(AUTO, **quiet)
            except ConnectionError:
                ray.init("local", include_dashboard=False, **quiet)
                logger.info("no cluster was found; one was started, of this machine alone")
                _refuse_small(scale)
        else:
            ray.init(address or AUTO, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        named = address or os.environ.get("RAY_ADDRESS", AUTO)
        message = f"the Ray cluster at {named} cannot be joined ({reason}); start it, and join it with `ray start`"
        raise EnvironmentLacksError(f"{message} on this machine") from error
    finally:
        for number, handler in handlers.items():  # Ray's own end the process without a word
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_small(scale: Scale) -> None:
    """Raise EnvironmentLacksError where this machine has too few processors: no other one will join."""
    import ray

    have, need = ray.cluster_resources(), {"CPU": scale.least * scale.cpus, "GPU": scale.least * scale.gpus}
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            ray.shutdown()
            raise EnvironmentLacksError(
                f"{scale.least} replicas take {count:g} {kind}s, this machine has {have.get(kind, 0):g}; use fewer, or "
                "start a cluster of several machines first, with `ray start`"
            )


@contextmanager
def replicas(
    bundle: Bundle | PipelineBundle, target: str, scale: Scale, name: str, keep_loaded: bool | None = None
) -> Iterator[Replicas]:
    """Replicas of a bundle's engine, all started, under a name that no other application of the cluster has.

    keep_loaded: as of a Replica. Raises EnvironmentLacksError where they do not start.
    """
    from ray import serve

    path = bundle.path.resolve()
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    deployment = serve.deployment(Replica, name="engine", max_constructor_retry_count=STARTS, **scale.options)
    application = deployment.bind(str(path), manifest_sha256(path), target, scale.cpus, keep_loaded)
    try:
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError as error:
            raise EnvironmentLacksError(f"the replicas do not start: {last_line(error)}") from error
        yield Replicas(handle)
    finally:
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()


def last_line(error: Exception) -> str:
    """Of a message with the trace of another process in it: what that process said."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
