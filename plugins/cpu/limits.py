"""What the processor can do at best, by short loops in the kernel library."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from plugins.cpu import library

SECONDS = 0.25  # of each measurement


@dataclass(frozen=True)
class Limits:
    """Products per second of all threads together: of bytes, with their sums, and of float32; 0 where unknown.

    variant: the instruction set whose byte products PackedGemm uses.
    """

    variant: str
    byte_products_per_s: float
    float_products_per_s: float


def measure(threads: int) -> Limits:
    """The limits of `threads` threads at once. Raises EnvironmentLacksError where there is no kernel library."""
    kernels = ctypes.CDLL(str(library.path_of_library()))
    kernels.packed_gemm_variant.restype = ctypes.c_char_p
    rates = []
    for name in ("byte_products_per_second", "float_products_per_second"):
        function = getattr(kernels, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
            rates.append(sum(pool.map(function, [SECONDS] * threads)))
    return Limits(kernels.packed_gemm_variant().decode(), *rates)
