"""From a torch module to an ONNX graph without weights: torch.export, then the ONNX exporter, then clean-up.

The graph keeps its parameters as inputs named by module path; who saves it binds them to the values it wants. So
nothing can fold a weight into another one, and no weight is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript import opset21 as op
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import nn

from export.dialect.functions import OPSET
from export.dialect.graph import attribute, is_op, result_of
from export.dialect.ops import DOMAIN, VERSION, attributes
from export.dialect.reference import check_attention_shapes
from export.errors import ContractError, ModelError
from export.formats.attention import AttentionFormats
from export.models.attention_calls import attention_calls
from export.models.description import Array
from export.models.families import MOST_TOKENS, SIDES, Input
from export.models.torch_modules import Denoiser
from export.onnx_files import quiet
from export.quantize_graph import PLACEHOLDER

IR_VERSION = 10
MODULE_PREFIX = "transformer."
ATTENTION = "QuantizedAttention"
# A node of the trace alone: what it passes on ends a stretch, and gets the name of the part that computed it.
STRETCH_END = "StretchEnd"
# Tables of sines and positions stay below this many elements; larger constants are not computed at export.
FOLD_LIMIT = 1 << 20
# Shapes of Reshape as constants, and what torch's view and slice calls leave behind.
CLEAN_UPS = (
    rules.materialize_reshape_shape_rule,
    rules.transpose_transpose_rule,
    rules.squeeze_reshape_1d_rule,
    rules.collapse_slice_rule,
    rules.mul_by_1_rule,
)


class PlaceholderLinear(nn.Module):
    """Stands for a linear in the trace: [..., K] -> [..., N], one node carrying the layer's name, no weight."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name, self.out_features = name, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        domain_op, attributes = f"{DOMAIN}::{PLACEHOLDER}", {"layer": self.name}
        return torch.onnx.ops.symbolic(domain_op, (x,), attributes, dtype=x.dtype, shape=shape, version=VERSION)


def trace(
    module: Denoiser, rows: tuple[Input, ...], samples: Mapping[str, Array], attention: AttentionFormats | None = None
) -> ir.Model:
    """ONNX graph of `module`, whose forward takes the inputs `rows` in order and returns its family's outputs.

    Dynamic axes are those of the rows. Parameters and buffers of the module become graph inputs behind the rows.
    attention: formats in which it is quantized, each one node of the dialect then; None: in float32, in plain ops.
    """
    part = module.transformer
    watched = attention_calls(part, partial(_quantized_attention, attention)) if attention else _ends_marked(part)
    with watched:
        program = exported(module, rows, samples)
    _drop_vain_squeezes(program)
    names = [row.name for row in rows]
    table: dict[Callable, Callable] = {
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.group_norm.default: _group_norm,
    }
    with quiet():
        onnx_program = torch.onnx.export(
            program, (), dynamo=True, input_names=names, output_names=list(module.family.outputs), opset_version=OPSET,
            optimize=False, verbose=False, custom_translation_table=table,
        )  # fmt: skip
        assert onnx_program is not None
        model = onnx_program.model
        # What a family gives the module beside its inputs are constants of the graph, not weights.
        given = set(program.graph_signature.inputs_to_lifted_tensor_constants.values())
        _open_weights(model, (set(program.state_dict) | set(program.constants)) - given)
        _clean(model)
    model.graph.name = module.family.noun
    _name_axes(model, rows)
    _name_attentions(model.graph)
    _name_stretches(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    return model


def exported(module: nn.Module, rows: tuple[Input, ...], samples: Mapping[str, Array]) -> torch.export.ExportedProgram:
    """torch.export's program of a module whose forward takes the inputs `rows` in order, their dynamic axes dynamic.
    The module is not run: tensors have sizes alone meanwhile.
    """
    least = {name: row.least_side for row in rows for name in row.dynamic_axes.values() if name in SIDES}
    names = {name for row in rows for name in row.dynamic_axes.values()}
    # A table of positions that is cut to the tokens' number is traced for numbers up to its end alone; callers are
    # refused more.
    most = {"tokens": MOST_TOKENS} if module.family.recordings is not None else {}
    sizes = {name: torch.export.Dim(name, min=least.get(name), max=most.get(name)) for name in sorted(names)}
    dynamic = tuple({axis: sizes[name] for axis, name in row.dynamic_axes.items()} for row in rows)
    args = tuple(torch.from_numpy(samples[row.name]) for row in rows)
    with torch.no_grad():
        return torch.export.export(module, args, dynamic_shapes={"args": dynamic}, strict=False)


def _drop_vain_squeezes(program: torch.export.ExportedProgram) -> None:
    """torch's squeeze leaves a dimension above 1 alone, ONNX's fails on it: remove those that do nothing."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            size = node.args[0].meta["val"].shape[node.args[1]]
            if isinstance(size, int) and size != 1:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
    program.graph_module.recompile()


def _quantized_attention(
    formats: AttentionFormats,
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One node for an attention, in its final form."""
    if isinstance(key.shape[-2], int):  # of a caption it is a symbol, and an engine refuses too many tokens
        check_attention_shapes(name, key.shape[-2], key.shape[-1])
    choices = attributes(ATTENTION, layer=name, qk_format=formats.qk, pv_format=formats.pv, scale=scale)
    inputs = (query, key, value, query.new_zeros((1, 1, 1, 1)) if mask is None else mask)
    shape = (*query.shape[:-1], value.shape[-1])
    domain_op = f"{DOMAIN}::{ATTENTION}"
    return torch.onnx.ops.symbolic(domain_op, inputs, choices, dtype=query.dtype, shape=shape, version=VERSION)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention in four plain ops, Softmax(Q * scale @ K^T + mask) @ V; the exporter's own form hides K^T."""
    if is_causal or enable_gqa or dropout_p or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        raise ContractError("attention with causal, boolean or grouped heads is not exported; use a float mask")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """A norm of each group by itself, then a factor and an offset for each channel. The exporter's own form computes a
    variance as a difference of means of squares, which cancels where a group's mean is far from zero."""
    rows = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))  # [B, groups, all numbers of one]
    ones, zeros = (op.Constant(value_floats=[value] * num_groups) for value in (1.0, 0.0))
    result = op.Reshape(op.InstanceNormalization(rows, ones, zeros, epsilon=eps), op.Shape(x))
    per_channel = op.Constant(value_ints=[-1, *[1] * (len(x.shape) - 2)])
    if weight is not None:
        result = op.Mul(result, op.Reshape(weight, per_channel))
    return result if bias is None else op.Add(result, op.Reshape(bias, per_channel))


