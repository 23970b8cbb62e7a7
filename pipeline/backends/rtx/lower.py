"""Lowers packed GEMMs and quantizers of the `fpq` dialect to standard ONNX that TensorRT-RTX runs on tensor cores.

Each PackedGemm becomes: operands of a hardware type (FP8 E4M3 or INT8) through QuantizeLinear and DequantizeLinear of
scale 1, one MatMul per limb, and the per-channel and per-token scales outside. The integer images are exact in the
operands, so the same file gives the same sums in stock onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from export.dialect.ops import DOMAIN
from export.errors import ContractError
from pipeline.backends.base import Capabilities, Choice, GemmRow, ProbeRow
from pipeline.backends.rtx.choose import Plan, choose
from pipeline.backends.rtx.emit import RtxEmitter
from pipeline.backends.rtx.gemms import emit_gemm
from pipeline.backends.rtx.operands import Operand
from pipeline.backends.rtx.quantizers import Token, emit_limbs, emit_norm_modulate, emit_static, emit_token
from pipeline.backends.rtx.weights import PackedWeight, packed_weight
from pipeline.passes.graph import constant, low_rank_of, unbalanced

LOWERED = ("QuantizeActivation", "QuantizeStatic", "NormModulateQuantize")
GROUPS_REFUSED = (
    "target rtx runs one GEMM for each linear and has no scale per token and group of input channels; build it with "
    "--target cpu, or calibrate with one scale per token"
)


@dataclass
class Lowering:
    """What was chosen for every quantized linear and where the parity gate finds it."""

    choices: list[Choice] = field(default_factory=list)
    probes: list[ProbeRow] = field(default_factory=list)


@dataclass
class _Context:
    """Quantizers already emitted, so that linears which share an input share its operands."""

    tokens: dict[ir.Node, Token] = field(default_factory=dict)
    limbs: dict[tuple[ir.Node, Operand], tuple[ir.Value, ...]] = field(default_factory=dict)


def lower(model: ir.Model, capabilities: Capabilities) -> Lowering:
    """Replace all `fpq` nodes of `model` in place. Raises ContractError for a node or format that cannot be lowered."""
    context, lowering = _Context(), Lowering()
    _refuse_groups(model.graph)
    packed = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "PackedGemm"]
    if not packed:
        raise ContractError("the model has no PackedGemm node, so nothing is quantized; run the packing passes first")
    for node in packed:
        _lower_gemm(model.graph, node, capabilities.gemms, context, lowering)
    _remove_dialect(model, [*packed, *context.tokens])
    return lowering


def _refuse_groups(graph: ir.Graph) -> None:
    """Before anything is changed."""
    groups = [node for node in graph if node.domain == DOMAIN and node.op_type == "PackedGroupGemm"]
    if groups:
        first = groups[0].attributes
        found = f"activation_group {first['activation_group'].as_int()} ({len(groups)} layers)"
        raise ContractError(f"{first['layer'].as_string()}: {found}; {GROUPS_REFUSED}")


def _lower_gemm(
    graph: ir.Graph, node: ir.Node, rows: tuple[GemmRow, ...], context: _Context, lowering: Lowering
) -> None:
    weight = packed_weight(node)
    plan = choose(weight, rows)
    quantizer = _quantizer_of(node, weight.layer)
    token, limbs = _operands(graph, quantizer, plan.operand, weight, context)
    result, gemm = emit_gemm(RtxEmitter(graph, node, weight.layer), weight, plan, token, limbs, node.inputs[5])
    result.shape, result.type = node.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    _replace(graph, node.outputs[0], result)
    lowering.choices.append(Choice(weight.layer, plan.row.path, plan.why))
    lowering.probes.append(_probe(weight, plan, token, limbs, gemm, result))


def _quantizer_of(node: ir.Node, layer: str) -> ir.Node:
    codes = node.inputs[0]
    producer = codes.producer() if codes is not None else None
    if producer is None or producer.op_type not in LOWERED:
        found = producer.op_type if producer else "a graph input"
        raise ContractError(f"{layer}: activation codes come from {found}; expected one of {LOWERED}")
    return producer


def _operands(
    graph: ir.Graph, quantizer: ir.Node, operand: Operand, weight: PackedWeight, context: _Context
) -> tuple[Token, tuple[ir.Value, ...]]:
    emit = RtxEmitter(graph, quantizer, quantizer.name or f"{weight.layer}/quantize")
    if quantizer not in context.tokens:
        x = quantizer.inputs[0]
        if quantizer.op_type == "NormModulateQuantize":
            x = emit_norm_modulate(emit, quantizer, weight.in_features)
        assert x is not None
        context.tokens[quantizer] = _token(emit, quantizer, x)
    token = context.tokens[quantizer]
    if (quantizer, operand) not in context.limbs:
        emit.prefix += "" if operand.type == "E4M3" else f"/{operand.type.lower()}"
        context.limbs[quantizer, operand] = emit_limbs(emit, token, operand)
    return token, context.limbs[quantizer, operand]


def _token(emit: RtxEmitter, quantizer: ir.Node, x: ir.Value) -> Token:
    name = quantizer.attributes["format"].as_string()
    if quantizer.op_type != "QuantizeStatic":
        return emit_token(emit, x, name)
    scale, zero = (constant(value) for value in quantizer.inputs[1:])
    assert scale is not None and zero is not None
    return emit_static(emit, x, name, float(scale[0]), float(zero[0]))


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Use `new` wherever `old` was used; a graph output keeps its name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _probe(
    weight: PackedWeight, plan: Plan, token: Token, limbs: tuple[ir.Value, ...], gemm: ir.Value, result: ir.Value
) -> ProbeRow:
    branch, output = low_rank_of(result) or (None, result)
    return ProbeRow(
        layer=weight.layer,
        path=plan.row.path,
        x=str(unbalanced(token.x).name),
        codes=tuple(str(limb.name) for limb in limbs),
        limb_weights=plan.operand.limb_weights,
        codes_unit=2.0**-plan.operand.exponent,
        codes_offset=-float(plan.operand.shift),
        act_scale=str(token.scale.name) if token.scale is not None else "",
        gemm=str(gemm.name),
        gemm_unit=2.0 ** (plan.operand.exponent + plan.weight_exponent),
        gemm_scale="",
        exact=plan.exact,
        output=str(output.name),
        half_roundings=0 if plan.exact else 3,  # group scale, weight, sum
        low_rank=str(branch.name) if branch is not None else "",
    )


def _remove_dialect(model: ir.Model, done: list[ir.Node]) -> None:
    """Drop lowered nodes, unused functions and constants; anything of the dialect that is left is an error."""
    graph = model.graph
    order = {node: index for index, node in enumerate(graph)}
    for node in sorted(done, key=order.__getitem__, reverse=True):
        graph.remove(node, safe=True)
    left = [node for node in graph if node.domain == DOMAIN]
    if left:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in left[:5])
        raise ContractError(f"{len(left)} nodes of domain {DOMAIN} were not packed and cannot be lowered: {names}")
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]
