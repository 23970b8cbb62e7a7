"""What stands between the integer GEMMs of a lowered graph -> the op that makes the linear, else one TokenChain.

A quantizer is a TokenChain from the start. Then what follows a linear goes into its PackedGemm, or into a chain behind
a GEMM of stock ops; a norm goes into the quantizer behind it; chains meet; both take the transpositions around
attention; and a PackedGemm quantizes its own rows. Names of tensors that probes refer to stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from export.dialect.graph import (
    FLOAT,
    GraphBuilder,
    attribute,
    drop_unused,
    inputs_of,
    is_op,
    new_node,
    only_reader,
    other_input,
    produced_by,
    read_by,
    result_of,
)
from export.formats.format import Format
from export.formats.operands import SMALL_ZERO, limb_base, zero_point
from pipeline.backends.cpu import packed_gemm
from pipeline.backends.cpu.gemms import Product, grouped_gemm
from pipeline.backends.cpu.native_ports import connect, finishes, make_instead, ports_in, ports_out
from pipeline.backends.cpu.quantized_attention import UseQuantizedAttention
from pipeline.backends.cpu.quantizers import Operand, rounding_factor
from pipeline.backends.cpu.token_chain import (
    OP,
    VERSION,
    Activation,
    In,
    Out,
    chain_node,
    channels,
    is_chain,
    misfit,
    number,
    stages,
)
from pipeline.passes.fuse_attention import FuseAttention
from pipeline.passes.quantized_gemm import QuantizedGemm
from pipeline.passes.rewrite import RewritePass
from plugins.cpu.library import DOMAIN

U8 = ir.TensorType(ir.DataType.UINT8)
HEADS_FIRST, HEADS_LAST, SWAPPED = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)


def finish_with_chains(model: ir.Model) -> list[RewritePass]:
    """Run the passes on a graph whose quantizers are chains, in place."""
    passes: list[RewritePass] = [
        FuseAttention(_attention, _attention_misfit),
        UseQuantizedAttention(),
        AbsorbEpilogues(),
        JoinChains(),
        MoveHeads(),
        QuantizeInGemm(),
    ]
    for rewrite in passes:
        rewrite(model)
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = VERSION
    return passes


def _attention(inputs: Mapping[str, ir.Value], name: str, like: ir.Node, scale: float) -> ir.Node:
    """Attention of the kernel library, see plugins/cpu/attention.h."""
    ordered = [inputs.get(port) for port in ("q", "k", "v", "mask")]
    return new_node(DOMAIN, "Attention", ordered, name, {"scale": scale}, 1, like.metadata_props)


def _attention_misfit(q: ir.Value, keys: ir.Value, v: ir.Value, mask: ir.Value | None) -> str | None:
    """Why the kernel library's attention does not take q [B, H, S, D], keys [B, H, D, T], v [B, H, T, D] and a mask
    that fits [B, H, S, T], as far as shapes are known; None if it does. It broadcasts the mask alone."""
    if any(value.dtype not in (None, FLOAT.dtype) for value in (q, keys, v)):
        return "its operands are not float32"
    (b, h, s, d), (b_k, h_k, d_k, t), of_values = (tuple(value.shape or ()) for value in (q, keys, v))
    if any(map(_unlike, (b, h, d, b, h, t, d), (b_k, h_k, d_k, *of_values))):
        return "its operands differ in batch, heads or channels"
    sizes = tuple(mask.shape) if mask is not None and mask.shape is not None else ()
    aligned = zip(reversed(sizes), (t, s, h, b), strict=False)
    if len(sizes) > 4 or any(size != 1 and _unlike(size, whole) for size, whole in aligned):
        return "its mask is larger than its scores"
    return None


def _unlike(size: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Are these known to be two sizes? One that has a name is not the constant 1."""
    return size != other and (1 in (size, other) or (isinstance(size, int) and isinstance(other, int)))


# --- quantizers -------------------------------------------------------------------------------------------------


