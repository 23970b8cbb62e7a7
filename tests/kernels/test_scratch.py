"""Memory of tasks in the kernel library: small blocks are kept for the next task, large ones go back to the system."""

import ctypes

import pytest

from plugins.cpu import library
from tests.support import native

pytestmark = pytest.mark.kernels
# Blocks above 32 MiB are mappings of their own in every C library of the tests, so that none is found in a hole again.
SMALL_BYTES, LARGE_BYTES = 1 << 20, 64 << 20


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    native.need_compiler()
    path = tmp_path_factory.mktemp("scratch") / library.NAME
    library.build(path, ("-fvisibility=default",), ("scratch.c",))  # the whole library keeps these to itself
    kernels = ctypes.CDLL(str(path))
    kernels.take_scratch.restype, kernels.take_scratch.argtypes = ctypes.c_void_p, [ctypes.c_int64]
    kernels.give_scratch.restype, kernels.give_scratch.argtypes = None, [ctypes.c_void_p]
    return kernels


def test_a_small_block_is_that_of_the_next_task(kernels):
    block = kernels.take_scratch(SMALL_BYTES)
    assert block % 64 == 0
    kernels.give_scratch(block)
    again = kernels.take_scratch(SMALL_BYTES // 2)
    assert again == block
    kernels.give_scratch(again)


def test_two_tasks_at_once_have_two_blocks(kernels):
    blocks = [kernels.take_scratch(SMALL_BYTES) for _ in range(2)]
    assert abs(blocks[0] - blocks[1]) >= SMALL_BYTES
    for block in blocks:
        kernels.give_scratch(block)


def test_a_large_block_is_not_kept(kernels):
    block = kernels.take_scratch(LARGE_BYTES)
    ctypes.memset(block, 0, LARGE_BYTES)
    kernels.give_scratch(block)
    small = kernels.take_scratch(SMALL_BYTES)
    assert not block <= small < block + LARGE_BYTES
    kernels.give_scratch(small)
