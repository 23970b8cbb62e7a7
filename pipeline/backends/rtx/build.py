"""Makes an `rtx` engine: the graph in TensorRT's own ops or with plugins, built ahead of time by TensorRT-RTX."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backends import metadata_file
from pipeline.backends.base import BuildResult, LoweredGraph
from pipeline.backends.fused.lower import recipe_problems, scaling_problems
from pipeline.backends.graph_files import graph_facts, packed_model, result, save_lowered
from pipeline.backends.qdq.gemms import matmul_names
from pipeline.backends.rtx.lower import GROUPS_REFUSED, LowerRtx
from pipeline.backends.tensorrt import kept_graph, plugin_payloads
from pipeline.backends.tensorrt.build import build_engine
from pipeline.backends.tensorrt.engine import ENGINE, RTX
from pipeline.backends.tensorrt.ep_context import write_context_model
from pipeline.backends.tensorrt.half import halve
from pipeline.backends.tensorrt.plan_file import EngineFile, check_gemms, read_engine_file
from pipeline.backends.tensorrt.plugin_graph import SCALINGS_REFUSED
from pipeline.files import write_json
from pipeline.passes.probes import GemmRow
from pipeline.passes.rewrite import LoweringPass

if TYPE_CHECKING:
    from pipeline.backends.rtx import RtxOptions
    from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1

# GPUs the builder takes, and those among them with FP8 tensor cores.
BUILDABLE_SMS = (80, 86, 89, 120, 121)
FP8_SMS = frozenset({89, 120, 121})
DATA_CENTRE = "TensorRT-RTX is for RTX GPUs; data-centre GPUs of this generation need the target cuda"
WHY_NOT = {75: "its FP32 GEMMs are refused on Turing", **dict.fromkeys((90, 100, 103), DATA_CENTRE)}


PLUGINS_REFUSED = (
    "rtx.ep_context {} with rtx.path plugin: its plugins are Python's, which onnxruntime does not have; use "
    "--set rtx.path=tensorrt"
)


def _one_or_two(path: str, activation: str, weight: str) -> tuple[GemmRow, GemmRow]:
    """One GEMM for activations that one hardware number holds, and two for those that take two limbs."""
    return GemmRow(path, activation, weight), GemmRow(f"{path}, 2 limbs", activation, weight, limbs=2)


FP8, INT8 = _one_or_two("fp8", "E4M3", "E4M3"), _one_or_two("int8", "INT8", "INT8")
FP8_INT4 = _one_or_two("fp8, int4 weights", "E4M3", "INT4")
INT8_INT4 = _one_or_two("int8, int4 weights", "INT8", "INT4")
# Real scales per group, in the smallest storage first.
HALF = (
    GemmRow("fp16, int4 weights", "FP16", "INT4", real_groups=True),
    GemmRow("fp16, fp8 weights", "FP16", "E4M3", real_groups=True),
    GemmRow("fp16", "FP16", "FP16", real_groups=True),
)
# Rows in order of preference by rtx.weights: one GEMM before two, the smaller weight before the larger.
ROWS: dict[str, tuple[GemmRow, ...]] = {
    "fp8": (FP8[0], INT8[0], FP8[1], INT8[1], *HALF),
    "int8": (*INT8, *FP8, *HALF),
    "int4": (FP8_INT4[0], INT8_INT4[0], FP8_INT4[1], INT8_INT4[1], FP8[0], INT8[0], FP8[1], INT8[1], *HALF),
}
# Type of a GEMM's operands in the engine's plan, by the activation type of its row.
PLAN_TYPES = {"E4M3": "fp8_e4m3", "INT8": "int8", "FP16": "half"}


def gemm_rows(weights: str, sms: tuple[int, ...]) -> tuple[GemmRow, ...]:
    """What every one of the GPUs runs; without FP8 tensor cores on each of them only the other rows are left."""
    has_fp8 = set(sms) <= FP8_SMS
    return tuple(row for row in ROWS[weights] if has_fp8 or "E4M3" not in (row.activation_type, row.weight_type))


def problems(recipe: Recipe, options: RtxOptions, package_problems: list[str]) -> list[str]:
    """GPUs that the builder refuses, activations that no lowering takes, and what is missing here."""
    refused = [*sm_problems(options.sm), *package_problems]
    if options.path == "plugin" and options.ep_context != "none":
        refused.append(PLUGINS_REFUSED.format(options.ep_context))
    if options.path != "plugin":
        return [*refused, *scaling_problems(recipe, {"token_group": GROUPS_REFUSED})]
    refused += recipe_problems(recipe, SCALINGS_REFUSED, plugin_payloads.REMEDY)
    return refused or plugin_payloads.problems(options.sm)


def lower(portable: Path, work_dir: Path, options: RtxOptions) -> LoweredGraph:
    """Write the graph that the builder gets into `work_dir`."""
    model = packed_model(portable)
    if options.path == "plugin":
        lowering: LoweringPass = plugin_payloads.lower(model, options.operands)
    else:
        if without := sorted(set(options.sm) - FP8_SMS):
            logger.info("SM %s has no FP8 tensor cores: the engine uses INT8 operands", ", ".join(map(str, without)))
        lowering = LowerRtx(gemm_rows(options.weights, options.sm))
        lowering(model)
    if options.attention == "fp16":
        halve(model)
    return save_lowered(model, work_dir, lowering)


def build(lowered: LoweredGraph, out_dir: Path, options: RtxOptions, batch_size: int) -> BuildResult:
    """Engine, its graph if it is kept, metadata.json and lowering.json.

    Raises ContractError where a linear is not the GEMM it should be.
    """
    more: dict[str, object] = {}
    if options.path == "plugin":
        facts, engine, more = plugin_payloads.build(
            lowered.path, out_dir / ENGINE, options.sm, batch_size, options.keep_onnx
        )
    else:
        facts = build_engine(RTX, lowered.path, out_dir / ENGINE, options.sm, batch_size)
        engine = read_engine_file(out_dir / ENGINE)
        check_gemms(engine, expected_gemms(lowered))
        kept_graph.keep(lowered.path, out_dir, options.keep_onnx)
    metadata = describe(engine, lowered) | facts | more
    write_json(out_dir / metadata_file.NAME, metadata)
    context = write_context_model(RTX, lowered.path, out_dir / ENGINE, options.ep_context, options.sm, str(facts[RTX]))
    return result(lowered, out_dir, (ENGINE, *kept_graph.kept_names(out_dir), *context), metadata)


def sm_problems(sms: tuple[int, ...]) -> list[str]:
    """One message for each compute capability that the builder refuses."""
    takes = (
        f"TensorRT-RTX builds for SM {', '.join(map(str, BUILDABLE_SMS))}; set rtx.sm or --target-sm to some of them"
    )
    refused = [sm for sm in sms if sm not in BUILDABLE_SMS]
    return [f"target rtx cannot be built for SM {sm}: {WHY_NOT.get(sm, 'unknown to it')}. {takes}" for sm in refused]


def expected_gemms(lowered: LoweredGraph) -> dict[str, str]:
    """MatMul node -> operand type in the plan, for every quantized linear and limb."""
    types = {row.path: PLAN_TYPES[row.activation_type] for rows in ROWS.values() for row in rows}
    return {node: types[probe.path] for probe in lowered.probes for node in matmul_names(probe.layer, len(probe.codes))}


def describe(engine: EngineFile, lowered: LoweredGraph) -> dict[str, object]:
    """The part of metadata.json that the engine's plan and the lowered graph tell."""
    kinds = Counter(step.kind for step in engine.steps)
    return {
        "schema_version": SCHEMA_VERSION,
        "compute_capabilities": list(engine.sms),
        "engine_bytes": engine.size_bytes,
        "engine_version": engine.version,
        "weights_bytes": sum(engine.constant_bytes.values()),
        "constant_bytes": engine.constant_bytes,
        "kernels": dict(sorted(kinds.items())),
        "gemms": engine.gemm_types,
        "fused_attentions": sum("gemm_mha" in step.name for step in engine.steps),
        "dimension_bounds": engine.bounds,
        **graph_facts(lowered),
    }
