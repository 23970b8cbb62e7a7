"""Makes a `cpu` engine: the lowered graph, split by how often its parts run, its weights and lowering.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from export.errors import ContractError, RecipeError
from export.onnx_files import load_model
from pipeline.backends import lowering_file, metadata_file
from pipeline.backends.base import CONDITION, DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.cpu.engine import METADATA, CpuMetadata, provided
from pipeline.backends.cpu.finish_with_chain import finish_with_chains
from pipeline.backends.cpu.lower import LowerCpu
from pipeline.backends.cpu.token_chain import drop_unread_outputs, is_chain
from pipeline.passes import run_shared
from pipeline.passes.fold_weights import FoldWeights
from pipeline.passes.probes import Capabilities, Choice, GemmRow, ProbeRow
from pipeline.passes.split_condition import split_condition
from plugins.cpu import library

if TYPE_CHECKING:
    from pipeline.backends.cpu import CpuOptions

GEMMS = (
    GemmRow("u8 x s8", "U8", "S8"),
    GemmRow("u8 x s8, 2 limbs", "U8", "S8", limbs=2),
    GemmRow("u8 x s8 per group", "U8", "S8", real_groups=True),
    GemmRow("u8 x s8 per group, 2 limbs", "U8", "S8", limbs=2, real_groups=True),
)


def capabilities(instruction_sets: Collection[str]) -> Capabilities:
    """What a CPU with these instruction sets runs."""
    return Capabilities("cpu", GEMMS, provided(instruction_sets))


def lower(portable: Path, work_dir: Path, options: CpuOptions, capabilities: Capabilities) -> LoweredGraph:
    """Write model.onnx and model.onnx.data, lowered, into `work_dir`; weights stream from the portable file."""
    model = load_model(portable)
    run_shared(model)
    lowering = LowerCpu(capabilities, chains=options.path == "native")
    lowering(model)
    if not lowering.choices:
        raise ContractError(f"{portable} has no quantized linear to lower; export the model again")
    choices, requires = lowering.choices, set(lowering.needs)
    if options.path == "native":
        choices = use_native(model, choices, lowering.probes)
        requires.add(library.requirement())
    FoldWeights()(model)
    ir.save(model, work_dir / MODEL, external_data=DATA, size_threshold_bytes=1024)
    (work_dir / METADATA).write_text(json.dumps({"requires": sorted(requires)}) + "\n", encoding="utf-8")
    return LoweredGraph(work_dir / MODEL, tuple(lowering.probes), tuple(choices))


def build(lowered: LoweredGraph, out_dir: Path) -> BuildResult:
    """Put the lowered graph, split by how often its parts run, its weights and lowering.json into `out_dir`."""
    beside = (DATA, METADATA)
    for name in beside:
        link_or_copy(lowered.path.with_name(name), out_dir / name)
    model = ir.load(lowered.path)
    split = split_condition(model)
    parts = {MODEL: model} if split is None else {MODEL: split.step, CONDITION: split.condition}
    for name, part in parts.items():
        drop_unread_outputs(part)
        ir.save(part, out_dir / name)
    lowering_file.write(LoweredGraph(out_dir / MODEL, lowered.probes, lowered.choices), out_dir / lowering_file.NAME)
    files = tuple(f"{out_dir.name}/{name}" for name in (*parts, *beside, lowering_file.NAME))
    return BuildResult(files, lowered, dict(metadata_file.read(out_dir, CpuMetadata)))


def use_native(model: ir.Model, choices: list[Choice], probes: list[ProbeRow]) -> list[Choice]:
    """Rewrite a lowered graph with native ops; the choices then say which layers they quantize and finish."""
    passes = finish_with_chains(model)
    chained = {value.name for node in model.graph if is_chain(node) for value in node.outputs}
    if not chained:
        why = next(
            (refusal.reason for rewrite in passes for refusal in rewrite.refusals),
            "no activation has a scale for each token",
        )
        raise RecipeError(f"cpu.path native has nothing to fuse in this model ({why}); build with --set cpu.path=stock")
    fused = {row.layer for row in probes if chained.issuperset((*row.codes, row.output))}
    return [replace(row, why=f"{row.why}; native ops around it") if row.layer in fused else row for row in choices]


def link_or_copy(source: Path, destination: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
