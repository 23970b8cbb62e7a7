"""Makes a `trt` engine: the graph of fused ops with ahead-of-time plugins in it, built by TensorRT."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from export.dialect.graph import drop_unused
from export.errors import ContractError
from export.onnx_files import load_model
from pipeline.backends import lowering_file
from pipeline.backends.base import DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.fused import kernel_formats
from pipeline.backends.tensorrt import plugin_payloads
from pipeline.backends.tensorrt.build import build_error, make_logger, parsed, profile_of, shape_bounds, write_engine
from pipeline.backends.tensorrt.half import halve_attention, halve_large_linears
from pipeline.backends.tensorrt.plugin_graph import SCALINGS_REFUSED, KernelNode
from pipeline.backends.trt.engine import ENGINE, METADATA, MODULE
from pipeline.files import sha256, write_json
from pipeline.passes import run_shared
from plugins.tensorrt import plugins
from plugins.tensorrt.aot import plugin_name
from plugins.tensorrt.payload import NAMESPACE, VERSION, Payload, compile_payload

if TYPE_CHECKING:
    from pipeline.backends.trt import TrtOptions
    from pipeline.recipe import Recipe

SCHEMA_VERSION = 1
FIELDS = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
PROOF = (
    "linears are proven in the graph of fused ops through onnxruntime, kernels in Triton's interpreter by the tests; "
    "building and running were written without TensorRT at hand"
)


def recipe_problems(recipe: Recipe) -> list[str]:
    """One message for each format and each scaling of activations that no kernel takes."""
    return [
        *kernel_formats.scaling_problems(recipe, SCALINGS_REFUSED),
        *kernel_formats.recipe_problems(recipe, plugin_payloads.REMEDY),
    ]


def lower(portable: Path, work_dir: Path, options: TrtOptions) -> LoweredGraph:
    """Write the graph of fused ops, which is verified, into `work_dir`."""
    model = load_model(portable)
    run_shared(model)
    lowering = plugin_payloads.lower(model, options.operands)
    if options.attention == "fp16":
        halve_attention(model)
        halve_large_linears(model)
    drop_unused(model)
    path = work_dir / MODEL
    ir.save(model, path, external_data=DATA, size_threshold_bytes=1024)
    return LoweredGraph(path, tuple(lowering.probes), tuple(lowering.choices))


def build(lowered: LoweredGraph, out_dir: Path, sm: int, batch_size: int) -> BuildResult:
    """Engine, metadata.json and lowering.json. Raises ContractError where a plugin is not in the engine."""
    graph = lowered.path.with_name(plugin_payloads.GRAPH)
    try:
        nodes = write_graph(lowered.path, graph, batch_size, sm)
        facts = build_engine(graph, out_dir / ENGINE, nodes, sm, batch_size)
    finally:
        graph.unlink(missing_ok=True)
    metadata = {**facts, **described(lowered, nodes)}
    write_json(out_dir / METADATA, metadata)
    lowering_file.write(lowered, out_dir / lowering_file.NAME)
    files = tuple(f"{out_dir.name}/{name}" for name in (ENGINE, METADATA, lowering_file.NAME))
    return BuildResult(files, lowered, metadata)


def write_graph(lowered: Path, path: Path, batch_size: int, sm: int) -> list[KernelNode]:
    """Write the builder's graph for GPU `sm` to `path`, beside `lowered`; returns its plugins."""
    return plugin_payloads.write_graph(lowered, path, batch_size, partial(_compiled, sm), plugin_name, FIELDS, (sm,))


def _compiled(sm: int, node: KernelNode) -> Payload:
    return compile_payload(node.kernel, node.spec, node.rows, (sm,), "ptx")


def build_engine(
    graph: Path, engine_path: Path, nodes: Sequence[KernelNode], sm: int, batch_size: int
) -> dict[str, Any]:
    """Build with TensorRT and write the engine; returns facts for the metadata. Not run.

    Raises ContractError with the parser's node and message or the builder's reason.
    """
    trt: Any = import_module(MODULE)
    plugins.register(MODULE)
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    parser = parsed(trt, network, log, graph)
    shapes = shape_bounds(onnx.load(graph, load_external_data=False), batch_size)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:
        config.clear_flag(tf32)
    config.add_optimization_profile(profile_of(builder, shapes))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise build_error(trt, log.errors, (sm,))
    del parser
    write_engine(engine_path, memoryview(engine))
    inspector = trt.Runtime(log).deserialize_cuda_engine(engine).create_engine_inspector()
    check_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON), nodes)
    size = engine_path.stat().st_size
    return {"shapes": shapes, "tensorrt": trt.__version__, "compute_capabilities": [sm], "engine_bytes": size}


def network_flags(trt: Any) -> int:
    """Strongly typed, and plugins by their PTX. From release 11 on every network is strongly typed and the flag of it
    ignored, so a release may lack it; one that lacks the other takes the only implementation that our plugins have."""
    known = trt.NetworkDefinitionCreationFlag
    flags = [getattr(known, name, None) for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def check_layers(information: str, nodes: Sequence[KernelNode]) -> None:
    """Raise ContractError where the engine's own list of layers (JSON of its inspector) lacks a plugin."""
    names = layer_names(information)
    missing = [node for node in nodes if node.name not in names]
    if missing:
        raise ContractError(
            f"{missing[0].name}: the engine has no layer of that name for the plugin {missing[0].kernel}"
        )


def layer_names(information: str) -> set[str]:
    """Names of the layers in the inspector's JSON: objects with a Name, or names alone where details are off."""
    try:
        layers = json.loads(information)["Layers"]
        return {str(row["Name"] if isinstance(row, dict) else row) for row in layers}
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(f"the inspector's list of layers cannot be read ({error!r}); build again") from error


def described(lowered: LoweredGraph, nodes: Sequence[KernelNode]) -> dict[str, Any]:
    """The part of metadata.json that needs no TensorRT."""
    return {
        "schema_version": SCHEMA_VERSION,
        "onnx_sha256": sha256(lowered.path),
        "onnx_data_sha256": sha256(lowered.path.with_name(DATA)),
        "paths": dict(Counter(choice.path for choice in lowered.choices)),
        **plugin_payloads.described(nodes),
        "proof": PROOF,
    }
