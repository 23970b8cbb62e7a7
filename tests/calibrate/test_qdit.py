"""The methods "qdit" and "g4w_p4a": what they make of a block, and of whole models with group sizes of their own."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from export import checkpoint
from export.errors import RecipeError
from export.formats.format import get_format
from export.models.load import denoiser, load
from export.to_onnx import export_portable
from pipeline import calibrate as package
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate import calibrate
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.groups.candidates import Candidates
from pipeline.calibrate.groups.proxy import ProxyScore
from pipeline.calibrate.groups.search import SearchOutcome
from pipeline.calibrate.groups.space import make_space
from pipeline.calibrate.learn import gptq
from pipeline.calibrate.method import Context
from pipeline.calibrate.methods import rtn
from pipeline.calibrate.methods.ptq4dm import skewed_shares
from pipeline.calibrate.methods.qdit import QDit
from pipeline.calibrate.plan import make_plans
from pipeline.calibrate.state import CalibrationState
from pipeline.calibrate.static_activations import find_range, unsigned_format
from pipeline.methods import METHODS
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import study
from tests.support import observed, tiny
from tests.verify.test_planted_faults import Bench

pytestmark = pytest.mark.torch

SETTINGS = ("weights.granularity=group",)


def inputs_of(unit, name):
    """What a layer is given in each call, by running the block by hand."""
    inputs = []
    part = unit.observed.block.get_submodule(unit.observed.names[name])
    handle = part.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).numpy()))
    for call in unit.observed.noisy:
        unit.observed.block(*call.args)
    handle.remove()
    return inputs


@pytest.mark.parametrize("granularity", ["per_channel", "group", "exact_group"])
@pytest.mark.parametrize("act_order", ["true", "false"])
def test_layers_are_gptq_of_their_own_inputs(granularity, act_order):
    method, unit = observed.make(
        "qdit", f"weights.granularity={granularity}", f"calibrate.options.act_order={act_order}"
    )
    for plan, layer in zip(unit.plans, method.quantize(unit), strict=True):
        rows = np.concatenate(inputs_of(unit, plan.name)).astype(np.float64)
        grid = gptq.Grid(get_format("INT4"), plan.granularity, plan.group_size, plan.multipliers, "absmax")
        expected = gptq.gptq(rtn.float_weight(plan), rows.T @ rows, grid, act_order=act_order == "true")
        np.testing.assert_array_equal(layer.unpacked_codes(), expected.codes)
        np.testing.assert_allclose(layer.scales, expected.scales, rtol=1e-6)
        np.testing.assert_array_equal(layer.bias, plan.linear.module.bias.numpy())
        assert (layer.name, layer.kind, layer.granularity) == (plan.name, plan.linear.kind, plan.granularity)


def test_a_layer_and_its_input_have_the_same_groups():
    method, unit = observed.make("qdit", *SETTINGS, "calibrate.options.group_sizes=4,4,4,8,2,16")
    layers = method.quantize(unit)
    assert [layer.group_size for layer in layers] == [4, 4, 4, 8, 2, 16]
    assert {layer.activation_scaling for layer in layers} == {"token_group"}
    assert [layer.activation_group for layer in layers] == [4, 4, 4, 8, 2, 16]
    assert [layer.scales.shape[1] for layer in layers] == [4, 4, 4, 2, 8, 2]


def test_one_group_is_a_scale_for_each_token():
    method, unit = observed.make("qdit", *SETTINGS, "calibrate.options.group_sizes=16*5,32")
    assert {layer.activation_scaling for layer in method.quantize(unit)} == {"per_token"}
    method, unit = observed.make("qdit", "weights.granularity=per_channel")
    assert {(layer.activation_scaling, layer.granularity) for layer in method.quantize(unit)} == {
        ("per_token", "per_channel")
    }


def test_activations_as_the_option_says():
    method, unit = observed.make("qdit", *SETTINGS, "calibrate.options.activations=per_token")
    assert {layer.activation_scaling for layer in method.quantize(unit)} == {"per_token"}
    method, unit = observed.make("qdit", *SETTINGS, "calibrate.options.activations=per_tensor")
    for layer in method.quantize(unit):
        expected = find_range(inputs_of(unit, layer.name), get_format("INT8"), "mse", layer.name)
        np.testing.assert_allclose(layer.activation_scale, expected.scale, rtol=1e-6)
        assert layer.activation_format == "INT8" and layer.activation_zero is None


def test_rounding_to_nearest_for_comparison():
    method, unit = observed.make("qdit", *SETTINGS, "calibrate.options.rounding=nearest")
    for plan, layer in zip(unit.plans, method.quantize(unit), strict=True):
        np.testing.assert_array_equal(layer.codes, rtn.quantize_linear(plan, "absmax").codes)


@pytest.mark.parametrize(("option", "search"), [("mse", "mse"), ("absmax", "absmax"), ("recipe", "mse")])
def test_weight_ranges_as_the_option_says(option, search):
    method, unit = observed.make("qdit", "calibrate.options.rounding=nearest", f"calibrate.options.range={option}")
    for plan, layer in zip(unit.plans, method.quantize(unit), strict=True):
        np.testing.assert_array_equal(layer.codes, rtn.quantize_linear(plan, search).codes)


def output_error(unit, layers):
    """Mean squared error of every layer's output on its own float inputs."""
    errors = []
    for layer in layers:
        rows = np.concatenate(inputs_of(unit, layer.name)).astype(np.float64)
        weight = unit.observed.block.get_submodule(unit.observed.names[layer.name]).weight.numpy()
        errors.append(float(((rows @ (layer.dequantized() - weight).T) ** 2).mean()))
    return np.array(errors)


