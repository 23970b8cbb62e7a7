"""`rtx.path=plugin` from a packed graph to an engine file, on a machine without a GPU: compiled, not run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.errors import ContractError, EnvironmentLacksError
from pipeline.backends.base import MODEL, LoweredGraph
from pipeline.backends.fused.ops import DOMAIN
from pipeline.backends.metadata_file import NAME as METADATA
from pipeline.backends.rtx import RtxBackend, RtxOptions
from pipeline.backends.rtx.build import ENGINE
from pipeline.backends.tensorrt import plugin_payloads
from pipeline.backends.tensorrt.plan_file import PLUGIN_STEP, check_plugins, read_engine_file
from pipeline.backends.tensorrt.plugin_graph import KernelNode
from pipeline.passes.quantized_gemm import read_gemm
from pipeline.recipe import Calibrate, Formats, Recipe
from pipeline.verify.oracle import activation_oracle
from pipeline.verify.probe import ProbedGraph, open_session
from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.tensorrt.payload import FIELD, Payload, from_text
from tests.support.op_models import make_node
from tests.support.portable import random_linear
from tests.support.rtx_models import Graph, Linear, block, single

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.rtx
WIDTH = 128
RECIPE = Recipe("t", "zoo:pixart_mini").with_options(RtxOptions(sm=(89,), path="plugin"))
PLUGINS = {"gelu_quantize": 1, "norm_modulate_quantize": 2, "packed_gemm": 4, "quantize": 1}
LINEARS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "ff.up", "ff.down")


def recipe(*sms: int) -> Recipe:
    return RECIPE.with_options(RtxOptions(sm=sms, path="plugin"))


def lowered(folder: Path, chosen: Recipe, model: onnx.ModelProto) -> LoweredGraph:
    portable = folder / "portable.onnx"
    onnx.save(model, portable, save_as_external_data=True, location="portable.onnx.data")
    (folder / "work").mkdir()
    return RtxBackend().lower(portable, folder / "work", chosen)


def small_block() -> onnx.ModelProto:
    return block(WIDTH, group_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lowered graph in work/, engine in rtx/."""
    root = tmp_path_factory.mktemp("plugin")
    (root / "rtx").mkdir()
    RtxBackend().build(lowered(root, RECIPE, small_block()), root / "rtx", RECIPE)
    return root


@pytest.mark.fast
def test_the_plan_has_every_plugin_with_its_weight_packed(folder: Path) -> None:
    engine = read_engine_file(folder / "rtx" / ENGINE)
    metadata = json.loads((folder / "rtx" / METADATA).read_text())
    assert metadata["plugins"] == PLUGINS and metadata["compute_capabilities"] == [89]
    assert sum(step.kind == PLUGIN_STEP for step in engine.steps) == sum(PLUGINS.values())
    # q, k, v, out: 128 x 128, up and down 128 x 256, half a byte each.
    weights = (4 * WIDTH**2 + 2 * 2 * WIDTH**2) // 2
    # A nibble for 64 input channels: a byte for each channel of q, k, v, out and up, two for those of down.
    multipliers = (4 * WIDTH + 2 * WIDTH) + 2 * WIDTH
    assert metadata["packed_weight_bytes"] == weights
    assert metadata["constant_bytes"]["int8"] == weights + multipliers
    assert "not run" in metadata["proof"]


def test_nothing_but_the_verified_graph_is_left_in_the_work_folder(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "work").iterdir()) == [MODEL, f"{MODEL}.data"]


def test_the_engine_carries_machine_code_once_for_equal_layers(folder: Path) -> None:
    nodes, payloads = builders_graph(folder)
    assert all(variant.code.startswith(b"\x7fELF") for payload in payloads for variant in payload.variants)
    carried = {name: payload for (name, _), payload in zip(nodes, payloads, strict=True) if payload.variants}
    assert sorted(carried) == [
        *("attn.to_out", "attn.to_out/quantize", "attn.to_q+attn.to_k+attn.to_v"),
        *("ff.down", "ff.down/quantize", "ff.up", "norm1", "norm2"),
    ]  # fmt: skip
    assert all(payload.sms == (89,) for payload in carried.values())
    data = (folder / "rtx" / ENGINE).read_bytes()
    assert all(text in data for _, text in nodes)


def builders_graph(folder: Path) -> tuple[list[tuple[str, bytes]], list[Payload]]:
    """(name, payload as text) of every plugin node of the builder's graph, and the payloads."""
    with plugin_payloads.builders_graph(folder / "work" / MODEL, 1, (89,)) as (path, _):
        graph = onnx.load(path, load_external_data=False).graph
    texts = [(node.name, a.s) for node in graph.node for a in node.attribute if a.name == FIELD]
    return texts, [from_text(text.decode()) for _, text in texts]


