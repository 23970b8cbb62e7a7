"""Weights stored in NVFP4: E2M1 codes, two in a byte, with an E4M3 scale for each block of 16 and one scale for all.

As ModelOpt exports them, and as compressed-tensors packs them. The weight is the code's value times the block's scale,
which is the stored one times ModelOpt's global scale, or divided by that of compressed-tensors. Both products are
rounded to float32: what the programs that write such files compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.formats.format import get_format

if TYPE_CHECKING:
    import torch

BLOCK = 16
# Ending of the global scale's name -> that of the codes'. Beside both stands the ending BLOCKS.
KINDS = {".weight_scale_2": ".weight", ".weight_global_scale": ".weight_packed"}
BLOCKS = ".weight_scale"


def stored_parts(name: str) -> tuple[str, str, str] | None:
    """(weight, codes, scales of blocks) by name, for the name of a global scale; None for any other tensor.

    >>> stored_parts("fc.weight_global_scale")
    ('fc.weight', 'fc.weight_packed', 'fc.weight_scale')
    """
    for ending, codes in KINDS.items():
        if name.endswith(ending):
            layer = name.removesuffix(ending)
            return f"{layer}.weight", layer + codes, layer + BLOCKS
    return None


def problem(codes: torch.Tensor | None, blocks: torch.Tensor | None, whole: torch.Tensor) -> str | None:
    """Why the parts are no NVFP4 weight, in words; None if they are."""
    if codes is None or blocks is None:
        return f"goes with {'codes' if codes is None else 'scales of blocks'} that the file has not"
    if str(codes.dtype) != "torch.uint8" or codes.ndim != 2:
        return f"goes with codes that are {codes.dtype} {tuple(codes.shape)}, not bytes of two"
    shape = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if str(blocks.dtype) != "torch.float8_e4m3fn" or tuple(blocks.shape) != shape or codes.shape[1] * 2 % BLOCK:
        return f"goes with scales of blocks that are {blocks.dtype} {tuple(blocks.shape)}, not float8_e4m3fn {shape}"
    if not bool((blocks.float() >= 0).all()):  # NaN is not
        return "goes with scales of blocks that are negative or NaN"
    if not whole.is_floating_point() or whole.itemsize < 2 or whole.numel() != 1:
        return f"is {whole.dtype} {tuple(whole.shape)}, not one number"
    values = whole.float()
    return None if bool((values.isfinite() & (values > 0)).all()) else "is not finite and positive"


def dequantized(codes: torch.Tensor, blocks: torch.Tensor, whole: torch.Tensor, name: str) -> torch.Tensor:
    """float32 weight [N, K] from codes uint8 [N, K / 2], blocks float8 [N, K / 16] and the global scale `name`."""
    import torch

    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()  # element 2i in the low nibble
    values = torch.from_numpy(get_format("E2M1").values).float()[both]
    divided = name.endswith(".weight_global_scale")
    scale = blocks.float() / whole.float() if divided else blocks.float() * whole.float()
    return (values.unflatten(1, (-1, BLOCK)) * scale[..., None]).flatten(1)
