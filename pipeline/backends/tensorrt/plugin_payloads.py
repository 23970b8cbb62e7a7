"""`rtx.path=plugin`: an engine whose quantized linears are this project's kernels, built without a GPU.

The kernels are compiled for every GPU of the recipe before the builder starts; they travel as text in an attribute of
their node and from there into the engine. What is proven: the graph of fused ops, in stock onnxruntime, linear by
linear; each kernel against its NumPy reference, in Triton's interpreter (tests); and that the engine's plan has every
plugin, with its weight packed. The engine itself is compiled, not run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from export.errors import ContractError, EnvironmentLacksError
from pipeline.backends.fused.lower import LowerFused
from pipeline.backends.fused.lower import lower as lower_fused
from pipeline.backends.fused.ops import DOMAIN
from pipeline.backends.tensorrt.build import Facts, build_engine, shape_bounds
from pipeline.backends.tensorrt.engine import RTX, KeepOnnx
from pipeline.backends.tensorrt.kept_graph import keep
from pipeline.backends.tensorrt.plan_file import EngineFile, check_plugins, read_engine_file
from pipeline.backends.tensorrt.plugin_graph import STATIC_REFUSED, KernelNode, RowRange, plugin_graph
from pipeline.passes.probes import Choice
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.tiles import prefers_integers
from plugins.tensorrt import rtx_loader, rtx_plugin
from plugins.tensorrt.payload import (
    FIELD,
    NAMESPACE,
    PLUGINS,
    VERSION,
    Form,
    Payload,
    compile_payload,
    compile_problems,
)

logger = logging.getLogger(__name__)
FIELDS = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
GRAPH = "engine.onnx"
REMEDY = "use another format, or --target rtx --set rtx.path=tensorrt"
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


def lower(model: ir.Model, operands: str = "fp8") -> LowerFused:
    """Lower `model` to fused ops, in place, after the shared passes; attention stays TensorRT's.

    operands: as LowerFused's. Raises ContractError for a layer that no kernel takes.
    """
    lowering = lower_fused(model, operands, attention=False)
    static = [node for node in model.graph if node.domain == DOMAIN and node.op_type.endswith("QuantizeStatic")]
    if static:
        raise ContractError(f"{static[0].name}: {STATIC_REFUSED}")
    lowering.choices = [Choice(row.layer, f"{PLUGIN}, {row.path}", row.why) for row in lowering.choices]
    return lowering


@contextmanager
def builders_graph(
    lowered: Path,
    batch_size: int,
    sms: Sequence[int],
    form: Form = "cubin",
    name: Callable[[Payload], str] = lambda payload: PLUGINS[payload.kernel],
    **fields: object,
) -> Iterator[tuple[Path, list[KernelNode]]]:
    """The graph that a builder gets, beside the graph of fused ops at `lowered`, whose weights it shares, and its
    plugins; within, it is there.

    form, name: of what a plugin carries, and of the plugin; equal layers are compiled once. fields: attributes of every
    plugin beside its namespace and version. sms: the GPUs that it is for. Raises ContractError for an op without one.
    """
    model = onnx.load(lowered, load_external_data=False)
    payloads: dict[tuple[str, GemmSpec | QuantizeSpec, RowRange], Payload] = {}

    def plugin_of(node: KernelNode) -> tuple[str, dict[str, object]]:
        key = (node.kernel, node.spec, node.rows)
        if key in payloads:
            payload = payloads[key].shared()
        else:
            payload = payloads[key] = compile_payload(node.kernel, node.spec, node.rows, sms, form)
        return name(payload), {**FIELDS, **fields, FIELD: payload.to_text()}

    nodes = plugin_graph(model, shape_bounds(model, batch_size), plugin_of, prefers_integers(sms))
    path = lowered.with_name(GRAPH)
    try:
        onnx.save(model, path)
        logger.info("%d plugins of %d kernels", len(nodes), len(payloads))
        yield path, nodes
    finally:
        path.unlink(missing_ok=True)


def build(
    lowered: Path, engine_path: Path, sms: tuple[int, ...], batch_size: int, keep_onnx: KeepOnnx = "no"
) -> tuple[Facts, EngineFile, dict[str, object]]:
    """Build the engine of the graph of fused ops at `lowered`: facts of the build, its plan, and what metadata.json
    says of plugins. keep_onnx: is the builder's graph kept beside the engine?

    Raises ContractError where a plugin is not in the plan with its weight packed.
    """
    rtx_plugin.creators()
    with builders_graph(lowered, batch_size, sms) as (graph, nodes):
        facts = build_engine(RTX, graph, engine_path, sms, batch_size)
        keep(graph, engine_path.parent, keep_onnx)
    engine = read_engine_file(engine_path)
    check_plugins(engine, {node.name: node.weight_bytes for node in nodes})
    return facts, engine, described(nodes)


def described(nodes: Sequence[KernelNode]) -> dict[str, object]:
    """What metadata.json says of the plugins."""
    return {
        "proof": PROOF,
        "plugins": dict(sorted(Counter(node.kernel for node in nodes).items())),
        "int8_operands": sum(getattr(node.spec, "multiplies_integers", False) for node in nodes),
        "plugin_namespace": NAMESPACE,
        "plugin_version": VERSION,
        "packed_weight_bytes": sum(node.weight_bytes for node in nodes),
    }
