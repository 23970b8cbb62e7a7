"""What stands between the integer GEMMs of a lowered graph -> TokenChains, as few as there can be.

First what follows a GEMM, then a norm in front of a quantizer, then chains that meet, then the transpositions around
attention. Names of tensors that probes refer to stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.dialect.graph import (
    MICROSOFT,
    attribute,
    drop_unused,
    inputs_of,
    is_op,
    only_reader,
    other_input,
    produced_by,
    read_by,
    result_of,
)
from pipeline.backends.cpu.token_chain import (
    DOMAIN,
    VERSION,
    In,
    Out,
    chain_inputs,
    chain_outputs,
    channels,
    is_chain,
    misfit,
    number,
    put_chain,
    stages,
    value_in,
    value_out,
)
from pipeline.passes.rewrite import RewritePass

FUSED, SUM = "MatMulIntegerToFloat", "MatMulInteger"
HEADS_FIRST, HEADS_LAST, SWAPPED = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)


def finish_with_chains(model: ir.Model) -> list[RewritePass]:
    """Run the passes on a graph whose quantizers are chains, in place."""
    passes: list[RewritePass] = [FinishGemms(), JoinChains(), MoveHeads()]
    if any(is_chain(node) for node in model.graph):
        model.opset_imports[DOMAIN] = VERSION
    for rewrite in passes:
        rewrite(model)
    return passes


# --- what follows a GEMM -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A GEMM's scaled sum, how a chain is to read it, and the integers of the weight of (one of) its GEMMs."""

    value: ir.Value
    inputs: dict[In, ir.Value]
    outputs: dict[Out, ir.Value]
    weight: ir.Value | None
    limb_weight: int = 0


class FinishGemms(RewritePass):
    """gelu(product * token scale + bias) * gate + residual -> TokenChain, as far as the graph has these in this order.

    A product of two limbs is taken in from their int32 sums on. The token scale must come from a TokenChain. Product
    and linear stay outputs, for the parity gates.
    """

    def rewrite(self, model: ir.Model) -> None:
        for product in _products(model.graph):
            value = product.value
            scaled = read_by(value, "Mul")
            if scaled is None or not _is_scale(other_input(scaled, value)):
                self.refuse(str(value.name), "its result is not scaled by a token scale alone")
                continue
            self._finish(model.graph, product, scaled)
            self.fired += 1
        model.graph.sort()
        drop_unused(model)

    def _finish(self, graph: ir.Graph, product: _Product, scaled: ir.Node) -> None:
        inputs = product.inputs | {In.TOKEN_SCALE: other_input(scaled, product.value)}
        last = scaled
        add = read_by(result_of(last), "Add")
        if add is not None and _is_bias(other_input(add, result_of(last)), product.weight):
            inputs[In.BIAS], last = other_input(add, result_of(last)), add
        linear = result_of(last)
        last, gelu = _gelu(last)
        last = _absorb(last, inputs)
        outputs = {Out.LINEAR: linear} | product.outputs
        if result_of(last) is not linear:
            outputs[Out.Y] = result_of(last)
        put_chain(graph, last, inputs, outputs, gelu=gelu, limb_weight=product.limb_weight)


def _products(graph: ir.Graph) -> list[_Product]:
    """The fused integer GEMMs, the sums of those that have one for each group, and the products of two limbs."""
    products: dict[ir.Value, _Product] = {}
    for node in graph:
        if is_op(node, FUSED, MICROSOFT):
            value = result_of(read_by(result_of(node), "Sum") or node)
            products.setdefault(value, _Product(value, {In.X: value}, {}, inputs_of(node).B))
        elif (two := _in_two_limbs(node)) is not None:
            products[two.value] = two
    return list(products.values())


