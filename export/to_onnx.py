"""Write a model as ONNX: the portable quantized form, or plain float32 for baselines.

Both files (model.onnx and model.onnx.data) are written beside their destination and renamed; the same inputs give the
same bytes. Tensors are streamed: at most one of them is in memory besides what the caller holds.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.about import About, sign
from export.carry_nan import carry_nan
from export.checkpoint import QuantizedLinear, shared_router
from export.dialect.graph import GraphBuilder, add_functions, add_initializer, is_op, lazy_tensor, result_of
from export.dialect.ops import DOMAIN
from export.errors import ContractError, ModelError
from export.formats.attention import AttentionFormats
from export.models.load import LoadedModel, denoiser, sample_inputs
from export.models.read_weights import is_finite
from export.quantize_graph import quantize_graph

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)
# Sizes of the traced example: two different numbers above 1, so that no axis is mistaken for another.
TRACE_BATCH, TRACE_TOKENS = 2, 7
# Smaller float tensors (biases, tables) are stored in fp32 without a Cast: the same values in a simpler graph.
NARROW_ELEMENTS = 4096
# The models' samplers use (rounded) timesteps of this range.
TIMESTEPS = np.arange(1000)
# What a file is, in words.
PORTABLE = "{noun} as a portable quantized model; ops of the domain fpq have their function bodies in this file"
FLOAT = "{noun} in float32"


@dataclass(frozen=True)
class ExportSummary:
    """What an export did. `kept` counts layers by reason; bytes of stored weights, and of the same model in fp16.

    attentions: how many are quantized, by their formats, which are None where none is."""

    quantized: int
    kept: Mapping[str, int]
    weights_bytes: int
    fp16_bytes: int
    attentions: int = 0
    attention: AttentionFormats | None = None

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.kept.items())
        count = sum(self.kept.values())
        sizes = f"{megabytes(self.weights_bytes)} packed vs {megabytes(self.fp16_bytes)} fp16"
        layers = f"{self.quantized} of {self.quantized + count} layers quantized, {count} kept ({reasons}), {sizes}"
        return layers if self.attention is None else f"{layers}, {self.attentions} attentions at {self.attention}"


def megabytes(size_bytes: int) -> str:
    """Size for people, decimal units.

    >>> megabytes(305_000_000), megabytes(1_220_000_000)
    ('305 MB', '1.22 GB')
    """
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"


def export_portable(
    model: LoadedModel,
    layers: list[QuantizedLinear],
    path: Path,
    height: int = 0,
    width: int = 0,
    attention: AttentionFormats | None = None,
    about: About | None = None,
) -> ExportSummary:
    """Write the portable quantized model to `path` and `path`.data for images of `height` x `width` pixels.

    Batch and caption length stay dynamic. attention: its formats, None for float32. about: what the file says of the
    model beside the formats. Raises ContractError unless `layers` are exactly the model's linears to quantize and fit
    them in shape, or if an attention cannot be quantized; ModelError if a tensor that is not quantized has NaN or Inf.
    """
    from export.trace import ATTENTION, PlaceholderLinear

    _check_layers(model, layers)
    _check_finite(model, {ref.name for ref in model.linears()})
    _log_undecided(layers)
    stand_ins = {ref.name: PlaceholderLinear(ref.name, ref.module.out_features) for ref in model.linears()}
    graph = _traced(model, stand_ins, height, width, attention)
    if model.family.quantizes:
        quantize_graph(graph, layers)
    attentions = sum(is_op(node, ATTENTION, DOMAIN) for node in graph.graph)
    if attention is not None:
        add_functions(graph, [ATTENTION])
    if any(layer.activation_scale is not None for layer in layers):
        carry_nan(graph.graph, [row.name for row in model.inputs])
    _bind(graph, _values(model, height, width), narrow=True)
    sign(graph, PORTABLE.format(noun=model.family.noun))
    graph.metadata_props.update((about or About()).metadata(layers, attention))
    save_model(graph, path)
    summary = replace(_summary(model, len(layers), path), attentions=attentions, attention=attention)
    logger.info("%s: %s", path, summary)
    return summary


def export_float(model: LoadedModel, path: Path, height: int = 0, width: int = 0) -> None:
    """Write the float model with float32 weights, for baselines; same inputs and output as the portable one.

    Raises ModelError if a tensor of the model has NaN or Inf.
    """
    _check_finite(model, set())
    graph = _traced(model, {}, height, width, attention=None)
    _bind(graph, _values(model, height, width), narrow=False)
    sign(graph, FLOAT.format(noun=model.family.noun))
    save_model(graph, path)


def _check_layers(model: LoadedModel, layers: list[QuantizedLinear]) -> None:
    refs = {ref.name: ref.module for ref in model.linears()}
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise ContractError(f"{len(names)} quantized layers have only {len(set(names))} names; calibrate again")
    if missing := [name for name in refs if name not in names]:
        raise ContractError(f"{missing[0]}: the model has this linear but the checkpoint does not; calibrate again")
    for layer in layers:
        codes_shape = (layer.out_features, layer.in_features)
        if layer.name not in refs:
            raise ContractError(
                f"{layer.name}: not a linear that {model.family.name} quantizes; calibrate this model again"
            )
        if tuple(refs[layer.name].weight.shape) != codes_shape:
            shape = tuple(refs[layer.name].weight.shape)
            raise ContractError(
                f"{layer.name}: codes are for a weight {codes_shape}, the model has {shape}; calibrate again"
            )
        if (refs[layer.name].bias is None) != (layer.bias is None):
            raise ContractError(
                f"{layer.name}: model and checkpoint disagree on whether it has a bias; calibrate again"
            )


def _check_finite(model: LoadedModel, replaced: set[str]) -> None:
    """Refuse a tensor with NaN or Inf that the graph will hold; those of the linears in `replaced` it will not."""
    for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
        if tensor.is_floating_point() and name.rpartition(".")[0] not in replaced and not is_finite(tensor):
            raise ModelError(f"{name}: holds NaN or Inf and would be part of the engine; use another model")


def _log_undecided(layers: list[QuantizedLinear]) -> None:
    """Warn of timesteps at which an engine's float32 may choose another low-rank branch than the reference does."""
    router = shared_router(layers)
    undecided = np.flatnonzero(router.undecided(TIMESTEPS)) if router is not None else ()
    if len(undecided):
        shown = ", ".join(map(str, undecided[:8])) + (", ..." if len(undecided) > 8 else "")
        logger.warning("router: branches are tied within float32 rounding at %d timesteps: %s", len(undecided), shown)


