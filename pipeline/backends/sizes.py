"""Sizes that a graph says by an expression of others, such as `head_bytes` of plugins/cpu/attention_operands.py."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping

# An expression that is longer was not written by anyone who meant a size.
LONGEST = 1000
OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluated(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The number that integers and names of sizes make with +, * and //; None for what is no such expression, or has a
    name of no size.

    >>> evaluated("64 + (tokens + 15) // 16 * 2", {"tokens": 17})
    68
    """
    if expression in sizes:  # a name may be any text
        return sizes[expression]
    if len(expression) > LONGEST:
        return None
    try:
        return _number(ast.parse(expression, mode="eval").body, sizes)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return int(OPERATORS[type(node.op)](_number(node.left, sizes), _number(node.right, sizes)))
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError(f"{ast.unparse(node)} is no size")
