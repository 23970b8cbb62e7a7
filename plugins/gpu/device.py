"""The GPU that a tensor is on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.errors import EnvironmentLacksError
from plugins.gpu.tiles import INTERPRETED

if TYPE_CHECKING:
    from torch import Tensor


def sm_of(tensor: Tensor) -> int:
    """Compute capability (10 * major + minor) of the tensor's GPU; INTERPRETED on the CPU.

    Raises EnvironmentLacksError where the CPU has no interpreter.
    """
    import torch
    import triton

    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    raise EnvironmentLacksError(
        f"tensors on {tensor.device}: the kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1 set before start"
    )