def _in_two_limbs(node: ir.Node) -> _Product | None:
    """`node` if it is Mul(Cast(high sum * limb weight + low sum), channel scale)."""
    cast = produced_by(inputs_of(node).A, "Cast") if is_op(node, "Mul") else None
    total = produced_by(inputs_of(cast).input, "Add") if cast else None
    weighted = produced_by(inputs_of(total).A, "Mul") if total else None
    high = produced_by(inputs_of(weighted).A, SUM) if weighted else None
    low = produced_by(inputs_of(total).B, SUM) if total else None
    if weighted is None or high is None or low is None or inputs_of(high).B is not inputs_of(low).B:
        return None
    weight, scale, limb_weight = inputs_of(high).B, inputs_of(node).B, number(inputs_of(weighted).B)
    if limb_weight is None or _size_of(scale) != channels(weight):
        return None
    inputs = {In.HIGH_SUM: result_of(high), In.LOW_SUM: result_of(low), In.CHANNEL_SCALE: scale}
    return _Product(result_of(node), inputs, {Out.PRODUCT: result_of(node)}, weight, int(limb_weight))


def _size_of(value: ir.Value) -> int | None:
    """Size of a stored vector, which is not read here; None for anything else."""
    shape = value.const_value.shape if value.const_value is not None else None
    return int(shape[0]) if shape is not None and shape.rank() == 1 else None  # type: ignore[arg-type]


