"""The `cuda` target without a GPU: build, refusals, and its executor on the CPU against the graph in onnxruntime."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.checkpoint import QuantizedLinear
from export.errors import ContractError, EnvironmentLacksError, RecipeError
from export.models import load as models
from export.models.families import FAMILIES
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, lowering_file
from pipeline.backends.base import Arrays, LoweredGraph
from pipeline.backends.cuda import CudaOptions
from pipeline.backends.cuda import engine as cuda_engine
from pipeline.backends.cuda.engine import Captured, CudaEngine, Part
from pipeline.backends.cuda.module import LoweredModule
from pipeline.backends.cuda.overflow import find_overflow
from pipeline.backends.fused.ops import DOMAIN
from pipeline.generate.diffusers_adapter import EngineTransformer
from pipeline.recipe import Recipe
from pipeline.verify.effort import LARGE_INSIDE, Effort
from pipeline.verify.gates import end_gates
from pipeline.verify.proof import verify, verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import Study, study
from plugins.gpu.spec import operand_bytes
from tests.support import tiny

pytestmark = pytest.mark.torch

BACKEND = BACKENDS["cuda"]


@dataclass(frozen=True)
class Built:
    """A folder like a bundle's, with the portable model and cuda/ of a tiny model."""

    folder: Path
    model: Any
    layers: list[QuantizedLinear]
    recipe: Recipe
    lowered: LoweredGraph

    @property
    def engine(self) -> Path:
        return self.folder / "cuda"

    def rebuilt(self, folder: Path, **chosen: str) -> Path:
        """cuda/ of the same lowered graph with other options."""
        recipe = self.recipe.with_options(replace(self.recipe.options(CudaOptions), **chosen))
        folder.mkdir()
        BACKEND.build(self.lowered, folder, recipe)
        return folder


@pytest.fixture(scope="module", params=["pixart", "hunyuan", "dit"])
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def build(family: str, folder: Path) -> Built:
    model = models.load(str(tiny.folder(family, folder)))
    layers = tiny.quantized(model, granularity="exact_group")
    export_portable(model, layers, folder / "model.onnx")
    chosen = {"name": "tiny", "model": model.source, "sampling": {"n_steps": 3}, "cuda": {"activations": "fp32"}}
    recipe = recipes.from_dict(chosen, "test")
    for name in ("work", "cuda"):
        (folder / name).mkdir()
    lowered = BACKEND.lower(folder / "model.onnx", folder / "work", recipe)
    BACKEND.build(lowered, folder / "cuda", recipe)
    return Built(folder, model, layers, recipe, lowered)


def random_inputs(graph: ir.Graph) -> Arrays:
    """Random inputs of a model; the last caption token is masked."""
    sizes, rng = {"batch": 2, "tokens": 5}, np.random.default_rng(0)
    arrays: Arrays = {}
    for value in graph.inputs:
        name, known = str(value.name), value.shape or ()
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in known]
        integer = value.dtype == ir.DataType.INT64
        arrays[name] = np.zeros(shape, np.int64) if integer else rng.standard_normal(shape).astype(np.float32)
        if "mask" in name:
            arrays[name] = np.ones(shape, np.float32)
            arrays[name][:, -1] = 0
    return arrays


# --- the executor ---------------------------------------------------------------------------------------------------


def test_every_step_equals_onnxruntime(built: Built) -> None:
    """Each node gets the inputs that onnxruntime computed, so that no rounding is carried on."""
    graph = ir.load(built.lowered.path)
    expected = all_tensors(built.lowered.path, graph.graph)
    module = LoweredModule(graph)
    tensors = {name: torch.from_numpy(array) for name, array in expected.items()} | module.known.constants
    tensors |= dict(module.named_buffers(recurse=False))
    for node in graph.graph:
        if fmt := node.attributes.get("format"):  # codes are operand bytes here
            codes = str(node.outputs[0].name)
            tensors[codes] = torch.from_numpy(operand_bytes(fmt.as_string())[expected[codes]])
    with torch.inference_mode():
        for step in module.steps:
            results = step.advance(dict(tensors))
            for name, tensor in zip(step.outputs, results, strict=False):
                if name:
                    compare(tensor, tensors[name], step.name)


