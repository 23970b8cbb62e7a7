"""fpq ops -> stock onnxruntime ops: integer GEMMs where the embedding is exact, float otherwise, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

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
from export.formats.operands import INT8_MAX, INT16_MAX, INT32_MAX, SMALL_ZERO, fits_byte, limb_base, pair_sum
from pipeline.backends.cpu.finish_with_chain import chained_gemm, quantize_with_chain
from pipeline.backends.cpu.gemms import finish, float_gemm, grouped_gemm, integer_gemm
from pipeline.backends.cpu.packed_gemm import OCTET, packed_gemm, packs
from pipeline.backends.cpu.quantizers import (
    Operand,
    in_groups,
    quantize,
    quantize_static,
    rounded_integers,
    static_integers,
    unsupported,
)
from pipeline.passes.probes import WIDE_SUM, Choice, GemmRow
from pipeline.passes.quantized_gemm import PACKED_GEMMS, QuantizedGemm, probe_of, read_gemm
from pipeline.passes.rewrite import LoweringPass

FUNCTION_PATH, FLOAT_PATH = "onnx function", "float32"
# In order of preference; these are in the kernel library.
PACKED = (
    GemmRow("u8 x packed s4", "U8", "S4"),
    GemmRow("u8 x packed s4, 2 limbs", "U8", "S4", limbs=2),
    GemmRow("u8 x packed s4 per group", "U8", "S4", real_groups=True),
    GemmRow("u8 x packed s4 per group, 2 limbs", "U8", "S4", limbs=2, real_groups=True),
    GemmRow("u8 x s8 panels", "U8", "S8"),
    GemmRow("u8 x s8 panels, 2 limbs", "U8", "S8", limbs=2),
    GemmRow("u8 x s8 panels per group", "U8", "S8", real_groups=True),
    GemmRow("u8 x s8 panels per group, 2 limbs", "U8", "S8", limbs=2, real_groups=True),
)
GEMMS = (
    GemmRow("u8 x s8", "U8", "S8"),
    GemmRow("u8 x s8, 2 limbs", "U8", "S8", limbs=2),
    GemmRow("u8 x s8 per group", "U8", "S8", real_groups=True),
    GemmRow("u8 x s8 per group, 2 limbs", "U8", "S8", limbs=2, real_groups=True),
)


@dataclass
class _Source:
    """A quantizer node, the float tensor it quantizes, and its operands emitted so far by number of limbs.

    0 limbs: its integers as float32.
    """

    node: ir.Node
    x: ir.Value | None = None
    operands: dict[int, Operand] = field(default_factory=dict)


class LowerCpu(LoweringPass):
    """Lower every packed GEMM and the quantizers it reads.

    provided: what the CPU can do, see `engine.provided`; `needs`: what of it a chosen path would not be exact without.
    chains: with ops of our own around the GEMMs.

    A packed GEMM whose codes do not come from a quantizer, or whose activation format has none here, keeps its ONNX
    function body (refused with the reason).
    """

    def __init__(self, provided: Collection[str], chains: bool = False) -> None:
        super().__init__()
        self.provided, self.chains = provided, chains
        self.needs: set[str] = set()

    def rewrite(self, model: ir.Model) -> None:
        self.needs = set()
        self._sources: dict[ir.Value, _Source] = {}
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in (*QUANTIZERS, "NormModulateQuantize"):
                self._sources[result_of(node)] = _Source(node)
            elif node.domain == DOMAIN and node.op_type in PACKED_GEMMS:
                self._lower(model.graph, node)
        for source in self._sources.values():
            if not any(output.uses() for output in source.node.outputs):
                model.graph.remove(source.node, safe=True)
        model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        gemm, source = read_gemm(node), self._sources.get(inputs_of(node).a_codes)
        static = gemm.activation_scale is not None
        why = "its codes do not come from a quantizer" if source is None else unsupported(gemm.activation, static)
        if why is not None:
            self.choices.append(Choice(gemm.layer, FUNCTION_PATH, why))
            self.refuse(gemm.layer, why)
            return
        assert source is not None
        row, why = choose_path(gemm, self.provided, PACKED if self.chains else ())
        if row and refusal(gemm, row, wide_sum=False):
            self.needs.add(WIDE_SUM)
        build = GraphBuilder(graph, node, gemm.layer, dict(node.metadata_props))
        bias = inputs_of(node).bias if gemm.has_bias else None
        operand = self._operand(graph, gemm, source, row.limbs if row else 0)
        if row in PACKED:
            product, output = packed_gemm(build, gemm, operand, bias)
        elif row and self.chains and operand.scale is not None and not gemm.activation_group:
            product, output = chained_gemm(build, gemm, operand, bias)
        else:
            emit = float_gemm if row is None else grouped_gemm if row.real_groups else integer_gemm
            product = emit(build, gemm, operand)
            output = finish(build, product, bias)
        _substitute(graph, node, output, gemm.layer)
        path = row.path if row else FLOAT_PATH
        by_group = row is not None and (gemm.activation_group > 0 or (row in PACKED and row.real_groups))
        self.choices.append(Choice(gemm.layer, path, why))
        self.probes.append(
            probe_of(
                gemm.layer,
                path,
                x=operand.x,
                codes=operand.codes,
                limb_weights=operand.weights,
                codes_offset=float(operand.zero),
                act_scale=operand.scale,
                gemm=product.probed,
                gemm_scale=product.scales,
                gemm_groups=gemm.sum_groups if by_group else 1,
                result=output,
                exact=row is not None and (by_group or not row.real_groups),
            )
        )
        self.fired += 1

    def _operand(self, graph: ir.Graph, gemm: QuantizedGemm, source: _Source, limbs: int) -> Operand:
        if limbs not in source.operands:
            # In front of the quantizer; a second form of the same tensor gets its own names.
            variant = f"_{len(source.operands) + 1}" if source.operands else ""
            quantizer = source.node
            before = GraphBuilder(graph, quantizer, f"{quantizer.name}{variant}", dict(quantizer.metadata_props))
            x = self._input(before, source)
            source.operands[limbs] = _operand(before, gemm, quantizer, x, limbs, self.chains)
        return source.operands[limbs]

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


def _substitute(graph: ir.Graph, node: ir.Node, output: ir.Value, layer: str) -> None:
    """Let `output` stand for the result of a packed node; what a low-rank branch is added to gets a name of its own."""
    old = result_of(node)
    output.shape, output.type = old.shape, old.type
    if old.is_graph_output():
        output.name = old.name
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if low_rank_of(output) is not None:  # the sum has taken the name of the linear's output
        output.name = f"{layer}/linear"


def _operand(
    build: GraphBuilder, gemm: QuantizedGemm, quantizer: ir.Node, x: ir.Value, limbs: int, chains: bool
) -> Operand:
    """The activation's u8 operands (limbs 0: its integers as float32), by the kind of scale that it has."""
    fmt, ports = gemm.activation, inputs_of(quantizer)
    if gemm.activation_scale is not None:
        scale, zero = (float(stored_array(value)[0]) for value in (ports.scale, ports.zero))
        if limbs:
            return quantize_static(build, x, fmt, limbs, scale, zero)
        return Operand(x, (static_integers(build, x, fmt, scale, zero),), (1,), 0, None)
    rows = in_groups(build, x, gemm.activation_group, gemm.activation_groups) if gemm.activation_group else x
    if limbs:  # groups are taken for tokens
        return replace((quantize_with_chain if chains else quantize)(build, rows, fmt, limbs), x=x)
    integers, token_scale = rounded_integers(build, rows, fmt)
    return Operand(x, (integers,), (1,), 0, token_scale)


