"""Traces of models, each made once in a run of the tests: tracing takes seconds and sees no number of a model or its
layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from export import to_onnx
from export.formats.attention import AttentionFormats
from export.models.load import LoadedModel

TRACE = to_onnx._traced
# Names the folder of the traces that the processes of a run share.
VARIABLE = "DITC_TEST_TRACES"


def traced(
    model: LoadedModel, stand_ins: Mapping[str, Any], height: int, width: int, attention: AttentionFormats | None
) -> ir.Model:
    """In place of to_onnx._traced: what the first process wrote of a model of the same class, configuration, modules,
    types, inputs, stand-ins and size. tests/export/test_export.py shows that its bytes are those of a trace anew."""
    from filelock import FileLock

    dtypes = sorted({str(parameter.dtype) for parameter in model.module.parameters()})
    shapes = [(name, type(of), of.out_features, getattr(of, "bias", None) is None) for name, of in stand_ins.items()]
    what = (model.config_sha256, str(model.module), model.inputs, dtypes, shapes, model.cells(height, width), attention)
    path = Path(os.environ[VARIABLE], hashlib.sha256(repr(what).encode()).hexdigest())
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(ir.to_proto(TRACE(model, stand_ins, height, width, attention)).SerializeToString())
            part.rename(path)
    return ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