@pytest.mark.parametrize("granularity", ["per_channel", "group", "exact_group"])
def test_layer_outputs_are_nearer_than_with_rounding_to_nearest(granularity):
    method, unit = observed.make("qdit", f"weights.granularity={granularity}", "calibrate.options.act_order=true")
    nearest = [rtn.quantize_linear(plan, "absmax") for plan in unit.plans]
    assert (output_error(unit, method.quantize(unit)) < output_error(unit, nearest)).all()


# --- g4w_p4a ---------------------------------------------------------------------------------------------------------


def test_static_ranges_are_those_of_ptq4dm_and_weights_those_of_gptq():
    method, unit = observed.make("g4w_p4a", "calibrate.options.granularity=recipe", "weights.granularity=group")
    steps = [call.step for call in method.context.data.calls]
    shares = skewed_shares(steps, observed.STEPS, 0.4, 0.4)
    largest = max(shares.values())
    for plan, layer in zip(unit.plans, method.quantize(unit), strict=True):
        parts = inputs_of(unit, plan.name)
        matrix = gptq.hessian(parts, plan.linear.module.in_features)
        grid = gptq.Grid(get_format("INT4"), "group", plan.group_size, (1,), "absmax")
        np.testing.assert_array_equal(layer.unpacked_codes(), gptq.gptq(rtn.float_weight(plan), matrix, grid).codes)
        kept = []
        for step, part in zip(steps, parts, strict=True):
            count = max(1, round(len(part) * shares[step] / largest))
            kept.append(part[np.linspace(0, len(part) - 1, count).round().astype(int)])
        expected = find_range(kept, unsigned_format("INT8"), "mse", layer.name)
        assert layer.activation_format == "UE1M7" and layer.activation_scaling == "per_tensor"
        np.testing.assert_allclose(layer.activation_scale, expected.scale, rtol=1e-6)
        np.testing.assert_allclose(layer.activation_zero, expected.zero, rtol=1e-6)


def test_groups_of_128_are_refused_where_they_do_not_fit():
    with pytest.raises(RecipeError, match=r"blocks\.0\.to_q: group size 128; use a divisor of K=16"):
        observed.make("g4w_p4a")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("activations=static", "activations 'static' of qdit; use one of token_group, per_token, per_tensor"),
        ("range=all", "range 'all'; use one of absmax, mse, recipe"),
        ("rounding=up", "rounding 'up' of qdit; use one of gptq, nearest"),
        (
            "search=fid",
            "search 'fid' of qdit; use one of none, proxy; pictures judge in python -m benchmarks.q",
        ),
        ("group_sizes=8,8", "2 group sizes for 6 layers"),
        ("group_sizes=3*6", r"blocks\.0\.to_q: group size 3; use a divisor of K=16"),
    ],
)
def test_wrong_options_are_refused(setting, message):
    with pytest.raises(RecipeError, match=message):
        observed.make("qdit", *SETTINGS, f"calibrate.options.{setting}")


