"""The native library for tests: compiled once for a test run; one TokenChain in stock onnxruntime."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.formats.format import get_format
from export.formats.operands import SMALL_ZERO, limb_base, zero_point
from pipeline.backends.cpu.token_chain import ATTRIBUTES, OP, VERSION, In, Out
from plugins.cpu import library
from plugins.cpu.library import DOMAIN

ELEMENT_TYPES = dict.fromkeys(("CODES", "LOW_CODES"), ir.DataType.UINT8)
_FOLDERS: list[tempfile.TemporaryDirectory] = []


problem = functools.cache(library.problem)


def need_compiler() -> None:
    """Skip the test where nothing can be compiled."""
    if problem():
        pytest.skip(problem())


@functools.cache
def folder(flags: tuple[str, ...] = ()) -> Path:
    """A folder with the library, compiled with these additional flags."""
    need_compiler()
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="ditc-test-"))
    path = Path(_FOLDERS[-1].name)
    library.build(path / library.NAME, flags)
    return path


def session(model: ir.Model, flags: tuple[str, ...] = (), threads: int = 2):
    """onnxruntime session of a model that may hold native ops."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(folder(flags) / library.NAME))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def run(model: ir.Model, feeds: dict, outputs=None, flags: tuple[str, ...] = ()) -> list[np.ndarray]:
    return session(model, flags).run(outputs, feeds)


def quantizer(name: str, limbs: int = 1) -> dict:
    """Attributes of a chain that quantizes into a format."""
    fmt = get_format(name)
    factor = 2.0 ** (23 - fmt.mantissa_bits) - 16 if len(fmt.binade_starts) else 0.0
    numbers = {"max_value": fmt.max_value, "kmax": float(fmt.kmax), "rounding_factor": factor}
    if limbs == 2:
        return numbers | {"zero": SMALL_ZERO, "limb_base": limb_base(fmt.kmax, limbs)}
    return numbers | {"zero": zero_point(fmt.kmax)}


def chain_model(places, results, **settings) -> ir.Model:
    """A model of one TokenChain: inputs and outputs are called as their places, of any shape."""
    inputs = {
        place: ir.Value(name=place.name, type=ir.TensorType(ELEMENT_TYPES.get(place.name, ir.DataType.FLOAT)))
        for place in places
    }
    attributes = ir.convenience.convert_attributes(ATTRIBUTES | settings)
    node = ir.Node(DOMAIN, OP, [inputs.get(place) for place in In], attributes, num_outputs=len(Out), name="chain")
    for place, value in zip(Out, node.outputs, strict=True):
        value.name = place.name if place in results else ""
        value.type = ir.TensorType(ELEMENT_TYPES.get(place.name, ir.DataType.FLOAT))
    outputs = [node.outputs[place] for place in results]
    graph = ir.Graph(list(inputs.values()), outputs, nodes=[node], opset_imports={"": 21, DOMAIN: VERSION}, name="g")
    return ir.Model(graph, ir_version=10)


def chain(feeds: dict, results, flags: tuple[str, ...] = (), **settings) -> list[np.ndarray]:
    """Outputs `results` of one TokenChain for arrays by place."""
    model = chain_model(list(feeds), results, **settings)
    return run(model, {place.name: array for place, array in feeds.items()}, [place.name for place in results], flags)
