"""fpq ops -> what our GPU kernels (`cuda`, `trt`, plugins of `rtx`) do: packed GEMMs with an epilogue,
quantizers with what is before them.

The dialect's codes stay what they were; on a GPU the kernels hold them as operand bytes (plugins/gpu/spec.py), one
for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from export.dialect.graph import (
    attribute,
    drop_unused,
    inputs_of,
    is_op,
    only_reader,
    produced_by,
    replace,
    result_of,
)
from export.dialect.ops import DOMAIN
from export.errors import ContractError, RecipeError
from export.formats.operands import exact_sum_limit
from pipeline.backends.fused.gate_residual import FuseGateResidual
from pipeline.backends.fused.merge_gemms import MergeGemms
from pipeline.backends.fused.ops import (
    OPERANDS_KEY,
    add_functions,
    attention_node,
    fused_inputs,
    fused_node,
    fused_outputs,
    gemm_attributes,
    quantizer_attributes,
)
from pipeline.methods import activation_scalings
from pipeline.passes.fuse_attention import FuseAttention
from pipeline.passes.probes import Choice, ProbeRow
from pipeline.passes.quantized_gemm import (
    QuantizedGemm,
    probe_of,
    quantizer_of,
    read_gemm,
    refuse_groups,
    refuse_unpacked,
)
from pipeline.passes.rewrite import LoweringPass
from plugins.gpu.spec import GemmSpec, format_problems

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

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
# Inputs whose names differ.
RENAMED = {"NormModulateQuantize": {"scale": "gain"}, "PackedGemm": {"w_codes": "codes"}}
# Fused op -> its output that the linear reads unquantized.
SEEN = {"GeluQuantize": "gelu", "GeluQuantizeStatic": "gelu", "NormModulateQuantize": "modulated"}
# What the tensor cores multiply.
FP8, INT8 = "fp8 operands", "int8 operands"
EITHER = "int8 or fp8 operands"
WIDE_INT8, OWN_CODES = "int8 codes, fp16 operands", "own codes, fp16 operands"


class LowerFused(LoweringPass):
    """Lower every packed GEMM and quantizer.

    A GELU whose only reader is a quantizer joins it. operands: "int8" for INT8 integers wherever every reader of a
    quantizer takes them, "auto" to leave it to the GPU. Raises ContractError for what no kernel takes, by layer.
    """

    def __init__(self, operands: str = "fp8") -> None:
        super().__init__()
        self.operands = operands

    def rewrite(self, model: ir.Model) -> None:
        refuse_groups(model.graph, GROUPS_REFUSED)
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in FUSED:
                self._quantizer(model.graph, node)
        gemms = [node for node in model.graph if is_op(node, "PackedGemm", DOMAIN)]
        if self.operands != "fp8":
            _choose_integers(gemms, self.operands)
        for node in gemms:
            self._gemm(model.graph, node)
        refuse_unpacked(model.graph)
        drop_unused(model)
        model.opset_imports.pop(DOMAIN, None)

    def _quantizer(self, graph: ir.Graph, node: ir.Node) -> None:
        kind = FUSED[node.op_type]
        extra = {"epsilon": float(attribute(node, "epsilon"))} if kind == "NormModulateQuantize" else {}
        gelu = None if kind == "NormModulateQuantize" else self._gelu(node)
        if gelu is not None:
            kind = f"Gelu{kind}"
        choices = quantizer_attributes(attribute(node, "format"), **extra)
        fused = fused_node(kind, _renamed(node), str(node.name), node, **choices)
        replace(graph, node, fused)
        if gelu is not None:
            fused_inputs(fused).set("x", inputs_of(gelu).X)
            # The parity gates find what the linear reads under the name that the GELU gave it.
            seen, before = fused_outputs(fused).gelu, result_of(gelu)
            seen.name, seen.shape = before.name, before.shape
            graph.remove(gelu, safe=True)
        self.fired += 1

    def _gelu(self, quantizer: ir.Node) -> ir.Node | None:
        """The GELU in front of a quantizer if the kernel can compute it."""
        gelu = produced_by(inputs_of(quantizer).x, "Gelu")
        if gelu is None:
            return None
        if attribute(gelu, "approximate", "none") != "tanh":
            self.refuse(quantizer.name, f"{gelu.name} is not the tanh form of GELU")
            return None
        if only_reader(result_of(gelu)) is not quantizer:
            self.refuse(quantizer.name, f"{result_of(gelu).name} has another reader")
            return None
        return gelu

    def _gemm(self, graph: ir.Graph, node: ir.Node) -> None:
        gemm, quantizer = read_gemm(node), quantizer_of(node)
        operands = quantizer.metadata_props.get(OPERANDS_KEY)
        kernel = kernel_spec(gemm, integers=operands == "int8")
        path = EITHER if operands == "auto" else path_of(kernel)
        attributes = gemm_attributes({key: item.value for key, item in node.attributes.items()})
        fused = fused_node("Gemm", _renamed(node), gemm.layer, node, **attributes)
        fused.metadata_props.update({OPERANDS_KEY: operands} if operands else {})
        replace(graph, node, fused)
        self.choices.append(Choice(gemm.layer, path, _why(gemm, kernel)))
        self.probes.append(_probe(gemm, path, fused, quantizer))
        self.fired += 1


def lower(model: ir.Model, operands: str = "fp8", attention: bool = True) -> LowerFused:
    """Lower `model` in place, after the shared passes. Returns the lowering with its choices and probes.

    attention: whether attentions become one op; TensorRT fuses its own.
    """
    lowering, merging = LowerFused(operands), MergeGemms()
    attentions = [FuseAttention(attention_node)] if attention else []
    for rewrite in (*attentions, lowering, FuseGateResidual(), merging):
        rewrite(model)
    lowering.probes = [merging.probe(row) for row in lowering.probes]
    add_functions(model)
    drop_unused(model)
    return lowering


def _renamed(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of a node of the dialect by the names that the fused op gives them."""
    return {RENAMED.get(node.op_type, {}).get(name, name): value for name, value in inputs_of(node).by_name().items()}


