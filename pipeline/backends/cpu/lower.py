"""fpq ops -> stock onnxruntime ops: integer GEMMs where the embedding is exact, float otherwise, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from export.dialect.graph import (
    MICROSOFT,
    QUANTIZERS,
    GraphBuilder,
    attribute,
    drop_unused,
    inputs_of,
    low_rank_of,
    result_of,
    stored_array,
)
from export.dialect.ops import DOMAIN
from export.formats.operands import INT8_MAX, INT16_MAX, UINT8_MAX
from pipeline.backends.cpu.finish_with_chain import chained_gemm
from pipeline.backends.cpu.gemms import Product, finish, float_gemm, grouped_gemm, integer_gemm, ungrouped
from pipeline.backends.cpu.quantize_with_chain import quantize_with_chain
from pipeline.backends.cpu.quantizers import (
    LARGE_ZERO,
    SMALL_ZERO,
    Operand,
    in_groups,
    largest_operand,
    limb_base,
    quantize,
    quantize_static,
    rounded_integers,
    static_integers,
    unsupported,
)
from pipeline.passes.probes import WIDE_SUM, Capabilities, Choice, GemmRow, ProbeRow
from pipeline.passes.quantized_gemm import PACKED_GEMMS, QuantizedGemm, probe_of, read_gemm
from pipeline.passes.rewrite import RewritePass

FUNCTION_PATH, FLOAT_PATH = "onnx function", "float32"
INT32_MAX = 2**31 - 1


@dataclass
class _Source:
    """A quantizer node, the float tensor it quantizes, and its operands emitted so far (by number of limbs, and as
    float32 integers with their scale)."""

    node: ir.Node
    x: ir.Value | None = None
    operands: dict[int, Operand] = field(default_factory=dict)
    integers: tuple[ir.Value, ir.Value | None] | None = None


class LowerCpu(RewritePass):
    """Lower every packed GEMM and the quantizers it reads; `choices` and `probes` have one row for each.
    `needs`: capabilities without which a chosen path would not be exact. chains: with ops of our own around the
    GEMMs.

    A packed GEMM whose codes do not come from a quantizer, or whose activation format has none here, keeps its ONNX
    function body (refused with the reason).
    """

    def __init__(self, capabilities: Capabilities, chains: bool = False) -> None:
        super().__init__()
        self.capabilities, self.chains = capabilities, chains
        self.choices: list[Choice] = []
        self.probes: list[ProbeRow] = []
        self.needs: set[str] = set()

    def rewrite(self, model: ir.Model) -> None:
        self.choices, self.probes, self.needs = [], [], set()
        self._sources: dict[ir.Value, _Source] = {}
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in (*QUANTIZERS, "NormModulateQuantize"):
                self._sources[result_of(node)] = _Source(node)
            elif node.domain == DOMAIN and node.op_type in PACKED_GEMMS:
                self._lower(model.graph, node)
        for source in self._sources.values():
            if not any(list(output.uses()) for output in source.node.outputs):
                model.graph.remove(source.node, safe=True)
        model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        gemm, source = read_gemm(node), self._sources.get(inputs_of(node).a_codes)
        static = gemm.activation_scale is not None
        why = "its codes do not come from a quantizer" if source is None else unsupported(gemm.activation, static)
        if why or source is None:
            self.choices.append(Choice(gemm.layer, FUNCTION_PATH, why))
            self.refuse(gemm.layer, why)
            return
        row, why = choose_path(gemm, self.capabilities)
        if row and refusal(gemm, row, wide_sum=False):
            self.needs.add(WIDE_SUM)
        build = GraphBuilder(graph, node, gemm.layer, dict(node.metadata_props))
        bias = inputs_of(node).bias if gemm.has_bias else None
        operand = None if row is None else self._operand(graph, gemm, source, row.limbs)
        if row is None or operand is None:
            product = self._float_product(graph, build, gemm, source)
            output = finish(build, product, bias)
        elif self.chains and operand.scale is not None and not gemm.activation_group:
            product, output = chained_gemm(build, gemm, operand, bias)
        else:
            product = (grouped_gemm if row.real_groups else integer_gemm)(build, gemm, operand)
            output = finish(build, product, bias)
        _substitute(graph, node, output)
        self.choices.append(Choice(gemm.layer, row.path if row else FLOAT_PATH, why))
        self.probes.append(_probe(gemm, row, source, product, output))
        self.fired += 1

    def _float_product(self, graph: ir.Graph, build: GraphBuilder, gemm: QuantizedGemm, source: _Source) -> Product:
        before = self._builder_at(graph, source)
        x = self._input(before, source)
        source.integers = source.integers or _integers(before, gemm, source.node, x)
        integers, scale = source.integers
        if gemm.activation_group:
            integers, scale = ungrouped(build, integers, scale, x), None
        return float_gemm(build, gemm, integers, scale)

    def _operand(self, graph: ir.Graph, gemm: QuantizedGemm, source: _Source, limbs: int) -> Operand:
        if limbs not in source.operands:
            before = self._builder_at(graph, source)
            x = self._input(before, source)
            source.operands[limbs] = _operand(before, gemm, source.node, x, limbs, self.chains)
        return source.operands[limbs]

    def _builder_at(self, graph: ir.Graph, source: _Source) -> GraphBuilder:
        """Builder in front of the quantizer; a second form of the same tensor gets its own names."""
        variant = "" if not source.operands and source.integers is None else f"_{len(source.operands) + 1}"
        return GraphBuilder(graph, source.node, f"{source.node.name}{variant}", dict(source.node.metadata_props))

    def _input(self, build: GraphBuilder, source: _Source) -> ir.Value:
        """The float tensor to quantize; a fused norm becomes one LayerNormalization with (1 + scale, shift)."""
        if source.x is None:
            ports = inputs_of(source.node)
            source.x = ports.x
            if source.node.op_type == "NormModulateQuantize":
                plus_one = build.op("Add", ports.scale, build.constant(1.0), name="plus_one")
                operands, epsilon = (ports.x, plus_one, ports.shift), float(attribute(source.node, "epsilon"))
                source.x = build.op("LayerNormalization", *operands, name="modulated", axis=-1, epsilon=epsilon)
        return source.x


def _probe(gemm: QuantizedGemm, row: GemmRow | None, source: _Source, product: Product, output: ir.Value) -> ProbeRow:
    assert source.x is not None
    where: dict[str, Any] = {
        "x": source.x,
        "gemm": product.probed,
        "gemm_scale": product.scales,
        "result": output,
    }
    if low_rank_of(output) is not None:  # the sum has taken the name of the linear's output
        output.name = f"{gemm.layer}/linear"
    if row is None:
        assert source.integers is not None
        integers, scale = source.integers
        return probe_of(gemm.layer, FLOAT_PATH, codes=[integers], act_scale=scale, exact=False, **where)
    operand = source.operands[row.limbs]
    return probe_of(
        gemm.layer,
        row.path,
        codes=operand.codes,
        limb_weights=operand.weights,
        codes_offset=float(operand.zero),
        act_scale=operand.scale,
        exact=not row.real_groups or gemm.activation_group > 0,
        gemm_groups=gemm.sum_groups if gemm.activation_group else 1,
        **where,
    )


def _substitute(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    old = result_of(node)
    output.shape, output.type = old.shape, old.type
    if old.is_graph_output():
        output.name = old.name
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _operand(
    build: GraphBuilder, gemm: QuantizedGemm, quantizer: ir.Node, x: ir.Value, limbs: int, chains: bool
) -> Operand:
    """The activation's integer operands by the kind of scale that it has."""
    if gemm.activation_scale is not None:
        return quantize_static(build, x, gemm.activation, limbs, *_static(quantizer))
    quantize_tokens = quantize_with_chain if chains else quantize
    if gemm.activation_group:  # groups are taken for tokens
        rows = in_groups(build, x, gemm.activation_group, gemm.activation_groups)
        return replace(quantize_tokens(build, rows, gemm.activation, limbs), x=x)
    return quantize_tokens(build, x, gemm.activation, limbs)


