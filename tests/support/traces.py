"""Traces of models, each made once in a process: tracing takes seconds and sees no number of a model or its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from export import to_onnx
from export.models.load import LoadedModel

TRACE = to_onnx._traced
_made: dict[tuple[Any, ...], ir.Model] = {}


def traced(model: LoadedModel, stand_ins: Mapping[str, Any], height: int, width: int) -> ir.Model:
    """In place of to_onnx._traced: a copy of the first trace of a model of the same class, configuration, modules,
    types, inputs, stand-ins and size."""
    dtypes = frozenset(parameter.dtype for parameter in model.module.parameters())
    shapes = [(name, type(of), of.out_features, getattr(of, "bias", None) is None) for name, of in stand_ins.items()]
    what = (model.config_sha256, str(model.module), model.inputs, dtypes, tuple(shapes), model.cells(height, width))
    if what not in _made:
        _made[what] = TRACE(model, stand_ins, height, width)
    return _made[what].clone()
