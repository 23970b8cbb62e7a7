"""The search for weight scales in C, where there is a C compiler: NumPy's bits, several times as fast."""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import EnvironmentLacksError
from plugins.cpu import library

logger = logging.getLogger(__name__)
F32 = NDArray[np.float32]
Function = Callable[..., None]  # in C, of ARGUMENTS
SOURCES = ("rounding_errors.c",)
POINTER, INTEGER, FLOAT = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS"), ctypes.c_int64, ctypes.c_float
ARGUMENTS = (POINTER, POINTER, INTEGER, INTEGER, INTEGER, INTEGER, FLOAT, FLOAT, FLOAT, POINTER)


@cache
def compiled() -> Function | None:
    """The function, compiled for this process; None where nothing can be compiled."""
    with tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        path = Path(folder) / "rounding_errors.so"
        try:
            library.build(path, sources=SOURCES)
            function = ctypes.CDLL(str(path)).fpq_rounding_errors
        except (EnvironmentLacksError, OSError) as error:
            logger.info("scales are searched by NumPy, some times slower: %s", error)
            return None
    function.argtypes, function.restype = ARGUMENTS, None
    return function


def rounding_errors(function: Function, x: F32, scales: F32, slope: float, least: float, max_value: float) -> F32:
    """[rows, tried, groups]: squared errors of magnitudes x [rows, groups, n] at scales [rows, tried], see
    rounding_errors.c."""
    rows, groups, n = x.shape
    errors = np.empty((*scales.shape, groups), np.float32)
    function(x, np.ascontiguousarray(scales), rows, groups, n, scales.shape[1], slope, least, max_value, errors)
    return errors
