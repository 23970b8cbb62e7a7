"""What the builds of all targets but the portable one do alike: a packed graph in, the lowered graph and a list out."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from export.dialect.graph import drop_unused
from export.dialect.ops import DOMAIN
from export.documents import sha256
from export.errors import ContractError
from export.onnx_files import load_model
from pipeline.backends import lowering_file, metadata_file
from pipeline.backends.base import DATA, MODEL, BuildResult, LoweredGraph
from pipeline.passes import run_shared
from pipeline.passes.quantized_gemm import PACKED_GEMMS
from pipeline.passes.rewrite import LoweringPass


def packed_model(portable: Path, quantized: bool = True) -> ir.Model:
    """The portable model after the shared passes. Raises ContractError where it has no quantized linear and is said to
    be `quantized`."""
    model = load_model(portable)
    run_shared(model)
    if quantized and not any(node.domain == DOMAIN and node.op_type in PACKED_GEMMS for node in model.graph):
        raise ContractError(f"{portable} has no quantized linear to lower; export the model again")
    return model


def save_lowered(model: ir.Model, work_dir: Path, lowering: LoweringPass) -> LoweredGraph:
    """Write model.onnx and model.onnx.data; weights are converted one by one while writing."""
    drop_unused(model)
    ir.save(model, work_dir / MODEL, external_data=DATA, size_threshold_bytes=1024)
    return LoweredGraph(work_dir / MODEL, tuple(lowering.probes), tuple(lowering.choices))


def graph_facts(lowered: LoweredGraph) -> dict[str, object]:
    """What metadata.json says of the lowered graph: hashes of its files, and how often each path was chosen."""
    return {
        "onnx_sha256": sha256(lowered.path),
        "onnx_data_sha256": sha256(lowered.path.with_name(DATA)),
        "paths": dict(Counter(choice.path for choice in lowered.choices)),
    }


def result(lowered: LoweredGraph, out_dir: Path, names: Sequence[str], metadata: Mapping[str, object]) -> BuildResult:
    """Write lowering.json beside metadata.json and the files `names`, and list them all."""
    lowering_file.write(lowered, out_dir / lowering_file.NAME)
    files = tuple(f"{out_dir.name}/{name}" for name in (*names, metadata_file.NAME, lowering_file.NAME))
    return BuildResult(files, lowered, metadata)


def link_or_copy(source: Path, destination: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