# --- graph and weights ---------------------------------------------------------------------------------------------


def _traced(
    model: LoadedModel,
    stand_ins: Mapping[str, nn.Module],
    height: int,
    width: int,
    attention: AttentionFormats | None,
) -> ir.Model:
    import torch

    from export.models.torch_modules import UpcastLinear, linear_like, set_resolution
    from export.trace import trace

    # Weights of the right shape that take no memory; their values are bound by name when the file is written.
    upcast = {path: part for path, part in model.module.named_modules() if isinstance(part, UpcastLinear)}
    large: dict[str, nn.Linear] = {**upcast, **{ref.name: ref.module for ref in model.linears()}}
    plain = {path: linear_like(part, torch.zeros(1, 1).expand(part.weight.shape)) for path, part in large.items()}
    module = denoiser(model, {**plain, **stand_ins})
    set_resolution(module, *model.cells(height, width))
    samples = sample_inputs(model, TRACE_BATCH, 0, height, width, TRACE_TOKENS)
    return trace(module, model.inputs, samples, attention)


def refuse_untraceable(model: LoadedModel, height: int, width: int) -> None:
    """Raise ModelError where no graph can be made of a model that was learned from its pipeline, for any number of
    pictures and tokens: its code may fix one, or do what ONNX has no form for. Nothing is computed."""
    try:
        _traced(model, {}, height, width, None)
    except Exception as error:  # whatever torch and its exporter say of code that nobody has tried
        words = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise ModelError(
            f"{model.source}: {model.family.class_name} cannot be traced for any number of pictures and tokens "
            f"({words})"
        ) from error


