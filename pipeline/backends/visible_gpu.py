"""The GPU that engines which compute with PyTorch run on."""

from __future__ import annotations


def visible_sm() -> int:
    """Compute capability of PyTorch's current GPU, 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return int(major * 10 + minor)
