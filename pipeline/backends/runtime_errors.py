"""What onnxruntime says of a graph or of its inputs, as an error of ours that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import ContractError
from pipeline.files import is_out_of_memory


@contextmanager
def runtime_errors(path: Path) -> Iterator[None]:
    """Within, onnxruntime works on the graph in `path`; a refusal becomes a ContractError. Lack of memory stays so."""
    try:
        yield
    except Exception as error:  # its classes, one for each cause, share no base
        # A message of its own with a name from the file that is not UTF-8 comes as UnicodeDecodeError.
        own = type(error).__module__.startswith("onnxruntime.") or isinstance(error, UnicodeDecodeError)
        if not own or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ContractError(
            f"{path}: onnxruntime refuses it ({reason}); verify the bundle, or build it again"
        ) from error
