"""The standard ONNX ops that a lowered graph may hold, as torch functions: one table, anything else is refused by name.

Semantics are those of opset 21. `host`: names of the inputs that must be known on the CPU (shapes, axes), since a
captured CUDA graph cannot ask the GPU for a size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from export.dialect.ops import Attributes
from export.errors import ContractError

# What torch calls: of tensors, None for absent ones.
Function = Callable[..., Tensor | Sequence[Tensor]]
TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True)
class OnnxOp:
    """make(attributes) -> function of the input tensors. product: a matrix product, which may run in FP16."""

    make: Callable[[Attributes], Function]
    host: tuple[str, ...] = ()
    product: bool = False


def numbers(x: Tensor) -> list[int]:
    """A host tensor as Python integers."""
    return [int(value) for value in x.reshape(-1).tolist()]


def _plain(function: Function) -> OnnxOp:
    """An op without attributes that is this torch function."""
    return OnnxOp(lambda _: function)


def _cast(attributes: Attributes) -> Function:
    to = attributes["to"]
    if to not in TORCH_TYPES:
        name = TensorProto.DataType.Name(to)
        raise ContractError(f"Cast to {name}: the executor has {', '.join(map(str, TORCH_TYPES.values()))}")
    return lambda x: x.to(TORCH_TYPES[to])


def _concat(attributes: Attributes) -> Function:
    return lambda *parts: torch.cat(parts, dim=attributes["axis"])


def _conv(attributes: Attributes) -> Function:
    rank = len(attributes["kernel_shape"])
    pads = list(attributes.get("pads", [0] * 2 * rank))
    if attributes.get("auto_pad", "NOTSET") != "NOTSET" or pads[:rank] != pads[rank:] or rank != 2:
        raise ContractError(f"Conv with pads {pads} over {rank} axes; the executor has symmetric ones over two")
    choices = {
        "stride": list(attributes.get("strides", [1] * rank)),
        "padding": pads[:rank],
        "dilation": list(attributes.get("dilations", [1] * rank)),
        "groups": attributes.get("group", 1),
    }
    return lambda x, w, b=None: functional.conv2d(x, w, b, **choices)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _einsum(attributes: Attributes) -> Function:
    return lambda *operands: torch.einsum(attributes["equation"], *operands)


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, numbers(shape)))


def _gather(attributes: Attributes) -> Function:
    axis = attributes.get("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        place, size = axis % x.ndim, x.shape[axis]
        picked = torch.index_select(x, place, torch.where(indices < 0, indices + size, indices).reshape(-1))
        return picked.reshape(*x.shape[:place], *indices.shape, *x.shape[place + 1 :])

    return gather


def _gelu(attributes: Attributes) -> Function:
    return lambda x: functional.gelu(x, approximate=attributes.get("approximate", "none"))


def _gemm(attributes: Attributes) -> Function:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if (alpha, beta) != (1.0, 1.0):
        raise ContractError(f"Gemm with alpha {alpha} and beta {beta}; the executor has 1 and 1")

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if attributes.get("transA", 0) else a
        b = b if attributes.get("transB", 0) else b.t()
        return functional.linear(a, b, c)

    return gemm


def _layer_norm(attributes: Attributes) -> Function:
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)
    return lambda x, w, b=None: functional.layer_norm(x, x.shape[axis:], w, b, epsilon)


def _reduce_mean(attributes: Attributes) -> Function:
    keep = bool(attributes.get("keepdims", 1))

    def mean(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return x.mean(list(range(x.ndim)) if axes is None else numbers(axes), keepdim=keep)

    return mean


def _reshape(attributes: Attributes) -> Function:
    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        sizes = numbers(shape)
        if not attributes.get("allowzero", 0):
            sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


def _shape(attributes: Attributes) -> Function:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    first = numbers(starts)
    along = list(range(len(first))) if axes is None else numbers(axes)
    by = [1] * len(first) if steps is None else numbers(steps)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(along, first, numbers(ends), by, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _softmax(attributes: Attributes) -> Function:
    return lambda x: torch.softmax(x, dim=attributes.get("axis", -1))


def _split(attributes: Attributes) -> Function:
    axis = attributes.get("axis", 0)

    def split(x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
        count = attributes.get("num_outputs")
        return torch.split(x, -(-x.shape[axis] // count) if sizes is None else numbers(sizes), dim=axis)

    return split


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(numbers(axes))


def _transpose(attributes: Attributes) -> Function:
    perm = attributes.get("perm")
    return lambda x: x.permute(list(perm) if perm is not None else list(range(x.ndim))[::-1])


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    places = numbers(axes)
    for axis in sorted(place % (x.ndim + len(places)) for place in places):
        x = x.unsqueeze(axis)
    return x


def _arg_max(attributes: Attributes) -> Function:
    if attributes.get("select_last_index", 0):
        raise ContractError("ArgMax with select_last_index; the executor takes the first of equal numbers")
    return lambda x: x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


ONNX_OPS: dict[str, OnnxOp] = {
    "Add": _plain(torch.add),
    "ArgMax": OnnxOp(_arg_max),
    "Cast": OnnxOp(_cast),
    "Concat": OnnxOp(_concat),
    "Conv": OnnxOp(_conv, product=True),
    "Cos": _plain(torch.cos),
    "Div": _plain(_divide),
    "Einsum": OnnxOp(_einsum),
    "Expand": OnnxOp(lambda _: _expand, host=("shape",)),
    "Gather": OnnxOp(_gather),
    "Gelu": OnnxOp(_gelu),
    "Gemm": OnnxOp(_gemm, product=True),
    "Identity": _plain(lambda x: x),
    "LayerNormalization": OnnxOp(_layer_norm),
    "MatMul": OnnxOp(lambda _: torch.matmul, product=True),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "ReduceMean": OnnxOp(_reduce_mean, host=("axes",)),
    "Reshape": OnnxOp(_reshape, host=("shape",)),
    "Shape": OnnxOp(_shape),
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": OnnxOp(lambda _: _slice, host=("starts", "ends", "axes", "steps")),
    "Softmax": OnnxOp(_softmax),
    "Split": OnnxOp(_split, host=("split",)),
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": OnnxOp(lambda _: _squeeze, host=("axes",)),
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": OnnxOp(_transpose),
    "Unsqueeze": OnnxOp(lambda _: _unsqueeze, host=("axes",)),
    "Where": _plain(torch.where),
}