def path_of(kernel: GemmSpec) -> str:
    """What the tensor cores multiply; FP16 in the place of FP8 on a GPU that has none."""
    if kernel.multiplies_integers:
        return INT8
    return {"E4M3": FP8, "INT8": WIDE_INT8}.get(kernel.operand.kind, OWN_CODES)


def takes_integers(chosen: str | None, preferred: bool) -> bool:
    """Whether codes marked `chosen` are INT8 integers on a GPU that prefers them, or does not."""
    return chosen == "int8" or (chosen == "auto" and preferred)


def _choose_integers(gemms: list[ir.Node], chosen: str) -> None:
    """Mark the quantizers all of whose readers can multiply INT8 integers: their codes have one form."""
    readers: dict[ir.Node, list[ir.Node]] = {}
    for node in gemms:
        readers.setdefault(quantizer_of(node), []).append(node)
    for quantizer, nodes in readers.items():
        if all(_fits_integers(read_gemm(node), chosen) for node in nodes):
            quantizer.metadata_props[OPERANDS_KEY] = chosen


def _fits_integers(gemm: QuantizedGemm, chosen: str) -> bool:
    """Integer formats, which are INT8 in any case, need no choice of the GPU's."""
    if kernel_spec(gemm).multiplies_integers:  # what no kernel takes at all is an error, not a reason for FP8
        return chosen == "int8"
    try:
        return kernel_spec(gemm, integers=True).multiplies_integers
    except ContractError:
        return False


def kernel_spec(gemm: QuantizedGemm, integers: bool = False) -> GemmSpec:
    """What the kernel is compiled for. Raises ContractError, naming the layer, where no kernel takes it."""
    try:
        return GemmSpec(
            activation=gemm.activation.name,
            weight=gemm.weight.name,
            in_features=gemm.in_features,
            out_features=gemm.out_features,
            group_size=gemm.group_size,
            multipliers=gemm.multipliers,
            real_groups=gemm.real_groups,
            integers=integers,
        )
    except (RecipeError, ContractError) as error:
        raise ContractError(f"{gemm.layer} cannot be lowered to the GPU kernels: {error}") from error


def _why(gemm: QuantizedGemm, kernel: GemmSpec) -> str:
    held = f"{gemm.activation.name} and {gemm.weight.name} are exact in the operands"
    if kernel.multiplies_integers:
        return f"{held}, and their sums in INT32"
    length = exact_sum_limit(gemm.activation.kmax, gemm.weight_kmax)
    if gemm.sum_length <= length:
        return f"{held}; a float32 sum of {gemm.sum_length} products is exact (up to {length} are)"
    return f"{held}; float32 sums are exact up to {length} of {gemm.sum_length} products"


def _probe(gemm: QuantizedGemm, path: str, fused: ir.Node, quantizer: ir.Node) -> ProbeRow:
    seen = SEEN.get(quantizer.op_type)
    return probe_of(
        gemm.layer,
        path,
        x=getattr(fused_outputs(quantizer), seen) if seen else fused_inputs(quantizer).x,
        codes=[fused_outputs(quantizer).values],
        codes_unit=2.0**gemm.activation.fraction_bits,
        act_scale=fused_outputs(quantizer).scale if gemm.activation_scale is None else None,
        gemm=fused_outputs(fused).sums,
        gemm_unit=gemm.unit,
        result=fused_outputs(fused).y,
        gemm_groups=gemm.sum_groups,
    )


# --- recipes that no kernel can compute, refused before any work ---------------------------------------------------


def recipe_problems(recipe: Recipe, refused: Mapping[str, str], remedy: str) -> list[str]:
    """One message for each number format of the recipe that no kernel takes, and as `scaling_problems`."""
    chosen = recipe.formats
    problems = format_problems((chosen.weight, *chosen.weight_of.values()), chosen.activation)
    return [*(f"{problem}; {remedy}" for problem in problems), *scaling_problems(recipe, refused)]


def scaling_problems(recipe: Recipe, refused: Mapping[str, str]) -> list[str]:
    """One message for each scaling of activations that the method gives and a target refuses. refused: why, by the
    scaling's name."""
    calibrate = recipe.calibrate
    scalings = activation_scalings(calibrate.method, calibrate.preset, calibrate.options)
    words = f"calibrate.method {calibrate.method} scales activations"
    return [f"{words} {scaling}: {refused[scaling]}" for scaling in scalings if scaling in refused]