# --- which form of GEMM: bounds checked by code, refusals as sentences ------------------------------------------------


def choose_path(
    gemm: QuantizedGemm, provided: Collection[str], packed: Sequence[GemmRow] = ()
) -> tuple[GemmRow | None, str]:
    """(first row that is exact, why) or (None, why none is). packed: rows that the kernel library adds."""
    reasons: list[str] = []
    for row in (*packed, *GEMMS):
        reason = refusal(gemm, row, WIDE_SUM in provided)
        if not reason:
            return row, "; ".join([_reason_for(gemm, row), *reasons])
        reasons.append(f"not {row.path}: {reason}")
    return None, "; ".join(reasons)


def _reason_for(gemm: QuantizedGemm, row: GemmRow) -> str:
    limbs = "" if row.limbs == 1 else f" in {row.limbs} limbs"
    return f"{gemm.activation.name} x {gemm.weight.name} is exact in u8 x s8 with int32 sums{limbs}"


def refusal(gemm: QuantizedGemm, row: GemmRow, wide_sum: bool) -> str | None:
    """Why `row` cannot run the linear exactly, None if it can."""
    if (gemm.sum_groups > 1) != row.real_groups:
        return "it has no scale per group" if gemm.sum_groups > 1 else "the weight has one scale per channel"
    if row in PACKED:
        return _not_packed(gemm, row) or _too_wide(gemm, row.limbs) or _overflow(gemm, row.limbs, wide_sum=True)
    return _too_wide(gemm, row.limbs) or _overflow(gemm, row.limbs, wide_sum)


def _not_packed(gemm: QuantizedGemm, row: GemmRow) -> str | None:
    """Why the kernel library has no such GEMM of this weight, None if it has one."""
    if row.weight_type == "S4" and gemm.weight.bits != 4:
        return f"{gemm.weight.name} has {gemm.weight.bits} bits, not 4"
    if row.weight_type == "S4" and not packs(gemm):
        return f"groups of {gemm.group_size} are no multiple of {OCTET}"
    if row.real_groups and gemm.sum_length % OCTET:
        return f"groups of {gemm.sum_length} are no multiple of {OCTET}"
    return None


def _too_wide(gemm: QuantizedGemm, limbs: int) -> str | None:
    # These words ("image": an integer that stands for a value) are in lowering.json, which bundles are hashed with:
    # `verify` would refuse those of before if they changed.
    kmax_a = gemm.activation.kmax
    if gemm.weight_kmax > INT8_MAX:
        return f"image {gemm.weight_kmax} of {gemm.weight.name} exceeds int8"
    if (limbs == 1 and not fits_byte(gemm.activation)) or limb_base(kmax_a, limbs) // 2 >= SMALL_ZERO:
        return f"image {kmax_a} of {gemm.activation.name} exceeds {limbs} operand{'s' * (limbs > 1)} of 8 bits"
    return None


def _overflow(gemm: QuantizedGemm, limbs: int, wide_sum: bool) -> str | None:
    pair = pair_sum(gemm.activation, limbs, gemm.weight_kmax)
    if not wide_sum and pair > INT16_MAX:
        return f"a pair of products can reach {pair}; this CPU sums pairs in 16 bits, at most {INT16_MAX}"
    total = gemm.activation.kmax * gemm.weight_kmax * gemm.sum_length
    return f"the sum can reach {total}, more than int32 holds" if total > INT32_MAX else None
