"""`python -m pipeline.serve BUNDLE`: an engine behind the OpenAI images API and a web page.

With --ray the engine is on a Ray cluster, as often as asked, and all else in this process.

The first SIGTERM or SIGINT has the server finish what it has taken, and end with 0; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from export.errors import RecipeError
from pipeline import machine
from pipeline.command import Answer, Parser, add_threads, parser, run
from pipeline.generate.draw import BATCH_SIZE
from pipeline.signals import leave

if TYPE_CHECKING:
    from pipeline.serve.scale import Scale
    from pipeline.serve.service import Limits, Service
    from pipeline.text_to_image import Pipeline

logger = logging.getLogger(__name__)

KEY_VARIABLE = "DITC_API_KEY"
MOST_QUEUE, MOST_TIMEOUT_S = 1000, 86_400.0


def make_parser() -> Parser:
    """All flags of `serve`."""
    flags = parser("serve", "Serve pictures of an engine: the OpenAI images API, a web page, health and metrics.")
    flags.add_argument(
        "bundle",
        help="engine folder written by build, or hf://OWNER/NAME[@REVISION], of a model of pixels or a pipeline",
    )
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: at all of this machine's")
    flags.add_argument("--port", type=int, default=8000, help="0: any that is free")
    text = f"what /v1 asks for as a bearer token (default: that of {KEY_VARIABLE}, which other users cannot see; none)"
    flags.add_argument("--api-key", metavar="KEY", help=text)
    text = "by which it is reached, as through a proxy: see Serving; may be given several times"
    flags.add_argument("--allowed-host", metavar="NAME", action="append", default=[], help=text)
    flags.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait; more get a 429")
    text = f"pictures drawn at a time, 1 to {BATCH_SIZE}: of requests of equal steps and guidance"
    flags.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=text)
    text = "of a request, from its arrival to its last picture; then it gets a 504"
    flags.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help=text)
    flags.add_argument("--target", default="auto", help="as of generate")
    text = (
        "keep all parts of a whole pipeline in memory, or load each anew for every batch and let it go (default: keep "
    )
    text += "them where their files take at most half of the memory that is free)"
    flags.add_argument("--keep-loaded", action=argparse.BooleanOptionalAction, help=text)
    add_threads(flags)
    text = "have replicas on a Ray cluster draw, of several machines with the same bundle at the same path"
    flags.add_argument("--ray", action="store_true", help=text)
    text = "with --ray: how many, or at least and at most, by load (default: 1)"
    flags.add_argument("--replicas", metavar="N|MIN:MAX", help=text)
    text = "with --ray: that each takes and computes with (default: 1)"
    flags.add_argument("--cpus-per-replica", type=int, metavar="N", help=text)
    text = "with --ray: that each takes, 0.5 for a half (default: 0)"
    flags.add_argument("--gpus-per-replica", type=float, metavar="X", help=text)
    text = "with --ray: the cluster (default: the one that this machine is part of, else one is started here)"
    flags.add_argument("--ray-address", metavar="HOST:PORT", help=text)
    return flags


def find_scale(args: argparse.Namespace) -> Scale | None:
    """What --ray and its flags say; None without it. Raises RecipeError for flags that do not go together."""
    from pipeline.serve.scale import read_scale

    own = ("replicas", "cpus_per_replica", "gpus_per_replica", "ray_address")
    if not args.ray:
        for flag in (flag for flag in own if getattr(args, flag) is not None):
            raise RecipeError(f"--{flag.replace('_', '-')} without --ray; one engine of this process draws")
        return None
    if args.threads is not None:
        raise RecipeError(f"--threads {args.threads} with --ray; say --cpus-per-replica, which it computes with")
    cpus, gpus = args.cpus_per_replica, args.gpus_per_replica
    return read_scale(args.replicas or "1", 1 if cpus is None else cpus, 0.0 if gpus is None else gpus)


def make_limits(args: argparse.Namespace) -> Limits:
    """As the flags say. Raises RecipeError for numbers that are no limits."""
    from pipeline.serve.service import Limits

    if not 1 <= args.queue <= MOST_QUEUE:
        raise RecipeError(f"--queue {args.queue}; use 1 to {MOST_QUEUE}")
    if not 1 <= args.batch_size <= BATCH_SIZE:
        raise RecipeError(
            f"--batch-size {args.batch_size}; use 1 to {BATCH_SIZE}, the largest that engines are built for"
        )
    if not 0 < args.timeout <= MOST_TIMEOUT_S:
        raise RecipeError(f"--timeout {args.timeout:g}; use seconds, up to {MOST_TIMEOUT_S:g}")
    return Limits(args.queue, args.batch_size, args.timeout)


def find_key(args: argparse.Namespace) -> str | None:
    """The key that /v1 asks for, None for none. Raises RecipeError for one that no client can send."""
    key: str | None = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise RecipeError("the API key is empty, or has characters that a header may not have; use letters and digits")
    return key


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises RecipeError where that cannot be."""
    if not 0 <= port <= 65535:
        raise RecipeError(f"--port {port}; use 1 to 65535, or 0 for any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise RecipeError(f"--host {host} --port {port} cannot be listened at ({reason}); choose another") from error


def is_local(listener: socket.socket) -> bool:
    """Whether this machine alone reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def names_of(listener: socket.socket, allowed: Sequence[str]) -> frozenset[str] | None:
    """What the server answers to, see Border; None: to any, as other machines may know it by any name. Raises
    RecipeError for a name that is none."""
    from pipeline.serve.border import host_name

    names = {name: host_name(name) for name in allowed}
    for name, read in names.items():
        if read is None:
            raise RecipeError(f"--allowed-host {name} is no name; give one such as pictures.example.org")
    return frozenset(read for read in names.values() if read) if names or is_local(listener) else None


def address_of(listener: socket.socket) -> str:
    """What a browser is told."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Serve until a signal comes."""
    machine.require(machine.SERVER, "serving", "serve")
    limits, key, scale = make_limits(args), find_key(args), find_scale(args)
    if scale is not None:
        machine.require(machine.RAY, "serving with --ray", "ray")
    from pipeline.serve.app import make_app
    from pipeline.serve.server import serve
    from pipeline.text_to_image import Pipeline

    with listening(args.host, args.port) as listener:
        names, address = names_of(listener, args.allowed_host), address_of(listener)
        if not is_local(listener) and key is None:
            logger.warning("%s can be reached from other machines, without an API key: see --api-key", args.host)
        # With replicas they keep theirs and draw, and this process has none.
        kept, drawn = (args.keep_loaded, limits.batch_size) if scale is None else (False, None)
        with Pipeline.load(args.bundle, args.target, args.threads, kept, drawn) as pipeline:
            name = f"ditc-{listener.getsockname()[1]}-{os.getpid()}"
            with make_service(pipeline, limits, scale, args, name) as service:
                service.start()
                serve(service, make_app(service, key, names), listener, _tell(answer, pipeline.name, address))
    return 0


@contextmanager
def make_service(
    pipeline: Pipeline, limits: Limits, scale: Scale | None, args: argparse.Namespace, name: str
) -> Iterator[Service]:
    """The pipeline behind a queue, or replicas of it under a name, in whose place it then lets its engine go."""
    from pipeline.serve.service import Service

    if scale is None:
        yield Service(pipeline, limits)
        return
    from pipeline.serve.cluster import joined, replicas

    assert pipeline.bundle is not None  # a server's pipeline is opened from one
    pipeline.close()
    with (
        joined(args.ray_address, scale),
        replicas(pipeline.bundle, args.target, scale, name, args.keep_loaded) as drawers,
    ):
        yield Service(pipeline, limits, drawers.start_batch, scale.most)


def _tell(answer: Answer, name: str, address: str) -> Callable[[], None]:
    """Says where the server is."""

    def ready() -> None:
        answer.line(f"{name} is served at {address}")
        answer.event(event="ready", address=address, model=name)

    return ready


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