def quantize_with_chain(build: GraphBuilder, x: ir.Value, fmt: Format, limbs: int) -> Operand:
    """x f32 [..., K] -> u8 operands [..., K] and scale [..., 1]: bit for bit what `quantizers.quantize` says in eleven
    standard ops."""
    one, base = limbs == 1, limb_base(fmt.kmax, limbs)
    zero = zero_point(fmt.kmax) if one else SMALL_ZERO
    places = {Out.CODES: ("codes" if one else "high", U8), Out.SCALE: ("scale", x.type)}
    if not one:
        places[Out.LOW_CODES] = ("low", U8)
    node = chain_node(
        build,
        {In.X: x},
        f"{places[Out.CODES][0]}/chain",
        max_value=fmt.max_value,
        kmax=float(fmt.kmax),
        rounding_factor=rounding_factor(fmt) if len(fmt.binade_starts) else 0.0,
        zero=zero,
        limb_base=0 if one else base,
    )
    for place, (name, kind) in places.items():
        node.outputs[place].name, node.outputs[place].type = f"{build.prefix}/{name}", kind
    codes = (node.outputs[Out.CODES],) if one else (node.outputs[Out.CODES], node.outputs[Out.LOW_CODES])
    return Operand(x, codes, (1,) if one else (base, 1), zero, node.outputs[Out.SCALE])


# --- what follows a GEMM -------------------------------------------------------------------------------------------


def chained_gemm(
    build: GraphBuilder, gemm: QuantizedGemm, operand: Operand, bias: ir.Value | None
) -> tuple[Product, ir.Value]:
    """A linear of stock ops whose token scale and bias are applied by a TokenChain: (its product, its result)."""
    product = grouped_gemm(build, gemm, operand)
    optional = {In.X: product.value, In.TOKEN_SCALE: product.token_scale, In.BIAS: bias}
    inputs = {place: value for place, value in optional.items() if value is not None}
    name = "scaled_tokens" if bias is None else "output"
    linear = chain_node(build, inputs, f"{name}/chain").outputs[Out.LINEAR]
    linear.name = f"{build.prefix}/{name}"
    return product, linear


class AbsorbEpilogues(RewritePass):
    """activation(linear) * gate + residual, as far as the graph has these in this order -> the op that makes `linear`.

    The activation is GELU in the tanh form or SiLU, which graphs have as x * Sigmoid(x)."""

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if finishes(node)]:
            self._absorb(node)
        model.graph.sort()
        drop_unused(model)

    def _absorb(self, node: ir.Node) -> None:
        linear = ports_out(node)["LINEAR"]
        activation, last = _activated(linear)
        inputs = {}
        for op_type, port, fits in (("Mul", "GATE", _is_gate), ("Add", "RESIDUAL", _has_shape_of)):
            reader = read_by(last, op_type)
            if reader is not None and fits(other_input(reader, last), last):
                inputs[port], last = other_input(reader, last), result_of(reader)
        if last is linear:
            return
        connect(node, inputs, {"activation": activation})
        make_instead(node, [("Y", last)])
        self.fired += 1


def _activated(linear: ir.Value) -> tuple[Activation, ir.Value]:
    """(which activation alone reads `linear`, its result); NONE and `linear` where others read it, or no activation."""
    gelu = read_by(linear, "Gelu")
    if gelu is not None and attribute(gelu, "approximate", "none") == "tanh":
        return Activation.GELU, result_of(gelu)
    silu = _silu(linear)
    return (Activation.NONE, linear) if silu is None else (Activation.SILU, silu)


def _silu(x: ir.Value) -> ir.Value | None:
    """x * Sigmoid(x) if nothing else reads x or its sigmoid, else None."""
    readers = [use.node for use in x.uses()]
    sigmoid = next((result_of(node) for node in readers if is_op(node, "Sigmoid")), None)
    product = read_by(sigmoid, "Mul") if sigmoid is not None else None
    if sigmoid is None or product is None or other_input(product, sigmoid) is not x:
        return None
    return None if len(readers) > 2 or x.is_graph_output() else result_of(product)


def _is_gate(gate: ir.Value, value: ir.Value) -> bool:
    """Computed by the model: one row for all rows of a sample, or one for each. A stored vector is the balance in front
    of a quantizer, whose input a gate looks at."""
    return gate.const_value is None and (not misfit(gate, value) or _has_shape_of(gate, value))


