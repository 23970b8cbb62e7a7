"""What two programs give the same engines, compared call by call, where both get the answers that one of them got.

A difference in the last bit of what a quantizing engine is given flips codes; answers part, and all that comes after
them, so that two right programs may draw pictures that differ by more than a fault would cost. So the calls of one
program are recorded, and the other one's are answered from that record. No engine runs there, nothing can flip, and
whatever it gives, in each call, is its own work on equal numbers: equal but for the roundings of that work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.base import Arrays, Engine

ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Sample:
    """A sample of a call: its inputs and outputs without their batch axis; an input that has none is as it is."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class Difference:
    """ulps: the largest of an array, see `ulps`. where: of what, in words."""

    ulps: float
    where: str


@dataclass(frozen=True)
class Record:
    """Samples that a component was called with, and its answers; and how far calls were from them that were answered by
    these, sample by sample. shared: inputs without a batch axis."""

    name: str
    shared: frozenset[str] = frozenset()
    samples: list[Sample] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def add(self, inputs: Arrays, outputs: Arrays) -> None:
        """Keep a call. All outputs have a batch axis."""
        for i in range(_count(outputs)):
            kept = {name: value[i].copy() for name, value in outputs.items()}
            self.samples.append(Sample({name: value.copy() for name, value in self._row(inputs, i).items()}, kept))

    def answer(self, inputs: Arrays) -> Arrays | None:
        """Outputs for a batch: of each sample those of the one that it is nearest to, in whatever call that was. None
        where a sample is like none of them in its shapes."""
        if not self.samples:
            self.differences.append(Difference(math.inf, f"that {self.name} is called at all"))
            return None
        count = max(len(value) for name, value in inputs.items() if name not in self.shared)
        answers = []
        for i in range(count):
            row = self._row(inputs, i)
            pairs = [(self._differences(row, sample), sample) for sample in self.samples]
            # By the largest difference, then the next: an input that is wrong in every call does not choose the sample.
            found, sample = min(pairs, key=lambda pair: [difference.ulps for difference in pair[0]])
            self.differences.append(found[0])
            if _shapes(row) != _shapes(sample.inputs):
                return None
            answers.append(sample.outputs)
        return {name: np.stack([outputs[name] for outputs in answers]) for name in answers[0]}

    def _row(self, inputs: Arrays, i: int) -> Arrays:
        return {name: value if name in self.shared else value[i] for name, value in inputs.items()}

    def _differences(self, row: Arrays, sample: Sample) -> list[Difference]:
        """Of every input, the largest first."""
        if row.keys() != sample.inputs.keys():
            return [Difference(math.inf, f"the names of {self.name}'s inputs")]
        found = [Difference(ulps(row[name], sample.inputs[name]), f"{self.name}'s {name}") for name in row]
        return sorted(found, key=lambda difference: -difference.ulps)


def _count(outputs: Arrays) -> int:
    return len(next(iter(outputs.values())))


def _shapes(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in arrays.items()}


def ulps(value: NDArray[np.generic], reference: NDArray[np.generic]) -> float:
    """The largest difference in units of 2^-24 of the reference's largest number; of whole numbers, and of shapes and
    numbers that are not finite, inf where they differ.

    >>> ulps(np.float32([1 + 2**-23, 4]), np.float32([1, 4])), ulps(np.array([1, 2]), np.array([1, 3]))
    (0.5, inf)
    """
    if value.shape == reference.shape and np.array_equal(value, reference):
        return 0.0
    if value.shape != reference.shape or {value.dtype.kind, reference.dtype.kind} != {"f"}:
        return math.inf
    ours, theirs = value.astype(np.float64), reference.astype(np.float64)
    largest = np.abs(theirs).max()
    error = np.abs(ours - theirs).max() / (largest * ROUNDING) if np.isfinite(largest) and largest else math.inf
    return float(error) if np.isfinite(error) else math.inf


@dataclass(frozen=True)
class Recorded:
    """An engine whose calls are kept."""

    engine: Engine
    record: Record

    def run(self, inputs: Arrays) -> Arrays:
        outputs = self.engine.run(inputs)
        self.record.add(inputs, outputs)
        return outputs

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class Replayed:
    """A record as the engine that it was made of, which is asked for what no sample of the record is like."""

    engine: Engine
    record: Record

    def run(self, inputs: Arrays) -> Arrays:
        answer = self.record.answer(inputs)
        return self.engine.run(inputs) if answer is None else answer

    def close(self) -> None:
        self.engine.close()
