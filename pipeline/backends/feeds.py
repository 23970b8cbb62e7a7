"""What an engine takes, and whether a call gives it: one check, in words, for every engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from export.documents import shown
from export.errors import ContractError, RecipeError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor

    Array: TypeAlias = NDArray[np.generic] | Tensor

# The largest magnitude of a float input. A norm sums the squares of a token's channels in float32: they overflow from
# 1.8e19 / sqrt(channels) on, 2.9e17 for 4096 channels, and the norm of such a token is then zero in some runtimes and
# NaN in others. The embedder in front of the norm may enlarge an input by the row sum of its weights: 2^18 is left.
LARGEST = 2.0**40
# The phase of a timestep embedding, timestep * frequency, is rounded to float32: its error is timestep * 2^-24 rad. At
# 2^14 that is 2^-10 rad or 60 dB, below what quantization leaves; schedules end at 1000.
LARGEST_OF = {"timestep": 2.0**14}


@dataclass(frozen=True)
class Declared:
    """One input of an engine. `shape` mixes numbers with names of sizes that vary, equal in all inputs of a call.

    low, high: bounds of every axis where the engine has them (empty: any size from 1 on).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()

    def text(self) -> str:
        """The shapes that fit, for people.

        >>> Declared("x", "float32", ("batch", 4)).text()
        '(batch, 4)'
        """
        return f"{self.low} to {self.high}" if self.low else f"({', '.join(map(str, self.shape))})"


def of_session(session: InferenceSession) -> tuple[Declared, ...]:
    """The inputs of an onnxruntime session; an axis without a name may have any size."""
    return tuple(
        Declared(row.name, ELEMENT_TYPES.get(row.type, row.type), tuple(_named(row.shape, row.name)))
        for row in session.get_inputs()
    )


# onnxruntime's names of element types that models have as inputs.
ELEMENT_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


def _named(shape: Sequence[int | str | None], name: str) -> list[int | str]:
    return [f"{name}.{axis}" if size is None or size == "" else size for axis, size in enumerate(shape)]


def of_bounds(bounds: Mapping[str, tuple[Sequence[int], ...]], dtypes: Mapping[str, DTypeLike]) -> tuple[Declared, ...]:
    """The inputs of an engine with optimization profiles: name -> (smallest, usual, largest) shape.

    What varies is the batch, the first axis, and the number of tokens. dtypes: of the engine's tensors, by name. Raises
    ContractError where the bounds, which a file states, are none, or of a tensor that the engine lacks.
    """
    declared = []
    for name, (low, usual, high) in bounds.items():
        rows = list(zip_longest(low, usual, high, fillvalue=-1))
        ordered = all(0 <= a <= b <= c for a, b, c in rows)
        if name not in dtypes or not ordered:
            stated = f"shapes of {shown(name)}: {shown(low)}, {shown(usual)}, {shown(high)}"
            raise ContractError(f"metadata.json states {stated}, which the engine cannot have; build the engine again")
        sizes = [
            a if a == b else ("batch" if axis == 0 else "tokens")
            for axis, (a, b) in enumerate(zip(low, high, strict=True))
        ]
        declared.append(Declared(name, np.dtype(dtypes[name]).name, tuple(sizes), tuple(low), tuple(high)))
    return tuple(declared)


def check_feeds(
    declared: Sequence[Declared], inputs: Mapping[str, Array], cast: bool = False, bounded: bool = True
) -> None:
    """Raise RecipeError where a call does not give what the engine takes: names, types, shapes, sizes, magnitudes.

    inputs: NumPy arrays or torch tensors. cast: the engine converts element types itself. bounded: refuse finite
    numbers that are too large for float32 arithmetic (see LARGEST).
    """
    rows = {row.name: row for row in declared}
    if wrong := sorted(set(rows) ^ set(inputs)):
        raise RecipeError(f"inputs {wrong} are missing or unknown; the engine takes {', '.join(sorted(rows))}")
    sizes: dict[str, tuple[str, int]] = {}
    for name, row in rows.items():
        _check_type(row, inputs[name], cast)
        _check_shape(row, tuple(inputs[name].shape), sizes)
    if bounded:
        check_numbers(inputs)


def _check_type(row: Declared, array: Array, cast: bool) -> None:
    if not hasattr(array, "dtype"):
        kind = type(array).__name__
        raise RecipeError(f"input {row.name} is of type {kind}; give a NumPy array of {row.dtype}")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype != row.dtype and not cast:
        raise RecipeError(f"input {row.name} is of {dtype}, the engine takes {row.dtype}; convert it with astype")


def _check_shape(row: Declared, shape: tuple[int, ...], sizes: dict[str, tuple[str, int]]) -> None:
    if len(shape) != len(row.shape):
        raise RecipeError(f"input {row.name} has shape {shape}; the engine takes {row.text()}")
    for axis, (size, known) in enumerate(zip(shape, row.shape, strict=True)):
        fits = row.low[axis] <= size <= row.high[axis] if row.low else size == known or isinstance(known, str)
        if size < 1 or not fits:
            remedy = "give at least one of each" if size < 1 else "fixed sizes are chosen when an engine is built"
            raise RecipeError(f"input {row.name} has shape {shape}; the engine takes {row.text()}; {remedy}")
        if isinstance(known, str):
            other, first = sizes.setdefault(known, (row.name, size))
            if size != first:
                raise RecipeError(
                    f"{known} is {first} in input {other}, but {size} in input {row.name}; give equal sizes"
                )


class TooLargeError(RecipeError):
    """A finite number that is too large for float32 arithmetic."""


def check_numbers(inputs: Mapping[str, Array]) -> None:
    """Raise RecipeError for a finite float that is too large (see LARGEST), and for a negative integer.

    NaN and infinity pass: a sample that has one gives NaN, as in PyTorch.
    """
    for name, array in inputs.items():
        if "bool" not in str(array.dtype):
            _check_numbers(name, array)


def _check_numbers(name: str, array: Array) -> None:
    low, high = _bounds(array)
    if "float" not in str(array.dtype):
        if low < 0:
            raise RecipeError(f"input {name} holds {low:g}; indices and lengths start at 0")
        return
    limit = LARGEST_OF.get(name, LARGEST)
    if max(high, -low) > limit:
        extreme = high if high > limit else low
        raise TooLargeError(f"input {name} holds {extreme:g}; the engine takes numbers of magnitude up to {limit:g}")


def _bounds(array: Array) -> tuple[float, float]:
    """Least and largest of the finite numbers of an array or tensor; (0, 0) without any."""
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # of a masked array all numbers count, since engines take them all
        low, high = float(array.min()), float(array.max())
    else:
        low, high = (float(bound) for bound in array.detach().aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    finite = array[np.isfinite(array)] if isinstance(array, np.ndarray) else array[array.isfinite()]
    return _bounds(finite) if len(finite) else (0.0, 0.0)
