"""fpq ops -> stock onnxruntime ops: integer GEMMs where the embedding is exact, float otherwise, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from export.dialect.ops import DOMAIN
from pipeline.backends.base import WIDE_SUM, Capabilities, Choice, GemmRow, ProbeRow
from pipeline.backends.cpu.gemms import Product, finish, float_gemm, grouped_gemm, integer_gemm, ungrouped
from pipeline.backends.cpu.paths import choose_path, refusal
from pipeline.backends.cpu.quantizers import (
    Operand,
    in_groups,
    quantize,
    quantize_groups,
    quantize_static,
    rounded_image,
    static_image,
    unsupported,
)
from pipeline.passes.emit import MICROSOFT, Emitter
from pipeline.passes.graph import QUANTIZERS, attribute, constant, drop_unused, low_rank_of, unbalanced
from pipeline.passes.quantized_gemm import GemmSpec, read_spec
from pipeline.passes.rewrite import RewritePass

GEMMS = ("PackedGemm", "PackedGroupGemm")
FUNCTION_PATH, FLOAT_PATH = "onnx function", "float32"


@dataclass
class _Source:
    """A quantizer node, the float tensor it quantizes, and its operands emitted so far (by number of limbs)."""

    node: ir.Node
    x: ir.Value | None = None
    operands: dict[int, Operand] = field(default_factory=dict)
    image: tuple[ir.Value, ir.Value | None] | None = None


class LowerCpu(RewritePass):
    """Lower every packed GEMM and the quantizers it reads; `choices` and `probes` have one row for each.
    `needs`: capabilities without which a chosen path would not be exact.

    A packed GEMM whose codes do not come from a quantizer, or whose activation format has none here, keeps its ONNX
    function body (refused with the reason).
    """

    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__()
        self.capabilities = capabilities
        self.choices: list[Choice] = []
        self.probes: list[ProbeRow] = []
        self.needs: set[str] = set()

    def rewrite(self, model: ir.Model) -> None:
        self.choices, self.probes, self.needs = [], [], set()
        self._sources: dict[ir.Value, _Source] = {}
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in (*QUANTIZERS, "NormModulateQuantize"):
                self._sources[node.outputs[0]] = _Source(node)
            elif node.domain == DOMAIN and node.op_type in GEMMS:
                self._lower(model.graph, node)
        for source in self._sources.values():
            if not any(list(output.uses()) for output in source.node.outputs):
                model.graph.remove(source.node, safe=True)
        model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        spec, source = read_spec(node), self._sources.get(node.inputs[0])  # type: ignore[arg-type]
        static = spec.activation_scale is not None
        why = "its codes do not come from a quantizer" if source is None else unsupported(spec.activation, static)
        if why or source is None:
            self.choices.append(Choice(spec.layer, FUNCTION_PATH, why))
            self.refuse(spec.layer, why)
            return
        row, why = choose_path(spec, self.capabilities)
        if row and refusal(spec, row, wide_sum=False):
            self.needs.add(WIDE_SUM)
        emit = Emitter(graph, node, spec.layer, dict(node.metadata_props))
        product, operand = self._product(graph, emit, spec, source, row)
        bias = node.inputs[5]
        has_bias = bias is not None and constant(bias) is not None and constant(bias).any()  # type: ignore[union-attr]
        output = finish(emit, product, bias if has_bias else None)
        self._substitute(graph, node, output)
        self._record(spec, row, why, source, product, operand, output)
        self.fired += 1

    def _product(
        self, graph: ir.Graph, emit: Emitter, spec: GemmSpec, source: _Source, row: GemmRow | None
    ) -> tuple[Product, Operand | None]:
        quantizer = self._emitter_at(graph, source)
        if row is None:
            x = self._input(quantizer, source)
            source.image = source.image or _image(quantizer, spec, source.node, x)
            image, scale = source.image
            if spec.activation_group:
                image, scale = ungrouped(emit, image, scale, x), None
            return float_gemm(emit, spec, image, scale), None
        if row.limbs not in source.operands:
            x = self._input(quantizer, source)
            source.operands[row.limbs] = _operand(quantizer, spec, source.node, x, row.limbs)
        operand = source.operands[row.limbs]
        emit_gemm = grouped_gemm if row.real_groups else integer_gemm
        return emit_gemm(emit, spec, operand), operand

    def _emitter_at(self, graph: ir.Graph, source: _Source) -> Emitter:
        """Emitter in front of the quantizer; a second form of the same tensor gets its own names."""
        variant = "" if not source.operands and source.image is None else f"_{len(source.operands) + 1}"
        return Emitter(graph, source.node, f"{source.node.name}{variant}", dict(source.node.metadata_props))

    def _input(self, emit: Emitter, source: _Source) -> ir.Value:
        """The float tensor to quantize; a fused norm becomes one LayerNormalization with (1 + scale, shift)."""
        if source.x is None and source.node.op_type in QUANTIZERS:
            source.x = source.node.inputs[0]
        elif source.x is None:
            x, shift, scale = source.node.inputs
            plus_one = emit.op("Add", scale, emit.constant(1.0), name="plus_one")
            epsilon = float(attribute(source.node, "epsilon"))
            source.x = emit.op("LayerNormalization", x, plus_one, shift, name="modulated", axis=-1, epsilon=epsilon)
        assert source.x is not None
        return source.x

    def _record(
        self,
        spec: GemmSpec,
        row: GemmRow | None,
        why: str,
        source: _Source,
        product: Product,
        operand: Operand | None,
        output: ir.Value,
    ) -> None:
        path = row.path if row else FLOAT_PATH
        self.choices.append(Choice(spec.layer, path, why))
        assert source.x is not None and (operand or source.image)
        codes = operand.codes if operand else source.image[:1]  # type: ignore[index]
        scale = operand.scale if operand else source.image[1]  # type: ignore[index]
        branch, total = low_rank_of(output) or (None, output)
        if branch is not None:  # the sum has taken the name of the linear's output
            output.name = f"{spec.layer}/linear"
        self.probes.append(
            ProbeRow(
                layer=spec.layer,
                path=path,
                x=str(unbalanced(source.x).name),
                codes=tuple(str(code.name) for code in codes),
                limb_weights=tuple(float(w) for w in operand.weights) if operand else (1.0,),
                codes_unit=1.0,
                codes_offset=float(operand.zero) if operand else 0.0,
                act_scale=str(scale.name) if scale is not None else "",
                gemm=str(product.probed.name),
                gemm_unit=1.0,
                gemm_scale=product.scales,
                exact=row is not None and (not row.real_groups or spec.activation_group > 0),
                output=str(total.name),
                low_rank=str(branch.name) if branch is not None else "",
                gemm_groups=spec.sum_groups if row is not None and spec.activation_group else 1,
            )
        )

    def _substitute(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        if old.is_graph_output():
            output.name = old.name
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _operand(emit: Emitter, spec: GemmSpec, quantizer: ir.Node, x: ir.Value, limbs: int) -> Operand:
    """The activation's integer operands by the kind of scale that it has."""
    if spec.activation_scale is not None:
        return quantize_static(emit, x, spec.activation, limbs, *_static(quantizer))
    if spec.activation_group:
        return quantize_groups(emit, x, spec.activation, limbs, spec.activation_group, spec.activation_groups)
    return quantize(emit, x, spec.activation, limbs)


def _image(emit: Emitter, spec: GemmSpec, quantizer: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(integer image as float32, scale) for formats too wide for integer operands."""
    if spec.activation_scale is not None:
        return static_image(emit, x, spec.activation, *_static(quantizer)), None
    if spec.activation_group:
        x = in_groups(emit, x, spec.activation_group, spec.activation_groups)
    return rounded_image(emit, x, spec.activation)


def _static(quantizer: ir.Node) -> tuple[float, float]:
    """(scale, zero) of a QuantizeStatic."""
    scale, zero = (constant(value) for value in quantizer.inputs[1:])
    assert scale is not None and zero is not None
    return float(scale[0]), float(zero[0])
