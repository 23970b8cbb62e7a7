"""fpq ops -> what the `cuda` target's kernels do: packed GEMMs with an epilogue, quantizers with what is before them.

The dialect's codes stay what they were; on a GPU the kernels hold them as operand bytes (plugins/gpu/operands.py), one
for one.
"""

from __future__ import annotations

import onnx_ir as ir

from export.dialect.ops import DOMAIN
from export.errors import ContractError, RecipeError
from export.formats.operands import exact_sum_limit
from pipeline.backends.base import Choice, ProbeRow
from pipeline.backends.fused.attention import FuseAttention
from pipeline.backends.fused.gate_residual import FuseGateResidual
from pipeline.backends.fused.ops import add_functions, fused_node, gemm_attributes, output_of, quantizer_attributes
from pipeline.passes.graph import QUANTIZERS, attribute, drop_unused, low_rank_of, produced_by, unbalanced
from pipeline.passes.quantized_gemm import GemmSpec, read_spec
from pipeline.passes.rewrite import RewritePass
from plugins.gpu import specs

GROUPS_REFUSED = (
    "the GPU kernels have no scale per token and group of input channels; build it with --target cpu, or calibrate "
    "with one scale per token"
)
# Quantizer -> fused op; a GELU in front gives its name to the first two.
FUSED = {
    "QuantizeActivation": "Quantize",
    "QuantizeStatic": "QuantizeStatic",
    "NormModulateQuantize": "NormModulateQuantize",
}
# Fused op -> its output that the linear reads unquantized.
SEEN = {"GeluQuantize": "gelu", "GeluQuantizeStatic": "gelu", "NormModulateQuantize": "modulated"}
# What the tensor cores multiply.
FP8, INT8 = "fp8 operands", "int8 operands"
EITHER = "int8 or fp8 operands"
WIDE_INT8, OWN_CODES = "int8 codes, fp16 operands", "own codes, fp16 operands"
# Metadata of quantizers and GEMMs whose codes are INT8 images by choice: "int8", or "auto" if the GPU decides.
OPERANDS_KEY = "fpq.operands"


