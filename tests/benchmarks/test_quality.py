"""The quality benchmark: measures against slow references, rows as data, resumable results, honest tables."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import record
from benchmarks.quality import __main__ as quality
from benchmarks.quality import drawing, measure
from benchmarks.quality import engines as quality_engines
from benchmarks.quality import metrics as quality_metrics
from benchmarks.quality import sensitivity as quality_sensitivity
from benchmarks.quality.metrics import (
    centred,
    frechet,
    frechet_between,
    frechet_estimate,
    frechet_increase,
    gaussian,
    median_estimate,
    psnr_db,
    share_estimate,
    ssim,
)
from benchmarks.quality.results import FAILED, FLOAT, MEASURED, UNAVAILABLE, Results, row_key
from benchmarks.quality.rows import CHANNEL, MODELS, SMALL, TABLES, Line, Row, rows_of
from benchmarks.quality.sensitivity import PartlyQuantized, cases, mean_noise_db
from export import checkpoint
from export.errors import EnvironmentLacksError, ModelError, RecipeError
from pipeline import machine
from pipeline.backends.cuda import CudaOptions
from pipeline.bench.measure import Timing
from pipeline.calibrate.modelopt import take_over as modelopt_take_over
from pipeline.calibrate.modelopt.backend import quant_config
from pipeline.recipe import Attention
from pipeline.verify.report import Gate
from tests.support.ray_stand_in import stand_in  # noqa: F401

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)


def features(count, shift=0.0, width=6):
    return RNG.standard_normal((count, width)) @ RNG.standard_normal((width, width)) + shift


# --- measures -------------------------------------------------------------------------------------------------------


def square_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def test_frechet_distance_is_the_formula_with_a_symmetric_square_root():
    a, b = gaussian(features(40)), gaussian(features(50, 1.0))
    half = square_root(a.covariance)
    cross = square_root(half @ b.covariance @ half)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * cross)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_two_normals_in_closed_form():
    a, b = gaussian(np.array([[-1.0, 0], [1, 0]])), gaussian(np.array([[3.0, 0], [3, 0]]))
    assert frechet(a, b) == pytest.approx(9 + 2)  # means 0 and 3 apart; variances 2 and 0


def test_equal_sets_have_no_distance_and_no_increase():
    one, real = features(60), features(70)
    distance = frechet_between(one, one)
    assert max(map(abs, (distance.value, distance.low, distance.high))) < 1e-6
    assert frechet_increase(one, one, real) == quality_metrics.Estimate(0, 0, 0)


def test_resampling_together_makes_the_increase_surer_than_the_distance():
    base, real = features(200), features(300)
    near = base + 0.01 * RNG.standard_normal(base.shape)
    distance, increase = frechet_estimate(near, real), frechet_increase(near, base, real)
    assert increase.high - increase.low < 0.3 * (distance.high - distance.low)
    assert increase.value == pytest.approx(distance.value - frechet_estimate(base, real).value)


def test_the_bootstrap_is_centred_on_the_estimate():
    values = RNG.exponential(size=100)
    estimate = centred(lambda rows: float(np.var(values[rows])), 100)  # a biased statistic of resamples
    assert estimate.low < estimate.value == np.var(values) < estimate.high


@given(st.integers(1, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_a_share_lies_in_its_interval_which_is_never_empty(count, data):
    right = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    share = share_estimate(right)
    assert 0 <= share.low <= share.value + 1e-12 and share.value - 1e-12 <= share.high <= 1 and share.low < share.high


def test_wilsons_interval_of_ten_out_of_ten():
    assert share_estimate(np.ones(10, bool)).low == pytest.approx(10 / (10 + 1.959964**2))


def test_psnr_counts_what_is_shown():
    reference = np.zeros((2, 1, 4, 4))
    other = np.stack([np.full((1, 4, 4), 0.5), np.zeros((1, 4, 4))])
    decibels = psnr_db(other, reference)
    assert decibels[0] == pytest.approx(10 * math.log10(4 / 0.25)) and decibels[1] == math.inf
    assert psnr_db(np.full((1, 1, 4, 4), 7.0), np.ones((1, 1, 4, 4)))[0] == math.inf  # both are white


def slow_ssim(a, b):
    """One channel, straight from the definition."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    similarities = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (part[top : top + 11, left : left + 11] for part in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            similarities.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(similarities)