def _has_shape_of(other: ir.Value, value: ir.Value) -> bool:
    """Is `other` known to have the shape of `value`, so that nothing is broadcast?"""
    shape, expected = other.shape, value.shape
    if shape is None or expected is None or not all(isinstance(size, int) or size.value for size in shape):
        return False
    return bool(shape.rank() > 1) and shape == expected


# --- chains that meet ----------------------------------------------------------------------------------------------


class JoinChains(RewritePass):
    """TokenChain(LayerNormalization(x)) -> TokenChain(x); TokenChain(y of a TokenChain) -> one TokenChain.

    What others read, or a parity gate looks at, stays an output.
    """

    def rewrite(self, model: ir.Model) -> None:
        for step in (self._take_norm, self._join):
            for node in [node for node in model.graph if _quantizes(node)]:
                step(model.graph, node)
        model.graph.sort()
        drop_unused(model)

    def _take_norm(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        x = ports_in(quantizer).get("X")
        norm = produced_by(x, "LayerNormalization")
        if norm is None or x is None:
            return
        if reason := _unfit(norm, quantizer):
            self.refuse(norm.name, reason)
            return
        ports = inputs_of(norm)
        inputs = {"X": ports.X, "NORM_SCALE": ports.Scale, "NORM_SHIFT": ports.B}
        connect(quantizer, inputs, {"epsilon": float(attribute(norm, "epsilon", 1e-5))})
        make_instead(quantizer, [("QUANTIZED", x)])
        self.fired += 1

    def _join(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        rest = ports_in(quantizer)
        first = produced_by(rest.pop("X", None), OP, DOMAIN)
        if first is None or _quantizes(first):
            return
        if _depend_on(list(rest.values()), first):
            self.refuse(quantizer.name, f"its norm depends on {first.name}")
            return
        connect(quantizer, ports_in(first), stages(first))
        make_instead(quantizer, ports_out(first).items())
        graph.remove(first, safe=True)
        self.fired += 1


def _quantizes(node: ir.Node) -> bool:
    return is_chain(node) and "CODES" in ports_out(node)


def _unfit(norm: ir.Node, quantizer: ir.Node) -> str | None:
    """Why a chain cannot take `norm` in, None if it can."""
    x, scale, shift = inputs_of(norm).X, inputs_of(norm).Scale, inputs_of(norm).get("B")
    rank = x.shape.rank() if x.shape else 3
    if only_reader(result_of(norm)) is not quantizer:
        return f"{result_of(norm).name} has another reader than {quantizer.name}"
    if attribute(norm, "axis", -1) not in (-1, rank - 1):
        return f"it normalizes over axis {attribute(norm, 'axis')}, not the last one"
    if shift is None:
        return "it has no shift"
    return _not_a_row(scale, x) or _not_a_row(shift, x)


def _not_a_row(value: ir.Value, x: ir.Value) -> str | None:
    """Why `value` is not [channels] or [batch, 1, channels], None if it is."""
    if (add := produced_by(value, "Add")) and value.shape is None:
        one = next((one for one in add.inputs if number(one) is not None), None)
        value = other_input(add, one) if one is not None else value  # 1 + scale
    return misfit(value, x)


def _depend_on(values: list[ir.Value], node: ir.Node) -> bool:
    """Is any of `values` computed from an output of `node`?"""
    seen: set[ir.Node] = set()
    todo = [value.producer() for value in values]
    while todo:
        earlier = todo.pop()
        if earlier is node:
            return True
        if earlier is not None and earlier not in seen:
            seen.add(earlier)
            todo += [value.producer() for value in earlier.inputs if value is not None]
    return False


# --- heads ---------------------------------------------------------------------------------------------------------


class MoveHeads(RewritePass):
    """Transpose(Reshape(linear)) -> heads_out of the op that makes `linear`; Reshape(Transpose(x)) -> heads_in of
    the chain that reads it. [batch, tokens, heads * size] is then [batch, heads, tokens, size] in memory.

    Keys are transposed once more, which onnxruntime takes into its matrix product.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if finishes(node) and not {"Y", "CODES"} & set(ports_out(node)):
                self._split(model.graph, node)
            elif _quantizes(node) and set(ports_in(node)) == {"X"}:
                self._gather(node)
        model.graph.sort()
        drop_unused(model)

    def _split(self, graph: ir.Graph, node: ir.Node) -> None:
        linear = ports_out(node)["LINEAR"]
        view = read_by(linear, "Reshape")
        if view is None or not (heads := _heads(linear, result_of(view))):
            return
        turn = read_by(result_of(view), "Transpose")
        perm = tuple(attribute(turn, "perm", ())) if turn is not None else ()
        if turn is None or perm not in (HEADS_FIRST, HEADS_LAST):
            return
        if perm == HEADS_LAST:
            turn = _in_two(graph, turn)
        connect(node, {}, {"heads_out": heads})
        make_instead(node, [("Y", result_of(turn))])
        self.fired += 1

    def _gather(self, quantizer: ir.Node) -> None:
        x = ports_in(quantizer)["X"]
        view = produced_by(x, "Reshape")
        turn = produced_by(inputs_of(view).data, "Transpose") if view else None
        if view is None or turn is None or tuple(attribute(turn, "perm", ())) != HEADS_FIRST:
            return
        heads = _heads(x, result_of(turn))
        if not heads or any(only_reader(result_of(node)) is None for node in (turn, view)):
            return
        connect(quantizer, {"X": inputs_of(turn).data}, {"heads_in": heads})
        make_instead(quantizer, [("QUANTIZED", x)])
        self.fired += 1


def _heads(rows: ir.Value, parts: ir.Value) -> int:
    """Number of heads if `parts` [batch, tokens, heads, size] are the channels of `rows` [batch, tokens, n], else 0."""
    whole, split = rows.shape, parts.shape
    if whole is None or split is None or whole.rank() != 3 or split.rank() != 4:
        return 0
    heads, size = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size != channels(rows):
        return 0
    return heads if list(whole)[:2] == list(split)[:2] else 0


def _in_two(graph: ir.Graph, turn: ir.Node) -> ir.Node:
    """Transpose to [batch, heads, size, tokens] as two: to [batch, heads, tokens, size], which is returned, and on."""
    build, old = GraphBuilder(graph, turn, str(turn.name)), result_of(turn)
    first = build.node("Transpose", [inputs_of(turn).data], "heads", {"perm": HEADS_FIRST})
    value = result_of(first)
    value.name, value.type = f"{old.name}/heads", old.type
    if old.shape is not None:
        value.shape = ir.Shape([old.shape[axis] for axis in SWAPPED])
    inputs_of(turn).set("data", value)
    turn.attributes["perm"] = ir.AttrInt64s("perm", SWAPPED)
    return first


# --- rows that are quantized where they are made --------------------------------------------------------------------


class QuantizeInGemm(RewritePass):
    """TokenChain(rows of a PackedGemm) -> outputs of that PackedGemm, which quantizes a block of rows soon after it is
    made. Rows that nobody else reads are in no tensor then."""

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if _quantizes(node)]:
            self._take(model.graph, node)
        model.graph.sort()

    def _take(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        rest = ports_in(quantizer)
        x = rest.pop("X")
        gemm = produced_by(x, packed_gemm.OP, DOMAIN)
        if gemm is None or not set(rest) <= {"NORM_SCALE", "NORM_SHIFT"} or stages(quantizer).get("heads_in"):
            return
        made = ports_out(gemm)
        if attribute(gemm, "heads_out", 0) or made.get("Y", made.get("LINEAR")) is not x:
            return
        if "CODES" in made:
            self.refuse(quantizer.name, f"{gemm.name} quantizes its rows for another reader")
            return
        if _depend_on(list(rest.values()), gemm):
            self.refuse(quantizer.name, f"its norm depends on {gemm.name}")
            return
        connect(gemm, rest, packed_gemm.quantizer_attributes(stages(quantizer)))
        make_instead(gemm, ports_out(quantizer).items())
        graph.remove(quantizer, safe=True)
        self.fired += 1
