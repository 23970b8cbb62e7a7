"""Run the kernels on torch tensors: on their GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from export.errors import ContractError, EnvironmentLacksError
from plugins.gpu import tiles
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec
from plugins.gpu.table import Kernel, kernel, launch_options
from plugins.gpu.tile_table import Tile
from plugins.gpu.tiles import INTERPRETED, RowTile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
HEURISTICS = {"packed_gemm": tiles.packed_tile, "expanded_gemm": tiles.expanded_tile}


def packed_gemm(
    spec: GemmSpec,
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scales: Tensor,
    bias: Tensor,
    *,
    multiplier_codes: Tensor | None = None,
    a_zero: Tensor | None = None,
    w_sums: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens: int = 0,
    out: Tensor | None = None,
    tile: Tile | None = None,
    sm: int | None = None,
    expand_first: bool | None = None,
) -> Tensor:
    """y [M, N] as GemmSpec says, weights packed u8 [N, K / 2].

    out: where to write it. tile, sm: what to run instead of HEURISTICS' choice for the tensors' GPU. expand_first:
    whether the weight is expanded for this call (N x K bytes until it ends) or decoded in registers; without: registers
    for a given tile, else what `tiles.expands_first` says. Raises ContractError for a tensor that is missing or of
    another shape or type, EnvironmentLacksError for CPU tensors that no interpreter takes.
    """
    inputs = dict(
        a=a, a_scale=a_scale, w=w, w_scales=w_scales, multiplier_codes=multiplier_codes, bias=bias, a_zero=a_zero,
        w_sums=w_sums, gate=gate, residual=residual,
    )  # fmt: skip
    if expand_first is None:
        expand_first = tile is None and len(a) > 0 and tiles.expands_first(spec, len(a), sm_of(a) if sm is None else sm)
    if expand_first:
        inputs["w"] = expand(spec, w, multiplier_codes)
    return _gemm(spec, inputs, tokens, out, tile, sm, expanded=expand_first)


def expanded_gemm(
    spec: GemmSpec,
    a: Tensor,
    a_scale: Tensor,
    w_expanded: Tensor,
    w_scales: Tensor,
    bias: Tensor,
    *,
    a_zero: Tensor | None = None,
    w_sums: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens: int = 0,
    out: Tensor | None = None,
    tile: Tile | None = None,
    sm: int | None = None,
) -> Tensor:
    """As packed_gemm with w_expanded u8 [N, K] from `expand`, multipliers folded in."""
    inputs = dict(
        a=a, a_scale=a_scale, w=w_expanded, w_scales=w_scales, bias=bias, a_zero=a_zero, w_sums=w_sums, gate=gate,
        residual=residual,
    )  # fmt: skip
    return _gemm(spec, inputs, tokens, out, tile, sm, expanded=True)


def expected_shapes(spec: GemmSpec, m: int, tokens: int, expanded: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every input tensor that `spec` needs for m rows, in the kernels' order."""
    n, k, groups = spec.out_features, spec.in_features, spec.groups
    rows: dict[str, tuple[tuple[int, ...], str]] = {
        "a": ((m, k), "uint8"),
        "a_scale": ((m,), "float32"),
        "w": ((n, k if expanded else k // 2), "uint8"),
        "w_scales": ((n, spec.scale_groups), "float32"),
    }
    if spec.has_multipliers and not expanded:
        rows["multiplier_codes"] = ((n, -(-groups // 2)), "uint8")
    rows["bias"] = ((n,), "float32")
    if spec.zero_point:
        rows |= {"a_zero": ((m,), "float32"), "w_sums": ((n,), "float32")}
    if spec.has_gate:
        rows |= {
            "gate": ((-(-m // tokens), n), TORCH_TYPES[spec.output]),
            "residual": ((m, n), TORCH_TYPES[spec.output]),
        }
    return rows


def _gemm(
    spec: GemmSpec,
    inputs: dict[str, Tensor | None],
    tokens: int,
    out: Tensor | None,
    tile: Tile | None,
    sm: int | None,
    expanded: bool,
) -> Tensor:
    import torch

    row = kernel("expanded_gemm" if expanded else "packed_gemm")
    a = inputs["a"]
    assert a is not None
    m = len(a)
    if spec.has_gate and (tokens <= 0 or m % tokens):
        raise ContractError(f"tokens {tokens}: the rows that share a gate must divide M {m}")
    present = _checked(expected_shapes(spec, m, max(tokens, 1), expanded), inputs)
    y = _output(out, (m, spec.out_features), TORCH_TYPES[spec.output], a)
    if m == 0:
        return y
    sm = sm_of(a) if sm is None else sm
    tile = tile or HEURISTICS[row.name](spec, m, sm, may_split=True)
    given = {**present, "M": m, "tokens": tokens}
    if tile.splits == 1:
        run(row, spec, tile, m, sm, {**given, "y": y})
        return y
    parts = torch.empty((tile.splits, *y.shape), dtype=torch.float32, device=a.device)
    run(row, spec, tile, m, sm, {**given, "y": parts})
    run(kernel("reduce_splits"), spec, tiles.ReduceTile(tile.splits), m, sm, {**given, "parts": parts, "y": y})
    return y


def run(row: Kernel, spec: Any, tile: Any, rows: int, sm: int, given: dict[str, Any]) -> None:
    """Launch the kernel of `row` on `given`, arguments by name; those that the spec does without are left out."""
    names, constants = _plan(row, spec, tile, sm)
    arguments = {name: given[name] for name in names}
    row.function()[row.grid(spec, tile, rows)](**arguments, **constants)


@lru_cache(4096)
def _plan(row: Kernel, spec: Any, tile: Any, sm: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(names of the run-time arguments, compile-time arguments and options): what no call changes."""
    names = tuple(argument.name for argument in row.arguments_of(spec))
    return names, {**row.all_constants(spec, tile, sm), **launch_options(tile)}


def pack(codes: Tensor, *, out: Tensor | None = None) -> Tensor:
    """codes u8 [N, K] below 16, K even -> u8 [N, K / 2], element 2i in the low nibble."""
    n, k = codes.shape
    spec, row = PackSpec(k), kernel("pack")
    _check_tensor("codes", codes, (n, k), "uint8")
    packed = _output(out, (n, k // 2), "uint8", codes)
    if n:
        sm = sm_of(codes)
        run(row, spec, tiles.band_tile(spec, n, sm), n, sm, {"codes": codes, "rows": n, "packed": packed})
    return packed


def expand(spec: GemmSpec, w: Tensor, multiplier_codes: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """w u8 [N, K / 2] -> u8 [N, K]: bytes of spec.weight_kind, of value * multiplier * 2^weight_exponent(spec)."""
    n, k = spec.out_features, spec.in_features
    expected: dict[str, tuple[tuple[int, ...], str]] = {"w": ((n, k // 2), "uint8")}
    if spec.has_multipliers:
        expected["multiplier_codes"] = ((n, -(-spec.groups // 2)), "uint8")
    present = _checked(expected, {"w": w, "multiplier_codes": multiplier_codes})
    expanded = _output(out, (n, k), "uint8", w)
    sm, row = sm_of(w), kernel("expand")
    run(row, spec, tiles.band_tile(spec, n, sm), n, sm, {**present, "rows": n, "expanded": expanded})
    return expanded


def _output(out: Tensor | None, shape: tuple[int, ...], dtype: str, like: Tensor) -> Tensor:
    import torch

    if out is None:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    _check_tensor("out", out, shape, dtype)
    return out


def _checked(expected: dict[str, tuple[tuple[int, ...], str]], given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    for name, (shape, dtype) in expected.items():
        _check_tensor(name, given.get(name), shape, dtype)
    return {name: tensor for name in expected if (tensor := given[name]) is not None}


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: str) -> None:
    if tensor is None:
        raise ContractError(f"{name} is missing; this GEMM needs it as {dtype} {list(shape)}")
    found = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != shape or found != dtype or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ContractError(
            f"{name} is {found} {list(tensor.shape)}{layout}; this GEMM takes {dtype} {list(shape)}, contiguous"
        )


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
    _check_row_tensor("x", x, (rows, spec.channels), _dtype(spec.input))
    inputs = {"x": x, **_modulation(spec, rows, shift, scale, tokens)}
    codes = torch.empty(rows, spec.channels, dtype=torch.uint8, device=x.device) if codes is None else codes
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if scales is None else scales
    _check_row_tensor("codes", codes, (rows, spec.channels), torch.uint8)
    _check_row_tensor("scales", scales, (rows,), torch.float32)
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
    _check_row_tensor("x", x, (rows, spec.channels), _dtype(spec.input))
    for name, tensor in (("scale", scale), ("zero", zero)):
        _check_row_tensor(name, tensor, (1,), torch.float32)
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
        _check_row_tensor(name, tensor, (rows // tokens, spec.channels), _dtype(spec.input))
    return {"shift": shift, "scale": scale}


def _check_row_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        wanted = ["M" if size < 0 else size for size in shape]
        raise ContractError(f"{name} is {tensor.dtype} {list(tensor.shape)}; the kernel takes {dtype} {wanted}")
    if not tensor.is_contiguous():
        raise ContractError(f"{name} with strides {tensor.stride()} is not contiguous; call .contiguous() first")


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
