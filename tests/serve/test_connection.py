"""Connections on which nothing happens are closed; those that move are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from pipeline.serve.connection import WatchedConnection
from pipeline.serve.server import make_config

EVERY_S = 0.2
SLOW_S = 5 * EVERY_S
PART, PARTS = bytes(1 << 16), 400  # more than a connection takes without being read


class Looked(WatchedConnection):
    every_s = EVERY_S


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """/large: many parts. /slow: an answer after some looks. Else a short one."""
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW_S)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/large":
        for _ in range(PARTS):
            await send({"type": "http.response.body", "body": PART, "more_body": True})
    await send({"type": "http.response.body", "body": b"done"})


def visited(visit: Callable[[int], Awaitable[Any]]) -> Any:
    """What a client of such a server comes to."""

    async def both() -> Any:
        config = make_config(application)
        config.http = Looked
        config.timeout_keep_alive = 3600
        server = uvicorn.Server(config)
        config.host, config.port = "127.0.0.1", 0
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            return await asyncio.wait_for(visit(port), 60)
        finally:
            server.should_exit = server.force_exit = True
            await serving

    return asyncio.run(both())


async def until_closed(port: int, sent: bytes) -> bytes:
    """All that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b"reset"
    finally:
        writer.close()


def test_half_a_head_and_nothing_at_all_are_not_waited_for() -> None:
    for sent in (b"GET / HTTP/1.1\r\nHost: loc", b""):
        assert visited(lambda port, sent=sent: until_closed(port, sent)) in (b"", b"reset")


def test_half_a_second_head_is_not_waited_for() -> None:
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = visited(lambda port: until_closed(port, whole + whole[:10]))
    assert answer == b"reset" or answer.count(b"200 OK") == 1


def test_an_answer_that_takes_long_is_waited_for() -> None:
    answer = visited(lambda port: until_closed(port, b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
    assert answer.endswith(b"done\r\n0\r\n\r\n")


def test_a_client_that_takes_nothing_is_left() -> None:
    async def visit(port: int) -> int:
        """Bytes of the answer, which are taken only after some time."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(SLOW_S)
        count = 0
        try:
            while part := await reader.read(1 << 20):
                count += len(part)
        except ConnectionResetError:
            pass
        writer.close()
        return count

    assert visited(visit) < len(PART) * PARTS


def test_a_client_that_takes_its_time_gets_all() -> None:
    async def visit(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        count, calls = 0, 0
        while part := await reader.read(1 << 20):
            count, calls = count + len(part), calls + 1
            if calls % 40 == 0:
                await asyncio.sleep(EVERY_S / 4)
        writer.close()
        return count

    assert visited(visit) > len(PART) * PARTS
