"""Run a quantizer on torch tensors: on their GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.errors import ContractError
from plugins.gpu.device import sm_of
from plugins.gpu.kernel import launch_options
from plugins.gpu.row_tiles import RowTile
from plugins.gpu.spec import QuantizeSpec
from plugins.gpu.table import kernel

if TYPE_CHECKING:
    import torch

KERNEL_OF = {"none": "quantize", "gelu": "gelu_quantize", "norm_modulate": "norm_modulate_quantize"}


def quantize(
    spec: QuantizeSpec,
    x: torch.Tensor,
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    tokens: int = 0,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    tile: RowTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, C] -> (operand bytes u8 [M, C], scale f32 [M]) by the kernel that `spec.before` asks for.

    shift, scale [M / tokens, C] and tokens: with "norm_modulate" only. codes, scales: written in place where given,
    so that a CUDA graph finds them again. tile: the heuristics' choice unless given. Raises ContractError for shapes,
    types or memory layouts that the kernel does not take, EnvironmentLacksError without a GPU and an interpreter.
    """
    import torch

    rows = x.shape[0] if x.dim() == 2 else -1
    _check_tensor("x", x, (rows, spec.channels), _dtype(spec.input))
    inputs = {"x": x, **_modulation(spec, rows, shift, scale, tokens)}
    codes = torch.empty(rows, spec.channels, dtype=torch.uint8, device=x.device) if codes is None else codes
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if scales is None else scales
    _check_tensor("codes", codes, (rows, spec.channels), torch.uint8)
    _check_tensor("scales", scales, (rows,), torch.float32)
    sizes = {"M": rows, "tokens": tokens} if spec.before == "norm_modulate" else {"M": rows}
    if rows:
        _launch(spec, {**inputs, **sizes, "codes": codes, "scales": scales}, rows, tile)
    return codes, scales


def quantize_static(
    spec: QuantizeSpec, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, tile: RowTile | None = None
) -> torch.Tensor:
    """x [M, C], scale and zero f32 [1] -> operand bytes u8 [M, C], for a static spec; else as `quantize`."""
    import torch

    if not spec.static:
        raise ContractError("this quantizer's spec has a scale per token; a static one has static=True")
    rows = x.shape[0] if x.dim() == 2 else -1
    _check_tensor("x", x, (rows, spec.channels), _dtype(spec.input))
    for name, tensor in (("scale", scale), ("zero", zero)):
        _check_tensor(name, tensor, (1,), torch.float32)
    codes = torch.empty(rows, spec.channels, dtype=torch.uint8, device=x.device)
    if rows:
        _launch(spec, {"x": x, "static_scale": scale, "static_zero": zero, "M": rows, "codes": codes}, rows, tile)
    return codes


def _launch(spec: QuantizeSpec, arguments: dict, rows: int, tile: RowTile | None) -> None:
    row, sm = kernel(KERNEL_OF[spec.before]), sm_of(arguments["x"])
    chosen = tile or row.tile(spec, rows, sm)
    constants = row.all_constants(spec, chosen, sm)
    row.function()[row.grid(spec, chosen, rows)](**arguments, **constants, **launch_options(chosen))


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _modulation(
    spec: QuantizeSpec, rows: int, shift: torch.Tensor | None, scale: torch.Tensor | None, tokens: int
) -> dict[str, torch.Tensor]:
    """shift and scale, checked; nothing for the quantizers without them."""
    if spec.before != "norm_modulate":
        if shift is not None or scale is not None:
            raise ContractError(f"shift and scale belong to norm_modulate; this quantizer's before is {spec.before!r}")
        return {}
    if shift is None or scale is None:
        raise ContractError("norm_modulate needs shift and scale")
    if tokens < 1 or rows % tokens:
        raise ContractError(f"tokens {tokens} does not divide the {rows} rows; it is the number of rows of a sample")
    for name, tensor in (("shift", shift), ("scale", scale)):
        _check_tensor(name, tensor, (rows // tokens, spec.channels), _dtype(spec.input))
    return {"shift": shift, "scale": scale}


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        wanted = ["M" if size < 0 else size for size in shape]
        raise ContractError(f"{name} is {tensor.dtype} {list(tensor.shape)}; the kernel takes {dtype} {wanted}")
    if not tensor.is_contiguous():
        raise ContractError(f"{name} with strides {tensor.stride()} is not contiguous; call .contiguous() first")
