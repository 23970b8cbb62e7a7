"""Makes a `trt` engine: the graph of fused ops with ahead-of-time plugins in it, built by TensorRT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import ContractError
from pipeline.backends import metadata_file
from pipeline.backends.base import BuildResult, LoweredGraph
from pipeline.backends.fused.lower import recipe_problems
from pipeline.backends.graph_files import graph_facts, packed_model, result, save_lowered
from pipeline.backends.tensorrt import kept_graph, plugin_payloads
from pipeline.backends.tensorrt.build import build_engine, make_logger
from pipeline.backends.tensorrt.engine import ENGINE, TRT
from pipeline.backends.tensorrt.ep_context import write_context_model
from pipeline.backends.tensorrt.half import halve
from pipeline.backends.tensorrt.plugin_graph import SCALINGS_REFUSED, KernelNode
from pipeline.files import write_json
from plugins.tensorrt import plugins
from plugins.tensorrt.aot import plugin_name

if TYPE_CHECKING:
    from pipeline.backends.trt import TrtOptions
    from pipeline.recipe import Recipe

SCHEMA_VERSION = 1
PROOF = (
    "linears are proven in the graph of fused ops through onnxruntime, kernels in Triton's interpreter by the tests; "
    "building and running were written without TensorRT at hand"
)


def problems(recipe: Recipe) -> list[str]:
    """One message for each format and each scaling of activations that no kernel takes."""
    return recipe_problems(recipe, SCALINGS_REFUSED, plugin_payloads.REMEDY)


def lower(portable: Path, work_dir: Path, options: TrtOptions) -> LoweredGraph:
    """Write the graph of fused ops, which is verified, into `work_dir`."""
    model = packed_model(portable)
    lowering = plugin_payloads.lower(model, options.operands)
    if options.attention == "fp16":
        halve(model)
    return save_lowered(model, work_dir, lowering)


def build(lowered: LoweredGraph, out_dir: Path, options: TrtOptions, sm: int, batch_size: int) -> BuildResult:
    """Engine, its graph if it is kept, metadata.json and lowering.json.

    Raises ContractError where a plugin is not in the engine.
    """
    with builders_graph(lowered.path, batch_size, sm) as (graph, nodes):
        facts = build_checked(graph, out_dir / ENGINE, nodes, sm, batch_size)
        kept_graph.keep(graph, out_dir, options.keep_onnx)
    metadata = {**facts, **described(lowered, nodes)}
    write_json(out_dir / metadata_file.NAME, metadata)
    context = write_context_model(TRT, lowered.path, out_dir / ENGINE, options.ep_context, (sm,), str(facts[TRT]))
    return result(lowered, out_dir, (ENGINE, *kept_graph.kept_names(out_dir), *context), metadata)


def builders_graph(lowered: Path, batch_size: int, sm: int) -> AbstractContextManager[tuple[Path, list[KernelNode]]]:
    """The builder's graph for GPU `sm`, and its plugins."""
    return plugin_payloads.builders_graph(lowered, batch_size, (sm,), "ptx", plugin_name, aot=1)


def build_checked(
    graph: Path, engine_path: Path, nodes: Sequence[KernelNode], sm: int, batch_size: int
) -> dict[str, object]:
    """Build with TensorRT, write the engine and look for its plugins; returns facts for the metadata. Not run.

    Raises ContractError as `build_engine`, and for a plugin that is not there.
    """
    plugins.register(TRT)
    # From release 11 on every network is strongly typed and the flag of it ignored; one that lacks the other takes the
    # only implementation that our plugins have.
    facts = build_engine(TRT, graph, engine_path, (sm,), batch_size, ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"))
    trt = import_module(TRT)
    engine = trt.Runtime(make_logger(trt)).deserialize_cuda_engine(engine_path.read_bytes())
    check_layers(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), nodes)
    return {**facts, "compute_capabilities": [sm], "engine_bytes": engine_path.stat().st_size}


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


def described(lowered: LoweredGraph, nodes: Sequence[KernelNode]) -> dict[str, object]:
    """The part of metadata.json that needs no TensorRT."""
    return {
        "schema_version": SCHEMA_VERSION,
        **graph_facts(lowered),
        **plugin_payloads.described(nodes),
        "proof": PROOF,
    }
