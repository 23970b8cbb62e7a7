"""The table of GPU kernels: one row each, in the order in which a linear layer meets them."""

from __future__ import annotations

from plugins.gpu import gemm_constants, meanings, reference, row_tiles, tiles
from plugins.gpu.kernel import Argument, Kernel
from plugins.gpu.spec import GemmSpec, PackSpec, QuantizeSpec

_CODES = Argument("codes", "*u8", "output", "[M, C] operand bytes")
_TOKEN_SCALES = Argument("scales", "*fp32", "output", "[M]", "per_token")
_STATIC = (
    Argument("static_scale", "*fp32", "input", "[1]", "static"),
    Argument("static_zero", "*fp32", "input", "[1]", "static"),
)
_X = Argument("x", "*{input}", "input", "[M, C]")
_M = Argument("M", "i32", "size", "rows of x")
_PLAIN = (_X, *_STATIC, _M, _CODES, _TOKEN_SCALES)

_A = (Argument("a", "*u8", "input", "[M, K] operand bytes"), Argument("a_scale", "*fp32", "input", "[M]"))
_W = Argument("w", "*u8", "input", "[N, K / 2] codes, element 2i in the low nibble")
_W_EXPANDED = Argument("w", "*u8", "input", "[N, K] bytes from expand")
_W_SCALES = Argument("w_scales", "*fp32", "input", "[N, scale groups]")
_MULTIPLIER_CODES = Argument("multiplier_codes", "*u8", "input", "[N, ceil(groups / 2)] nibbles", "has_multipliers")
_AFTER = (
    Argument("bias", "*fp32", "input", "[N]"),
    Argument("a_zero", "*fp32", "input", "[M]", "zero_point"),
    Argument("w_sums", "*fp32", "input", "[N]", "zero_point"),
    Argument("gate", "*{output}", "input", "[M / tokens, N]", "has_gate"),
    Argument("residual", "*{output}", "input", "[M, N]", "has_gate"),
    Argument("M", "i32", "size", "rows of a"),
    Argument("tokens", "i32", "size", "rows of a that share a row of gate", "has_gate"),
    Argument("y", "*{output}", "output", "[M, N]"),
)
_ROWS = Argument("rows", "i32", "size", "N, rows of w")

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "quantize",
        "x [M, C] -> codes u8 [M, C], scale f32 [M]: operand bytes of x / scale, scale = absmax / max_value or static.",
        "plugins.gpu.quantize:quantize",
        QuantizeSpec,
        _PLAIN,
        meanings.quantize,
        row_tiles.row_tile,
        row_tiles.constants,
        row_tiles.grid,
    ),
    Kernel(
        "gelu_quantize",
        "As quantize, of GELU(x) in its tanh form.",
        "plugins.gpu.quantize:gelu_quantize",
        QuantizeSpec,
        _PLAIN,
        meanings.gelu_quantize,
        row_tiles.row_tile,
        row_tiles.constants,
        row_tiles.grid,
    ),
    Kernel(
        "norm_modulate_quantize",
        "As quantize, of LayerNorm(x) * (1 + scale) + shift; shift and scale [M / tokens, C], of `tokens` rows each.",
        "plugins.gpu.quantize:norm_modulate_quantize",
        QuantizeSpec,
        (
            _X,
            Argument("shift", "*{input}", "input", "[M / tokens, C]"),
            Argument("scale", "*{input}", "input", "[M / tokens, C]"),
            _M,
            Argument("tokens", "i32", "size", "rows of x that share a row of shift and scale"),
            _CODES,
            _TOKEN_SCALES,
        ),
        meanings.norm_modulate_quantize,
        row_tiles.row_tile,
        row_tiles.norm_constants,
        row_tiles.grid,
    ),
    Kernel(
        "packed_gemm",
        "y [M, N] = epilogue((a @ w^T * w_scales) * a_scale + a_zero * w_sums + bias), weights decoded in the kernel.",
        "plugins.gpu.gemm:packed_gemm",
        GemmSpec,
        (*_A, _W, _W_SCALES, _MULTIPLIER_CODES, *_AFTER),
        reference.packed_gemm,
        tiles.packed_tile,
        gemm_constants.packed_constants,
        tiles.gemm_grid,
    ),
    Kernel(
        "expanded_gemm",
        "As packed_gemm with weights expanded once, at load, to E4M3 or INT8 bytes with their multipliers.",
        "plugins.gpu.gemm:expanded_gemm",
        GemmSpec,
        (*_A, _W_EXPANDED, _W_SCALES, *_AFTER),
        reference.expanded_gemm,
        tiles.expanded_tile,
        gemm_constants.gemm_constants,
        tiles.gemm_grid,
    ),
    Kernel(
        "reduce_splits",
        "parts f32 [splits, M, N], unscaled sums of a GEMM's splits (with real groups scaled) -> y as packed_gemm.",
        "plugins.gpu.epilogue:reduce_splits",
        GemmSpec,
        (Argument("parts", "*fp32", "input", "[splits, M, N]"), _A[1], _W_SCALES, *_AFTER),
        reference.reduce_splits,
        tiles.reduce_tile,
        gemm_constants.reduce_constants,
        tiles.reduce_grid,
    ),
    Kernel(
        "pack",
        "codes u8 [N, K] below 16 -> u8 [N, K / 2], element 2i in the low nibble.",
        "plugins.gpu.repack:pack",
        PackSpec,
        (
            Argument("codes", "*u8", "input", "[N, K]"),
            Argument("rows", "i32", "size", "N"),
            Argument("packed", "*u8", "output", "[N, K / 2]"),
        ),
        reference.pack,
        tiles.band_tile,
        gemm_constants.pack_constants,
        tiles.band_grid,
    ),
    Kernel(
        "expand",
        "w u8 [N, K / 2], multiplier_codes -> u8 [N, K], E4M3 or INT8 bytes of value * multiplier * a power of two.",
        "plugins.gpu.repack:expand",
        GemmSpec,
        (_W, _MULTIPLIER_CODES, _ROWS, Argument("expanded", "*u8", "output", "[N, K]")),
        reference.expand,
        tiles.band_tile,
        gemm_constants.expand_constants,
        tiles.band_grid,
    ),
)


def kernel(name: str) -> Kernel:
    """The row called `name`; KeyError for an unknown one."""
    return {row.name: row for row in KERNELS}[name]
