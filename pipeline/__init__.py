"""The compiler: from a Diffusion Transformer and a recipe to a verified engine bundle.

from pipeline import load
engine = load("engines/pixart_w4a6").engine()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.bundle.bundle import Bundle

__all__ = ["load"]


def load(path: str | Path, threads: int | None = None) -> Bundle:
    """Open a bundle; every file is verified first. Raises export.errors.ContractError if it is damaged.

    path: its folder, or hf://OWNER/NAME[@REVISION], which is downloaded first (extra `hub`). threads: of an engine's
    call on the CPU; None: one for each core, within the container's CPU limit and OMP_NUM_THREADS.
    """
    from pipeline.bundle.bundle import load_bundle

    return load_bundle(path, threads)
