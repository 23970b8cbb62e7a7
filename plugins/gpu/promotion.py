"""How many products a tensor core may add up before they go to a float32 addition of their own."""

from __future__ import annotations

from plugins.gpu.specs import GemmSpec


def promotion_of(spec: GemmSpec, sm: int, step: int) -> int:
    """0: never."""
    return 0
