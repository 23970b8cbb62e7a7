"""Faults inside quantized linears of whole models: stored numbers, quantizers, sums, branches and static scales."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.graph_edit import GraphEdit, Step, attribute, set_attribute, some
from tests.support.graph_faults import CALLS, MINIS, GraphFault, half, times
from tests.support.learned import BRANCHES

LEARNED = tuple(f"{name} learned" for name in MINIS)
BOTH = (*MINIS, "hunyuan")
GEMM, OUTPUT = frozenset({"gemm_exact"}), frozenset({"linear_output"})
CODES, SCALE = frozenset({"codes_inadmissible"}), frozenset({"scale_error"})
# Ends of the names of the layers that most faults are planted in, the last of the kind.
QUERY, KEY, VALUE, OUT, HIDDEN = "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2"


def layer_of(edit: GraphEdit, end: str) -> str:
    """The last layer whose name ends so."""
    names = [item.name for item in edit.graph.initializer if f"{end}." in item.name]
    return some(names, f"no layer {end}")[-1].rpartition(f"{end}.")[0] + end


def _change(edit: GraphEdit, end: str, key: str, function: Any) -> None:
    edit.change(f"{layer_of(edit, end)}.{key}", function)


def _entry(array: NDArray[Any], function: Any) -> NDArray[Any]:
    """function on one entry in the middle."""
    flat = array.reshape(-1)
    flat[flat.size // 2] = function(flat[flat.size // 2])
    return array


def _one_nibble(edit: GraphEdit) -> None:
    _change(edit, QUERY, "codes", partial(_entry, function=lambda byte: byte ^ 0x10))


def _one_code_of_every_layer(edit: GraphEdit) -> None:
    for name in [item.name for item in edit.graph.initializer if item.name.endswith(".codes")]:
        edit.change(name, partial(_entry, function=lambda byte: byte ^ 0x01))


def _one_multiplier(edit: GraphEdit) -> None:
    _change(edit, OUT, "multipliers", partial(_entry, function=lambda index: index ^ 1))


def _one_scale(edit: GraphEdit, exponent: int) -> None:
    _change(edit, VALUE, "scales", partial(_entry, function=lambda scale: scale * np.float32(1 + 2.0**exponent)))


def _one_bias(edit: GraphEdit) -> None:
    _change(edit, HIDDEN, "bias", partial(_entry, function=lambda bias: bias + np.float32(0.01)))


def _exchanged_weights(edit: GraphEdit) -> None:
    """The images of keys and values, with scales and biases as they were."""
    names = [f"{layer_of(edit, end)}.image" for end in (KEY, VALUE)]
    first, second = (edit.array(name) for name in names)
    edit.change(names[0], lambda _: second)
    edit.change(names[1], lambda _: first)


def _exchanged_panels(edit: GraphEdit) -> None:
    """The same of packed weights."""
    names = [f"{layer_of(edit, end)}.panels" for end in (KEY, VALUE)]
    first, second = (edit.array(name) for name in names)
    edit.change(names[0], lambda _: second)
    edit.change(names[1], lambda _: first)


def _one_panel_entry(edit: GraphEdit, kind: str) -> None:
    """1 on one entry of a packed weight's panels (one of two codes), multipliers or sums."""

    def add(array: NDArray[Any]) -> NDArray[Any]:
        array.reshape(-1)[array.size // 2] ^= 1
        return array

    edit.change(f"{layer_of(edit, QUERY)}.{kind}", add)


def _packed_zero_point(edit: GraphEdit) -> None:
    node = _product(edit, QUERY)
    set_attribute(node, "zero", attribute(node, "zero") + 1)


# Ops that sum codes -> which input is the zero point of the activation's.
SUMS = {"MatMulIntegerToFloat": 4, "MatMulInteger": 2}


def _sums(edit: GraphEdit, end: str) -> list[Any]:
    """The sums of a layer's codes: one, or one for each part that codes of 8 bits are split into."""
    start = f"{layer_of(edit, end)}/"
    return some([node for node in edit.nodes(*SUMS) if node.output[0].startswith(start)], f"no sum of {end}")


def _zero_point(edit: GraphEdit) -> None:
    node = _sums(edit, QUERY)[0]
    place = SUMS[node.op_type]
    node.input[place] = edit.constant(np.asarray(edit.array(node.input[place]) + 1))


def _product(edit: GraphEdit, end: str) -> Any:
    node = edit.producer(f"{layer_of(edit, end)}/product")
    return some([node] if node is not None else [], f"no product of {end}")[0]


def _sum_off_by_one(edit: GraphEdit) -> None:
    """In one channel."""
    product = _product(edit, HIDDEN)
    scales = edit.array(next(name for name in product.input if name.endswith(".unit_scales")))
    step = np.zeros_like(scales)
    step[len(step) // 2] = scales[len(step) // 2]
    edit.route(product.output[0], Step("Add", (step,)))


def _token_scale_of_the_neighbour(edit: GraphEdit) -> None:
    """Scales [B, S, 1] turned by one token, where the layer's result is scaled; the quantizer's own are right."""
    tensor = f"{layer_of(edit, OUT)}/quantize/scale"
    product = _product(edit, OUT)
    last = edit.apply(tensor, Step("Slice", (np.array([-1]), np.array([2**31]), np.array([1]))))
    others = Step("Slice", (np.array([0]), np.array([-1]), np.array([1])))
    turned = edit.apply(tensor, others, Step("Concat", (last,), {"axis": 1}, place=1))
    edit.redirect(edit.readers(product.output[0]), tensor, turned)


def _doubled_scale(edit: GraphEdit) -> None:
    edit.route(f"{layer_of(edit, OUT)}/quantize/scale", times(2))


def _truncating_quantizer(edit: GraphEdit) -> None:
    edit.route(f"{layer_of(edit, OUT)}/quantize/scaled", Step("Floor"))


def _codes_of_the_neighbour(edit: GraphEdit) -> None:
    """Two tokens of one sample exchanged on the way into the sum."""
    for node in _sums(edit, OUT):
        first, second, rest = (
            edit.apply(node.input[0], Step("Slice", (np.array([start]), np.array([end]), np.array([1]))))
            for start, end in ((0, 1), (1, 2), (2, 2**31))
        )
        node.input[0] = edit.apply(second, Step("Concat", (first, rest), {"axis": 1}))


def _codes_of_another_layer(edit: GraphEdit) -> None:
    """A quantizer shared by mistake: the output projection reads what the queries did."""
    for node, other in zip(_sums(edit, OUT), _sums(edit, QUERY), strict=True):
        node.input[0] = other.input[0]


def _floor_of_absmax(edit: GraphEdit) -> None:
    """1e-3 in the place of 1e-30 in every quantizer: tokens of zeros and tiny ones lose their values."""
    for tensor in edit.tensors("/quantize/absmax"):
        clip = edit.producer(tensor)
        assert clip is not None
        clip.input[1] = edit.constant(np.float32(1e-3))


# --- routed branches ------------------------------------------------------------------------------------------------

BRANCHED = "attn1.to_q"


def _next_branch(edit: GraphEdit) -> None:
    for key in ("lora_down", "lora_up"):
        _change(edit, BRANCHED, key, lambda branches: np.roll(branches, 1, axis=0))


def _half_a_branch(edit: GraphEdit) -> None:
    _change(edit, BRANCHED, "lora_up", lambda branches: np.roll(branches, 1, axis=0))


def _branch_dropped(edit: GraphEdit) -> None:
    _change(edit, BRANCHED, "lora_up", np.zeros_like)


def _branch_of_another_layer(edit: GraphEdit) -> None:
    other = edit.array(f"{layer_of(edit, OUT)}.lora_up")
    _change(edit, BRANCHED, "lora_up", lambda own: other[..., : own.shape[-1]])


def _branch_of_the_first_sample(edit: GraphEdit) -> None:
    """The branch [B] that the first timestep chooses for all: branch[:1] + 0 * branch."""
    tensor = "router/branch"
    readers = some(edit.readers(tensor), "no router")
    first = edit.apply(tensor, Step("Slice", (np.array([0]), np.array([1]))))
    spread = edit.apply(tensor, Step("Mul", (np.int64(0),)), Step("Add", (first,)))
    edit.redirect(readers, tensor, spread)


def _router_reads_rounded_hundreds(edit: GraphEdit) -> None:
    """Timesteps rounded to hundreds: wrong near the borders between branches."""
    column = "router/column"
    edit.route(column, Step("Div", (np.float32(100),)), Step("Round"), times(100))


def _branch_of_the_end(edit: GraphEdit) -> None:
    """Below t = 20 the next branch."""
    last = edit.apply("timestep", Step("Less", (np.float32(20),)), Step("Cast", attributes={"to": 7}))
    edit.route("router/branch", Step("Add", (last,)), Step("Mod", (np.int64(BRANCHES),)))


def _branch_slightly_off(edit: GraphEdit) -> None:
    edit.route(f"{layer_of(edit, BRANCHED)}/low_rank", times(1.001))


def _branch_in_half(edit: GraphEdit) -> None:
    edit.route(f"{layer_of(edit, BRANCHED)}/low_rank", *half())


# --- static scales, zero points, balance ----------------------------------------------------------------------------


def _static_scale(edit: GraphEdit, exponent: int) -> None:
    _change(edit, KEY, "activation_scale", lambda scale: scale * np.float32(1 + 2.0**exponent))


def _static_scale_of_another_layer(edit: GraphEdit) -> None:
    names = [item.name for item in edit.graph.initializer if item.name.endswith(".activation_scale")]
    scales = {float(edit.array(name)[0]): name for name in names}
    edit.change(scales[max(scales)], lambda _: edit.array(scales[min(scales)]))


def _static_zero(edit: GraphEdit, factor: float) -> None:
    _change(edit, HIDDEN, "activation_zero", lambda zero: zero * np.float32(factor))


def _balance_of_the_neighbour(edit: GraphEdit) -> None:
    _change(edit, QUERY, "input_multiplier", lambda factors: np.roll(factors, 1))


def _offset_dropped(edit: GraphEdit) -> None:
    _change(edit, QUERY, "input_offset", np.zeros_like)


def _one_balance(edit: GraphEdit) -> None:
    _change(edit, QUERY, "input_multiplier", partial(_entry, function=lambda factor: factor * np.float32(1.01)))


LINEAR_FAULTS = (
    GraphFault("one nibble", "stored numbers", _one_nibble, BOTH, GEMM, "portable"),
    GraphFault("one code of every layer", "stored numbers", _one_code_of_every_layer, MINIS, GEMM, "portable"),
    GraphFault("one multiplier", "stored numbers", _one_multiplier, ("pixart_mini", "hunyuan"), GEMM, "portable"),
    GraphFault(
        "one scale x (1 + 2^-10)", "stored numbers", partial(_one_scale, exponent=-10), BOTH, OUTPUT, "portable"
    ),
    GraphFault(
        "one scale x (1 + 2^-18)", "stored numbers", partial(_one_scale, exponent=-18), BOTH, OUTPUT, "portable"
    ),
    GraphFault("one bias + 0.01", "stored numbers", _one_bias, BOTH, OUTPUT, "portable"),
    GraphFault("keys and values exchanged", "stored numbers", _exchanged_weights, BOTH, GEMM),
    GraphFault("keys and values exchanged, fused path", "stored numbers", _exchanged_panels, MINIS, GEMM, "fused"),
    GraphFault("one packed code", "stored numbers", partial(_one_panel_entry, kind="panels"), MINIS, GEMM, "fused"),
    GraphFault(
        "one packed multiplier",
        "stored numbers",
        partial(_one_panel_entry, kind="panel_multipliers"),
        ("pixart_mini",),
        GEMM,
        "fused",
    ),
    GraphFault("one sum of weights", "sums", partial(_one_panel_entry, kind="weight_sums"), MINIS, GEMM, "fused"),
    GraphFault("zero point off by one", "sums", _zero_point, BOTH, GEMM),
    GraphFault("zero point off by one, fused path", "sums", _packed_zero_point, MINIS, GEMM, "fused"),
    GraphFault("sum off by one in a channel", "sums", _sum_off_by_one, BOTH, GEMM),
    GraphFault("token scale of the neighbour", "quantizers", _token_scale_of_the_neighbour, BOTH, OUTPUT),
    GraphFault("token scale doubled", "quantizers", _doubled_scale, BOTH, SCALE),
    GraphFault("quantizer truncates", "quantizers", _truncating_quantizer, BOTH, CODES),
    GraphFault("codes of the neighbour token", "quantizers", _codes_of_the_neighbour, BOTH, GEMM),
    GraphFault("codes of another layer", "quantizers", _codes_of_another_layer, BOTH, GEMM),
    GraphFault("floor of absmax 1e-3", "quantizers", _floor_of_absmax, MINIS, frozenset({"quantizers"})),
    GraphFault("next branch", "routed branches", _next_branch, LEARNED, OUTPUT, "portable"),
    GraphFault("half a branch", "routed branches", _half_a_branch, LEARNED, OUTPUT, "portable"),
    GraphFault("branch dropped", "routed branches", _branch_dropped, LEARNED, OUTPUT, "portable"),
    GraphFault("up-matrix of another layer", "routed branches", _branch_of_another_layer, LEARNED, OUTPUT, "portable"),
    GraphFault(
        "branch of the first sample",
        "routed branches",
        _branch_of_the_first_sample,
        LEARNED,
        OUTPUT | CALLS,
        "portable",
    ),
    GraphFault(
        "router rounds its timestep",
        "routed branches",
        _router_reads_rounded_hundreds,
        LEARNED,
        OUTPUT | CALLS,
        "portable",
    ),
    GraphFault("next branch below t = 20", "routed branches", _branch_of_the_end, LEARNED, OUTPUT | CALLS, "portable"),
    GraphFault("branch x 1.001", "routed branches", _branch_slightly_off, LEARNED, OUTPUT),
    GraphFault("branch in FP16", "routed branches", _branch_in_half, LEARNED, OUTPUT),
    GraphFault(
        "static scale x (1 + 2^-10)",
        "static scales",
        partial(_static_scale, exponent=-10),
        LEARNED,
        CODES | OUTPUT,
        "portable",
    ),
    GraphFault(
        "static scale of another layer", "static scales", _static_scale_of_another_layer, LEARNED, CODES, "portable"
    ),
    GraphFault("zero point dropped", "static scales", partial(_static_zero, factor=0), LEARNED, CODES, "portable"),
    GraphFault(
        "zero point x 1.001", "static scales", partial(_static_zero, factor=1.001), LEARNED, CODES | OUTPUT, "portable"
    ),
    GraphFault("balance of the neighbour", "static scales", _balance_of_the_neighbour, LEARNED, CODES, "portable"),
    GraphFault("one factor of the balance x 1.01", "static scales", _one_balance, LEARNED, CODES, "portable"),
    GraphFault("offset dropped", "static scales", _offset_dropped, LEARNED, CODES, "portable"),
)
