"""The gates of an autoencoder's half: the right module passes, and what is planted in it is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.models.autoencoder_modules import stretch_ends
from export.models.load import LoadedModel, denoiser, load
from export.to_onnx import export_portable
from pipeline.backends.base import Arrays, LoweredGraph
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.case import Run
from pipeline.verify.autoencoder import SIZES, Call, Reference, bound_gate, coverage_gate, whole_gates
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.report import Gate
from pipeline.verify.walk import Stop
from tests.support.tiny_vae import vae_folder

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(vae_folder(tmp_path_factory.mktemp("vae"))), half="decoder")


@pytest.fixture(scope="module")
def reference(model: LoadedModel) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def calls(reference: Reference) -> list[Call]:
    return [reference.call(seed, size) for seed, size in enumerate(SIZES)]


def changed(model: LoadedModel, change: Callable[[nn.Module], None]) -> nn.Module:
    """The float32 module with a change of its decoder."""
    module = copy.deepcopy(denoiser(model))
    change(module.transformer.decoder)
    return module


def gates_of(calls: Sequence[Call], run: Run) -> dict[str, Gate]:
    return {gate.name.removeprefix("cpu/"): gate for gate in whole_gates("cpu", calls, run)}


class TorchGraph:
    """A torch module in the place of a graph whose inner tensors are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.ends = stretch_ends(module.transformer)
        self.produced = {f"{name}/output" for name in self.ends}

    def cut(self, names: Collection[str], fed: Arrays) -> Run:
        def run(inputs: Arrays) -> Arrays:
            tensors: Arrays = {}

            def keeping(name: str) -> Callable[[nn.Module, object, Tensor], None]:
                return lambda _module, _inputs, result: tensors.update({f"{name}/output": result.numpy()})

            hooks = [part.register_forward_hook(keeping(name)) for name, part in self.ends.items()]
            with torch.no_grad():
                output = self.module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
            for hook in hooks:
                hook.remove()
            return tensors | {"sample": output.numpy()}

        return run


def stretches_gate(reference: Reference, graph: object, calls: Sequence[Call]) -> Gate:
    return bound_gate("cpu/segments", "stretches", reference.stretches("cpu", graph, calls[0]))  # type: ignore[arg-type]


# --- the right module ------------------------------------------------------------------------------------------------


def test_the_right_module_passes_with_room(model: LoadedModel, reference: Reference, calls: list[Call]) -> None:
    gates = gates_of(calls, ReferenceEngine(denoiser(model)).run)
    assert set(gates) == {"calls", "repeats", "finite"} and all(gate.passed for gate in gates.values())
    stretches = reference.stretches("cpu", TorchGraph(denoiser(model)), calls[0])  # type: ignore[arg-type]
    assert [row.layer for row in stretches[-2:]] == ["decoder.up_blocks.2.resnets.1", None]
    assert [row.layer for row in stretches[:3]] == [
        f"decoder.mid_block.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")
    ]
    assert max(gates["calls"].value, *(row.error for row in stretches)) < 0.8


def test_the_reference_is_a_float64_run_and_leaves_the_model_alone(model: LoadedModel, calls: list[Call]) -> None:
    assert {call.stops[0].x.dtype for call in calls} == {np.dtype(np.float64)}
    assert {call.stops[1].x.dtype for call in calls} == {np.dtype(np.float32)}
    assert {len(call.stops[0].x) for call in calls} == {1, 2, 3}
    assert len({call.stops[0].x.shape[2:] for call in calls}) == len(calls)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_a_graph_has_a_tensor_for_each_stretch(
    model: LoadedModel, reference: Reference, calls: list[Call], tmp_path: Path
) -> None:
    export_portable(model, [], tmp_path / "model.onnx")
    probed = ProbedGraph(LoweredGraph(tmp_path / "model.onnx", (), ()))
    rows = reference.stretches("onnx", probed, calls[0])
    assert len(rows) == 1 + len(stretch_ends(model.module)) and max(row.error for row in rows) < 1
    probed.produced.remove("decoder.mid_block.resnets.1/output")
    gate = stretches_gate(reference, probed, calls)
    assert not gate.passed and "the graph has no decoder.mid_block.resnets.1/output" in gate.why
    gate = coverage_gate("onnx", model, probed)
    assert gate.passed and gate.value == len(list(model.module.parameters()))
    other = load(str(vae_folder(tmp_path, seed=1)), half="decoder")
    gate = coverage_gate("onnx", other, probed)
    assert not gate.passed and "does not: it was rounded, changed or left out" in gate.why


# --- faults -----------------------------------------------------------------------------------------------------------


def moved(path: str, name: str, index: int, by: float) -> Callable[[nn.Module], None]:
    """One number of a parameter moved by so much."""

    def change(decoder: nn.Module) -> None:
        tensor = decoder.get_submodule(path).get_parameter(name)
        tensor.view(-1)[index] += by

    return change


def put(path: str, name: str, value: object) -> Callable[[nn.Module], None]:
    """An attribute of a part replaced."""
    return lambda decoder: setattr(decoder.get_submodule(path), name, value)


