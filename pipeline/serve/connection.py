"""A connection of the server that is closed when nothing happens on it.

uvicorn waits without end for the rest of a request's head, and for a client to take an answer. Either costs whoever
opens many connections nothing, and the server a file each, of which a process may have some thousand.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# How often a connection is looked at. One that stood still from one look to the next is closed.
LOOKED_AT_EVERY_S = 30.0


class WatchedConnection(H11Protocol):
    """uvicorn's protocol, in which a head must have arrived by the second look, and an answer move between two."""

    every_s = LOOKED_AT_EVERY_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def _look_again(self, before: tuple[object, int] | None) -> None:
        self.loop.call_later(self.every_s, self._look, before)

    def _look(self, before: tuple[object, int] | None) -> None:
        """before: the request and the bytes to be taken, of a connection that waited for its client at the last look;
        None: it did not."""
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size():  # closed for us, but for bytes that the client does not take
                self.transport.abort()
            return
        left = self.transport.get_write_buffer_size()
        waits = left > 0 or self.cycle is None or self.cycle.response_complete
        now = (self.cycle, left) if waits else None
        if now is not None and now == before:
            self.transport.abort()
        else:
            self._look_again(now)