@contextmanager
def uncompiled(lowered: Path, *sms: int) -> Iterator[tuple[Path, list[KernelNode]]]:
    """The builder's graph with plugins that carry no code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin_payloads, "compile_payload", lambda kernel, spec, *_: Payload(kernel, spec, ()))
        with plugin_payloads.builders_graph(lowered, 1, sms) as graph:
            yield graph


@pytest.mark.fast
def test_the_builders_graph_is_the_verified_one_without_bodies(folder: Path) -> None:
    with uncompiled(folder / "work" / MODEL, 89) as (path, _):
        verified, bare = (onnx.load(folder / "work" / name, load_external_data=False) for name in (MODEL, path.name))
    assert [node.name for node in bare.graph.node] == [node.name for node in verified.graph.node]
    assert not bare.functions and verified.functions
    plugins = {node.name: node for node in bare.graph.node if node.domain == DOMAIN}
    spec = from_text(next(a.s.decode() for a in plugins["ff.down"].attribute if a.name == FIELD)).spec
    assert (spec.in_features, spec.out_features, spec.group_size, spec.output) == (2 * WIDTH, WIDTH, 64, "fp32")
    assert len(plugins["norm1"].output) == 2 and len(plugins["ff.up"].output) == 1
    types = {tensor.name: tensor.data_type for tensor in bare.graph.initializer}
    assert types["ff.up.codes"] == types["ff.up.multipliers"] == onnx.TensorProto.INT8
    assert onnx.TensorProto.UINT8 not in types.values()


@pytest.mark.kernels
def test_the_verified_graph_runs_in_stock_onnxruntime_and_agrees_with_tensorrt_s(folder: Path, tmp_path: Path) -> None:
    of_tensorrt = lowered(tmp_path, RECIPE.with_options(RtxOptions()), small_block())
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 9, WIDTH), "shift": (2, 1, WIDTH), "scale": (2, 1, WIDTH)}
    fed = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    own, other = (
        open_session(onnx.load(path, load_external_data=False), path.parent, threads=1).run(["y"], fed)[0]
        for path in (folder / "work" / MODEL, of_tensorrt.path)
    )
    # Both have the same exact sums; float32 after them is rounded in another order, so that a quotient at a midpoint of
    # the grid may get the neighbouring code: a share of codes that the gates bound, here none or a few of 18 x 128.
    assert np.median(np.abs(own - other)) <= 4 * np.finfo(np.float32).eps * np.abs(other).max()


def test_every_linear_passes_its_gate(folder: Path, tmp_path: Path) -> None:
    """The exact integer sums of the operands' images, in the graph that the engine is made from."""
    linear = Linear("layer", 64, 48, group_size=32)
    graph = lowered(tmp_path, recipe(89), single(linear))
    x = np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32)
    ((_, (probe,)),) = ProbedGraph(graph).probes(["layer"], [{"x": x}])
    weight = read_gemm(next(iter(packed_nodes(single(linear))))).integers()
    assert np.array_equal(probe.gemm, (probe.integers @ weight.T * probe.gemm_unit).astype(np.float32))
    oracle = activation_oracle(x.reshape(10, 64), random_linear(n=48))
    assert ((probe.integers >= oracle.lowest) & (probe.integers <= oracle.highest)).all()


def packed_nodes(model: onnx.ModelProto) -> list[ir.Node]:
    return [node for node in ir.serde.deserialize_model(model).graph if node.op_type == "PackedGemm"]


def test_probes_cover_every_linear_and_choices_say_plugin(tmp_path: Path) -> None:
    graph = lowered(tmp_path, recipe(89), small_block())
    assert {probe.layer for probe in graph.probes} == set(LINEARS)
    assert {choice.path for choice in graph.choices} == {"plugin, int8 or fp8 operands"}
    assert all(probe.exact for probe in graph.probes)


def test_two_builds_give_the_same_graph_and_metadata(folder: Path, tmp_path: Path) -> None:
    """The engines differ at times in numbers that the builder gives to tensors of its own."""
    (tmp_path / "rtx").mkdir()
    RtxBackend().build(lowered(tmp_path, RECIPE, small_block()), tmp_path / "rtx", RECIPE)
    for name in (f"work/{MODEL}", f"work/{MODEL}.data", f"rtx/{METADATA}"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("linear", "sms"),
    [
        (Linear("layer", 128, 64, "INT8", weight="E1M2"), (86,)),
        (Linear("layer", 128, 64, "E3M4", group_size=32, real_groups=True), (120,)),
    ],
    ids=["INT8 without FP8 units", "real groups"],
)
def test_other_formats_and_gpus_build(linear: Linear, sms: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "rtx").mkdir()
    chosen = recipe(*sms)
    metadata = RtxBackend().build(lowered(tmp_path, chosen, single(linear)), tmp_path / "rtx", chosen).metadata
    assert metadata["plugins"] == {"packed_gemm": 1, "quantize": 1} and metadata["compute_capabilities"] == list(sms)
    assert metadata["constant_bytes"]["int8"] == 128 * 64 // 2


def specs_of(graph: LoweredGraph, *sms: int) -> list[QuantizeSpec | GemmSpec]:
    """Of every plugin of the builder's graph for these GPUs."""
    with uncompiled(graph.path, *sms) as (_, nodes):
        return [node.spec for node in nodes]


