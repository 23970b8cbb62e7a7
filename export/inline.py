"""A portable model without functions: for tools that take standard ops alone and read no function bodies (OpenVINO)."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from export.about import sign
from export.dialect.ops import DOMAIN
from export.errors import ContractError
from export.onnx_files import load_model, quiet, reading
from export.to_onnx import save_model

logger = logging.getLogger(__name__)
WHAT = "{noun} as a portable quantized model in standard ops alone"


def write_inlined(source: Path, path: Path) -> int:
    """Write the portable model `source` to `path` and `path`.data with the bodies of the dialect's ops in place of its
    nodes; returns how many nodes the graph then has. Numbers, names of inputs and outputs, and metadata stay.

    Raises ContractError for a file without ops of the dialect.
    """
    model = load_model(source)
    if DOMAIN not in model.opset_imports:
        raise ContractError(f"{source} has no ops of the domain {DOMAIN}: it is in standard ops, or no portable model")
    with reading(source), quiet():
        inline(model)
    sign(model, WHAT.format(noun=model.graph.name))
    save_model(model, path)
    logger.info("%s: %d nodes of standard ops", path, len(model.graph))
    return len(model.graph)


def inline(model: ir.Model) -> None:
    """Replace the nodes of the dialect in place; constants become stored tensors, equal ones one.

    A Constant with `value_float` or `value_ints` is what an attribute of a function leaves behind: tools that fold
    constants take the first for float64.
    """
    passes = (
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    for graph_pass in passes:
        graph_pass(model)
