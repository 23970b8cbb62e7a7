"""`rtx.path=plugin`: an engine whose quantized linears are this project's kernels, built without a GPU.

The kernels are compiled for every GPU of the recipe before the builder starts; they travel as text in an attribute of
their node and from there into the engine. What is proven: the graph of fused ops, in stock onnxruntime, linear by
linear; each kernel against its NumPy reference, in Triton's interpreter (tests); and that the engine's plan has every
plugin, with its weight packed. The engine itself is compiled, not run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from export.errors import EnvironmentLacksError
from pipeline.backends.fused.lower import LowerCuda
from pipeline.backends.tensorrt.build import BuildFacts, build_engine, shape_bounds
from pipeline.backends.tensorrt.plan_file import EngineFile, check_plugins, read_engine_file
from pipeline.backends.tensorrt.plugin_graph import Bounds, KernelNode, lower_fused, plugin_graph
from pipeline.passes.probes import Choice
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.tiles import prefers_integers
from plugins.tensorrt import rtx_loader, rtx_plugin
from plugins.tensorrt.payload import FIELD, NAMESPACE, PLUGINS, VERSION, Payload, compile_payload, compile_problems

logger = logging.getLogger(__name__)
FIELDS = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
GRAPH = "engine.onnx"
REMEDY = "use another format, or --target rtx --set rtx.path=native"
# What a path of a quantized linear begins with where a plugin computes it.
PLUGIN = "plugin"
# Of an engine that is not run: the graph that is proven computes what its plugins do, by other code.
PLUGINS_APART = "kernels in its plugins are proven by the tests in Triton's interpreter, not here"
PROOF = (
    "linears are proven in the graph of fused ops through onnxruntime, kernels in Triton's interpreter by the tests; "
    "kernels and engine are compiled, not run"
)


def problems(sms: Sequence[int]) -> list[str]:
    """What this machine lacks for building with plugins, beyond what every engine needs."""
    lacking = [f"rtx.path=plugin: {problem}" for problem in compile_problems(sms)]
    try:
        rtx_loader.load()
    except EnvironmentLacksError as error:
        lacking.append(str(error))
    return lacking


def lower(model: ir.Model, operands: str) -> LowerCuda:
    """Lower `model` to fused ops, in place, after the shared passes. Raises ContractError for what no kernel takes."""
    lowering = lower_fused(model, operands)
    lowering.choices = [Choice(row.layer, f"{PLUGIN}, {row.path}", row.why) for row in lowering.choices]
    return lowering


def write_graph(
    lowered: Path,
    path: Path,
    batch_size: int,
    compiled: Callable[[KernelNode], Payload],
    name: Callable[[Payload], str],
    fields: Mapping[str, Any],
    sms: Sequence[int],
) -> list[KernelNode]:
    """Write the graph that a builder gets to `path`, beside `lowered`, whose weights it shares; returns its plugins.

    compiled: what a node's plugin carries; equal layers are compiled once. name: of a plugin; fields: attributes of
    all; sms: the GPUs that it is for. Raises ContractError for an op without a plugin.
    """
    model = onnx.load(lowered, load_external_data=False)
    payloads: dict[tuple[str, GemmSpec | QuantizeSpec, Bounds], Payload] = {}

    def plugin_of(node: KernelNode) -> tuple[str, dict[str, Any]]:
        key = (node.kernel, node.spec, node.rows)
        if key in payloads:
            payload = payloads[key].shared()
        else:
            payload = payloads[key] = compiled(node)
        return name(payload), {**fields, FIELD: payload.to_text()}

    bounds = shape_bounds(model, batch_size)
    nodes = plugin_graph(model, bounds, plugin_of, prefers_integers(sms))
    onnx.save(model, path)
    logger.info("%d plugins of %d kernels", len(nodes), len(payloads))
    return nodes


def build(
    lowered: Path, engine_path: Path, sms: tuple[int, ...], batch_size: int
) -> tuple[BuildFacts, EngineFile, dict[str, Any]]:
    """Build the engine of the graph of fused ops at `lowered`: facts of the build, its plan, and what metadata.json
    says of plugins. Raises ContractError where a plugin is not in the plan with its weight packed."""
    rtx_plugin.creators()
    graph = lowered.with_name(GRAPH)
    try:
        compiled = partial(_compiled, sms)
        nodes = write_graph(lowered, graph, batch_size, compiled, lambda node: PLUGINS[node.kernel], FIELDS, sms)
        facts = build_engine(graph, engine_path, sms, batch_size)
    finally:
        graph.unlink(missing_ok=True)
    engine = read_engine_file(engine_path)
    check_plugins(engine, {node.name: node.weight_bytes for node in nodes})
    return facts, engine, described(nodes)


def _compiled(sms: Sequence[int], node: KernelNode) -> Payload:
    return compile_payload(node.kernel, node.spec, node.rows, sms)


def described(nodes: Sequence[KernelNode]) -> dict[str, Any]:
    """What metadata.json says of the plugins."""
    return {
        "proof": PROOF,
        "plugins": dict(sorted(Counter(node.kernel for node in nodes).items())),
        "int8_operands": sum(getattr(node.spec, "multiplies_integers", False) for node in nodes),
        "plugin_namespace": NAMESPACE,
        "plugin_version": VERSION,
        "packed_weight_bytes": sum(node.weight_bytes for node in nodes),
    }