def test_ssim_is_the_definition():
    a = RNG.uniform(-1, 1, (2, 2, 14, 13))
    b = np.clip(a + 0.2 * RNG.standard_normal(a.shape), -1, 1)
    expected = [np.mean([slow_ssim(a[i, c], b[i, c]) for c in range(2)]) for i in range(2)]
    np.testing.assert_allclose(ssim(b, a), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(a, a), 1)


def test_a_median_may_be_infinite():
    median = median_estimate(np.array([math.inf, math.inf, 3.0, math.inf]))
    assert median.value == median.high == math.inf


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_row_is_a_recipe(model):
    rows = rows_of(model)
    assert len(rows) > 100 and len({row.name for row in rows}) == len(rows)
    for row in rows:
        recipe = quality_engines.row_recipe(row)
        methods = (row.name.partition("-")[0], "qdit") if "rtn" in row.name else (row.name.partition("-")[0],)
        assert recipe.model == f"zoo:{model}" and recipe.calibrate.method in methods
        assert (recipe.attention.formats is None) == ("attention" not in row.name), "whatever the recipe has"


def test_rows_are_chosen_by_table_and_name():
    names = [row.name for row in rows_of("dit_mini", ["groups"], ["*power*", "rtn-fp-channel-*"])]
    assert names == ["rtn-fp-channel-w4a6", *(f"rtn-fp-power{size}-w4a6" for size in (128, 64, 32, 16))]


def test_the_default_recipe_has_rows_of_smaller_groups_and_of_its_full_preset():
    for model in MODELS:
        names = [row.name for row in rows_of(model, ["learned_groups"])]
        assert names == ["fp4dit-fp-exact64-w4a6", "fp4dit-fp-exact32-w4a6", "fp4dit-fp-exact16-w4a6"]
    fast, full = rows_of("pixart_mini", ["full_default"])
    assert set(full.settings) - set(fast.settings) == {"preset=full"} and not set(fast.settings) - set(full.settings)
    assert TABLES["full_default"].models == ("pixart_mini",)


@pytest.mark.parametrize(("model", "least"), [*((model, 80) for model in SMALL), ("pixart_scenes", 10)])
def test_a_measured_row_is_known_by_what_its_recipe_is_today(model, least):
    """Else it would be measured again: a default that changes must be pinned in the rows."""
    results = Results(model, record.RESULTS)
    document = results.read()
    measured = [row for row in rows_of(model) if document["rows"].get(row.name, {}).get("status") == MEASURED]
    assert len(measured) >= least
    for row in measured:
        key = row_key(document["subject"], quality_engines.row_recipe(row), row.multipliers, row.algorithm)
        assert results.has(row.name, key), row.name


def test_a_method_that_is_not_there_is_told_by_name():
    row = Row("magic-w4a6", "dit_mini", "dit_w4a8", ("method=magic",))
    with pytest.raises(RecipeError, match="'magic' is not available; use one of auto, rtn"):
        quality_engines.row_recipe(row)


def test_the_key_follows_every_setting_and_the_subject():
    one, other = (quality_engines.row_recipe(row) for row in rows_of("dit_mini", patterns=["rtn-fp-exact64-w4a[68]"]))
    keys = {row_key({"count": 1}, one, ()), row_key({"count": 2}, one, ()), row_key({"count": 1}, other, ())}
    assert len(keys | {row_key({"count": 1}, one, (1, 2))}) == 4
    assert row_key({"count": 1}, one, ()) in keys
    quantized = replace(one, attention=Attention("INT8", "INT8"))
    assert row_key({"count": 1}, quantized, ()) not in keys
    by_algorithm = {row_key({"count": 1}, one, (), {"method": "svdquant", "lowrank": rank}) for rank in (1, 2)}
    assert len(by_algorithm | keys) == 5


# --- drawing --------------------------------------------------------------------------------------------------------


def test_fewer_pictures_are_the_first_of_more():
    few, more = drawing.make_subject("dit_mini", 2, 0), drawing.make_subject("dit_mini", 3, 0)
    assert few.prompts == more.prompts[:2] and (few.labels == more.labels[:2]).all()
    noise, longer = few.painter.noise, more.painter.noise
    np.testing.assert_array_equal(noise, longer[:2])
    assert not np.array_equal(noise, drawing.make_subject("dit_mini", 2, 1).painter.noise)


@pytest.fixture(scope="module")
def subject():
    return drawing.make_subject("dit_mini", 4, 0)