class LowerCuda(RewritePass):
    """Lower every packed GEMM and quantizer; `choices` and `probes` have one row for each GEMM.

    A GELU whose only reader is a quantizer joins it. operands: "int8" for INT8 images wherever every reader of a
    quantizer takes them, "auto" to leave it to the GPU. Raises ContractError for what no kernel takes, by layer.
    """

    def __init__(self, operands: str = "fp8") -> None:
        super().__init__()
        self.operands = operands

    def rewrite(self, model: ir.Model) -> None:
        self.choices: list[Choice] = []
        self.probes: list[ProbeRow] = []
        _refuse_groups(model.graph)
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in (*QUANTIZERS, "NormModulateQuantize"):
                self._quantizer(model.graph, node)
        gemms = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "PackedGemm"]
        if self.operands != "fp8":
            _choose_integers(gemms, self.operands)
        for node in gemms:
            self._gemm(model.graph, node)
        _finish(model)

    def _quantizer(self, graph: ir.Graph, node: ir.Node) -> None:
        name, fmt = str(node.name), attribute(node, "format")
        kind, inputs, extra, gelu = FUSED[node.op_type], list(node.inputs), {}, None
        if kind == "NormModulateQuantize":
            extra = {"epsilon": float(attribute(node, "epsilon"))}
        elif (gelu := self._gelu(node)) is not None:
            kind, inputs[0] = f"Gelu{kind}", gelu.inputs[0]
        fused = fused_node(kind, inputs, name, node, **quantizer_attributes(fmt, **extra))
        old, new = list(node.outputs), fused.outputs[: len(node.outputs)]
        if gelu is not None:
            old, new = [*old, node.inputs[0]], [*new, output_of(fused, "gelu")]  # type: ignore[list-item]
        for before, after in zip(old, new, strict=True):
            after.name, after.shape = before.name, before.shape
        graph.insert_before(node, fused)
        for before, after in zip(node.outputs, new, strict=False):
            ir.convenience.replace_all_uses_with(before, after)
        graph.remove(node, safe=True)
        if gelu is not None:
            graph.remove(gelu, safe=True)
        self.fired += 1

    def _gelu(self, quantizer: ir.Node) -> ir.Node | None:
        """The GELU in front of a quantizer if the kernel can compute it."""
        gelu = produced_by(quantizer.inputs[0], "Gelu")
        if gelu is None:
            return None
        if attribute(gelu, "approximate", "none") != "tanh":
            self.refuse(quantizer.name, f"{gelu.name} is not the tanh form of GELU")
            return None
        if len(list(gelu.outputs[0].uses())) > 1 or gelu.outputs[0].is_graph_output():
            self.refuse(quantizer.name, f"{gelu.outputs[0].name} has another reader")
            return None
        return gelu

    def _gemm(self, graph: ir.Graph, node: ir.Node) -> None:
        spec, quantizer = read_spec(node), _quantizer_of(node)
        chosen = quantizer.metadata_props.get(OPERANDS_KEY, "")
        kernel = kernel_spec(spec, integers=chosen == "int8")
        path = EITHER if chosen == "auto" else path_of(kernel)
        given = gemm_attributes({key: found.value for key, found in node.attributes.items()})
        fused = fused_node("Gemm", list(node.inputs), spec.layer, node, **given)
        fused.metadata_props.update({OPERANDS_KEY: chosen} if chosen else {})
        fused.outputs[0].name, fused.outputs[0].shape = node.outputs[0].name, node.outputs[0].shape
        graph.insert_before(node, fused)
        ir.convenience.replace_all_uses_with(node.outputs[0], fused.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        self.choices.append(Choice(spec.layer, path, _why(spec, kernel)))
        self.probes.append(_probe(spec, path, fused, quantizer))
        self.fired += 1


def lower(model: ir.Model, operands: str = "fp8") -> LowerCuda:
    """Lower `model` in place, after the shared passes. Returns the lowering with its choices and probes."""
    lowering = LowerCuda(operands)
    for rewrite in (FuseAttention(), lowering, FuseGateResidual()):
        rewrite(model)
    add_functions(model)
    return lowering


def path_of(kernel: specs.GemmSpec) -> str:
    """What the tensor cores multiply; FP16 in the place of FP8 on a GPU that has none."""
    if kernel.multiplies_integers:
        return INT8
    return {"E4M3": FP8, "INT8": WIDE_INT8}.get(kernel.operand.kind, OWN_CODES)


def takes_integers(chosen: str | None, preferred: bool) -> bool:
    """Whether codes marked `chosen` are INT8 images on a GPU that prefers them, or does not."""
    return chosen == "int8" or (chosen == "auto" and preferred)


def _choose_integers(gemms: list[ir.Node], chosen: str) -> None:
    """Mark the quantizers all of whose readers can multiply INT8 images: their codes have one form."""
    readers: dict[ir.Node, list[ir.Node]] = {}
    for node in gemms:
        readers.setdefault(_quantizer_of(node), []).append(node)
    for quantizer, nodes in readers.items():
        if all(_fits_integers(read_spec(node), chosen) for node in nodes):
            quantizer.metadata_props[OPERANDS_KEY] = chosen


def _fits_integers(spec: GemmSpec, chosen: str) -> bool:
    """Integer formats, INT8 images in any case, need no choice of the GPU's."""
    if kernel_spec(spec).multiplies_integers:  # what no kernel takes at all is an error, not a reason for FP8
        return chosen == "int8"
    try:
        return kernel_spec(spec, integers=True).multiplies_integers
    except ContractError:
        return False


def kernel_spec(spec: GemmSpec, integers: bool = False) -> specs.GemmSpec:
    """What the kernel is compiled for. Raises ContractError, naming the layer, where no kernel takes it."""
    try:
        return specs.GemmSpec(
            activation=spec.activation.name,
            weight=spec.weight.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            group_size=spec.group_size,
            multipliers=spec.multipliers,
            real_groups=spec.real_groups,
            integers=integers,
        )
    except (RecipeError, ContractError) as error:
        raise ContractError(f"{spec.layer} cannot be lowered to the GPU kernels: {error}") from error


def _refuse_groups(graph: ir.Graph) -> None:
    """Before anything is changed."""
    groups = [node for node in graph if node.domain == DOMAIN and node.op_type == "PackedGroupGemm"]
    if groups:
        found = f"activation_group {attribute(groups[0], 'activation_group')} ({len(groups)} layers)"
        raise ContractError(f"{attribute(groups[0], 'layer')}: {found}; {GROUPS_REFUSED}")


def _quantizer_of(gemm: ir.Node) -> ir.Node:
    codes = gemm.inputs[0]
    producer = codes.producer() if codes is not None else None
    if producer is None or not producer.domain.startswith(DOMAIN):
        found = producer.op_type if producer else "a graph input"
        raise ContractError(f"{attribute(gemm, 'layer')}: activation codes come from {found}; expected a quantizer")
    return producer


def _why(spec: GemmSpec, kernel: specs.GemmSpec) -> str:
    held = f"{spec.activation.name} and {spec.weight.name} are exact in the operands"
    if kernel.multiplies_integers:
        return f"{held}, and their sums in INT32"
    length = exact_sum_limit(spec.activation.kmax, spec.weight_kmax)
    if spec.sum_length <= length:
        return f"{held}; a float32 sum of {spec.sum_length} products is exact (up to {length} are)"
    return f"{held}; float32 sums are exact up to {length} of {spec.sum_length} products"


def _probe(spec: GemmSpec, path: str, gemm: ir.Node, quantizer: ir.Node) -> ProbeRow:
    seen = SEEN.get(quantizer.op_type)
    x = output_of(quantizer, seen) if seen else quantizer.inputs[0]
    assert x is not None
    branch, total = low_rank_of(gemm.outputs[0]) or (None, gemm.outputs[0])
    static = spec.activation_scale is not None
    return ProbeRow(
        layer=spec.layer,
        path=path,
        x=str(unbalanced(x).name),
        codes=(str(output_of(quantizer, "values").name),),
        limb_weights=(1.0,),
        codes_unit=2.0**spec.activation.fraction_bits,
        codes_offset=0.0,
        act_scale="" if static else str(quantizer.outputs[1].name),
        gemm=str(gemm.outputs[1].name),
        gemm_unit=spec.unit,
        gemm_scale="",
        output=str(total.name),
        low_rank=str(branch.name) if branch is not None else "",
        gemm_groups=spec.sum_groups,
    )


def _finish(model: ir.Model) -> None:
    """Nothing of the portable dialect may be left."""
    left = [node for node in model.graph if node.domain == DOMAIN]
    if left:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in left[:5])
        raise ContractError(f"{len(left)} nodes of domain {DOMAIN} were not packed and cannot be lowered: {names}")
    drop_unused(model)
    model.opset_imports.pop(DOMAIN, None)
