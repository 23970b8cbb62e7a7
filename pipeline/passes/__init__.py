"""The graph passes that every target shares, in the order they run, and what they tell of a quantized linear; they know
no target.

What an engine reads of them (`probes`) needs no ONNX, so the passes are imported where they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from pipeline.passes.rewrite import RewritePass


def run_shared(model: ir.Model) -> list[RewritePass]:
    """Run the passes before any lowering on `model`, in place; the passes hold counts and refusals."""
    from pipeline.passes.fuse_norm_modulate_quantize import FuseNormModulateQuantize
    from pipeline.passes.pack_gemm import PackGemm
    from pipeline.passes.share_quantizers import ShareQuantizers

    passes: list[RewritePass] = [ShareQuantizers(), FuseNormModulateQuantize(), PackGemm()]
    for rewrite in passes:
        rewrite(model)
    return passes
