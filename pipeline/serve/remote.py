"""A batch that a replica draws, seen from the server; drawn again by another one where the replica ends.

Nothing is lost by that, and nothing told twice: a picture is given by its seed, so the second replica repeats what the
first has done, and what was told of it already is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from export.errors import ContractError
from pipeline.generate.draw import Pictures
from pipeline.serve.jobs import Row
from pipeline.serve.replica import Order, Progress

logger = logging.getLogger(__name__)
# Replicas that may end under one batch: one that ends each of them shall not go through all that there will be.
MOST_ENDED = 3


class Stream(Protocol):
    """The steps of an order, as a replica makes them."""

    def __next__(self) -> Progress: ...

    def cancel(self) -> None: ...


class RemoteBatch:
    """The steps of some rows, made by replicas; a Batch."""

    def __init__(
        self,
        rows: Sequence[Row],
        send: Callable[[Order], Stream],
        ended: tuple[type[Exception], ...],
        tell_ended: Callable[[], None],
    ) -> None:
        """send: an order to a replica that is free; ended: what its stream raises where the replica is no more;
        tell_ended: is called then."""
        self._rows, self._send, self._ended, self._tell_ended = list(rows), send, ended, tell_ended
        self._count_ended = 0
        self._order_anew()

    def _order_anew(self) -> None:
        n_steps, guidance_scale = self._rows[0].settings
        pictures = tuple(row.picture for row in self._rows)
        previews = tuple(row.job.preview_steps for row in self._rows)
        self._places = list(range(len(self._rows)))  # of what is kept, in the order
        self._stream = self._send(Order(pictures, n_steps, guidance_scale, previews))

    _last: Progress | None = None

    @property
    def n_steps(self) -> int:
        """All there are; of a batch that no replica has begun, 0."""
        return self._last.n_steps if self._last else 0

    @property
    def steps_done(self) -> int:
        return self._last.steps_done if self._last else 0

    @property
    def is_over(self) -> bool:
        return self._last is not None and self._last.steps_done == self._last.n_steps

    def step(self) -> None:
        """The next step, which is waited for. Raises what the replica raises, and ContractError where one after the
        other ends."""
        done = self.steps_done
        while self.steps_done == done:
            try:
                progress = next(self._stream)
            except StopIteration:
                raise ContractError(f"a replica ended its work after {done} steps; see its log") from None
            except self._ended as error:
                self._count_ended += 1
                self._tell_ended()
                reason = " ".join(str(error).split())[:300]
                logger.warning("a replica has ended after step %d of its batch: %s", done, reason)
                if self._count_ended == MOST_ENDED:
                    message = f"{MOST_ENDED} replicas ended while they drew the batch; see the logs of the cluster"
                    raise ContractError(message) from error
                self._order_anew()
            else:
                if progress.steps_done > done:
                    self._last = progress

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone. The replica draws the others to their end too, unless none is left."""
        self._rows = [self._rows[row] for row in rows]
        self._places = [self._places[row] for row in rows]
        if not self._rows:
            self._stream.cancel()

    def preview(self, row: int) -> Pictures:
        """Raises ContractError where there is none."""
        assert self._last is not None
        return _pixels(self._last.previews[self._places[row]])

    def picture(self, row: int) -> Pictures:
        """Raises ContractError where there is none."""
        assert self._last is not None
        return _pixels(self._last.pictures[self._places[row]])


def _pixels(answer: Pictures | str) -> Pictures:
    if isinstance(answer, str):
        raise ContractError(answer)
    return answer
