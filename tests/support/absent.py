"""A process without the compiler's packages: `python -m tests.support.absent VERB ...`, or `hide()` before any import.

They are nowhere to be found, neither by an import nor by a look-up of their version, as where they were never
installed. (Blocked by an error of its own kind, a look-up would end in that error instead of "not installed".)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

HIDDEN = frozenset(
    {
        "accelerate", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "ml_dtypes", "onnx", "onnx_ir",
        "onnxscript", "pytest", "scipy", "sklearn", "sympy", "tensorrt", "tensorrt_rtx", "torch", "torchvision",
        "transformers", "triton",
    }
)  # fmt: skip


class Without:
    """One of Python's finders, which no longer finds what is hidden."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, *args: Any) -> Any:
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

    def find_distributions(self, context: Any) -> Any:
        search = getattr(self.finder, "find_distributions", lambda _: ())
        return (row for row in search(context) if str(row.metadata["Name"]).replace("-", "_") not in HIDDEN)


def hide() -> None:
    """From here on this process has none of the hidden packages. Raises AssertionError if one is imported already."""
    assert not (early := visible()), f"{early} were imported before they could be hidden"
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]


def visible() -> list[str]:
    """Hidden packages that are imported all the same."""
    return sorted({name.partition(".")[0] for name in sys.modules} & HIDDEN)


def main(argv: Sequence[str]) -> int:
    """The verb's exit code. Raises AssertionError if it got at a hidden package."""
    hide()
    from pipeline.__main__ import main as verb

    code = verb(argv)
    assert not visible(), f"{argv[0]} imports {visible()}"
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
