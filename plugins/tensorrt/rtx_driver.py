"""The few functions of the CUDA driver that a plugin needs, through ctypes: load machine code, launch it on a stream.

Compiled, not run: no machine with an RTX GPU was at hand. Tests record the launches with a driver of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from hashlib import sha256

from export.errors import EnvironmentLacksError, ResourceError

LIBRARY = "libcuda.so.1"
# CUdevice_attribute and CUfunction_attribute of cuda.h.
CAPABILITY_MAJOR, CAPABILITY_MINOR, DYNAMIC_SHARED_BYTES = 75, 76, 8
# Above this a kernel must ask for its dynamic shared memory (CUDA C++ Programming Guide, compute capabilities).
SHARED_BYTES_FREE = 48 * 1024
Grid = tuple[int, int, int]
Params = ctypes.Array[ctypes.c_void_p]


class CudaDriver:
    """The system's driver; handles are integers. All calls are for the current CUDA context."""

    def __init__(self) -> None:
        """Raises EnvironmentLacksError where there is none."""
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise EnvironmentLacksError(f"{LIBRARY} does not open ({error}); plugins run on an NVIDIA GPU") from error
        self._loaded: dict[tuple[int, bytes, str], int] = {}

    def capability(self) -> int:
        """Compute capability of the current GPU, 10 * major + minor."""
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check("cuCtxGetDevice", ctypes.byref(device))
        for value, attribute in ((major, CAPABILITY_MAJOR), (minor, CAPABILITY_MINOR)):
            self._check("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return 10 * major.value + minor.value

    def function(self, cubin: bytes, name: str, shared_bytes: int) -> int:
        """The kernel `name` of machine code `cubin`, with its shared memory allowed.

        Many plugins share one kernel, so it is loaded once in a context, and kept until the process ends.
        """
        context = ctypes.c_void_p()
        self._check("cuCtxGetCurrent", ctypes.byref(context))
        key = (context.value or 0, sha256(cubin).digest(), name)
        if key not in self._loaded:
            self._loaded[key] = self._load(cubin, name, shared_bytes)
        return self._loaded[key]

    def _load(self, cubin: bytes, name: str, shared_bytes: int) -> int:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        self._check("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        if shared_bytes > SHARED_BYTES_FREE:
            self._check("cuFuncSetAttribute", function, DYNAMIC_SHARED_BYTES, shared_bytes)
        return int(function.value or 0)

    def launch(self, function: int, grid: Grid, threads: int, shared_bytes: int, stream: int, params: Params) -> None:
        """Put one launch on `stream`. params: array of pointers to the arguments."""
        block, handle = (threads, 1, 1), ctypes.c_void_p(function)
        self._check("cuLaunchKernel", handle, *grid, *block, shared_bytes, ctypes.c_void_p(stream), params, None)

    def _check(self, call: str, *arguments: object) -> None:
        code = getattr(self._cuda, call)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(text))
            raise ResourceError(f"{call} failed with {(text.value or b'').decode() or code}; see the CUDA driver's log")


@cache
def cuda_driver() -> CudaDriver:
    """The process's driver. Raises EnvironmentLacksError where there is none."""
    return CudaDriver()


class Arguments:
    """The arguments of a launch in fixed memory: made once, pointers replaced before each launch."""

    def __init__(self, types: Sequence[str]) -> None:
        """types: Triton's names, pointers begin with a star; the other arguments are 32-bit integers."""
        self.values = [ctypes.c_uint64() if kind.startswith("*") else ctypes.c_int32() for kind in types]
        self.params = (ctypes.c_void_p * len(self.values))(*map(ctypes.addressof, self.values))

    def set(self, index: int, value: int) -> None:
        self.values[index].value = value
