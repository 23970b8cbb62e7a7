"""The process: one event loop, started when the address is open, ended by a signal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from pipeline.serve.connection import WatchedConnection
from pipeline.serve.service import Service
from pipeline.signals import first_calls

# For clients to take the last answers; then the server ends without them.
TAKEN_WITHIN_S = 10


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it is ready and leaves signals to this program."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_config(app: ASGIApp) -> uvicorn.Config:
    """How requests reach the application."""
    return uvicorn.Config(
        app,
        http=WatchedConnection,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=TAKEN_WITHIN_S,
    )


def serve(service: Service, app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal comes; what has been taken by then is finished. ready: called once.

    While it is finished the address stays open: new requests are refused with a 503, and /health says so.
    """
    asyncio.run(_serve(service, app, listener, ready))


async def _serve(service: Service, app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
    server = _Server(make_config(app), ready)
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    async def end() -> None:
        await told.wait()
        await service.drain()
        server.should_exit = True

    with first_calls(lambda: loop.call_soon_threadsafe(told.set)):
        ending = asyncio.create_task(end())
        await server.serve([listener])
        ending.cancel()