def test_wrong_granularity_of_g4w_p4a_is_refused():
    with pytest.raises(RecipeError, match="granularity 'fine' of g4w_p4a; use group or recipe"):
        observed.make("g4w_p4a", "calibrate.options.granularity=fine")


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(tiny.folder("dit", tmp_path_factory.mktemp("models"))))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def make_recipe(*settings):
    recipe = recipes.load("dit_w4a8")
    small = ["calibrate.size=2", "calibrate.timesteps=2", "sampling.n_steps=3", "method=qdit"]
    return recipes.with_settings(recipe, [*small, *settings])


def quick(*settings):
    search = ["search=proxy", "sizes=16,32,64", "generations=2", "population=6", "samples=2", *settings]
    return make_recipe(
        "weights.granularity=group", "weights.group_size=32", *(f"calibrate.options.{one}" for one in search)
    )


def test_searched_sizes_keep_the_budget_and_reach_the_checkpoint(model, tmp_path, caplog):
    caplog.set_level("INFO")
    layers = calibrate(model, quick(), tmp_path / "searched")
    plain = calibrate(model, make_recipe("weights.granularity=group", "weights.group_size=32"), tmp_path / "plain")
    assert {layer.group_size for layer in layers} <= {16, 32, 64}
    assert sum(layer.size_bytes for layer in layers) <= sum(layer.size_bytes for layer in plain)
    assert all(layer.activation_group in (0, layer.group_size) for layer in layers)
    assert "searched" in caplog.text
    sizes = [layer.group_size for layer in checkpoint.load(tmp_path / "searched")]
    assert sizes == [layer.group_size for layer in layers]


def test_exact_groups_of_float_formats_are_searched_down_to_16(model, tmp_path):
    """Layers in E3M0, which has no exact multipliers, keep one scale per channel."""
    options = {"search": "proxy", "generations": 1, "population": 4, "samples": 2, "activations": "per_token"}
    formats = ["formats.weight=E2M1", "formats.activation=E2M3", 'formats.weight_of."ff.in"=E3M0']
    recipe = make_recipe(*formats, *(f"calibrate.options.{key}={value}" for key, value in options.items()))
    plans = make_plans(model.linears(), recipe)
    assert {gene.sizes for gene in make_space(plans, "kind").genes} == {(16, 32, 64), (16, 32, 64, 128)}
    layers = calibrate(model, recipe, tmp_path)
    assert {layer.group_size for layer in layers if layer.kind == "ff.in"} == {0}
    assert {layer.granularity for layer in layers} == {"per_channel", "exact_group"}
    assert {layer.activation_scaling for layer in layers} == {"per_token"}


