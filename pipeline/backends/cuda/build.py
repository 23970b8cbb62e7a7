"""Makes a `cuda` engine: the graph of fused ops, split by how often its parts run, and what the engine reads of it."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from export.errors import ContractError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.backends.base import CONDITION, DATA, MODEL, BuildResult, LoweredGraph
from pipeline.backends.cuda.engine import MIN_SM, SCHEMA_VERSION
from pipeline.backends.fused.lower import GROUPS_REFUSED, recipe_problems
from pipeline.backends.fused.lower import lower as lower_fused
from pipeline.backends.fused.ops import DOMAIN
from pipeline.backends.graph_files import graph_facts, packed_model, result, save_lowered, save_part
from pipeline.files import write_json
from pipeline.passes.split_condition import split_condition

if TYPE_CHECKING:
    from pipeline.backends.cuda import CudaOptions
    from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
PROOF = (
    "linears are proven in the lowered graph through onnxruntime, kernels in Triton's interpreter by the tests; "
    "kernels are compiled, not run"
)
REMEDY = "use another format, or --target cpu"


def problems(recipe: Recipe) -> list[str]:
    """One message for each format and each scaling of activations that no kernel takes."""
    return recipe_problems(recipe, {"token_group": GROUPS_REFUSED}, REMEDY)


def lower(portable: Path, work_dir: Path, options: CudaOptions) -> LoweredGraph:
    """Write model.onnx and its data, lowered, into `work_dir`; weights stay packed."""
    model = packed_model(portable)
    return save_lowered(model, work_dir, lower_fused(model, options.operands))


def build(lowered: LoweredGraph, out_dir: Path, options: CudaOptions) -> BuildResult:
    """The lowered graph, split by how often its parts run, metadata.json and lowering.json. Raises ContractError for a
    graph that the executor cannot run."""
    from pipeline.backends.cuda.module import refuse_unknown

    model = ir.load(lowered.path)
    refuse_unknown(model.graph)
    parts = split(model)
    # No hard link: onnx_ir refuses to read data through one.
    shutil.copyfile(lowered.path.with_name(DATA), out_dir / DATA)
    for name, part in parts.items():
        save_part(part, out_dir / name)
    metadata = describe(model, lowered, options)
    write_json(out_dir / metadata_file.NAME, metadata)
    return result(lowered, out_dir, (*parts, DATA), metadata)


def split(model: ir.Model) -> dict[str, ir.Model]:
    """File name -> part: what runs once per image, and the rest; one part where what crosses is not all floats."""
    parts = split_condition(model)
    if parts is None:
        return {MODEL: model}
    crossing = [value for value in parts.condition.graph.outputs if value.dtype != ir.DataType.FLOAT]
    if crossing:
        logger.info("the graph is not split: %s is %s", crossing[0].name, crossing[0].dtype)
        return {MODEL: model}
    return {MODEL: parts.step, CONDITION: parts.condition}


def describe(model: ir.Model, lowered: LoweredGraph, options: CudaOptions) -> dict[str, object]:
    """metadata.json: what the engine needs, takes and holds, and what built it."""
    kernels = Counter(node.op_type for node in model.graph if node.domain == DOMAIN)
    return {
        "schema_version": SCHEMA_VERSION,
        "least_sm": MIN_SM,
        "torch": machine.tool_version("torch"),
        "triton": machine.tool_version("triton"),
        "options": {"weights": options.weights, "activations": options.activations},
        "inputs": {str(value.name): _input_row(value) for value in model.graph.inputs},
        "kernels": dict(sorted(kernels.items())),
        "weights_bytes": lowered.path.with_name(DATA).stat().st_size,
        **graph_facts(lowered),
        "proof": PROOF,
    }


def _input_row(value: ir.Value) -> dict[str, object]:
    """Element type and shape of an input; a size that may vary is given by its name."""
    if value.shape is None or value.dtype is None:
        raise ContractError(f"input {value.name} has no shape or type; export the model again")
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"dtype": value.dtype.numpy().name, "shape": shape}