def _integers(
    build: GraphBuilder, gemm: QuantizedGemm, quantizer: ir.Node, x: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """(integers as float32, scale) for formats too wide for integer operands."""
    if gemm.activation_scale is not None:
        return static_integers(build, x, gemm.activation, *_static(quantizer)), None
    if gemm.activation_group:
        x = in_groups(build, x, gemm.activation_group, gemm.activation_groups)
    return rounded_integers(build, x, gemm.activation)


def _static(quantizer: ir.Node) -> tuple[float, float]:
    """(scale, zero) of a QuantizeStatic."""
    ports = inputs_of(quantizer)
    return float(stored_array(ports.scale)[0]), float(stored_array(ports.zero)[0])


# --- which form of GEMM: bounds checked by code, refusals as sentences ------------------------------------------------


def choose_path(gemm: QuantizedGemm, capabilities: Capabilities) -> tuple[GemmRow | None, str]:
    """(first row that is exact, why) or (None, why none is)."""
    reasons: list[str] = []
    for row in capabilities.gemms:
        reason = refusal(gemm, row, WIDE_SUM in capabilities.ops)
        if not reason:
            return row, "; ".join([_reason_for(gemm, row), *reasons])
        reasons.append(f"not {row.path}: {reason}")
    return None, "; ".join(reasons)


def _reason_for(gemm: QuantizedGemm, row: GemmRow) -> str:
    limbs = "" if row.limbs == 1 else f" in {row.limbs} limbs"
    return f"{gemm.activation.name} x {gemm.weight.name} is exact in u8 x s8 with int32 sums{limbs}"


def refusal(gemm: QuantizedGemm, row: GemmRow, wide_sum: bool) -> str:
    """Why `row` cannot run the linear exactly, '' if it can."""
    if (gemm.sum_groups > 1) != row.real_groups:
        return "it has no scale per group" if gemm.sum_groups > 1 else "the weight has one scale per channel"
    return _too_wide(gemm, row.limbs) or _overflow(gemm, row.limbs, wide_sum)


def _too_wide(gemm: QuantizedGemm, limbs: int) -> str:
    # These words ("image": an integer that stands for a value) are in lowering.json, which bundles are hashed with:
    # `verify` would refuse those of before if they changed.
    kmax_a = gemm.activation.kmax
    if gemm.weight_kmax > INT8_MAX:
        return f"image {gemm.weight_kmax} of {gemm.weight.name} exceeds int8"
    too_large = kmax_a >= LARGE_ZERO if gemm.activation.sign_bits else kmax_a > UINT8_MAX
    if (limbs == 1 and too_large) or limb_base(kmax_a, limbs) // 2 >= SMALL_ZERO:
        return f"image {kmax_a} of {gemm.activation.name} exceeds {limbs} operand{'s' * (limbs > 1)} of 8 bits"
    return ""


def _overflow(gemm: QuantizedGemm, limbs: int, wide_sum: bool) -> str:
    pair = 2 * largest_operand(gemm.activation, limbs) * gemm.weight_kmax
    if not wide_sum and pair > INT16_MAX:
        return f"a pair of products can reach {pair}; this CPU sums pairs in 16 bits, at most {INT16_MAX}"
    total = gemm.activation.kmax * gemm.weight_kmax * gemm.sum_length
    return f"the sum can reach {total}, more than int32 holds" if total > INT32_MAX else ""
