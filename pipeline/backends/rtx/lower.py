"""Lowers packed GEMMs and quantizers of the `fpq` dialect to standard ONNX that TensorRT-RTX runs on tensor cores.

Each PackedGemm becomes: operands of a hardware type (FP8 E4M3 or INT8) through QuantizeLinear and DequantizeLinear of
scale 1, one MatMul per limb, and the per-channel and per-token scales outside. The integers are exact in the operands,
so the same file gives the same sums in stock onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from export.dialect.graph import FLOAT, GraphBuilder, attribute, inputs_of, is_op, result_of, stored_array
from export.dialect.ops import DOMAIN
from export.formats.operands import HardwareNumber
from pipeline.backends.rtx.choose import GemmChoice, choose
from pipeline.backends.rtx.gemms import emit_gemm
from pipeline.backends.rtx.quantizers import Token, emit_limbs, emit_norm_modulate, emit_static, emit_token
from pipeline.passes.probes import Choice, GemmRow, ProbeRow
from pipeline.passes.quantized_gemm import (
    QuantizedGemm,
    probe_of,
    quantizer_of,
    read_gemm,
    refuse_groups,
    refuse_unpacked,
)

NATIVE_GROUPS_REFUSED = (
    "target rtx runs one GEMM for each linear and has no scale per token and group of input channels; build it with "
    "--target cpu, or calibrate with one scale per token"
)


@dataclass
class Lowering:
    """What was chosen for every quantized linear and where the parity gate finds it."""

    choices: list[Choice] = field(default_factory=list)
    probes: list[ProbeRow] = field(default_factory=list)


@dataclass
class _Emitted:
    """Quantizers already emitted, so that linears which share an input share its operands."""

    tokens: dict[ir.Node, Token] = field(default_factory=dict)
    limbs: dict[tuple[ir.Node, HardwareNumber], tuple[ir.Value, ...]] = field(default_factory=dict)


def lower(model: ir.Model, rows: tuple[GemmRow, ...]) -> Lowering:
    """Replace all `fpq` nodes of `model` in place. rows: ways to run a GEMM, in order of preference. Raises
    ContractError for a node or format that cannot be lowered."""
    emitted, lowering = _Emitted(), Lowering()
    refuse_groups(model.graph, NATIVE_GROUPS_REFUSED)
    packed = [node for node in model.graph if is_op(node, "PackedGemm", DOMAIN)]
    for node in packed:
        _lower_gemm(model.graph, node, rows, emitted, lowering)
    _remove_dialect(model, [*packed, *emitted.tokens])
    return lowering


def _lower_gemm(
    graph: ir.Graph, node: ir.Node, rows: tuple[GemmRow, ...], emitted: _Emitted, lowering: Lowering
) -> None:
    gemm = read_gemm(node)
    choice = choose(gemm, rows)
    token, limbs = _operands(graph, quantizer_of(node), choice.number, gemm, emitted)
    build = GraphBuilder(graph, node, gemm.layer, typed=False)
    result, product = emit_gemm(build, gemm, choice, token, limbs, inputs_of(node).bias)
    result.shape, result.type = result_of(node).shape, FLOAT
    _replace(result_of(node), result)
    lowering.choices.append(Choice(gemm.layer, choice.row.path, choice.why))
    lowering.probes.append(_probe(gemm, choice, token, limbs, product, result))


def _operands(
    graph: ir.Graph, quantizer: ir.Node, number: HardwareNumber, gemm: QuantizedGemm, emitted: _Emitted
) -> tuple[Token, tuple[ir.Value, ...]]:
    build = GraphBuilder(graph, quantizer, quantizer.name or f"{gemm.layer}/quantize", typed=False)
    if quantizer not in emitted.tokens:
        x = inputs_of(quantizer).x
        if quantizer.op_type == "NormModulateQuantize":
            x = emit_norm_modulate(build, quantizer, gemm.in_features)
        emitted.tokens[quantizer] = _token(build, quantizer, x)
    token = emitted.tokens[quantizer]
    if (quantizer, number) not in emitted.limbs:
        build.prefix += "" if number.type == "E4M3" else f"/{number.type.lower()}"
        emitted.limbs[quantizer, number] = emit_limbs(build, token, number)
    return token, emitted.limbs[quantizer, number]


def _token(build: GraphBuilder, quantizer: ir.Node, x: ir.Value) -> Token:
    name = attribute(quantizer, "format")
    if quantizer.op_type != "QuantizeStatic":
        return emit_token(build, x, name)
    scale, zero = (float(stored_array(value)[0]) for value in (inputs_of(quantizer).scale, inputs_of(quantizer).zero))
    return emit_static(build, x, name, scale, zero)


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Use `new` wherever `old` was used; a graph output keeps its name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _probe(
    gemm: QuantizedGemm,
    choice: GemmChoice,
    token: Token,
    limbs: tuple[ir.Value, ...],
    product: ir.Value,
    result: ir.Value,
) -> ProbeRow:
    return probe_of(
        gemm.layer,
        choice.row.path,
        x=token.x,
        codes=limbs,
        limb_weights=choice.number.limb_weights,
        codes_unit=2.0**-choice.number.exponent,
        codes_offset=-float(choice.number.shift),
        act_scale=token.scale,
        gemm=product,
        gemm_unit=2.0 ** (choice.number.exponent + choice.weight_exponent),
        result=result,
        exact=choice.exact,
        half_roundings=0 if choice.exact else 3,  # group scale, weight, sum
    )


def _remove_dialect(model: ir.Model, done: list[ir.Node]) -> None:
    """Drop lowered nodes, unused functions and constants; anything of the dialect that is left is an error."""
    graph = model.graph
    order = {node: index for index, node in enumerate(graph)}
    for node in sorted(done, key=order.__getitem__, reverse=True):
        graph.remove(node, safe=True)
    refuse_unpacked(graph)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]
