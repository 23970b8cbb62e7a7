"""Makes an `ort_cuda` engine: the lowered graph, and which of its nodes are not known to run on the GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from pipeline.backends import metadata_file
from pipeline.backends.base import DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.fused.lower import scaling_problems
from pipeline.backends.graph_files import graph_facts, link_or_copy, packed_model, result, save_lowered
from pipeline.backends.ort_cuda.kernels import ONNXRUNTIME, without_kernel
from pipeline.backends.ort_cuda.lower import GROUPS_REFUSED, LowerOrtCuda
from pipeline.backends.tensorrt.half import halve
from pipeline.files import write_json

if TYPE_CHECKING:
    from pipeline.backends.ort_cuda import OrtCudaOptions
    from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
PROOF = "the graph is proven by onnxruntime's CPU execution provider; the CUDA one was not run"


def problems(recipe: Recipe) -> list[str]:
    """Activations that no lowering takes."""
    return scaling_problems(recipe, {"token_group": GROUPS_REFUSED})


def lower(portable: Path, work_dir: Path, options: OrtCudaOptions) -> LoweredGraph:
    """Write model.onnx and model.onnx.data, lowered, into `work_dir`; weights stream from the portable file."""
    model, lowering = packed_model(portable), LowerOrtCuda()
    lowering(model)
    if options.attention == "fp16":
        halve(model)
    return save_lowered(model, work_dir, lowering)


def build(lowered: LoweredGraph, out_dir: Path) -> BuildResult:
    """Put the lowered graph, its weights, metadata.json and lowering.json into `out_dir`."""
    for name in (MODEL, DATA):
        link_or_copy(lowered.path.with_name(name), out_dir / name)
    missing = without_kernel(onnx.load(lowered.path, load_external_data=False))
    if missing:
        nodes = ", ".join(f"{count} x {node}" for node, count in missing.items())
        logger.info("onnxruntime %s has no CUDA kernel that is known here for %s", ONNXRUNTIME, nodes)
    metadata = {
        "schema_version": SCHEMA_VERSION,
        **graph_facts(lowered),
        "kernels_of_onnxruntime": ONNXRUNTIME,
        "without_known_kernel": missing,
        "proof": PROOF,
    }
    write_json(out_dir / metadata_file.NAME, metadata)
    return result(lowered, out_dir, (MODEL, DATA), metadata)