def test_the_proxy_is_the_error_of_the_denoiser_with_candidate_layers(model):
    recipe = make_recipe("weights.granularity=group", "weights.group_size=32")
    plans = make_plans(model.linears(), recipe)
    space = make_space(plans, "layer", (16, 32))
    data = calibration_data(model, recipe)
    score = ProxyScore.of(Candidates(model.source, recipe, "layer", space, "token_group", model), data, 2)
    individual = tuple([16, 32] * (len(plans) // 2))
    layers = []
    for plan, size in zip(plans, individual, strict=True):
        layer = rtn.quantize_linear(replace(plan, group_size=size), "mse")
        layers.append(replace(layer, activation_scaling="token_group", activation_group=size))
    exact, quantized = ReferenceEngine(denoiser(model)), ReferenceEngine(fake_quant(model, layers, torch.float32))
    channels = model.config["in_channels"]
    errors = []
    for call in score.calls:
        expected, other = (engine.run(call)["sample"][:, :channels].astype(float) for engine in (exact, quantized))
        errors.append(10 * np.log10((expected**2).sum() / ((other - expected) ** 2).sum()))
    assert len(score.calls) == len(data.calls) and len(score.calls[0]["hidden_states"]) == 1
    assert score()(individual) == pytest.approx(-np.mean(errors), abs=1e-3)  # dB: sums of float32 in another order


def test_the_search_tries_the_layers_that_it_will_get(model, tmp_path, monkeypatch):
    """With the recipe's own sizes chosen, the stored candidates are the layers of the checkpoint."""
    monkeypatch.setattr(
        "pipeline.calibrate.methods.qdit.search", lambda space, *_: SearchOutcome(space.uniform(32), (), {})
    )
    monkeypatch.setattr(SearchOutcome, "cost", 0.0)
    stored = {}
    whole = CalibrationState.complete

    def keep(state, layers):
        for layer in layers:
            stored[layer.name] = checkpoint.load(state.folder / "search" / "layers" / layer.name / "32")[0]
        whole(state, layers)

    monkeypatch.setattr(CalibrationState, "complete", keep)
    for layer in calibrate(model, quick(), tmp_path):
        np.testing.assert_array_equal(layer.codes, stored[layer.name].codes)
        np.testing.assert_array_equal(layer.scales, stored[layer.name].scales)
        assert layer.activation_group == stored[layer.name].activation_group


class Stop(Exception):
    """Ends a run where the test wants it to."""


def test_a_stopped_calibration_goes_on_with_its_scores(model, tmp_path, monkeypatch):
    whole = calibrate(model, quick(), tmp_path / "whole")

    def stop(*arguments, **fields):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(package, "_observed", stop)
        with pytest.raises(Stop):
            calibrate(model, quick(), tmp_path / "parts")
    scores = tmp_path / "parts" / "search" / "scores.json"
    assert len(json.loads(scores.read_text())["costs"]) >= 6
    monkeypatch.setattr("pipeline.calibrate.methods.qdit.store_layers", lambda *_: None)
    monkeypatch.setattr("pipeline.calibrate.groups.proxy._Proxy.__call__", stop)  # nothing is left to score
    again = calibrate(model, quick(), tmp_path / "parts")
    assert [layer.group_size for layer in again] == [layer.group_size for layer in whole]
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(again, whole, strict=True))


class InThread(ThreadPoolExecutor):
    """Stands for a pool of processes: what it is sent is pickled, but nothing is imported anew, which takes seconds."""

    def __init__(self, workers, context, start):
        super().__init__(1, initializer=start)

    def submit(self, work, job):
        return super().submit(work, pickle.loads(pickle.dumps(job)))


def test_a_longer_search_in_more_processes_takes_the_scores_of_a_shorter_one(model, tmp_path, monkeypatch):
    """And finds what one process finds."""
    monkeypatch.setattr("pipeline.jobs.processes.ProcessPoolExecutor", InThread)

    def searched(folder, *settings):
        recipe = quick("candidates=nearest", "population=4", *settings)
        options = METHODS["qdit"].resolve("fast", recipe.calibrate.options)
        method = QDit(Context(model, recipe, options, folder, calibration_data(model, recipe)))
        plans = method.plan(make_plans(model.linears(), recipe))
        return [plan.group_size for plan in plans], folder / "search" / "scores.json"

    sizes, path = searched(tmp_path / "whole")
    whole = json.loads(path.read_text())["costs"]
    _, path = searched(tmp_path / "parts", "generations=1")
    document = json.loads(path.read_text())
    worst = max(document["costs"], key=document["costs"].get)
    document["costs"][worst] += 1  # still the worst, and told from one that is scored again
    path.write_text(json.dumps(document))
    again, _ = searched(tmp_path / "parts", "workers=2")
    assert again == sizes and len(document["costs"]) < len(whole)
    assert json.loads(path.read_text())["costs"] == whole | {worst: whole[worst] + 1}


def test_the_number_of_processes_alone_does_not_start_a_calibration_anew(model):
    origins = [package.origin(model, quick(*more)) for more in ((), ("workers=2",), ("generations=3",))]
    assert origins[0] == origins[1] != origins[2]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["group", "exact_group"])
def test_group_sizes_by_layer_reach_graph_and_engine(granularity, model, tmp_path):
    """Calibrated, exported, lowered, built and run: every gate holds that a build has."""
    sizes = [16, 16, 16, 32, 64, 128, 64, 64, 64, 32, 16, 256]
    text = "16*3,32,64,128,64*3,32,16,256"
    recipe = make_recipe(f"weights.granularity={granularity}", f"calibrate.options.group_sizes={text}")
    layers = calibrate(model, recipe, tmp_path / "layers")
    assert [layer.group_size for layer in checkpoint.load(tmp_path / "layers")] == sizes
    export_portable(model, layers, tmp_path / "model.onnx")
    bench = Bench(model, layers, recipe, tmp_path / "model.onnx", study(model, layers, recipe))
    graph = bench.lower("cpu", bench.portable, tmp_path / "work")
    (tmp_path / "cpu").mkdir()
    BACKENDS["cpu"].build(graph, tmp_path / "cpu", recipe)
    engine, report = BACKENDS["cpu"].load(tmp_path), Report()
    try:
        verify_target("cpu", model, layers, graph, engine, bench.found, report)
    finally:
        engine.close()
    assert report.failures() == []