def _is_scale(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and is_chain(node) and value_out(node, Out.SCALE) is value


def _is_bias(value: ir.Value, weight: ir.Value | None) -> bool:
    """A stored vector, one number for each channel of the product."""
    size = _size_of(value)
    return size is not None and size == channels(weight)


def _gelu(last: ir.Node) -> tuple[ir.Node, int]:
    reader = read_by(result_of(last), "Gelu")
    if reader is not None and attribute(reader, "approximate", "none") == "tanh":
        return reader, 1
    return last, 0


def _absorb(last: ir.Node, inputs: dict[In, ir.Value]) -> ir.Node:
    """Take a gate and a residual into `inputs`; the last node that is then computed."""
    for op_type, place, fits in (("Mul", In.GATE, _is_gate), ("Add", In.RESIDUAL, _is_residual)):
        value = result_of(last)
        reader = read_by(value, op_type)
        if reader is not None and fits(other_input(reader, value), value):
            inputs[place], last = other_input(reader, value), reader
    return last


def _is_gate(gate: ir.Value, value: ir.Value) -> bool:
    """Computed by the model. A stored vector is the balance in front of a quantizer, whose input a gate looks at."""
    return gate.const_value is None and not misfit(gate, value)


def _is_residual(residual: ir.Value, value: ir.Value) -> bool:
    """Known to have the shape of `value`, so that nothing is broadcast."""
    shape, expected = residual.shape, value.shape
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
        x = value_in(quantizer, In.X)
        norm = produced_by(x, "LayerNormalization")
        if norm is None or x is None:
            return
        if reason := _unfit(norm, quantizer):
            self.refuse(norm.name, reason)
            return
        ports = inputs_of(norm)
        inputs = {In.X: ports.X, In.NORM_SCALE: ports.Scale, In.NORM_SHIFT: ports.B}
        epsilon = float(attribute(norm, "epsilon", 1e-5))
        outputs = chain_outputs(quantizer) | {Out.QUANTIZED: x}
        put_chain(graph, quantizer, inputs, outputs, epsilon=epsilon, **stages(quantizer))
        graph.remove(quantizer, safe=True)
        self.fired += 1

    def _join(self, graph: ir.Graph, quantizer: ir.Node) -> None:
        x = value_in(quantizer, In.X)
        first = x.producer() if x is not None else None
        if first is None or not is_chain(first) or value_out(first, Out.CODES) is not None:
            return
        rest = {place: value for place, value in chain_inputs(quantizer).items() if place is not In.X}
        if _depend_on(list(rest.values()), first):
            self.refuse(quantizer.name, f"its norm depends on {first.name}")
            return
        both = stages(first) | stages(quantizer)
        outputs = chain_outputs(quantizer) | chain_outputs(first)
        put_chain(graph, quantizer, chain_inputs(first) | rest, outputs, **both)
        for node in (quantizer, first):
            graph.remove(node, safe=True)
        self.fired += 1


def _quantizes(node: ir.Node) -> bool:
    return is_chain(node) and value_out(node, Out.CODES) is not None


def _unfit(norm: ir.Node, quantizer: ir.Node) -> str:
    """Why a chain cannot take `norm` in, '' if it can."""
    x, scale, shift = inputs_of(norm).X, inputs_of(norm).Scale, inputs_of(norm).get("B")
    rank = x.shape.rank() if x.shape else 3
    if only_reader(result_of(norm)) is not quantizer:
        return f"{result_of(norm).name} has another reader than {quantizer.name}"
    if attribute(norm, "axis", -1) not in (-1, rank - 1):
        return f"it normalizes over axis {attribute(norm, 'axis')}, not the last one"
    if shift is None:
        return "it has no shift"
    return _not_a_row(scale, x) or _not_a_row(shift, x)


def _not_a_row(value: ir.Value, x: ir.Value) -> str:
    """Why `value` is not [channels] or [batch, 1, channels], '' if it is."""
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
    """Transpose(Reshape(linear)) -> heads_out of the chain that makes `linear`; Reshape(Transpose(x)) -> heads_in of
    the chain that reads it. [batch, tokens, heads * size] is then [batch, heads, tokens, size] in memory.

    Keys are transposed once more, which onnxruntime takes into its matrix product.
    """

    def rewrite(self, model: ir.Model) -> None:
        for node in [node for node in model.graph if is_chain(node)]:
            outputs, inputs = set(chain_outputs(node)), set(chain_inputs(node))
            if outputs - {Out.PRODUCT} == {Out.LINEAR}:
                self._split(model.graph, node)
            elif Out.CODES in outputs and inputs == {In.X}:
                self._gather(model.graph, node)
        model.graph.sort()
        drop_unused(model)

    def _split(self, graph: ir.Graph, chain: ir.Node) -> None:
        linear = chain_outputs(chain)[Out.LINEAR]
        view = read_by(linear, "Reshape")
        if view is None or not (heads := _heads(linear, result_of(view))):
            return
        turn = read_by(result_of(view), "Transpose")
        perm = tuple(attribute(turn, "perm", ())) if turn is not None else ()
        if turn is None or perm not in (HEADS_FIRST, HEADS_LAST):
            return
        if perm == HEADS_LAST:
            turn = _in_two(graph, turn)
        outputs = chain_outputs(chain) | {Out.Y: result_of(turn)}
        put_chain(graph, turn, chain_inputs(chain), outputs, **stages(chain) | {"heads_out": heads})
        graph.remove(chain, safe=True)
        self.fired += 1

    def _gather(self, graph: ir.Graph, chain: ir.Node) -> None:
        x = chain_inputs(chain)[In.X]
        view = produced_by(x, "Reshape")
        turn = produced_by(inputs_of(view).data, "Transpose") if view else None
        if view is None or turn is None or tuple(attribute(turn, "perm", ())) != HEADS_FIRST:
            return
        heads = _heads(x, result_of(turn))
        if not heads or any(only_reader(result_of(node)) is None for node in (turn, view)):
            return
        outputs = chain_outputs(chain) | {Out.QUANTIZED: x}
        put_chain(graph, chain, {In.X: inputs_of(turn).data}, outputs, **stages(chain) | {"heads_in": heads})
        graph.remove(chain, safe=True)
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
    first = ir.Node("", "Transpose", turn.inputs, [ir.AttrInt64s("perm", HEADS_FIRST)], name=f"{turn.name}/heads")
    value, old = result_of(first), result_of(turn)
    value.name, value.type = f"{old.name}/heads", old.type
    if old.shape is not None:
        value.shape = ir.Shape([old.shape[axis] for axis in SWAPPED])
    graph.insert_before(turn, first)
    inputs_of(turn).set("data", value)
    turn.attributes["perm"] = ir.AttrInt64s("perm", SWAPPED)
    return first