@contextmanager
def _ends_marked(module: nn.Module) -> Iterator[None]:
    """Within, what the parts of an autoencoder that end a stretch compute goes through a node with their name."""
    from export.models.autoencoder_modules import stretch_ends

    def mark(path: str, result: torch.Tensor) -> torch.Tensor:
        domain_op, choices = f"{DOMAIN}::{STRETCH_END}", {"layer": path}
        return torch.onnx.ops.symbolic(
            domain_op, (result,), choices, dtype=result.dtype, shape=result.shape, version=VERSION
        )

    with ExitStack() as stack:
        for path, part in stretch_ends(module).items():
            hook = partial(lambda path, _module, _inputs, result: mark(path, result), path)
            stack.callback(part.register_forward_hook(hook).remove)
        yield


def _open_weights(model: ir.Model, names: set[str]) -> None:
    """Turn parameters from initializers into graph inputs. Raises ModelError for one that is called like an input."""
    inputs = {value.name for value in model.graph.inputs}
    for name in sorted(names & set(model.graph.initializers)):
        value = model.graph.initializers.pop(name)
        value.const_value, value.name = None, name.removeprefix(MODULE_PREFIX)
        if value.name in inputs:
            raise ModelError(f"{value.name}: an input and a tensor of the model have this name; rename the tensor")
        model.graph.inputs.append(value)


def _clean(model: ir.Model) -> None:
    """Inline, fold small constants, drop what is unused and everything that names files of this machine."""
    common.InlinePass()(model)
    for last in (False, True):
        if last:
            rewrite(model, CLEAN_UPS)
        fold_constants_ir(model, onnx_shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
        common.RemoveUnusedNodesPass()(model)
    passes = (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    for graph_pass in passes:
        graph_pass(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.ir_version = "", "", IR_VERSION
    for value in _values(model.graph):
        value.metadata_props.clear()


def _values(graph: ir.Graph) -> list[ir.Value]:
    outputs = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *outputs]


def _name_axes(model: ir.Model, rows: tuple[Input, ...]) -> None:
    """Call the dynamic axes by their names ("batch", "tokens") in every shape; forget other symbols."""
    inputs = {value.name: value for value in model.graph.inputs}
    known = {}
    for row in rows:
        for axis, name in row.dynamic_axes.items():
            shape = inputs[row.name].shape
            if shape is None or isinstance(shape[axis], int):
                raise ContractError(
                    f"{row.name}: axis {axis} ({name}) was fixed to {shape}; the model reads it as a number"
                )
            known[str(shape[axis])] = name
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else known.get(str(size)) for size in value.shape])


def _name_attentions(graph: ir.Graph) -> None:
    """A node of quantized attention is called as its attention is, its result "layer/output"."""
    for node in graph:
        if is_op(node, ATTENTION, DOMAIN):
            node.name = str(attribute(node, "layer"))
            result_of(node).name = f"{node.name}/output"


def _name_stretches(graph: ir.Graph) -> None:
    """The tensors at marks, which go, are called "part/output" by the module path of the part."""
    for node in list(graph):
        if is_op(node, STRETCH_END, DOMAIN):
            (value,), layer = node.inputs, attribute(node, "layer")
            assert value is not None, f"a mark of {layer} without an input"
            ir.convenience.replace_all_uses_with(result_of(node), value)
            value.name = f"{layer}/output"
            graph.remove(node, safe=True)
