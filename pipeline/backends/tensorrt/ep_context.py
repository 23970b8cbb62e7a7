"""An EP-context model: an ONNX file of one node, `EPContext`, that stands for an engine. The execution provider of the
product that built the engine runs it in onnxruntime, instead of building one from a graph.

The attributes are those that the providers read (TensorrtExecutionProvider of onnxruntime-gpu 1.31.1,
NvTensorRTRTXExecutionProvider of onnxruntime-ep-nv-tensorrt-rtx 0.5.0); what checks them here is onnxruntime's schema.
No GPU was at hand: such a model is written, not run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.errors import ContractError
from pipeline import machine
from pipeline.backends import stock_runtime
from pipeline.backends.base import Check
from pipeline.backends.tensorrt.engine import CONTEXT_MODEL, RTX, TRT, EpContext

logger = logging.getLogger(__name__)
PROVIDERS = {RTX: "NvTensorRTRTXExecutionProvider", TRT: "TensorrtExecutionProvider"}
# Distributions that bring a provider which is not onnxruntime's own.
PLUGINS = {RTX: ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"), TRT: ()}
INSTALLED_BY = {RTX: "onnxruntime-ep-nv-tensorrt-rtx", TRT: "onnxruntime-gpu"}
# A protobuf message has less than 2 GiB; the rest is for names and shapes.
LARGEST_EMBEDDED = 2**31 - 2**20


def write_context_model(
    module: str, lowered: Path, engine: Path, form: EpContext, sms: Sequence[int], version: str
) -> list[str]:
    """Write the model beside `engine` as the recipe has it; the names of the files that were written, none for "none".

    module: tensorrt or tensorrt_rtx, of release `version`. lowered: the graph that the engine was built from, which has
    its inputs and outputs. Raises ContractError for an engine that is too large to be embedded.
    """
    if form == "none":
        return []
    size = engine.stat().st_size
    if form == "embedded" and size > LARGEST_EMBEDDED:
        raise ContractError(f"{engine} has {size} bytes, more than an ONNX file holds; use ep_context=beside")
    import onnx  # `check` is for machines without the compiler, too
    from onnx import helper

    from export.about import sign
    from export.dialect.graph import MICROSOFT

    source = onnx.load(lowered, load_external_data=False)
    graph = source.graph
    attributes: dict[str, Any] = {
        "main_context": 1,
        "embed_mode": int(form == "embedded"),
        "ep_cache_context": engine.read_bytes() if form == "embedded" else engine.name,
        "ep_sdk_version": version,
        "partition_name": graph.name,
        "source": PROVIDERS[module],
    }
    if len(sms) == 1:  # the providers compare it with the GPU's and know no list
        attributes["hardware_architecture"] = str(sms[0])
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    node = helper.make_node("EPContext", inputs, outputs, name=graph.name, domain=MICROSOFT, **attributes)
    whole = helper.make_graph([node], graph.name, graph.input, graph.output)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(whole, opset_imports=imports, ir_version=10)
    model.metadata_props.extend(source.metadata_props)
    sign(model, f"EP context: runs {engine.name} by {PROVIDERS[module]}")
    onnx.save(model, engine.with_name(CONTEXT_MODEL))
    return [CONTEXT_MODEL]


def check(module: str) -> Check:
    """Row of `doctor`: is the provider installed that runs the EP-context model of this product's engine?"""
    name, target = PROVIDERS[module], {RTX: "rtx", TRT: "trt"}[module]
    plugins = [f"{plugin} {version}" for plugin in PLUGINS[module] if (version := machine.installed_version(plugin))]
    built_in = [f"in {package} {version}" for package, version in stock_runtime.packages().items()]
    found = plugins or (built_in if name in stock_runtime.providers() else [])
    remedy = f"only needed to run the model of {target}.ep_context in onnxruntime; pip install {INSTALLED_BY[module]}"
    return Check(name, bool(found), f"{', '.join(found) or 'not installed'}; not run", False, remedy)
