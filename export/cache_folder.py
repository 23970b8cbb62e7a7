"""Where results that can be made again are kept between runs: the one rule for all of them."""

from __future__ import annotations

import os
from pathlib import Path

OVERRIDE = "DITC_CACHE"


def cache_folder(*parts: str) -> Path:
    """The user's cache folder, or what `parts` name below it: DITC_CACHE, else ditc below XDG_CACHE_HOME or ~/.cache.

    Nothing is made; what lies there may be removed at any time.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(OVERRIDE) or Path(base) / "ditc").joinpath(*parts)