def all_tensors(path: Path, graph: ir.Graph) -> Arrays:
    """Inputs, and every tensor that the graph computes from them, by onnxruntime."""
    changed, inputs = onnx.load(path), random_inputs(graph)
    names = [str(value.name) for node in graph for value in node.outputs]
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(changed.SerializeToString(), options)
    return dict(zip(names, session.run(names, inputs), strict=True)) | inputs


def compare(tensor: torch.Tensor, expected: torch.Tensor, step: str) -> None:
    """What one node computes from the same inputs.

    Floats: the longest sum has 1616 terms. Roundings of a float32 sum are as good as random, so n terms leave about
    sqrt(n) = 40 of them, each of a partial sum about as large as the largest result; two orders of summing, twice that.
    Codes: one differs only where such a rounding moves a number over a midpoint, which in these few tokens hits less
    than one code in a thousand.
    """
    assert tensor.shape == expected.shape and tensor.dtype == expected.dtype, step
    if tensor.dtype == torch.uint8:
        assert float((tensor != expected).float().mean()) <= 1e-3, step
    elif tensor.is_floating_point():
        assert float((tensor - expected).abs().max()) <= 80 * 2.0**-24 * float(expected.abs().max()), step
    else:
        assert torch.equal(tensor, expected), step


def test_the_engine_passes_all_gates_in_both_arithmetics(built: Built, tmp_path: Path) -> None:
    """On the CPU. A fault in one GEMM of the engine alone, whose graph is right, fails the gate of the steps."""
    studied = study(built.model, built.layers, built.recipe, {"fp32", "fp16 tokens"})
    engine, report = CudaEngine(built.engine, device="cpu"), Report()
    # All steps and calls by their outputs, the inside of a step and of one call.
    effort = Effort((0, 1, 2), studied.probed[-1:], pictures=1, inside=LARGE_INSIDE)
    verify_target("cuda", built.model, built.layers, built.lowered, engine, studied, report, effort=effort)
    assert report.failures() == []
    half = CudaEngine(built.rebuilt(tmp_path / "half", activations="fp16", weights="expanded"), device="cpu")
    recipe = built.recipe.with_options(CudaOptions(activations="fp16"))
    arithmetic = BACKEND.arithmetic(recipe, runs_here=True)
    assert failed_ends(half, studied, arithmetic) == set()
    assert "cuda/median_sqnr_db" in failed_ends(half, studied, BACKEND.arithmetic(recipe, runs_here=False))
    assert half.step is not None
    gemms = list(half.step.module.gemms)
    assert all(gemm.is_expanded for gemm in gemms)
    gemms[-1].w = gemms[-1].w.flip(0)
    assert "cuda/step_sqnr_db" in failed_ends(half, studied, arithmetic)


def failed_ends(engine: CudaEngine, studied: Study, arithmetic: str) -> set[str]:
    """Names of the gates on steps and pictures that fail."""
    gates = end_gates(
        "cuda", studied.errors(engine.run), studied.case.draw(engine.run), studied, studied.float32[arithmetic]
    )
    return {gate.name for gate in gates if not gate.passed}


