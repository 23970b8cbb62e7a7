"""What the processor can do at best, by short loops in the kernel library."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from plugins.cpu import library

SECONDS = 0.25  # of each measurement
STREAM_BYTES = 256 << 20  # read from memory again and again, by all threads together: more than caches hold


@dataclass(frozen=True)
class Limits:
    """What all threads together do at best; 0 where unknown.

    variant: the instruction set whose byte products PackedGemm uses. byte_products_per_s, float_products_per_s: of
    products with their sums. memory_bytes_per_s: read from memory in order, STREAM_BYTES of it.
    """

    variant: str
    byte_products_per_s: float
    float_products_per_s: float
    memory_bytes_per_s: float


def quantizing_s() -> float:
    """Seconds that all threads together have quantized rows in PackedGemm so far, in this process.

    Raises EnvironmentLacksError where there is no kernel library.
    """
    kernels = ctypes.CDLL(str(library.path_of_library()))
    kernels.packed_gemm_quantizing_seconds.restype = ctypes.c_double
    return float(kernels.packed_gemm_quantizing_seconds())


def measure(threads: int) -> Limits:
    """The limits of `threads` threads at once. Raises EnvironmentLacksError where there is no kernel library."""
    kernels = ctypes.CDLL(str(library.path_of_library()))
    kernels.packed_gemm_variant.restype = ctypes.c_char_p
    seconds, stream = ctypes.c_double(SECONDS), ctypes.c_int64(STREAM_BYTES // threads)
    loops: dict[str, tuple[ctypes.c_double | ctypes.c_int64, ...]] = {
        "byte_products_per_second": (seconds,),
        "float_products_per_second": (seconds,),
        "memory_bytes_per_second": (seconds, stream),
    }
    rates = []
    for name, arguments in loops.items():
        function = getattr(kernels, name)
        function.restype = ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
            calls = [pool.submit(function, *arguments) for _ in range(threads)]
        rates.append(sum(call.result() for call in calls))
    return Limits(kernels.packed_gemm_variant().decode(), *rates)
