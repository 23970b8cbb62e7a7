"""Functions of float32 numbers, each rounded once: what IEEE asks of the root, and is nowhere promised of the others.

A scheduler's tables are float32, and diffusers takes roots and logarithms of them with PyTorch, which gives one of the
two floats beside the value, another on every machine. Here the nearer one is taken, on all.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# A number, or an array of any shape; functions give the same.
Float32 = TypeVar("Float32", np.float32, NDArray[np.float32])


def root(x: Float32) -> Float32:
    """Square root; NaN of what is negative."""
    return _rounded_once(np.sqrt, x)


def log(x: Float32) -> Float32:
    """Natural logarithm; minus infinity of 0."""
    return _rounded_once(np.log, x)


def exp(x: Float32) -> Float32:
    """e to the power x."""
    return _rounded_once(np.exp, x)


def expm1(x: Float32) -> Float32:
    """e to the power x, minus 1."""
    return _rounded_once(np.expm1, x)


def _rounded_once(function: np.ufunc, x: Float32) -> Float32:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        result: Float32 = function(np.asarray(x, np.float64)).astype(np.float32)
    return result
