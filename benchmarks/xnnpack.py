"""Linears of XNNPACK, as LiteRT runs them: a model of one operation each. Needs ai-edge-litert."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

MODULE = "ai_edge_litert"
SCALE = 0.01  # of weights; of no consequence
BLOCK_VERSION = 12  # of the operation, from which on weights may have a scale for each block


@dataclass(frozen=True)
class Linear:
    """Activations are quantized to 8 bits at each call, a scale for each token; static: they come as such, and results
    are rounded to 8 bits. block: input channels that share a scale of the weight, 0: a scale for each output channel.
    """

    bits: int
    block: int = 0
    static: bool = False

    @property
    def name(self) -> str:
        weight = f"INT{self.bits}" + f" by groups of {self.block}" * bool(self.block)
        return f"XNNPACK {weight} x INT8, {'static' if self.static else 'dynamic'}"


LINEARS = (Linear(8), Linear(8, static=True), Linear(4), Linear(4, block=64))


def is_installed() -> bool:
    """Is LiteRT there?"""
    return find_spec(MODULE) is not None


def random_linear(linear: Linear, m: int, n: int, k: int, rng: np.random.Generator, threads: int) -> Interpreter:
    """A linear of [m, k] by [n, k], whose `invoke` runs it, on codes of the whole range."""
    largest = 2 ** (linear.bits - 1) - 1
    weight = rng.integers(-largest, largest + 1, (n, k)).astype(np.int8)
    x = rng.integers(-127, 128, (m, k)).astype(np.int8 if linear.static else np.float32)
    return opened(linear, x, weight, threads)


def opened(linear: Linear, x: NDArray[np.generic], weight: NDArray[np.int8], threads: int) -> Interpreter:
    """The linear with its input [M, K] of int8 or float32 and its weight [N, K]. Raises AssertionError if LiteRT would
    not leave it to XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=_model(linear, len(x), weight), num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    operations = [row["op_name"] for row in interpreter._get_ops_details()]
    assert operations[-1] == "DELEGATE", f"{linear.name}: LiteRT runs {operations} by itself"
    return interpreter


def _model(linear: Linear, m: int, weight: NDArray[np.int8]) -> bytes:
    """y[m, n] = x[m, k] weight[n, k]', as a file of LiteRT."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    n, k = weight.shape
    types, buffers = schema.TensorType, [schema.BufferT() for _ in range(5)]  # the first is that of no data

    def tensor(buffer: int, shape: tuple[int, ...], kind: int, quantization: object = None) -> object:
        result = schema.TensorT()
        result.buffer, result.shape, result.type, result.quantization = buffer, list(shape), kind, quantization
        return result

    def scales(*values: float) -> object:
        result = schema.QuantizationParametersT()
        result.scale, result.zeroPoint, result.quantizedDimension = list(values), [0] * len(values), 0
        return result

    outer = types.INT8 if linear.static else types.FLOAT32
    tensors = [tensor(1, (m, k), outer, scales(1.0) if linear.static else None)]
    if linear.block:
        of_weight, blocks = schema.QuantizationParametersT(), schema.BlockwiseQuantizationT()
        blocks.scales, blocks.zeroPoints, blocks.blockSize = 3, -1, linear.block
        of_weight.details, of_weight.detailsType = blocks, schema.QuantizationDetails.BlockwiseQuantization
        buffers[4].data = _bytes(np.full((n, k // linear.block), SCALE, np.float16))
    else:
        of_weight = scales(*[SCALE] * n)
    if linear.bits == 4:
        pairs = (weight.astype(np.uint8) & 15).reshape(-1, 2)
        buffers[2].data = _bytes(pairs[:, 0] | pairs[:, 1] << 4)
    else:
        buffers[2].data = _bytes(weight)
    tensors.append(tensor(2, (n, k), types.INT4 if linear.bits == 4 else types.INT8, of_weight))
    tensors.append(tensor(3, (m, n), outer, scales(SCALE * k) if linear.static else None))
    if linear.block:
        tensors.append(tensor(4, (n, k // linear.block), types.FLOAT16))
    code, operator, options = schema.OperatorCodeT(), schema.OperatorT(), schema.FullyConnectedOptionsT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = BLOCK_VERSION
    options.asymmetricQuantizeInputs = True
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    operator.builtinOptions, operator.builtinOptionsType = options, schema.BuiltinOptions.FullyConnectedOptions
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, [operator], [0], [2]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _bytes(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.frombuffer(array.tobytes(), np.uint8)