@pytest.fixture(scope="module")
def trajectory():
    return drawing.float_trajectory(drawing.make_subject("dit_mini", 2, 0))


def test_the_float_model_has_no_error_on_its_own_trajectory(subject, trajectory):
    assert len(trajectory.calls) == subject.painter.generation.n_steps
    assert min(trajectory.errors_db(drawing.float_engine(subject).run)) == math.inf


def test_only_the_wanted_multipliers_are_used(subject, tmp_path):
    row = rows_of("dit_mini", ["groups"], ["rtn-fp-power64-*"])[0]
    layers, _ = quality_engines.calibrated(subject, row, quality_engines.row_recipe(row), tmp_path)
    multipliers = {int(value) for layer in layers for value in np.unique(layer.multipliers)}
    assert multipliers <= {1, 2, 4, 8} and len(multipliers) > 1
    again, _ = quality_engines.calibrated(subject, row, quality_engines.row_recipe(row), tmp_path)
    assert all((one.codes == other.codes).all() for one, other in zip(layers, again, strict=True))


def test_modelopt_calibrates_in_the_formats_of_the_row_and_once(subject, tmp_path, monkeypatch):
    row = rows_of("dit_mini", patterns=["modelopt-svdquant-rank1-w4a6"])[0]
    recipe, asked = quality_engines.row_recipe(row), []
    plain = rows_of("dit_mini", patterns=["rtn-fp-exact64-w4a6"])[0]
    layers, _ = quality_engines.calibrated(subject, plain, quality_engines.row_recipe(plain), tmp_path)

    def take_over(model, _, module, folder):
        assert module == "quantized"
        checkpoint.save(layers, folder)
        return layers

    monkeypatch.setattr(modelopt_take_over, "quantized", lambda *words: asked.append(words) or "quantized")
    monkeypatch.setattr(modelopt_take_over, "take_over", take_over)
    for _ in range(2):
        made, _ = quality_engines.calibrated(subject, row, recipe, tmp_path)
        assert [layer.name for layer in made] == [layer.name for layer in layers]
    ((model, given, config),) = asked
    assert model is subject.model and given == recipe
    assert config == quant_config("E2M1", "E2M3", "exact_group", 64, {"method": "svdquant", "lowrank": 1})


