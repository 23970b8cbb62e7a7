"""Sizes that a graph says by an expression: the numbers are right, and what is no such expression is none."""

import pytest

from pipeline.backends.sizes import evaluated

SIZES = {"tokens": 17, "batch": 2, "unk__3 x": 5}


@pytest.mark.parametrize(
    ("expression", "size"),
    [("tokens", 17), ("unk__3 x", 5), ("64", 64), ("2 * (tokens + 15) // 16 + batch", 6), ("7 // batch * 2", 6)],
)
def test_expressions_of_integers_and_sizes(expression, size):
    assert evaluated(expression, SIZES) == size


@pytest.mark.parametrize(
    "expression",
    ["", "other", "tokens + other", "tokens - 1", "tokens / 2", "tokens // 0", "2.5", "True", "-1", "f(tokens)", "2 +",
     "[tokens]", "tokens.bit_length", "a\0b", "1; 2", "+".join("1" * 1000), "-" * 900 + "1", "not " * 200 + "1"],
)  # fmt: skip
def test_what_is_no_such_expression(expression):
    assert evaluated(expression, SIZES) is None
