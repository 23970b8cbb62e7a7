"""torch.cuda without a GPU: streams and graphs that note in which order they are used, and replay what was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """Waits are noted; `cuda_stream` is its handle."""

    name: str
    cuda_stream: int
    events: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.events.append(f"host waits for {self.name}")


@dataclass
class Graph:
    """What was captured, as functions; nothing of it runs before `replay`."""

    cuda: FakeCuda
    calls: list[Callable[[], Any]] = field(default_factory=list)

    def replay(self) -> None:
        self.cuda.events.append("replay")
        for call in self.calls:
            call()


class FakeCuda:
    """What the engines use of torch.cuda. `current`: the stream in use; `capturing`: the graph that records, if any."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.count = 0
        self.current = Stream("main", 0, self.events)
        self.capturing: Graph | None = None

    def Stream(self) -> Stream:
        self.count += 1
        return Stream(f"side {self.count}", self.count, self.events)

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        """As torch's: if the end of the capture raises, the stream of the capture stays the current one."""
        assert capture_error_mode == "thread_local", "other threads' work would break the capture"
        before, self.current = self.current, stream or Stream("capture", 99, self.events)
        self.capturing = graph
        self.events.append(f"capture on {self.current.name}")
        try:
            yield
        except BaseException as error:
            raise RuntimeError("capture_end: the capture was invalidated") from error
        finally:
            self.capturing = None
        self.current = before

    def launch(self, what: str, call: Callable[[], Any]) -> None:
        """A kernel on the current stream: it runs at once, or with every replay of the graph that captures it."""
        if self.capturing is not None:
            self.capturing.calls.append(call)
        else:
            self.events.append(f"{what} on {self.current.name}")
            call()