def _values(model: LoadedModel, height: int, width: int) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its module path, with position tables for the resolution."""
    from export.models.torch_modules import set_resolution, with_modules

    module = with_modules(model.module, {})
    set_resolution(module, *model.cells(height, width))
    return dict([*module.named_parameters(), *module.named_buffers()])


def _bind(graph: ir.Model, values: Mapping[str, torch.Tensor], narrow: bool) -> None:
    """Turn the graph's weight inputs into initializers, read from `values` when the file is written."""
    for value in [value for value in graph.graph.inputs if value.name in values]:
        graph.graph.inputs.remove(value)
        tensor = values[str(value.name)]
        if _only_read_transposed(value):
            tensor = tensor.T
            _drop_transposes(graph.graph, value)
        if not tensor.is_floating_point():  # a table of places
            value.const_value = ir.tensor(tensor.numpy(), name=value.name)
            graph.graph.register_initializer(value)
        elif value.dtype == ir.DataType.FLOAT16:  # a large table, whose rows the model widens
            value.const_value = _stored(value, tensor, ir.DataType.FLOAT16)
            graph.graph.register_initializer(value)
        elif narrow and tensor.numel() >= NARROW_ELEMENTS and (tensor.half().float() == tensor).all():
            _bind_narrow(graph.graph, value, tensor)
        else:
            value.const_value = _stored(value, tensor, ir.DataType.FLOAT)
            graph.graph.register_initializer(value)


def _only_read_transposed(value: ir.Value) -> bool:
    """Does every reader of a matrix turn it first? (Linears on sequences do; then it is stored turned, [K, N].)"""
    perms = [node.attributes["perm"].as_ints() for node in value.consumers() if node.op_type == "Transpose"]
    return bool(perms) and len(perms) == len(value.uses()) and all(list(perm) == [1, 0] for perm in perms)


def _drop_transposes(graph: ir.Graph, value: ir.Value) -> None:
    for node in list(value.consumers()):
        value.shape = result_of(node).shape
        ir.convenience.replace_all_uses_with(result_of(node), value)
        graph.remove(node, safe=True)


def _bind_narrow(graph: ir.Graph, value: ir.Value, tensor: torch.Tensor) -> None:
    """fp16 initializer -> Cast -> the value that the graph reads."""
    stored = add_initializer(graph, _stored(value, tensor, ir.DataType.FLOAT16))
    wide = GraphBuilder(graph, graph[0], str(value.name)).op("Cast", stored, name="cast", to=ir.DataType.FLOAT.value)
    wide.shape = value.shape
    ir.convenience.replace_all_uses_with(value, wide)


def _stored(value: ir.Value, tensor: torch.Tensor, kind: ir.DataType) -> ir.LazyTensor:
    """What a weight input becomes: float32 or float16, converted when the file is written."""

    def array() -> NDArray[np.floating]:
        return (tensor.half() if kind == ir.DataType.FLOAT16 else tensor.float()).contiguous().numpy()

    return lazy_tensor(str(value.name), kind, tensor.shape, array)


# --- files ---------------------------------------------------------------------------------------------------------


def save_model(graph: ir.Model, path: Path) -> None:
    """Write both files into a folder beside `path`, then rename: the data first, so a model always has its data."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        ir.save(graph, part / path.name, external_data=f"{path.name}.data")
        for name in (f"{path.name}.data", path.name):
            if (part / name).exists():
                os.replace(part / name, path.with_name(name))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _summary(model: LoadedModel, quantized: int, path: Path) -> ExportSummary:
    kept = Counter(reason.partition(":")[0] for _, reason in model.kept())
    stored = path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size
    return ExportSummary(quantized, kept, stored, 2 * sum(p.numel() for p in model.module.parameters()))
