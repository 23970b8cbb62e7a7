"""Integer expressions over tensor shapes, written down before the shapes are known.

TensorRT evaluates launch sizes and scalars of a plugin when the shapes come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from export.errors import ContractError

# A size: an integer, or what a library has for one that it does not know yet.
Size = Any
Dimension = Callable[[int, int], Size]
Quotient = Callable[[Size, Size], Size]


@dataclass(frozen=True)
class Expression:
    """kind: "constant" (its value), "dim" (input, axis), "product", "floor_div", "ceil_div" (two expressions), or
    "negative" (one), which stands only inside of -(-x // y), the form in which a ceiling is written."""

    kind: str
    operands: tuple[Any, ...]

    def __mul__(self, other: Expression | int) -> Expression:
        return Expression("product", (self, as_expression(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Expression | int) -> Expression:
        return Expression("floor_div", (self, as_expression(other)))

    def __neg__(self) -> Expression:
        if self.kind == "floor_div" and self.operands[0].kind == "negative":
            return Expression("ceil_div", (self.operands[0].operands[0], self.operands[1]))
        return Expression("negative", (self,))

    def resolve(self, dim: Dimension, ceil_div: Quotient) -> Size:
        """The value, dimensions given by dim(input, axis): integers, or a library's own symbols."""
        if self.kind == "constant":
            return self.operands[0]
        if self.kind == "dim":
            return dim(*self.operands)
        if self.kind not in OPERATIONS:
            raise ContractError(f"a launch size is negative: {self}")
        first, second = (operand.resolve(dim, ceil_div) for operand in self.operands)
        return OPERATIONS[self.kind](first, second, ceil_div)


OPERATIONS: dict[str, Callable[[Size, Size, Quotient], Size]] = {
    # An integer cannot multiply a library's symbol from the left.
    "product": lambda a, b, _: b * a if isinstance(a, int) else a * b,
    "floor_div": lambda a, b, _: a // b,
    "ceil_div": lambda a, b, ceil_div: ceil_div(a, b),
}


def as_expression(value: Expression | int) -> Expression:
    """A constant for an integer; an expression as it is."""
    return value if isinstance(value, Expression) else Expression("constant", (int(value),))


def rows_of(index: int, rank: int) -> Expression:
    """Rows of input `index`: the product of all dimensions but the last."""
    dims = [Expression("dim", (index, axis)) for axis in range(rank - 1)]
    return math.prod(dims[1:], start=dims[0]) if dims else as_expression(1)