def rounded(decoder: nn.Module) -> None:
    weight = decoder.get_submodule("up_blocks.1.resnets.0.conv1").get_parameter("weight")
    weight.copy_(weight.bfloat16())


# A fault -> (the change, the stretch that is named).
FAULTS = {
    "a bias at the end": (moved("conv_out", "bias", 0, 1e-4), "the output"),
    "a bias inside": (moved("up_blocks.0.resnets.0.conv1", "bias", 3, 1e-3), "decoder.up_blocks.0.resnets.0"),
    "a bias of an upsampling": (moved("up_blocks.0.upsamplers.0.conv", "bias", 1, 1e-4), "upsamplers.0"),
    "a norm's weight": (moved("up_blocks.1.resnets.1.norm2", "weight", 2, 1e-3), "decoder.up_blocks.1.resnets.1"),
    "a norm's bias": (moved("mid_block.resnets.0.norm1", "bias", 2, 1e-3), "decoder.mid_block.resnets.0"),
    "an epsilon at the end": (put("conv_norm_out", "eps", 1e-5), "the output"),
    "an epsilon inside": (put("up_blocks.2.resnets.0.norm1", "eps", 1e-5), "decoder.up_blocks.2.resnets.0"),
    "groups of a norm": (put("up_blocks.0.resnets.0.norm1", "num_groups", 8), "decoder.up_blocks.0.resnets.0"),
    "an activation": (put("up_blocks.0.resnets.1", "nonlinearity", nn.GELU()), "decoder.up_blocks.0.resnets.1"),
    "a weight in bfloat16": (rounded, "decoder.up_blocks.1.resnets.0"),
    "heads of attention": (put("mid_block.attentions.0", "heads", 2), "decoder.mid_block.attentions.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_place_named(
    model: LoadedModel, reference: Reference, calls: list[Call], fault: str
) -> None:
    change, place = FAULTS[fault]
    gate = stretches_gate(reference, TorchGraph(changed(model, change)), calls)
    assert not gate.passed and f"first over its limit: up to {place}" in gate.why.replace(
        "decoder.up_blocks.0.up", "up"
    )


@pytest.mark.parametrize("fault", ["a bias at the end", "an activation", "a weight in bfloat16", "heads of attention"])
def test_the_whole_shows_a_fault_of_some_size(model: LoadedModel, calls: list[Call], fault: str) -> None:
    gates = gates_of(calls, ReferenceEngine(changed(model, FAULTS[fault][0])).run)
    assert not gates["calls"].passed and "up to the output, in batch 1, height x width 16 x 12" in gates["calls"].why
    assert gates["repeats"].passed and gates["finite"].passed


def mixing_samples(run: Run) -> Run:
    """A little of the mean over a batch is in every sample."""
    return lambda inputs: run({name: array + 1e-3 * array.mean(0) * (len(array) > 1) for name, array in inputs.items()})


def losing_nan(run: Run) -> Run:
    return lambda inputs: run({name: np.nan_to_num(array) for name, array in inputs.items()})


def keeping(run: Run) -> Run:
    """Each call of a size is the first one of that size, moved a little."""
    kept: dict[tuple[int, ...], Arrays] = {}

    def call(inputs: Arrays) -> Arrays:
        (array,) = inputs.values()
        before = kept.setdefault(array.shape, run(inputs))
        kept[array.shape] = {name: value * np.float32(1 + 2**-23) for name, value in before.items()}
        return before

    return call


def test_faults_of_single_calls_are_found(model: LoadedModel, calls: list[Call]) -> None:
    right = ReferenceEngine(denoiser(model)).run
    gates = gates_of(calls, mixing_samples(right))
    assert not gates["calls"].passed and "up to the output, in batch 2, " in gates["calls"].why
    assert "first beside a sample of NaN" in gates_of(calls, losing_nan(right))["repeats"].why
    assert "first after others" in gates_of(calls, keeping(right))["repeats"].why
    lost = gates_of(calls, lambda inputs: {"sample": np.full_like(right(inputs)["sample"], np.nan)})
    assert not lost["finite"].passed and not lost["calls"].passed


# --- without a model -------------------------------------------------------------------------------------------------


def made_up_calls() -> list[Call]:
    """Two calls of a function that doubles, with passes that round."""
    calls = []
    for batch in (1, 2):
        inputs = {"latents": np.random.default_rng(batch).standard_normal((batch, 4, 6, 5)).astype(np.float32)}
        exact = 2.0 * inputs["latents"].astype(np.float64)
        noise = (np.random.default_rng(seed).uniform(-1, 1, exact.shape) for seed in range(4))
        passes = [exact * (1 + 2.0**-24 * one) for one in noise]
        calls.append(Call(f"batch {batch}", inputs, tuple(Stop(None, one) for one in (exact, *passes))))
    return calls


@pytest.mark.fast
def test_a_wrong_factor_is_found() -> None:
    calls = made_up_calls()
    gates = gates_of(calls, lambda inputs: {"sample": 2 * inputs["latents"]})
    assert all(gate.passed for gate in gates.values())
    gate = gates_of(calls, lambda inputs: {"sample": np.float32(2.00002) * inputs["latents"]})["calls"]
    assert not gate.passed and "in batch 1: all numbers times 1.00001: a factor is wrong" in gate.why