@pytest.mark.kernels
def test_the_engine_runs_on_the_kernels(
    built: Built, interpreter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model on Triton kernels, interpreted: as near to plain torch in fp16 as that is to float32.

    Both round tokens to fp16 in the same places, and differ where a last place flips a code; each by itself is off
    from float32 by all its fp16 roundings.
    """
    if built.model.family.name != "dit":
        pytest.skip("one family, the smallest, suffices")
    half, full = (
        CudaEngine(built.rebuilt(tmp_path / name, activations=name, weights="packed"), device="cpu")
        for name in ("fp16", "fp32")
    )
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    sample = half.run(inputs)["sample"]
    monkeypatch.delenv("TRITON_INTERPRET")
    expected, exact = half.run(inputs)["sample"], full.run(inputs)["sample"]
    assert np.linalg.norm(sample - expected) <= np.linalg.norm(expected - exact)


def test_tokens_are_half_and_timesteps_are_not(built: Built) -> None:
    module = LoweredModule(ir.load(built.lowered.path), activations="fp16")
    types = module.known.types
    outputs = [(step, name) for step in module.steps for name in step.outputs if name is not None]
    sines = [name for step, name in outputs if "Sin" in step.name or name.startswith("sin")]
    assert sines and {types[name] for name in sines} == {torch.float32}
    gemms = [step.outputs[0] for step in module.steps if step.name.endswith(("to_q", "to_out.0", "net.2"))]
    assert gemms and {types[name] for name in gemms} == {torch.float16}


# The name of a parameter -> what makes the numbers behind it too large for FP16.
LARGE = {"1.attn1.to_v": ("output of .*1.attn1.to_q.*", 4e4), "1.ff.net.2": ("output of .*1.ff.net.2", 1e5)}


@pytest.mark.parametrize("part", LARGE)
def test_a_number_beyond_fp16_is_named_with_its_layer(part: str, tmp_path: Path) -> None:
    words, size = LARGE[part]
    model = models.load(str(tiny.folder("dit", tmp_path, half=False)))
    linear = next(ref.module for ref in model.linears() if ref.name.endswith(part))
    linear.weight.copy_(linear.weight.sign() * size)
    layers = tiny.quantized(model, granularity="exact_group")
    export_portable(model, layers, tmp_path / "model.onnx")
    chosen = {"name": "tiny", "model": model.source, "sampling": {"n_steps": 2}, "cuda": {"activations": "fp16"}}
    recipe = recipes.from_dict(chosen, "test")
    (tmp_path / "cuda").mkdir()
    lowered = BACKEND.lower(tmp_path / "model.onnx", tmp_path / "cuda", recipe)
    report = verify(model, layers, {"cuda": lowered}, {}, recipe, tmp_path / "report")
    gate = next(gate for gate in report.gates if gate.name == "cuda/fp16_range")
    assert not gate.passed and re.search(f"in step 1: FP16 overflow: the {words} reaches .*FP16 holds 65504", gate.why)
    assert BACKEND.overflow(lowered, recipe.with_options(CudaOptions(activations="fp32"))) is None


def test_numbers_within_fp16_pass(built: Built) -> None:
    """Random inputs, and those that are too large from the start."""
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    assert find_overflow(built.lowered.path, {"a call": inputs}) is None
    large = inputs | {"hidden_states": inputs["hidden_states"] * np.float32(1e6)}
    where = find_overflow(built.lowered.path, {"a call": inputs, "another": large})
    assert where is not None and where[0] == "another" and "an input reaches" in str(where[1])


def test_auto_expands_where_a_call_has_many_tokens(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ir.load(built.lowered.path)
    module = LoweredModule(graph, weights="auto").finish()
    inputs = {name: torch.from_numpy(array) for name, array in random_inputs(graph.graph).items()}
    with torch.inference_mode():
        few = module(inputs)["sample"]
        assert not any(gemm.is_expanded for gemm in module.gemms)
        monkeypatch.setattr("pipeline.backends.cuda.torch_gemm.EXPAND_FROM", 20)
        assert torch.equal(module(inputs)["sample"], few)  # the same sums, from a byte for each weight
    assert {gemm.is_expanded for gemm in module.gemms if "net.0" in gemm_name(module, gemm)} == {True}


def gemm_name(module: LoweredModule, gemm: Any) -> str:
    return next(step.name for step in module.steps if step.run is gemm)


def test_an_unknown_op_is_refused_before_anything_runs(built: Built) -> None:
    graph = ir.load(built.lowered.path)
    node = next(node for node in graph.graph if node.op_type == "Sigmoid")
    node.op_type = "Selu"
    with pytest.raises(ContractError, match=r"target cuda does not know Selu \(first at node .*\); add a row"):
        LoweredModule(graph)


# --- build and load -------------------------------------------------------------------------------------------------


def test_what_build_writes(built: Built) -> None:
    metadata = json.loads((built.engine / "metadata.json").read_text())
    assert metadata["least_sm"] == 80 and metadata["torch"] == torch.__version__
    assert metadata["proof"].endswith("kernels are compiled, not run")
    assert metadata["options"] == {"weights": "auto", "activations": "fp32"}
    graph = ir.load(built.lowered.path).graph
    gemms = [str(node.name) for node in graph if node.domain == DOMAIN and node.op_type.startswith("Gemm")]
    assert sum(metadata["kernels"][name] for name in ("Gemm", "GemmGateResidual")) == len(gemms) < len(built.layers)
    assert sorted("+".join(gemms).split("+")) == sorted(layer.name for layer in built.layers)
    assert sum(metadata["paths"].values()) == len(built.layers)
    assert metadata["inputs"]["hidden_states"] == {"dtype": "float32", "shape": ["batch", 4, 8, 8]}
    again = lowering_file.read(built.engine / lowering_file.NAME)
    assert again.probes == built.lowered.probes and again.path == built.engine / "model.onnx"
    # Codes of 4 bits stay packed: the quantized weights take half a byte each, and little is added.
    stored = sum(layer.out_features * layer.in_features for layer in built.layers) / 2
    portable = (built.folder / "model.onnx.data").stat().st_size
    assert stored < metadata["weights_bytes"] <= 1.01 * portable + 8192


def test_the_same_portable_model_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    again = BACKEND.lower(built.folder / "model.onnx", tmp_path, built.recipe)
    for name in ("model.onnx", "model.onnx.data"):
        assert again.path.with_name(name).read_bytes() == built.lowered.path.with_name(name).read_bytes()


def test_loading_without_a_gpu_is_refused(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_engine, "visible_sm", lambda: 0)
    with pytest.raises(EnvironmentLacksError, match="needs an NVIDIA GPU"):
        BACKEND.load(built.folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"more": np.zeros(1, np.float32)}, r"inputs \['more'\] are missing or unknown"),
        ({"hidden_states": np.zeros((2, 4, 8, 9), np.float32)}, "hidden_states has shape"),
        ({"timestep": np.zeros((2, 1), np.float32)}, "timestep has shape"),
    ],
)
def test_wrong_inputs_are_refused(changed: Arrays, message: str, built: Built) -> None:
    engine = CudaEngine(built.engine, device="cpu")
    inputs = random_inputs(ir.load(built.lowered.path).graph) | changed
    with pytest.raises(RecipeError, match=message):
        engine.run(inputs)


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: a replay runs the module on the fixed inputs, into the fixed outputs."""

    def __init__(self, captured: dict[str, Any]) -> None:
        self.captured = captured

    def replay(self) -> None:
        for name, tensor in self.captured["module"](self.captured["inputs"]).items():
            self.captured["outputs"][name].copy_(tensor)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was captured, with FakeGraphs."""
    records: list[dict[str, Any]] = []

    def make(module: Any, inputs: dict[str, Any]) -> Captured:
        captured = {"module": module, "inputs": inputs, "outputs": module(inputs)}
        records.append(captured)
        return Captured(FakeGraph(captured), inputs, captured["outputs"])

    monkeypatch.setattr(Captured, "make", make)
    return records


def capturing(folder: Path) -> tuple[CudaEngine, list[Part]]:
    """An engine that captures as on a GPU, on the CPU; and its parts."""
    engine = CudaEngine(folder, device="cpu")
    parts = [part for part in (engine.step, engine.condition) if part is not None]
    for part in parts:
        part.device = "cpu:0"
    return engine, parts


def test_a_graph_is_captured_once_for_each_shape(built: Built, captures: list[dict[str, Any]]) -> None:
    """What surrounds the capture; the capture itself needs a GPU. Inputs are what was copied, conditions included."""
    engine, parts = capturing(built.engine)
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    calls = [inputs, inputs | {"hidden_states": inputs["hidden_states"] + 1}]
    for name in sorted(set(inputs) & {"encoder_hidden_states", "class_labels"}):
        calls.append(inputs | {name: inputs[name] + 1})
    calls = [*calls, *calls]
    expected = [CudaEngine(built.engine, device="cpu").run(call)["sample"] for call in calls]
    for call, sample in zip(calls, expected, strict=True):
        assert np.array_equal(engine.run(call)["sample"], sample)
    assert len(captures) == len(parts)


def test_a_graph_that_reads_packed_weights_goes_when_they_are_expanded(
    built: Built, captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backends.cuda.torch_gemm.EXPAND_FROM", 32)  # tokens of two pictures, not of one
    engine, parts = capturing(built.engine)
    two = random_inputs(ir.load(built.lowered.path).graph)
    one = {name: array[:1] if "rotary" not in name else array for name, array in two.items()}
    first = engine.run(one)["sample"]
    assert [len(part.captured) for part in parts] == [1] * len(parts) and parts[0].module.expanded == 0
    engine.run(two)
    assert len(parts[0].captured) == 1 and parts[0].module.expanded > 0
    assert np.array_equal(engine.run(one)["sample"], first) and len(parts[0].captured) == 2


def test_the_condition_is_computed_when_it_changes(built: Built) -> None:
    engine = CudaEngine(built.engine, device="cpu")
    if engine.condition is None or engine.step is None:
        pytest.skip("the model has no product that depends on the condition alone")
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    first = engine.run(inputs)["sample"]
    engine.run(inputs | {"timestep": inputs["timestep"] + 1})
    assert engine.conditions == 1 and "encoder_hidden_states" not in engine.step.inputs
    inputs["encoder_hidden_states"][0, 0, 0] += 10.0  # in place, in the caller's array
    assert not np.array_equal(engine.run(inputs)["sample"], first) and engine.conditions == 2


def test_tensors_give_what_arrays_give(built: Built) -> None:
    """In other types, not contiguous, and made in inference mode, too; results are the caller's own."""
    engine, inputs = CudaEngine(built.engine, device="cpu"), random_inputs(ir.load(built.lowered.path).graph)
    expected = engine.run(inputs)["sample"]
    tensors = {name: torch.from_numpy(array.astype(array.dtype)) for name, array in inputs.items()}
    sample = engine.run_tensors(tensors)["sample"]
    assert np.array_equal(sample.numpy(), expected) and not sample.is_inference()
    tensors["hidden_states"] = tensors["hidden_states"].double().mT.contiguous().mT
    tensors["timestep"] = tensors["timestep"].clone().requires_grad_()
    with torch.inference_mode():
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for one in (tensors, copies, copies):
        again = engine.run_tensors(one)["sample"]
        assert torch.equal(again, sample) and again.data_ptr() != sample.data_ptr() and not again.requires_grad
    assert engine.conditions == (engine.condition is not None)
    with pytest.raises(RecipeError, match=r"hidden_states has shape \(1,\)"):
        engine.run_tensors(tensors | {"hidden_states": torch.zeros(1)})


def test_a_condition_is_known_by_its_tensor_and_its_version(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CudaEngine(built.engine, device="cpu")
    if engine.condition is None:
        pytest.skip("the model has no product that depends on the condition alone")
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    compared: list[bool] = []
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(bool((a == b).all())) or compared[-1])
    names = set(engine.condition.inputs)
    first = engine.run_tensors(tensors)["sample"]
    engine.run_tensors(tensors | {"timestep": tensors["timestep"] + 1})
    assert engine.conditions == 1 and not compared  # the same tensors: not looked at
    equal = {name: tensor.clone() if name in names else tensor for name, tensor in tensors.items()}
    engine.run_tensors(equal), engine.run_tensors(equal)
    assert engine.conditions == 1 and compared == [True] * len(names)  # compared once, then known
    equal["encoder_hidden_states"][0, 0, 0] += 10.0  # in place: another version
    changed = engine.run_tensors(equal)["sample"]
    assert engine.conditions == 2 and compared[len(names) :] == [False] and bool((changed != first).any())
    assert np.array_equal(engine.run(inputs)["sample"], first.numpy()) and engine.conditions == 3


def test_it_stands_in_for_a_diffusers_transformer(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, family = CudaEngine(built.engine, device="cpu"), FAMILIES[built.model.family.name]
    inputs = random_inputs(ir.load(built.lowered.path).graph)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if "image_rotary_cos" in tensors:
        tensors["image_rotary_emb"] = (tensors.pop("image_rotary_cos"), tensors.pop("image_rotary_sin"))
    transformer = EngineTransformer(engine, family, dict(built.model.config))
    expected = engine.run(inputs)["sample"]
    monkeypatch.setattr(engine, "run", None)  # tensors do not go through NumPy
    assert np.array_equal(transformer(**tensors).sample.numpy(), expected)