@pytest.mark.parametrize(
    ("operands", "sms", "integers"),
    [
        ("int8", (80,), True),
        ("fp8", (80,), False),
        ("auto", (80, 86, 89, 120), True),
        ("auto", (90,), False),
        ("auto", (89, 100), False),
    ],
)
def test_operands_are_what_the_recipe_or_the_gpus_say(
    operands: str, sms: tuple[int, ...], integers: bool, tmp_path: Path
) -> None:
    """Codes and GEMMs alike; the graph that is verified is the same for every GPU."""
    graph = lowered(tmp_path, RECIPE.with_options(RtxOptions(path="plugin", operands=operands)), small_block())
    specs = specs_of(graph, *sms)
    assert {spec.integers for spec in specs} == {integers} and len(specs) == sum(PLUGINS.values())
    assert all(spec.multiplies_integers == integers for spec in specs if isinstance(spec, GemmSpec))


def test_formats_that_do_not_embed_in_int8_stay_fp8(tmp_path: Path) -> None:
    chosen = RECIPE.with_options(RtxOptions(path="plugin", operands="int8"))
    graph = lowered(tmp_path, chosen, single(Linear("layer", 64, 48, "E3M2")))
    assert {spec.integers for spec in specs_of(graph, 86)} == {False}
    assert {choice.path for choice in graph.choices} == {"plugin, fp8 operands"}


# --- what must be refused ------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_layer_that_is_no_plugin_is_named(folder: Path) -> None:
    engine = read_engine_file(folder / "rtx" / ENGINE)
    with pytest.raises(ContractError, match=r"ff\.gone: the engine .* has no kernel for it; expected a plugin"):
        check_plugins(engine, {"ff.gone": 0})
    with pytest.raises(ContractError, match=r"scores/MatMul: the engine .* runs it as function"):
        check_plugins(engine, {"scores/MatMul": 0})


def test_a_weight_that_is_not_packed_is_named(folder: Path) -> None:
    engine = read_engine_file(folder / "rtx" / ENGINE)
    with pytest.raises(
        ContractError, match=r"ff\.up: packed weights are int8 of 65536 bytes, its constants are .*int8"
    ):
        check_plugins(engine, {"ff.up": 4 * 16384})


def test_constant_scales_are_refused_before_any_work() -> None:
    static = replace(RECIPE, calibrate=Calibrate(method="msfp"))
    (problem,) = RtxBackend().problems(static)
    assert "calibrate.method msfp scales activations per_tensor" in problem and "rtx.path=tensorrt" in problem


def test_constant_scales_are_refused_while_lowering(tmp_path: Path) -> None:
    graph, layer = Graph(), Linear("layer", 64, 48)
    graph.initializers += [
        onnx.numpy_helper.from_array(np.full(1, v, np.float32), n) for n, v in (("s", 0.1), ("z", 0))
    ]
    node = make_node("QuantizeStatic", ["x", "s", "z"], ["c"], name="layer/quantize", format="E2M3")
    graph.nodes.append(node)
    graph.linear(("c", "s"), layer, "y")
    with pytest.raises(ContractError, match=r"layer/quantize: plugins quantize with one scale per token"):
        lowered(tmp_path, RECIPE, graph.model(64, {"y": 48}))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("formats", "text"),
    [
        (Formats("INT8", "INT8"), "weights in INT8: the GPU kernels take 4-bit weights.*; .*rtx.path=tensorrt"),
        (Formats("E2M1", "E2M3", {"ff.in": "E2M3"}), "weights in E2M3: the GPU kernels take 4-bit weights"),
    ],
)
def test_formats_that_no_kernel_takes_are_refused_before_any_work(formats: Formats, text: str) -> None:
    (problem,) = RtxBackend().problems(replace(RECIPE, formats=formats))
    assert re.search(text, problem)
    assert RtxBackend().problems(replace(RECIPE, formats=formats).with_options(RtxOptions())) == []


def test_gpus_that_no_kernel_is_compiled_for_are_refused_before_any_work() -> None:
    (problem,) = RtxBackend().problems(recipe(89, 121))
    assert "not compiled for SM 121" in problem


def test_a_missing_triton_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.gpu.compile.problems", lambda: ["triton is not installed; run: pip install triton"])
    (problem,) = RtxBackend().problems(RECIPE)
    assert "rtx.path=plugin: triton is not installed" in problem
    assert RtxBackend().problems(RECIPE.with_options(RtxOptions())) == []


def test_doctor_lists_the_plugins_that_the_registry_finds() -> None:
    row = RtxBackend().checks()[1]
    assert row.ok and row.found == (
        "namespace fpq, version 1: Quantize GeluQuantize NormModulateQuantize PackedGemm; compiled, not run"
    )


def test_doctor_says_why_there_are_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentLacksError("tensorrt_rtx is not here; install it")

    monkeypatch.setattr("plugins.tensorrt.rtx_plugin.registered", missing)
    row = RtxBackend().checks()[1]
    assert not row.ok and not row.needed and "rtx.path=plugin; tensorrt_rtx is not here" in row.remedy
