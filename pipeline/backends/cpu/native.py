"""A graph lowered for stock onnxruntime -> the same with the ops of the native library, where they fuse something."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.backends.cpu.finish_with_chain import NativeFinish
from pipeline.backends.cpu.native_heads import NativeHeads
from pipeline.backends.cpu.native_join import NativeJoin
from pipeline.backends.cpu.quantize_with_chain import NativeQuantize
from pipeline.passes.rewrite import RewritePass

NATIVE_PASSES: tuple[type[RewritePass], ...] = (NativeQuantize, NativeFinish, NativeJoin, NativeHeads)


def run_native(model: ir.Model) -> list[RewritePass]:
    """Run the native passes on `model`, in place; names of tensors that probes refer to stay."""
    passes = [make() for make in NATIVE_PASSES]
    for rewrite in passes:
        rewrite(model)
    return passes
