"""The quantizer of the CPU lowering, eleven standard ops -> one TokenChain."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pipeline.backends.cpu.token_chain import DOMAIN, VERSION, In, Out, number, put_chain
from pipeline.passes.graph import drop_unused, is_constant, is_op, name_of, only_reader, other_input, produced_by
from pipeline.passes.rewrite import RewritePass

MAGIC = 1.5 * 2.0**23


@dataclass(frozen=True)
class _Quantizer:
    """What the standard ops compute: codes and scale of x, with the numbers they hold."""

    x: ir.Value
    scale: ir.Value
    numbers: dict[str, float]


@dataclass(frozen=True)
class _Limbs:
    """Where an image goes: `codes` alone, or `codes` * base and the rest in `low`."""

    image: ir.Value
    codes: ir.Value
    zero: int
    low: ir.Value | None = None
    base: int = 0


class NativeQuantize(RewritePass):
    """QuantizeLinear(image of x in units of its token's scale) -> TokenChain(x): codes and scale, bit for bit.

    An image too wide for one operand of 8 bits gives the codes of two limbs.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if is_op(node, "QuantizeLinear") and not _is_low(node)]:
            limbs = _limbs(node)
            found = limbs if isinstance(limbs, str) else _match(limbs.image)
            if isinstance(limbs, str) or isinstance(found, str):
                self.refuse(name_of(node), str(found))
                continue
            outputs = {Out.CODES: limbs.codes, Out.SCALE: found.scale}
            if limbs.low is not None:
                outputs[Out.LOW_CODES] = limbs.low
            given = {"zero": limbs.zero, "limb_base": limbs.base} | found.numbers
            put_chain(model.graph, node, {In.X: found.x}, outputs, **given)
            self.fired += 1
        if self.fired:
            model.opset_imports[DOMAIN] = VERSION
        drop_unused(model)


def _is_low(node: ir.Node) -> bool:
    """Does it quantize what another QuantizeLinear leaves of the image?"""
    rest = produced_by(node.inputs[0], "Sub")
    high = produced_by(rest.inputs[1], "DequantizeLinear") if rest else None
    return high is not None and produced_by(high.inputs[0], "QuantizeLinear") is not None


def _limbs(node: ir.Node) -> _Limbs | str:
    """The operands that the QuantizeLinear `node` begins, or why they are none of ours."""
    image, codes, base = node.inputs[0], node.outputs[0], number(node.inputs[1])
    if image is None or len(node.inputs) < 3 or (zero := number(node.inputs[2])) is None:
        return "it has no zero point"
    if base == 1.0:
        return _Limbs(image, codes, int(zero))
    low = next((low for use in codes.uses() if (low := _low_of(use.node, image))), None)
    if low is None or base is None or not is_constant(low.inputs[1], 1.0) or not is_constant(low.inputs[2], zero):
        return "its image is neither in units of 1 nor in two limbs"
    return _Limbs(image, codes, int(zero), low.outputs[0], int(base))


def _low_of(dequantize: ir.Node, image: ir.Value) -> ir.Node | None:
    """The QuantizeLinear of image - dequantize."""
    rest = only_reader(dequantize.outputs[0]) if is_op(dequantize, "DequantizeLinear") else None
    low = only_reader(rest.outputs[0]) if is_op(rest, "Sub") and rest.inputs[0] is image else None  # type: ignore[union-attr]
    return low if is_op(low, "QuantizeLinear") else None


def _match(image: ir.Value) -> _Quantizer | str:
    """The quantizer whose image this is, or why it is none."""
    scaled, factor_of = image, None
    if subtract := produced_by(image, "Sub"):
        add, magic = produced_by(subtract.inputs[0], "Add"), subtract.inputs[1]
        if add is None or magic is None or magic not in add.inputs or not _is_magic(magic):
            return "its image is not rounded by one sum"
        scaled, factor_of = other_input(add, magic), magic.producer().inputs[0]  # type: ignore[union-attr]
    elif nearest := produced_by(image, "Round"):
        scaled = nearest.inputs[0]  # type: ignore[assignment]
    multiply = produced_by(scaled, "Mul")
    inverse = produced_by(multiply.inputs[1], "Div") if multiply else None
    clip = produced_by(inverse.inputs[1], "Clip") if inverse else None
    if multiply is None or inverse is None or clip is None:
        return "its input is not scaled by the token's largest magnitude"
    return _numbers(multiply.inputs[0], inverse, clip, factor_of)


def _is_magic(value: ir.Value) -> bool:
    clip = produced_by(value, "Clip")
    return clip is not None and number(clip.inputs[1]) == MAGIC and len(clip.inputs) == 2


def _numbers(x: ir.Value | None, inverse: ir.Node, clip: ir.Node, wide: ir.Value | None) -> _Quantizer | str:
    peak = produced_by(clip.inputs[0], "ReduceMax")
    magnitude = produced_by(peak.inputs[0], "Abs") if peak else None
    if x is None or peak is None or magnitude is None or magnitude.inputs[0] is not x:
        return "its scale is not that of its own input"
    scale = next((use.node for use in clip.outputs[0].uses() if is_op(use.node, "Div") and use.idx == 0), None)
    factor = 0.0 if wide is None else _factor(wide, magnitude.outputs[0], inverse.outputs[0])
    found = {"kmax": number(inverse.inputs[0]), "absmax_floor": number(clip.inputs[1])}
    found |= {"max_value": number(scale.inputs[1]) if scale else None, "rounding_factor": factor}
    if scale is None or any(value is None for value in found.values()):
        return f"its numbers are not all constants ({found})"
    return _Quantizer(x, scale.outputs[0], {name: float(value or 0) for name, value in found.items()})


def _factor(wide: ir.Value, magnitude: ir.Value, inverse: ir.Value) -> float | None:
    """The constant in (|x| * inverse) * constant."""
    outer = produced_by(wide, "Mul")
    inner = produced_by(outer.inputs[0], "Mul") if outer else None
    return number(outer.inputs[1]) if outer and inner and list(inner.inputs) == [magnitude, inverse] else None
