"""Low-rank branches of quantized linears in a graph, in standard ops: one router, and two small products per layer.

The router reads the graph's input `timestep` once and gives each sample the number of its branch; a layer gathers the
two matrices of that branch, so a batch may hold samples of different timesteps.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import half_where_exact
from export.dialect.graph import GraphBuilder, LayerBuilder
from export.errors import ContractError
from export.router import ARRAYS, Router

TIMESTEP, ROUTER = "timestep", "router"
INT64, HALF, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT16, ir.DataType.FLOAT


def add_router(graph: ir.Graph, router: Router) -> ir.Value:
    """The branch of each sample, int64 [batch], computed at the head of the graph. Raises ContractError."""
    timestep = next((value for value in graph.inputs if value.name == TIMESTEP), None)
    if timestep is None:
        raise ContractError(
            f"the model has no input {TIMESTEP}, which low-rank branches are routed by; calibrate without"
        )
    build = GraphBuilder(graph, graph[0], ROUTER)
    stored = {key: build.constant(key, getattr(router, key)) for key in ARRAYS}
    column = build.plain(
        "column", "Reshape", timestep, build.constant("one_column", np.array([-1, 1])), kind=timestep.type
    )
    if timestep.dtype != FLOAT:
        column = build.plain("timestep", "Cast", column, to=FLOAT.value)
    phase = build.plain("phase", "Mul", column, stored["frequencies"])
    wave = build.plain("wave", "Concat", build.plain("cos", "Cos", phase), build.plain("sin", "Sin", phase), axis=1)
    hidden = build.plain("hidden", "Gemm", wave, stored["w1"], stored["b1"], transB=1)
    active = build.plain("active", "Mul", hidden, build.plain("sigmoid", "Sigmoid", hidden))
    logits = build.plain("logits", "Gemm", active, stored["w2"], stored["b2"], transB=1)
    branch = build.plain("branch", "ArgMax", logits, axis=1, keepdims=0, kind=ir.TensorType(INT64))
    branch.shape = timestep.shape
    return branch


def add_low_rank(build: LayerBuilder, x: ir.Value, branch: ir.Value) -> ir.Value:
    """lora_up[h] @ (lora_down[h] @ x) as "layer/low_rank", for x [batch, K] or [batch, rows, K].

    Matrices are stored as [H, K, R] and [H, R, N], in float16 where that holds all of their numbers.
    """
    layer = build.layer
    assert layer.lora_down is not None and layer.lora_up is not None
    _check_batch(layer.name, x, branch)
    down, up = (_matrix(build, key, getattr(layer, key), branch) for key in ("lora_down", "lora_up"))
    if x.shape is not None and x.shape.rank() == 3:
        return build.plain("low_rank", "MatMul", build.plain("low_rank_inner", "MatMul", x, down), up)
    axis = build.constant("low_rank_axis", np.array([1]))
    inner = build.plain("low_rank_inner", "MatMul", build.plain("low_rank_row", "Unsqueeze", x, axis), down)
    return build.plain("low_rank", "Squeeze", build.plain("low_rank_product", "MatMul", inner, up), axis)


def _matrix(build: LayerBuilder, key: str, array: NDArray[np.float32], branch: ir.Value) -> ir.Value:
    """The matrix of each sample's branch, float32 [batch, ., .]."""
    stored = build.constant(key, half_where_exact(array).transpose(0, 2, 1))
    found = build.plain(key, "Gather", stored, branch, axis=0, kind=stored.type)
    return found if stored.dtype == FLOAT else build.plain(f"{key}_f32", "Cast", found, to=FLOAT.value)


def _check_batch(layer: str, x: ir.Value, branch: ir.Value) -> None:
    """The first axis of x must be the batch, since each sample has a branch of its own."""
    shape, batch = list(x.shape or ()), next(iter(branch.shape or (None,)))
    known = [str(size) for size in (*shape[:1], batch) if size is not None and str(size) != "None"]
    if len(shape) not in (2, 3) or len(set(known)) > 1:
        raise ContractError(
            f"{layer}: its input has shape {x.shape}, not [{batch}, K] or [{batch}, rows, K], so a low-rank branch for "
            f"each sample does not fit; calibrate without"
        )
