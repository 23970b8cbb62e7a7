"""The gates of an autoencoder's half: the right module passes, and what is planted in it is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.models.load import LoadedModel, denoiser, load
from export.to_onnx import export_portable
from pipeline.backends.base import Arrays, LoweredGraph
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.case import Run
from pipeline.verify.autoencoder import Call, coverage_gate, judged, reference_calls
from pipeline.verify.probe import ProbedGraph
from pipeline.verify.report import Gate
from tests.support.tiny_vae import vae_folder

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(vae_folder(tmp_path_factory.mktemp("vae"))), half="decoder")


@pytest.fixture(scope="module")
def calls(model: LoadedModel) -> list[Call]:
    return reference_calls(model)


def gates_of(calls: list[Call], run: Run) -> dict[str, Gate]:
    return {gate.name.removeprefix("cpu/"): gate for gate in judged("cpu", calls, run).gates}


def run_of(model: LoadedModel, change: Callable[[nn.Module], None] = lambda decoder: None) -> Run:
    """The float32 module with a change of its decoder."""
    module = copy.deepcopy(denoiser(model))
    change(module.transformer.decoder)
    return ReferenceEngine(module).run


def test_the_right_module_passes_with_room(model: LoadedModel, calls: list[Call]) -> None:
    gates = gates_of(calls, run_of(model))
    assert set(gates) == {"segments", "calls", "repeats", "finite"} and all(gate.passed for gate in gates.values())
    assert max(gates["segments"].value, gates["calls"].value) < 0.7


def test_the_reference_is_a_float64_run_of_every_kind_of_call(calls: list[Call]) -> None:
    assert {call.stops[0].x.dtype for call in calls} == {np.dtype(np.float64)}
    assert {call.stops[1].x.dtype for call in calls} == {np.dtype(np.float32)}
    assert {len(call.stops[0].x) for call in calls} == {1, 2, 3}
    assert len({call.stops[0].x.shape[2:] for call in calls}) == len(calls)


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
    weight = decoder.up_blocks[1].resnets[0].conv1.weight
    weight.copy_(weight.bfloat16())


FAULTS = {
    "a bias at the end": moved("conv_out", "bias", 0, 1e-4),
    "a bias inside": moved("up_blocks.0.resnets.0.conv1", "bias", 3, 1e-3),
    "a norm's weight": moved("up_blocks.1.resnets.1.norm2", "weight", 2, 1e-3),
    "a norm's bias": moved("mid_block.resnets.0.norm1", "bias", 2, 1e-3),
    "an epsilon at the end": put("conv_norm_out", "eps", 1e-5),
    "an epsilon inside": put("mid_block.attentions.0.group_norm", "eps", 1e-4),
    "groups of a norm": put("up_blocks.0.resnets.0.norm1", "num_groups", 8),
    "an activation function": put("up_blocks.0.resnets.1", "nonlinearity", nn.GELU()),
    "a weight in bfloat16": rounded,
    "heads of attention": put("mid_block.attentions.0", "heads", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(model: LoadedModel, calls: list[Call], fault: str) -> None:
    gates = gates_of(calls, run_of(model, FAULTS[fault]))
    assert not gates["segments"].passed and not gates["calls"].passed, gates
    assert "worst in batch 1, height x width 16 x 12: " in gates["segments"].why
    assert gates["repeats"].passed and gates["finite"].passed


def mixing_samples(run: Run) -> Run:
    """The mean over a batch is in every sample."""
    return lambda inputs: run({name: array + 1e-3 * array.mean(0) * (len(array) > 1) for name, array in inputs.items()})


def losing_nan(run: Run) -> Run:
    return lambda inputs: run({name: np.nan_to_num(array) for name, array in inputs.items()})


def keeping(run: Run) -> Run:
    """Each call is a little of the last one of its size."""
    kept: dict[tuple[int, ...], Arrays] = {}

    def call(inputs: Arrays) -> Arrays:
        (array,) = inputs.values()
        before = kept.setdefault(array.shape, run(inputs))
        kept[array.shape] = {name: value * np.float32(1 + 2**-23) for name, value in before.items()}
        return before

    return call


def test_faults_of_single_calls_are_found(model: LoadedModel, calls: list[Call]) -> None:
    right = run_of(model)
    gates = gates_of(calls, mixing_samples(right))
    assert gates["segments"].passed and not gates["calls"].passed and "worst in batch" in gates["calls"].why
    assert "first beside a sample of NaN" in gates_of(calls, losing_nan(right))["repeats"].why
    assert "first after others" in gates_of(calls, keeping(right))["repeats"].why
    lost = gates_of(calls, lambda inputs: {"sample": np.full_like(right(inputs)["sample"], np.nan)})
    assert not lost["finite"].passed and not lost["segments"].passed


def test_every_tensor_is_looked_for_in_the_graph(model: LoadedModel, tmp_path: Path) -> None:
    export_portable(model, [], tmp_path / "model.onnx")
    probed = ProbedGraph(LoweredGraph(tmp_path / "model.onnx", (), ()))
    gate = coverage_gate("onnx", model, probed)
    assert gate.passed and gate.value == len(list(model.module.parameters()))
    other = load(str(vae_folder(tmp_path, seed=1)), half="decoder")
    gate = coverage_gate("onnx", other, probed)
    assert not gate.passed and gate.value == 0 and "does not: it was rounded, changed or left out" in gate.why
