"""What is done with every request before it has an address: the name that it came by is looked at, and HEAD answered.

A page of a foreign name whose owner has it point at this machine (DNS rebinding) is of the server's own site for a
browser, which then lets it ask for pictures and read answers. Its requests carry that name in `Host`. So a server for
this machine alone answers to addresses, which no such page has, to `localhost`, and to names that it was told.
"""

from __future__ import annotations

import ipaddress
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.documents import shown
from pipeline.serve.images_request import ApiError

LOCAL = "localhost"
MISDIRECTED = 421


class Border:
    """The application, for those who may reach it. names: in lower case, that it answers to; None: to any."""

    def __init__(self, app: ASGIApp, names: frozenset[str] | None) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (problem := self._problem(scope)) is not None:
            await _answer(problem, send)
        elif scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self.app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        """Why a request is refused. One without a Host is from no browser."""
        if self.names is None:
            return None
        for value in (value for key, value in scope["headers"] if key == b"host"):
            name = host_name(value.decode("latin-1"))
            if name is None or not (is_own(name) or name in self.names):
                message = f"host {shown(value.decode('latin-1'))} is not served here; ask for 127.0.0.1 or localhost"
                remedy = "or start the server with --allowed-host and the name"
                return ApiError(MISDIRECTED, f"{message}, {remedy}", code="misdirected_request")
        return None


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port, in lower case; None where there is none.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000"), host_name("a.b."), host_name("[::1"), host_name("a@b:c")
    ('localhost', '::1', 'a.b', None, None)
    """
    name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdecimal() else (host, "", "")
    if name.startswith("[") != name.endswith("]") or (port and int(port) > 65535):
        return None
    name = name.removesuffix(".").lower()
    return name.strip("[]") if name and not set(name) & set(" @/\\?#") else None


def is_own(name: str) -> bool:
    """Whether a name is an address, or this machine's for itself: nobody can have it point elsewhere.

    >>> is_own("127.0.0.1"), is_own("::1"), is_own("a.localhost"), is_own("localhost.org")
    (True, True, True, False)
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == LOCAL or name.endswith(f".{LOCAL}")
    return True


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


async def _answer(error: ApiError, send: Send) -> None:
    """In OpenAI's form, as all errors."""
    body = json.dumps({"error": error.fields}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
