"""What a call must give an engine: every way to get it wrong has its sentence, the same one for every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, RecipeError
from pipeline.backends.feeds import LARGEST, LARGEST_OF, Declared, check_feeds, of_bounds

DECLARED = (
    Declared("x", "float32", ("batch", "tokens", 4)),
    Declared("mask", "float32", ("batch", "tokens")),
    Declared("timestep", "float32", ("batch",)),
    Declared("labels", "int64", ("batch",)),
)
BOUNDS = {"x": ((1, 4), (2, 4), (8, 4)), "timestep": ((1,), (2,), (8,))}


def inputs(batch: int = 2, tokens: int = 3) -> dict[str, Any]:
    return {
        "x": np.ones((batch, tokens, 4), np.float32),
        "mask": np.ones((batch, tokens), np.float32),
        "timestep": np.full(batch, 999, np.float32),
        "labels": np.zeros(batch, np.int64),
    }


def test_what_fits_passes_at_any_size_and_up_to_the_largest_number() -> None:
    for batch, tokens in ((1, 1), (9, 7)):
        check_feeds(DECLARED, inputs(batch, tokens))
    check_feeds(DECLARED, inputs() | {"x": np.full((2, 3, 4), -LARGEST, np.float32)})
    check_feeds(DECLARED, inputs() | {"timestep": np.array([0, LARGEST_OF["timestep"]], np.float32)})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"z": np.zeros(2, np.float32)},
        r"inputs \['z'\] are missing or unknown; the engine takes labels, mask",
    ),
    "batch 0": ({"x": np.zeros((0, 3, 4), np.float32)}, r"x has shape \(0, 3, 4\).*give at least one of each"),
    "no token": (
        {"x": np.zeros((2, 0, 4), np.float32)},
        r"x has shape \(2, 0, 4\); the engine takes \(batch, tokens, 4\)",
    ),
    "other batch": ({"timestep": np.zeros(3, np.float32)}, r"batch is 2 in input x, but 3 in input timestep"),
    "other tokens": ({"mask": np.ones((2, 5), np.float32)}, r"tokens is 3 in input x, but 5 in input mask"),
    "fixed size": ({"x": np.zeros((2, 3, 5), np.float32)}, r"fixed sizes are chosen when an engine is built"),
    "rank": ({"timestep": np.float32(3)}, r"timestep has shape \(\); the engine takes \(batch\)"),
    "float64": ({"x": np.ones((2, 3, 4))}, r"x is of float64, the engine takes float32; convert it with astype"),
    "integers": ({"timestep": np.ones(2, np.int64)}, r"timestep is of int64, the engine takes float32"),
    "a list": ({"timestep": [1.0, 2.0]}, r"timestep is of type list; give a NumPy array of float32"),
    "overflow": ({"x": np.full((2, 3, 4), 1e30, np.float32)}, r"x holds 1e\+30; .*magnitude up to 1.09951e\+12"),
    "negative overflow": ({"x": np.full((2, 3, 4), -1e30, np.float32)}, r"x holds -1e\+30"),
    "overflow beside NaN": (
        {"x": np.stack([np.full((3, 4), np.nan), np.full((3, 4), 1e30)]).astype(np.float32)},
        r"x holds 1e\+30; ",
    ),
    "overflow beside infinity": (
        {"mask": np.full((2, 3), [np.inf, -np.inf, -1e30], np.float32)},
        r"mask holds -1e\+30",
    ),
    "phase": ({"timestep": np.full(2, 1e6, np.float32)}, r"timestep holds 1e\+06; .*up to 16384"),
    "negative class": ({"labels": np.array([0, -1])}, r"labels holds -1; indices and lengths start at 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_words(name: str) -> None:
    change, words = WRONG[name]
    with pytest.raises(RecipeError, match=words):
        check_feeds(DECLARED, inputs() | change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes(value: float) -> None:
    check_feeds(DECLARED, inputs() | {"x": np.full((2, 3, 4), value, np.float32)})
    check_feeds(DECLARED, inputs() | {"timestep": np.array([1, value], np.float32)})


def test_all_numbers_of_a_masked_array_count() -> None:
    """Engines take them all."""
    masked = np.ma.masked_array(np.ones((2, 3), np.float32), mask=True)
    check_feeds(DECLARED, inputs() | {"mask": masked})
    with pytest.raises(RecipeError, match=r"mask holds 1e\+30"):
        masked.data[...] = 1e30
        check_feeds(DECLARED, inputs() | {"mask": masked})


def test_a_missing_input() -> None:
    with pytest.raises(RecipeError, match=r"inputs \['mask'\] are missing"):
        check_feeds(DECLARED, {name: array for name, array in inputs().items() if name != "mask"})


def test_engines_that_convert_take_other_types_and_the_reference_any_number() -> None:
    check_feeds(DECLARED, inputs() | {"x": np.ones((2, 3, 4))}, cast=True)
    check_feeds(DECLARED, inputs() | {"x": np.full((2, 3, 4), 1e30, np.float32)}, bounded=False)


def test_tensors_are_checked_as_arrays_are() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: torch.from_numpy(array) for name, array in inputs().items()}
    check_feeds(DECLARED, tensors | {"x": tensors["x"].clone().requires_grad_()})
    check_feeds(DECLARED, tensors | {"x": tensors["x"].half()}, cast=True)
    for name in ("float64", "overflow beside NaN", "overflow", "negative class", "other batch"):
        change, words = WRONG[name]
        with pytest.raises(RecipeError, match=words):
            check_feeds(DECLARED, tensors | {key: torch.from_numpy(array) for key, array in change.items()})


def bounded(batch: int) -> dict[str, Any]:
    return {"x": np.zeros((batch, 4), np.float32), "timestep": np.zeros(batch, np.float32)}


def test_bounds_of_an_engine_with_profiles() -> None:
    for bounds in ({"x": [[1], [2, 4], [8, 4]]}, {"x": [[1, 4], [9, 4], [8, 4]]}, {"other": [[1], [1], [1]]}):
        with pytest.raises(ContractError, match="which the engine cannot have"):
            of_bounds(bounds, {"x": np.float32})
    declared = of_bounds(BOUNDS, {"x": np.float32, "timestep": np.float32})
    for batch in (1, 8):
        check_feeds(declared, bounded(batch))
    with pytest.raises(RecipeError, match=r"x has shape \(9, 4\); the engine takes \(1, 4\) to \(8, 4\)"):
        check_feeds(declared, bounded(9))
    with pytest.raises(RecipeError, match="batch is 2 in input x, but 3 in input timestep"):
        check_feeds(declared, bounded(2) | {"timestep": np.zeros(3, np.float32)})
