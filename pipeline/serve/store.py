"""PNG files that a client fetches by their address, the newest ones, in memory."""

from __future__ import annotations

import secrets
from collections import OrderedDict

# Of all files together; the oldest go first.
MOST_BYTES = 64 << 20
NAME_BYTES = 16  # random ones: nobody guesses the address of somebody else's picture


class PictureStore:
    """For one thread, that of the event loop."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.size_bytes = most_bytes, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def put(self, png: bytes) -> str:
        """Keep a file; returns its name. Older ones go where they no longer fit beside it."""
        name = secrets.token_hex(NAME_BYTES)
        self._files[name] = png
        self.size_bytes += len(png)
        while self.size_bytes > self.most_bytes and len(self._files) > 1:
            _, oldest = self._files.popitem(last=False)
            self.size_bytes -= len(oldest)
        return name

    def get(self, name: str) -> bytes | None:
        """The file; None where there is none, or none any more."""
        return self._files.get(name)
