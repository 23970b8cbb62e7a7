"""Lowers packed GEMMs and quantizers of the `fpq` dialect to standard ONNX that runtimes run on tensor cores.

Each PackedGemm becomes: operands of a hardware type (FP8 E4M3 or INT8) through QuantizeLinear and DequantizeLinear of
scale 1, one MatMul per limb, and the per-channel and per-token scales outside. The integers are exact in the operands,
so the same file gives the same sums in stock onnxruntime.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from export.dialect.graph import (
    FLOAT,
    GraphBuilder,
    attribute,
    drop_unused,
    inputs_of,
    is_op,
    result_of,
    stored_array,
)
from export.dialect.ops import DOMAIN
from export.formats.operands import HardwareNumber
from pipeline.backends.qdq.choose import choose
from pipeline.backends.qdq.gemms import emit_gemm
from pipeline.backends.qdq.quantizers import Token, emit_limbs, emit_norm_modulate, emit_static, emit_token
from pipeline.passes.probes import Choice, GemmRow
from pipeline.passes.quantized_gemm import (
    QuantizedGemm,
    probe_of,
    quantizer_of,
    read_gemm,
    refuse_groups,
    refuse_unpacked,
)
from pipeline.passes.rewrite import LoweringPass


class LowerQdq(LoweringPass):
    """Replace all `fpq` nodes. rows: ways to run a GEMM, in order of preference.

    Linears that share an input share its operands. Raises ContractError for a node or format that cannot be lowered.
    groups_refused: what is said of scales per token and group. A target with other ops for the same arithmetic has its
    own emitters.
    """

    groups_refused: ClassVar[str]
    emit_token = staticmethod(emit_token)
    emit_limbs = staticmethod(emit_limbs)
    emit_gemm = staticmethod(emit_gemm)

    def __init__(self, rows: tuple[GemmRow, ...]) -> None:
        super().__init__()
        self.rows = rows

    def rewrite(self, model: ir.Model) -> None:
        self._tokens: dict[ir.Node, Token] = {}
        self._limbs: dict[tuple[ir.Node, HardwareNumber], tuple[ir.Value, ...]] = {}
        refuse_groups(model.graph, self.groups_refused)
        for node in list(model.graph):
            if is_op(node, "PackedGemm", DOMAIN):
                self._lower(model.graph, node)
        drop_unused(model)
        refuse_unpacked(model.graph)
        model.opset_imports.pop(DOMAIN, None)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        gemm = read_gemm(node)
        choice = choose(gemm, self.rows)
        number = choice.number
        token, limbs = self._operands(graph, quantizer_of(node), number, gemm)
        build = GraphBuilder(graph, node, gemm.layer, typed=False)
        result, product = self.emit_gemm(build, gemm, choice, token, limbs, inputs_of(node).bias)
        old = result_of(node)
        result.shape, result.type = old.shape, FLOAT
        if old.is_graph_output():
            result.name, old.name = old.name, f"{old.name}/replaced"
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.choices.append(Choice(gemm.layer, choice.row.path, choice.why))
        self.probes.append(
            probe_of(
                gemm.layer,
                choice.row.path,
                x=token.x,
                codes=limbs,
                limb_weights=number.limb_weights,
                codes_unit=2.0**-number.exponent,
                codes_offset=-float(number.shift),
                act_scale=token.scale,
                gemm=product,
                gemm_unit=2.0 ** (number.exponent + choice.weight_exponent),
                result=result,
                exact=choice.exact,
                half_roundings=0 if choice.exact else 3,  # group scale, weight, sum
            )
        )
        self.fired += 1

    def _operands(
        self, graph: ir.Graph, quantizer: ir.Node, number: HardwareNumber, gemm: QuantizedGemm
    ) -> tuple[Token, tuple[ir.Value, ...]]:
        build = GraphBuilder(graph, quantizer, quantizer.name or f"{gemm.layer}/quantize", typed=False)
        if quantizer not in self._tokens:
            x = inputs_of(quantizer).x
            if quantizer.op_type == "NormModulateQuantize":
                x = emit_norm_modulate(build, quantizer, gemm.in_features)
            self._tokens[quantizer] = self._token(build, quantizer, x)
        token = self._tokens[quantizer]
        if (quantizer, number) not in self._limbs:
            build.prefix += "" if number.type == "E4M3" else f"/{number.type.lower()}"
            self._limbs[quantizer, number] = self.emit_limbs(build, token, number)
        return token, self._limbs[quantizer, number]

    def _token(self, build: GraphBuilder, quantizer: ir.Node, x: ir.Value) -> Token:
        name, ports = attribute(quantizer, "format"), inputs_of(quantizer)
        if quantizer.op_type != "QuantizeStatic":
            return self.emit_token(build, x, name)
        scale, zero = (float(stored_array(value)[0]) for value in (ports.scale, ports.zero))
        return emit_static(build, x, name, scale, zero)
