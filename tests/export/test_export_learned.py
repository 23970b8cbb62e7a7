"""What calibration methods learn, in the portable graph: the same numbers in any runtime, and all of it read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export import to_onnx
from export.checkpoint import QuantizedLinear
from export.errors import ContractError
from export.models.load import LoadedModel, load, sample_inputs
from export.portable import read_layers
from export.to_onnx import export_portable
from pipeline.backends.reference import ReferenceEngine, fake_quant
from tests.support import learned, tiny
from tests.support.portable import op_types, portable, random_linear, run

INPUTS = "float[batch,S,64] x, float[batch] timestep"
ONE = 'y = fpq.QuantizedLinear <layer="a"> (x)'
TIMES = np.float32([3, 500, 997])
ROUNDING = 2.0**-24
CASES = {
    "per_tensor": lambda one: learned.with_scaling(one, "per_tensor"),
    "zero": lambda one: learned.with_scaling(one, "zero"),
    "token_group": lambda one: learned.with_scaling(one, "token_group"),
    "balance": learned.with_balance,
    "multiplier": lambda one: learned.with_balance(one, offset=False),
    "branches": lambda one: learned.with_low_rank(one, learned.router()),
    "halves": lambda one: learned.with_low_rank(one, learned.router(), half=True),
    "only branch": lambda one: learned.with_low_rank(one, None, half=True),
    "everything": lambda one: learned.with_low_rank(
        learned.with_balance(learned.with_scaling(one, "zero")), learned.router()
    ),
}


def grid_input(seed: int = 0, tokens: int = 5) -> Any:
    """[3, tokens, 64] float32 whose quotients lie far from midpoints with near certainty: float32 codes are exact."""
    return np.random.default_rng(seed).normal(size=(3, tokens, 64)).astype(np.float32)


def size_of(layer: QuantizedLinear, x: Any) -> Any:
    """Sum of the magnitudes of all products, per output: what a rounding error is relative to.

    A rounded number exceeds |x * multiplier| by offset, zero and half a step, together less than 1 here.
    """
    reach = np.abs(x) * (1 if layer.input_multiplier is None else layer.input_multiplier) + 1
    size = reach @ np.abs(layer.dequantized()).T + (0 if layer.bias is None else np.abs(layer.bias))
    if layer.lora_down is None:
        return size
    pairs = zip(np.abs(layer.lora_down), np.abs(layer.lora_up), strict=True)
    return size + np.max([np.abs(x) @ down.T @ up.T for down, up in pairs], axis=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", CASES)
def test_the_graph_computes_what_the_layer_stands_for(what: str, bias: bool) -> None:
    """K products with rounded operands, and as many of the branches: (2 K + 16) roundings of the sum of magnitudes."""
    layer, x = CASES[what](random_linear(bias=bias)), grid_input()
    feeds = {"x": x, "timestep": TIMES} if layer.router is not None else {"x": x}
    model = portable(ONE, [layer], INPUTS)
    (output,) = run(model, {name: feeds.get(name, TIMES) for name in ("x", "timestep")})
    expected = learned.expected_output(layer, x, TIMES)
    assert (np.abs(output - expected) <= (2 * 64 + 16) * ROUNDING * size_of(layer, x)).all()


@pytest.mark.parametrize("what", ["branches", "everything"])
def test_inputs_without_a_row_axis(what: str) -> None:
    layer, x = CASES[what](random_linear()), grid_input(tokens=1)
    flat = portable(ONE, [layer], "float[batch,64] x, float[batch] timestep", "float[batch,16] y")
    (output,) = run(flat, {"x": x[:, 0], "timestep": TIMES})
    (expected,) = run(portable(ONE, [layer], INPUTS), {"x": x, "timestep": TIMES})
    np.testing.assert_allclose(output, expected[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["float[batch,64] x", "float[a,b,c,64] x"])
def test_a_branch_without_router_takes_any_axes_and_no_timestep(shape: str) -> None:
    layer, x = CASES["only branch"](random_linear()), grid_input(tokens=4)
    shaped = x[:, 0] if "batch" in shape else x.reshape(3, 2, 2, 64)
    (output,) = run(portable(ONE, [layer], shape, f"float[{shape.split('[')[1].split(',64')[0]},16] y"), {"x": shaped})
    (expected,) = run(portable(ONE, [layer], INPUTS), {"x": x, "timestep": TIMES})
    flat = expected[:, 0] if "batch" in shape else expected
    np.testing.assert_allclose(output.reshape(flat.shape), flat, rtol=1e-6, atol=1e-6)


def test_a_branch_without_router_is_read_back_beside_routed_ones(tmp_path: Path) -> None:
    of = learned.router()
    layers = [learned.with_low_rank(random_linear("a"), of), learned.with_low_rank(random_linear("b", seed=1), None)]
    body = 'u = fpq.QuantizedLinear <layer="a"> (x) v = fpq.QuantizedLinear <layer="b"> (x) y = Add(u, v)'
    ir.save(portable(body, layers, INPUTS), tmp_path / "model.onnx")
    back = {layer.name: layer for layer in read_layers(tmp_path / "model.onnx")}
    for layer in layers:
        assert back[layer.name].router == layer.router
        for key in ("lora_down", "lora_up"):
            np.testing.assert_array_equal(getattr(back[layer.name], key), getattr(layer, key))


def test_integer_timesteps_are_converted() -> None:
    layer, x = CASES["branches"](random_linear()), grid_input()
    model = portable(ONE, [layer], "float[batch,S,64] x, int64[batch] timestep")
    (output,) = run(model, {"x": x, "timestep": TIMES.astype(np.int64)})
    (expected,) = run(portable(ONE, [layer], INPUTS), {"x": x, "timestep": TIMES})
    np.testing.assert_array_equal(output, expected)


def test_one_router_serves_all_layers() -> None:
    of = learned.router()
    layers = [learned.with_low_rank(random_linear(name, seed=i), of, i) for i, name in enumerate("ab")]
    body = 'u = fpq.QuantizedLinear <layer="a"> (x) v = fpq.QuantizedLinear <layer="b"> (x) y = Add(u, v)'
    model = portable(body, layers, INPUTS)
    types = op_types(model)
    assert (types.count("ArgMax"), types.count("Gemm"), types.count("Gather")) == (1, 2, 4)


def test_branches_that_float16_holds_are_stored_in_it() -> None:
    for half, kind in ((True, np.dtype(np.float16)), (False, np.dtype(np.float32))):
        model = portable(ONE, [learned.with_low_rank(random_linear(), learned.router(), half=half)], INPUTS)
        assert {model.graph.initializers[f"a.lora_{key}"].dtype.numpy() for key in ("down", "up")} == {kind}


def test_a_model_without_timestep_cannot_have_branches() -> None:
    with pytest.raises(ContractError, match="the model has no input timestep, which low-rank branches are routed by"):
        portable(ONE, [CASES["branches"](random_linear())])


@pytest.mark.parametrize("shape", ["frames,S,64", "batch,S,2,64"])
def test_an_input_that_is_not_led_by_the_batch_cannot_have_branches(shape: str) -> None:
    with pytest.raises(ContractError, match=r"a: its input has shape .*, not \[batch, K\] or \[batch, rows, K\]"):
        portable(ONE, [CASES["branches"](random_linear())], f"float[{shape}] x, float[batch] timestep")


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pixart", "hunyuan"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[QuantizedLinear], Path]:
    """A tiny model in which each layer has something else."""
    root = tmp_path_factory.mktemp("learned")
    model = load(str(tiny.folder(request.param, root)))
    layers = learned.mixed(tiny.quantized(model, granularity="exact_group"))
    export_portable(model, layers, root / "model.onnx")
    return model, layers, root / "model.onnx"


@pytest.mark.torch
def test_all_of_it_is_read_back(exported: Any) -> None:
    _, layers, path = exported
    by_name = {layer.name: layer for layer in read_layers(path)}
    assert len(by_name) == len(layers)
    for layer in layers:
        for key in layer.__dataclass_fields__:
            one, other = getattr(layer, key), getattr(by_name[layer.name], key)
            assert (one is None) == (other is None), (layer.name, key)
            np.testing.assert_array_equal(one, other, err_msg=f"{layer.name} {key}")


@pytest.mark.torch
def test_the_model_is_the_reference(exported: Any) -> None:
    """Layer by layer on the graph's own inputs: the float64 reference on what the layer reads.

    At most 256 products, twice with branches, each off by 2^-24: 1e-4 of the largest number is above that.
    """
    model, layers, path = exported
    inputs = sample_inputs(model, 2, 1) | {"timestep": np.float32([7, 801])}
    graph = onnx.load(path, load_external_data=False)
    read = {layer.name: first_input(graph, layer.name) for layer in layers}
    outputs = probed(path, graph, {*read.values(), *(f"{layer.name}/output" for layer in layers)}, inputs)
    modules = dict(fake_quant(model, layers, torch.float64).named_modules())
    for layer in layers:
        linear, x = modules[f"transformer.{layer.name}"], outputs[read[layer.name]]
        if layer.router is not None:
            linear.routing.tell(torch.from_numpy(inputs["timestep"]))
        expected = linear(torch.from_numpy(x).double()).numpy()
        close = np.abs(outputs[f"{layer.name}/output"] - expected) <= 1e-4 * np.abs(expected).max()
        assert close.mean() > 0.95, layer.name  # the rest: codes on the other side of a midpoint


@pytest.mark.torch
def test_branch_numbers_follow_the_timesteps(exported: Any) -> None:
    model, _, path = exported
    times, inputs = np.arange(0, 1000, 13).astype(np.float32), sample_inputs(model, 2, 1)
    session = probe_session(path, onnx.load(path, load_external_data=False), {"router/branch"})
    for pair in times[:-1:2, None] + np.float32([0, 13]):
        (branches,) = session.run(["router/branch"], fed(session, inputs | {"timestep": pair}))
        np.testing.assert_array_equal(branches, learned.router().choose(pair))


def first_input(graph: onnx.ModelProto, layer: str) -> str:
    nodes = {node.name: node for node in graph.graph.node}
    first = next(role for role in ("multiply", "quantize") if f"{layer}/{role}" in nodes)
    return nodes[f"{layer}/{first}"].input[0]


def probe_session(path: Path, graph: onnx.ModelProto, names: Iterable[str]) -> onnxruntime.InferenceSession:
    """The graph, whose file is at `path`, with values inside it as its outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(changed, path.with_name("probed.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path.with_name("probed.onnx"), options, ["CPUExecutionProvider"])


def fed(session: onnxruntime.InferenceSession, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: inputs[item.name] for item in session.get_inputs()}


def probed(path: Path, graph: onnx.ModelProto, names: set[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    inner = sorted(names - set(inputs))
    session = probe_session(path, graph, inner)
    values = dict(zip(inner, session.run(inner, fed(session, inputs)), strict=True))
    return values | {name: inputs[name] for name in names & set(inputs)}


@pytest.mark.torch
def test_models_of_different_routers_are_refused(exported: Any, tmp_path: Path) -> None:
    model, layers, _ = exported
    other = [
        replace(layer, router=learned.router(seed=9)) if i > 5 and layer.router else layer
        for i, layer in enumerate(layers)
    ]
    with pytest.raises(ContractError, match="have different routers; all layers of a model share one"):
        export_portable(model, other, tmp_path / "model.onnx")


@pytest.mark.torch
def test_a_router_that_rounding_may_sway_is_told(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, layers, _ = exported
    to_onnx._log_undecided(layers)
    assert not caplog.records
    of = learned.router()
    tied = replace(of, w2=0 * of.w2)
    to_onnx._log_undecided([replace(layer, router=tied if layer.router else None) for layer in layers])
    assert "router: branches are tied within float32 rounding at 1000 timesteps: 0, 1, 2, 3," in caplog.text


@pytest.mark.torch
def test_the_reference_of_the_model_runs(exported: Any) -> None:
    model, layers, _ = exported
    inputs = sample_inputs(model, 2, 1)
    assert np.isfinite(ReferenceEngine(fake_quant(model, layers, torch.float32)).run(inputs)["sample"]).all()
