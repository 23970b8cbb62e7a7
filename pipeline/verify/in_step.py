"""Several passes of one PyTorch module in step, from linear to linear, so that each weight is unpacked once for all.

Of a large model no unpacked weight is kept (pipeline.backends.reference), and to unpack one takes longer than a short
call multiplies by it. So passes with inputs of different lengths wait for each other at every linear, whose product is
computed of all their rows together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.progress import raise_if_stopped

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _AtLinear:
    """Where a pass stands: before a linear, with its input x [..., K]."""

    linear: torch.nn.Module
    x: torch.Tensor


@dataclass(frozen=True)
class _Finished(Generic[T]):
    """The end of a pass: its result in a list, or an empty list and the error that ended it."""

    result: list[T]
    error: BaseException | None = None

    def value(self) -> T:
        (result,) = self.result
        return result


class _AbandonedError(Exception):
    """Ends the thread of a pass that nobody waits for."""


class _Pass(Generic[T]):
    """One function in a thread of its own, which only runs while `start` or `go_on` waits for it: what passes draw
    from a common generator is drawn in their order."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._stops: SimpleQueue[_AtLinear | _Finished[T]] = SimpleQueue()
        self._outputs: SimpleQueue[torch.Tensor | _AbandonedError] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> _AtLinear | _Finished[T]:
        self._thread.start()
        return self._stops.get()

    def go_on(self, output: torch.Tensor) -> _AtLinear | _Finished[T]:
        """Take `output` for that of the linear that the pass stands at, and go to the next one."""
        self._outputs.put(output)
        return self._stops.get()

    def abandon(self) -> None:
        """End a pass that will not be walked to its end."""
        if self._thread.ident is not None:
            self._outputs.put(_AbandonedError())
            self._thread.join()

    def at(self, linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Called by a linear in the pass's own thread."""
        self._stops.put(_AtLinear(linear, x))
        output = self._outputs.get()
        if isinstance(output, _AbandonedError):
            raise output
        return output

    def _run(self) -> None:
        _current.one = self
        try:
            self._stops.put(_Finished([self._function()]))
        except _AbandonedError:
            return
        except BaseException as error:  # handed to whoever waits
            self._stops.put(_Finished([], error))


# Which pass the current thread belongs to.
_current = threading.local()


def in_step(
    linears: Sequence[torch.nn.Module], functions: Sequence[Callable[[], T]], after: Callable[[], None] = lambda: None
) -> list[T]:
    """The results of all functions, which call the module that has `linears`, in one order and each any number of
    times. after: what is done after each product.

    A linear's rows must not depend on each other. Raises what a function raises.
    """
    import torch

    passes = [_Pass(function) for function in functions]
    results = dict[int, _Finished[T]]()
    try:
        with _stopping(linears) as forwards, torch.inference_mode():
            stops = {place: one.start() for place, one in enumerate(passes)}
            while stops:
                raise_if_stopped()
                waiting = dict[int, _AtLinear]()
                for place, stop in stops.items():
                    if isinstance(stop, _AtLinear):
                        waiting[place] = stop
                    elif stop.error is not None:
                        raise stop.error
                    else:
                        results[place] = stop
                if not waiting:
                    break
                # A pass that calls the module once more goes on alone, when the others have ended.
                linear = next(iter(waiting.values())).linear
                together = {place: stop.x for place, stop in waiting.items() if stop.linear is linear}
                outputs = _product(forwards[linear], list(together.values()))
                after()
                stops = dict(waiting)
                for place, output in zip(together, outputs, strict=True):
                    stops[place] = passes[place].go_on(output)
    finally:
        for one in passes:
            one.abandon()
    return [results[place].value() for place in range(len(passes))]


def _product(forward: Callable[[torch.Tensor], torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a linear gives for each of several inputs [..., K], computed of all rows together."""
    import torch

    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    parts = forward(torch.cat(rows)).split([len(part) for part in rows])
    return [part.reshape(*x.shape[:-1], -1) for part, x in zip(parts, inputs, strict=True)]


@contextmanager
def _stopping(
    linears: Sequence[torch.nn.Module],
) -> Iterator[dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """Within, the linears are stops of the passes that call them; gives what they compute. Hooks before a linear run
    in the pass, on its own input."""
    forwards: dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]] = {part: part.forward for part in linears}
    try:
        for part in linears:
            part.forward = partial(_stopped, part)
        yield forwards
    finally:
        for part in linears:
            part.__dict__.pop("forward", None)


def _stopped(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    one: _Pass[object] = _current.one
    return one.at(linear, x)
