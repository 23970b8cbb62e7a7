"""How far two right runs of one portable model may be apart.

The runtimes' float32 operations round each in their own order. Between two quantizers that moves a quantizer's input by
a few units in the last place (pipeline/verify/study.py: QUANTIZER_ULPS); where the input lies so near to a midpoint, a
code flips, which changes everything after it. So the distance is measured: runs of the model in one runtime, with the
input of every quantizer moved at random by up to QUANTIZER_ULPS, are equally right ways of computing it. A tool may be
twice as far from the plain run as the farthest of them: both it and the plain run are off from the exact result. In a
small model flips are rare; there inputs are moved by more, as the study does, until they hit most runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.external_data import load_to_model

from export.dialect.graph import QUANTIZERS, add_initializer
from export.dialect.ops import DOMAIN
from export.onnx_files import load_model
from pipeline.distance import sqnr_db
from pipeline.verify.study import HITTING_ULPS, QUANTIZER_ULPS, most_are_hit

Arrays = Mapping[str, NDArray[Any]]
# One flip may do ten times what another does.
RUNS = 16
TWICE_DB = 20 * math.log10(2)
# Ops that round floats to codes -> how many of their inputs they round.
ROUNDED = dict.fromkeys(QUANTIZERS, 1) | {"QuantizedAttention": 3}


def limit_db(model: Path, feeds: Arrays, plain: Arrays) -> float:
    """The least SQNR of a right run to `plain`, the outputs of a run of the portable `model`."""
    distances: list[float] = []
    for ulps in (QUANTIZER_ULPS, *HITTING_ULPS):
        runs = (run(moved(load_model(model), ulps, seed), feeds) for seed in range(RUNS))
        distances = [distance_db(plain, outputs) for outputs in runs]
        if most_are_hit(distances):
            break
    return min(distances) - TWICE_DB


def distance_db(reference: Arrays, outputs: Arrays) -> float:
    """SQNR of all outputs, the worst of them."""
    return float(np.min([sqnr_db(reference[name], outputs[name]) for name in reference]))  # nan stays nan


def moved(model: ir.Model, ulps: float, seed: int) -> ir.Model:
    """The model with a factor within `ulps` of 1 for each channel in front of every quantizer, in place."""
    rng = np.random.default_rng(seed)
    for node in [node for node in model.graph if node.domain == DOMAIN and node.op_type in ROUNDED]:
        for place, value in enumerate(node.inputs[: ROUNDED[node.op_type]]):
            assert value is not None and value.shape is not None, f"{node.name} reads a value of unknown shape"
            by = rng.uniform(-ulps, ulps, int(value.shape[-1])) * 2.0**-23  # type: ignore[arg-type]
            factor = add_initializer(model.graph, ir.tensor((1 + by).astype(np.float32), name=f"{node.name}.{place}"))
            product = ir.Node("", "Mul", [value, factor])
            model.graph.insert_before(node, product)
            node.replace_input_with(place, product.outputs[0])
    return model


def run(model: ir.Model, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Outputs by name in this environment's onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = ir.to_proto(load_to_model(model)).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
