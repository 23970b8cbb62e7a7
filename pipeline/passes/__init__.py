"""The graph passes that every target shares, in the order they run; they know no target."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.fuse_norm_modulate_quantize import FuseNormModulateQuantize
from pipeline.passes.pack_gemm import PackGemm
from pipeline.passes.refusal import Refusal, RewritePass
from pipeline.passes.share_quantizers import ShareQuantizers

__all__ = [
    "SHARED_PASSES",
    "FuseNormModulateQuantize",
    "PackGemm",
    "Refusal",
    "RewritePass",
    "ShareQuantizers",
    "run_shared",
]

SHARED_PASSES: tuple[type[RewritePass], ...] = (ShareQuantizers, FuseNormModulateQuantize, PackGemm)


def run_shared(model: ir.Model) -> list[RewritePass]:
    """Run the passes before any lowering on `model`, in place; the passes hold counts and refusals."""
    passes = [make() for make in SHARED_PASSES]
    for rewrite in passes:
        rewrite(model)
    return passes
