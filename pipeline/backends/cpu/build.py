"""Makes a `cpu` engine: the lowered graph, split by how often its parts run, its weights and lowering.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from pipeline.backends import metadata_file
from pipeline.backends.base import CONDITION, DATA, MODEL, TIMESTEP, BuildResult, LoweredGraph
from pipeline.backends.cpu.engine import CpuMetadata
from pipeline.backends.cpu.finish_with_chain import finish_with_chains
from pipeline.backends.cpu.fold_weights import FoldWeights
from pipeline.backends.cpu.half_gemm import HalfGemms
from pipeline.backends.cpu.lower import LowerCpu
from pipeline.backends.cpu.token_chain import drop_unread_outputs
from pipeline.backends.graph_files import link_or_copy, packed_model, result, save_lowered
from pipeline.passes.split_condition import split_condition, split_timestep
from plugins.cpu import library

if TYPE_CHECKING:
    from pipeline.backends.cpu import CpuOptions

logger = logging.getLogger(__name__)


def lower(
    portable: Path, work_dir: Path, options: CpuOptions, provided: Collection[str], quantized: bool = True
) -> LoweredGraph:
    """Write model.onnx and model.onnx.data, lowered, into `work_dir`; weights stream from the portable file.

    quantized: is there a linear that is? An autoencoder has none.
    """
    model = packed_model(portable, quantized)
    lowering = LowerCpu(provided, chains=options.path == "fused")
    lowering(model)
    requires = set(lowering.needs)
    if options.path == "fused" and fuse_chains(model, lowering):
        requires.add(library.requirement())
        if quantized:
            HalfGemms()(model)
    if quantized:  # else weights are those of convolutions: float16 in the file, widened once by onnxruntime
        FoldWeights()(model)
    (work_dir / metadata_file.NAME).write_text(json.dumps({"requires": sorted(requires)}) + "\n", encoding="utf-8")
    return save_lowered(model, work_dir, lowering)


def build(lowered: LoweredGraph, out_dir: Path) -> BuildResult:
    """Put the lowered graph, split by how often its parts run, its weights and lowering.json into `out_dir`."""
    for name in (DATA, metadata_file.NAME):
        link_or_copy(lowered.path.with_name(name), out_dir / name)
    parts = {MODEL: ir.load(lowered.path)}
    if by_condition := split_condition(parts[MODEL]):
        parts |= {MODEL: by_condition.step, CONDITION: by_condition.condition}
    if by_timestep := split_timestep(parts[MODEL]):
        parts |= {MODEL: by_timestep.rest, TIMESTEP: by_timestep.timestep}
    for name, part in parts.items():
        drop_unread_outputs(part)
        ir.save(part, out_dir / name)
    return result(lowered, out_dir, (*parts, DATA), dict(metadata_file.read(out_dir, CpuMetadata)))


def fuse_chains(model: ir.Model, lowering: LowerCpu) -> bool:
    """Let chains finish what stands between the GEMMs; the choices then say around which layers they do. False where
    the graph has nothing for the kernel library."""
    finish_with_chains(model)
    own = {value.name for node in model.graph if node.domain == library.DOMAIN for value in node.outputs}
    fused = {row.layer for row in lowering.probes if own.issuperset((*row.codes, row.output))}
    # These words are in lowering.json, which bundles are hashed with.
    lowering.choices = [
        replace(row, why=f"{row.why}; native ops around it") if row.layer in fused else row for row in lowering.choices
    ]
    own_ops = any(node.domain == library.DOMAIN for node in model.graph)
    if not own_ops:
        logger.info("cpu.path fused has nothing to fuse in this model: its ops are onnxruntime's own")
    return own_ops