def test_times_of_interrupted_calibrations_add_up(subject, tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr(quality_engines, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    row = rows_of("dit_mini", patterns=["rtn-fp-channel-w4a8"])[0]
    recipe = quality_engines.row_recipe(row)

    def interrupted(model, recipe, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(quality_engines, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quality_engines.calibrated(subject, row, recipe, tmp_path)
    monkeypatch.setattr(quality_engines, "calibrate", lambda *_: ["a layer"])
    assert quality_engines.calibrated(subject, row, recipe, tmp_path) == (["a layer"], 15 / 60)
    assert [json.loads(path.read_text()) for path in tmp_path.rglob("seconds.json")] == [{"seconds": 15.0}]


def test_layers_are_quantized_in_part(subject, monkeypatch):
    monkeypatch.setattr(quality_sensitivity, "LINES", (Line("FP", "fp", CHANNEL, widths=("w4a8", "w4a4")),))
    by_part = {(case.kind, case.part): case for case in cases(subject) if case.row == "fp-w4a4"}
    linears = {ref.name: ref for ref in subject.model.linears()}
    layer = by_part["ff.in", "both"].layers[0]
    x = drawing.torch.randn(3, layer.in_features, generator=drawing.torch.Generator().manual_seed(0))
    parts = {part: PartlyQuantized(linears[layer.name], layer, part)(x) for part in ("weights", "activations", "both")}
    weight, bias = drawing.torch.from_numpy(layer.dequantized()).float(), linears[layer.name].module.bias
    np.testing.assert_allclose(parts["weights"], x @ weight.T + bias, atol=1e-5)
    assert not np.allclose(parts["activations"], parts["weights"]) and not np.allclose(parts["both"], parts["weights"])
    assert {case.kind for case in by_part.values()} >= {"ff.in", "ff.out", "all"}
    assert len(by_part["all", "both"].layers) == len(linears)


def test_weights_alone_are_measured_once(subject, trajectory, monkeypatch):
    monkeypatch.setattr(quality_sensitivity, "LINES", (Line("FP", "fp", CHANNEL, widths=("w4a8", "w4a4")),))
    calls = []
    monkeypatch.setattr(quality_sensitivity, "_steps_db", lambda *args: calls.append(args[2]) or [20.0])
    rows = quality_sensitivity.sensitivity(subject, trajectory)
    kinds = len({row["kind"] for row in rows})
    assert len(rows) == 2 * 3 * kinds and len(calls) == 5 * kinds and rows[0]["sqnr_db"] == pytest.approx(20)


def test_mean_noise_is_ruled_by_the_worst_step():
    assert mean_noise_db([100.0, 10.0]) == pytest.approx(10 + 10 * math.log10(2), abs=1e-6)


# --- the whole, and its results -------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    def run(*words):
        places = ["--count", "4", "--work-dir", str(tmp_path / "work"), "--output-dir", str(tmp_path / "results")]
        monkeypatch.setattr("sys.argv", ["quality", "dit_mini", *places, *words])
        monkeypatch.setattr(quality_metrics, "RESAMPLES", 5)
        return quality.main(), Results("dit_mini", tmp_path / "results").read()["rows"]

    return run


def test_a_row_is_measured_once_proven_and_kept(command, monkeypatch):
    code, rows = command("--rows", "rtn-fp-channel-w4a8")
    row = rows["rtn-fp-channel-w4a8"]
    assert code == 0 and list(rows) == [FLOAT, "rtn-fp-channel-w4a8"] and row["status"] == MEASURED
    assert row["drawn_by"] in ("cpu engine, stock", "reference") and row["proof"]["gates"]["cpu/gemm_exact"] == 0
    assert row["psnr_db"]["value"] > 25 and len(row["step_sqnr_db"]) == 20
    assert rows[FLOAT]["frechet_increase"]["value"] == 0 and rows[FLOAT]["weights"] == row["weights"]

    def fail(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(measure, "measured_row", fail)
    assert command("--rows", "rtn-fp-channel-w4a8") == (0, rows)


def test_an_engine_that_fails_a_gate_does_not_draw(subject, trajectory, monkeypatch, tmp_path):
    row = rows_of("dit_mini", patterns=["rtn-fp-channel-w4a8"])[0]
    recipe = quality_engines.row_recipe(row)
    layers, _ = quality_engines.calibrated(subject, row, recipe, tmp_path)
    monkeypatch.setattr(quality_engines, "prove", lambda *_: [Gate("cpu/gemm_exact", 1.0, 0, "", "")])
    with quality_engines.drawer(subject, layers, recipe, trajectory, tmp_path / "engine") as engine:
        assert engine.name == "reference" and "cpu/gemm_exact" in engine.proof["refused"]


def test_the_engine_of_another_target_draws_if_its_graph_is_proven(subject, trajectory, monkeypatch, tmp_path):
    row = rows_of("dit_mini", patterns=["rtn-fp-channel-w4a8"])[0]
    recipe = quality_engines.row_recipe(row)
    layers, _ = quality_engines.calibrated(subject, row, recipe, tmp_path)
    asked = []

    def build(_, __, row_recipe, ___, target):  # no GPU here: the float model stands in
        asked.append((target, row_recipe.options(CudaOptions).activations))
        return None, drawing.float_engine(subject)

    monkeypatch.setattr(quality_engines, "build_engine", build)
    monkeypatch.setattr(quality_engines, "prove", lambda *args: [Gate(f"{args[-1]}/gemm_exact", 0.0, 0, "", "")])
    timings = {"cuda engine, fp32": Timing((1.0,)), "reference": Timing((2.0,))}
    monkeypatch.setattr(quality_engines, "interleaved", lambda *_: timings)
    with quality_engines.drawer(subject, layers, recipe, trajectory, tmp_path / "engine", "cuda") as engine:
        assert asked == [("cuda", "fp32")] and engine.name == "cuda engine, fp32"
        assert (
            engine.proof["gates"] == {"cuda/gemm_exact": 0}
            and 20 < engine.proof["engine_against_reference_sqnr_db"] < 60
        )


def test_a_gpu_that_is_not_there_is_missed_before_work(command, monkeypatch, caplog):
    monkeypatch.setattr(drawing.torch.cuda, "is_available", lambda: False)
    code, rows = command("--rows", "rtn-fp-channel-w4a8", "--target", "cuda")
    assert code == EnvironmentLacksError.exit_code and rows == {}
    assert "finds no GPU; take --target cpu" in caplog.text


def test_rows_that_fail_or_are_not_there_are_recorded(command, monkeypatch):
    monkeypatch.setattr(measure, "measured_row", lambda *_: (_ for _ in ()).throw(ValueError("no luck")))
    strange = Row("magic-w4a6", "dit_mini", "dit_w4a8", ("method=magic",))
    usual = rows_of("dit_mini", patterns=["rtn-int-channel-w4a4"])
    monkeypatch.setattr(quality, "rows_of", lambda *_: [strange, *usual])
    code, rows = command("--rows", "*")
    assert code == 1 and rows["rtn-int-channel-w4a4"]["status"] == FAILED
    assert rows["rtn-int-channel-w4a4"]["reason"] == "internal error, ValueError: no luck"
    assert rows["magic-w4a6"]["status"] == UNAVAILABLE and "'magic' is not available" in rows["magic-w4a6"]["reason"]


def test_a_row_of_modelopt_is_not_there_without_it(command, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "modelopt" else name)
    code, rows = command("--rows", "modelopt-max-exact64-w4a6")
    row = rows["modelopt-max-exact64-w4a6"]
    assert code == 0 and row["status"] == UNAVAILABLE
    assert row["reason"].endswith("needs modelopt; install with: pip install 'ditc[modelopt]'")


SHARING = ["rtn-fp-exact64-w4a6", "rtn-fp-exact64-attention-*-w4a6", "rtn-[fi]*-channel-w4a4"]


def test_rows_of_equal_layers_wait_for_one_calibration(tmp_path):
    rows = [(row, quality_engines.row_recipe(row)) for row in rows_of("dit_mini", patterns=SHARING)]
    jobs = {job.name: job for job in measure.row_jobs(rows, None, "sha256", tmp_path, "cpu", False)}
    names = [row.name for row, _ in rows]
    before = [jobs[name].after for name in names]
    assert len(jobs) == len(names) + len(set(before)) and len(names) == 6 and len(set(before)) == 3
    assert list(jobs).index(before[0]) == 0 and jobs[before[0]].after is None


def no_layers(shared, row, recipe, work, redo):
    if "channel-w4a8" in row.name:
        raise ModelError("no layers")


def made_up(shared, row, recipe, work, target):
    """A row's numbers, for speed, as another machine measured them."""
    if "-int-" in row.name:
        raise ValueError("no luck")
    assert work.is_absolute()
    numbers = {name: {"value": float(len(row.settings))} for name in ("frechet_increase", "psnr_db", "accuracy")}
    return numbers | {"drawn_by": target, "calibration_minutes": 0.0, "cpu": "another one"}


def test_a_cluster_records_what_this_process_records(command, monkeypatch, ray):
    """A row whose process is lost too, and those that fail, by themselves or with their calibration."""
    monkeypatch.setattr(measure, "calibrate_row", no_layers)
    monkeypatch.setattr(measure, "measured_row", made_up)
    words = ["--rows", "rtn-[fi]*-channel-w4a[46]", "--rows", "rtn-fp-channel-w4a8"]
    code, rows = command(*words)
    ray.machines = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    ray.losses["rtn-fp-channel-w4a6"] = [ray.errors["WorkerCrashedError"]("gone")]
    assert command(*words, "--redo", "--ray", "head:6379") == (code, rows) == (1, rows)
    assert {name: row["status"] for name, row in rows.items()} == {
        FLOAT: MEASURED,
        "rtn-int-channel-w4a6": FAILED,
        "rtn-int-channel-w4a4": FAILED,
        "rtn-fp-channel-w4a8": FAILED,
        "rtn-fp-channel-w4a6": MEASURED,
        "rtn-fp-channel-w4a4": MEASURED,
    }
    assert rows["rtn-fp-channel-w4a8"]["reason"] == "calibration of rtn-fp-channel-w4a8: no layers"
    assert rows["rtn-fp-channel-w4a6"]["cpu"] == "another one" != rows[FLOAT]["cpu"], "where it was measured"
    assert [name for name, _ in ray.sent].count("rtn-fp-channel-w4a6") == 2 and ray.joined == ["head:6379"]
    assert {options["num_cpus"] for _, options in ray.sent} == {8}, "a row has a machine for itself"


def test_rows_of_other_pictures_are_not_mixed_in(command, caplog):
    command("--rows", "none")
    assert command("--rows", "none", "--seed", "3")[0] == RecipeError.exit_code
    assert "has seed 0, not 3; give another --output-dir" in caplog.text


def test_changed_rows_do_not_go_into_the_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", "--set", "weights.search=absmax"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--output-dir" in capsys.readouterr().err
