"""Tests of the kernel library's ops, run in a process of their own with a library under sanitizers:

    python -m tests.support.sanitized test_file.py -k some

The process needs the sanitizer's run time before all else: LD_PRELOAD.
"""

import subprocess
import sys

import pytest

from plugins.cpu import library
from tests.support import native

FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")


def environment() -> dict[str, str]:
    """What such a process is started with. onnxruntime throws, so the C++ library must be there when ASan starts."""
    compiler = library.compiler()
    names = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {"LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0"}  # Python leaves much behind


def main(arguments: list[str]) -> int:
    compiled = native.folder
    native.folder = lambda flags=(): compiled(FLAGS)
    options = ["-q", "-s", "-n", "0", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
    return pytest.main([*options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
