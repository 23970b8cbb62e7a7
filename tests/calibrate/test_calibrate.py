"""Calibration as a whole: plans, round to nearest, resume, refusals, command."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from export import checkpoint
from export.errors import ContractError, ModelError, RecipeError
from export.formats.format import get_format
from export.models.families import FAMILIES
from pipeline import recipe as recipes
from pipeline.build import resolve
from pipeline.calibrate import adopt, calibrate
from pipeline.calibrate.__main__ import main, make_parser
from pipeline.calibrate.learn import reconstruct
from pipeline.calibrate.methods.rtn import RoundToNearest
from pipeline.calibrate.state import ORIGIN_FILE, TIME_FILE, CalibrationState
from pipeline.methods import METHODS
from tests.support import tiny

SHAPES = {
    "block.0.to_q": ("attn.qkv", 64, 128),
    "block.0.ff_in": ("ff.in", 256, 64),
    "block.1.ff_out": ("ff.out", 64, 256),
}


@dataclass(frozen=True)
class Linear:
    name: str
    kind: str
    module: torch.nn.Linear


def make_model(seed=0, shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(seed)
    linears = [Linear(name, kind, torch.nn.Linear(k, n).to(dtype)) for name, (kind, n, k) in shapes.items()]
    facts = {"sha256": f"weights of seed {seed}", "config_sha256": "", "parameters": 1000, "family": FAMILIES["dit"]}
    return SimpleNamespace(linears=lambda: linears, **facts)


def make_recipe(*settings):
    return recipes.with_settings(recipes.Recipe(name="test", model="none"), list(settings))


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sqnr_db(model, layers):
    pairs = [
        (linear.module.weight.double().detach().numpy(), layer.dequantized())
        for linear, layer in zip(model.linears(), layers, strict=True)
    ]
    return 10 * np.log10(sum((w**2).sum() for w, _ in pairs) / sum(((w - q) ** 2).sum() for w, q in pairs))


@pytest.mark.parametrize("granularity", recipes.GRANULARITIES)
@pytest.mark.parametrize("search", recipes.SEARCHES)
def test_every_granularity_and_search_gives_complete_layers(granularity, search, tmp_path):
    model = make_model()
    settings = (f"weights.granularity={granularity}", f"weights.search={search}", "weights.group_size=32")
    layers = calibrate(model, make_recipe(*settings), tmp_path)
    assert [layer.name for layer in layers] == list(SHAPES)
    assert [(layer.kind, layer.out_features, layer.in_features) for layer in layers] == list(SHAPES.values())
    assert all(layer.granularity == granularity for layer in layers)
    for layer, linear in zip(layers, model.linears(), strict=True):
        np.testing.assert_array_equal(layer.bias, linear.module.bias.detach().numpy())
    # Uniform weights in E2M1: the error of a step of 1/6 to 1 of the clip is above 1/100 and below 1/40 of the power.
    assert 16 < sqnr_db(model, layers) < 25


def test_finer_scales_are_better(tmp_path):
    sqnr = {}
    for granularity in recipes.GRANULARITIES:
        model = make_model()
        for linear in model.linears():
            linear.module.weight.data[:, :8] *= 8  # outlier columns, all in one group
        sqnr[granularity] = sqnr_db(
            model, calibrate(model, make_recipe(f"weights.granularity={granularity}"), tmp_path / granularity)
        )
    assert sqnr["per_channel"] + 0.3 < sqnr["exact_group"]
    assert sqnr["per_channel"] + 0.3 < sqnr["group"]


def test_formats_follow_the_layer_kind_and_a_format_without_multipliers_takes_one_scale(tmp_path, caplog):
    caplog.set_level("INFO")
    layers = calibrate(make_model(), make_recipe('formats.weight_of={"ff.in" = "E3M0"}'), tmp_path)
    assert {layer.kind: layer.weight_format for layer in layers} == {
        "attn.qkv": "E2M1",
        "ff.in": "E3M0",
        "ff.out": "E2M1",
    }
    assert {layer.kind: layer.granularity for layer in layers}["ff.in"] == "per_channel"
    assert "ff.in: 1 layers in E3M0 have no exact multipliers but 1" in caplog.text


def test_weights_in_16_bits_are_read_as_they_are(tmp_path):
    wide, narrow = make_model(), make_model(dtype=torch.float16)
    for linear in wide.linears():
        linear.module.weight.data = linear.module.weight.data.half().float()
        linear.module.bias.data = linear.module.bias.data.half().float()
    for a, b in zip(
        calibrate(wide, make_recipe(), tmp_path / "a"), calibrate(narrow, make_recipe(), tmp_path / "b"), strict=True
    ):
        assert np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(broken, tmp_path):
    model = make_model()
    model.linears()[1].module.weight.data[3, 4] = broken
    with pytest.raises(ModelError, match=r"block\.0\.ff_in: 1 of 16384 weights are NaN or Inf"):
        calibrate(model, make_recipe(), tmp_path)


@pytest.mark.parametrize(("size", "fitting"), [(48, 32), (96, 64), (1000, 64)])
def test_a_group_size_that_does_not_fit_is_refused_before_work_with_one_that_does(size, fitting, tmp_path):
    with pytest.raises(
        RecipeError, match=rf"weights.group_size {size} does not divide .*--set weights.group_size={fitting}\b"
    ):
        calibrate(make_model(), make_recipe(f"weights.group_size={size}"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert calibrate(make_model(), make_recipe(f"weights.group_size={fitting}"), tmp_path / "new")


class Stopped(RoundToNearest):
    """Is interrupted after `left` layers."""

    left = 0

    def quantize(self, unit):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().quantize(unit)


STOPPED = replace(METHODS["rtn"], target="tests.calibrate.test_calibrate:Stopped")


def stopped_after(done, folder, monkeypatch):
    Stopped.left = done
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "rtn", STOPPED)
        with pytest.raises(KeyboardInterrupt):
            calibrate(make_model(), make_recipe(), folder)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(done, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate(make_model(), make_recipe(), whole)
    Stopped.left = done
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "rtn", STOPPED)
        with pytest.raises(KeyboardInterrupt):
            calibrate(make_model(), make_recipe(), parts)
    kept = {path.parent.name: path.stat().st_mtime_ns for path in parts.glob("layers/*/*.json")}
    assert len(kept) == done
    Stopped.left = len(SHAPES) - done  # exactly what is left may be done now
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "rtn", STOPPED)
        calibrate(make_model(), make_recipe(), parts)
    assert digests(parts) == digests(whole)


def test_a_half_written_layer_is_done_again(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate(make_model(), make_recipe(), whole)
    stopped_after(2, parts, monkeypatch)
    next(parts.glob(f"layers/*/{checkpoint.LAYERS_FILE}")).unlink()
    calibrate(make_model(), make_recipe(), parts)
    assert digests(parts) == digests(whole)


@pytest.mark.parametrize("change", ["recipe", "model"])
def test_state_of_another_recipe_or_model_is_not_used(change, tmp_path):
    calibrate(make_model(), make_recipe(), tmp_path / "folder")
    model = make_model(seed=1 if change == "model" else 0)
    recipe = make_recipe(*(["weights.search=absmax"] if change == "recipe" else []))
    calibrate(model, recipe, tmp_path / "folder")
    calibrate(model, recipe, tmp_path / "fresh")
    assert digests(tmp_path / "folder") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("finished", [False, True])
def test_a_resumed_run_refuses_state_of_other_settings_and_leaves_it(finished, tmp_path):
    calibrate(make_model(), make_recipe(), tmp_path)
    if not finished:
        (tmp_path / checkpoint.LAYERS_FILE).unlink()
    before = digests(tmp_path)
    with pytest.raises(
        RecipeError, match=r"\(weights\.group_size is 64 there, 32 here\); restore them to go on, or .*--f"
    ):
        calibrate(make_model(), make_recipe("weights.group_size=32"), tmp_path, resume=True)
    with pytest.raises(RecipeError, match="model_sha256 is weights of seed 0 there, weights of seed 1 here"):
        calibrate(make_model(seed=1), make_recipe(), tmp_path, resume=True)
    assert digests(tmp_path) == before


def test_what_decides_nothing_may_change(tmp_path, monkeypatch):
    calibrate(make_model(), make_recipe(), tmp_path / "first")
    monkeypatch.delattr(RoundToNearest, "quantize")
    others = ("sampling.seed=1", "sampling.batch_size=2", "sampling.n_steps=3", "calibrate.seed=1", "calibrate.size=5")
    assert calibrate(make_model(), make_recipe(*others), tmp_path / "first", resume=True)
    assert adopt(make_model(), make_recipe(*others), tmp_path / "first", tmp_path / "second")


def test_exchanged_layers_are_found(tmp_path, monkeypatch):
    stopped_after(2, tmp_path, monkeypatch)
    first, second = (tmp_path / "layers" / name for name in list(SHAPES)[:2])
    first.rename(tmp_path / "aside"), second.rename(first), (tmp_path / "aside").rename(second)
    with pytest.raises(
        ContractError, match=r"to_q: found block\.0\.ff_in where block\.0\.to_q belongs; remove that folder"
    ):
        calibrate(make_model(), make_recipe(), tmp_path, resume=True)


def test_a_finished_checkpoint_of_other_layers_is_found(tmp_path):
    layers = calibrate(make_model(), make_recipe(), tmp_path / "first")
    for wrong, part in (
        (layers[::-1], r"found block\.1\.ff_out where block\.0\.to_q"),
        (layers[:2], "2 layers where 3"),
    ):
        checkpoint.save(wrong, tmp_path / "first")
        with pytest.raises(ContractError, match=part):
            calibrate(make_model(), make_recipe(), tmp_path / "first")
        with pytest.raises(ContractError, match=part):
            adopt(make_model(), make_recipe(), tmp_path / "first", tmp_path / "second")


def test_two_runs_in_one_folder(tmp_path):
    with (
        CalibrationState(tmp_path, {"a": 1}),
        pytest.raises(RecipeError, match=r"another calibration.* is writing"),
        CalibrationState(tmp_path, {"a": 2}),
    ):
        pytest.fail("entered")
    assert json.loads((tmp_path / ORIGIN_FILE).read_text()) == {"a": 1}


def test_a_resumed_run_counts_the_time_of_the_earlier_one(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    stopped_after(2, tmp_path, monkeypatch)
    path = tmp_path / "layers" / TIME_FILE
    assert 0 < json.loads(path.read_text())["seconds"] < 60
    path.write_text('{"seconds": 3600}')
    calibrate(make_model(), make_recipe(), tmp_path)
    assert "(rtn) in 360" in caplog.text and not path.exists()


def test_a_finished_run_is_read_back(tmp_path, monkeypatch):
    first = calibrate(make_model(), make_recipe(), tmp_path)
    monkeypatch.delattr(RoundToNearest, "quantize")
    again = calibrate(make_model(), make_recipe(), tmp_path)
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    assert not (tmp_path / "layers").exists()


def test_a_finished_checkpoint_is_adopted_elsewhere(tmp_path, monkeypatch):
    first = calibrate(make_model(), make_recipe(), tmp_path / "first")
    monkeypatch.delattr(RoundToNearest, "quantize")
    again = adopt(make_model(), make_recipe(), tmp_path / "first", tmp_path / "second")
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    assert digests(tmp_path / "second") == digests(tmp_path / "first")


def test_a_checkpoint_of_other_settings_is_refused_with_what_differs(tmp_path):
    calibrate(make_model(), make_recipe(), tmp_path / "first")
    first, out = tmp_path / "first", tmp_path / "out"
    other = make_recipe("weights.group_size=32", "weights.search=absmax")
    with pytest.raises(RecipeError, match=r"size is 64 there, 32 here; weights\.search is mse there, absmax here\)"):
        adopt(make_model(), other, first, out)
    with pytest.raises(RecipeError, match="model_sha256 is weights of seed 0 there, weights of seed 1 here"):
        adopt(make_model(seed=1), make_recipe(), first, out)
    (first / checkpoint.LAYERS_FILE).unlink()
    with pytest.raises(RecipeError, match=r"holds no finished calibration; python -m pipeline\.calibrate"):
        adopt(make_model(), make_recipe(), first, out)
    assert not out.exists()


def command(folder, output, group_size):
    settings = ["--set", "method=rtn", "--set", f"weights.group_size={group_size}"]
    return ["--engine", "pixart_w4a6", "-m", str(folder), "-o", str(output), *settings]


@pytest.mark.torch
def test_command_on_a_model_folder(tmp_path, capsys):
    folder = tiny.folder("pixart", tmp_path)
    flags = command(folder, tmp_path / "out", group_size=32)
    assert main([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    layers = checkpoint.load(tmp_path / "out")
    assert answer["linears"] == len(layers) == 20 and answer["size_bytes"] == sum(layer.size_bytes for layer in layers)
    assert {layer.weight_format for layer in layers} == {"E2M1"}
    assert all(get_format(layer.activation_format).name == "E2M3" for layer in layers)


@pytest.mark.torch
def test_command_refuses_a_group_size_that_does_not_fit(tmp_path, capsys, caplog):
    folder = tiny.folder("pixart", tmp_path)
    flags = command(folder, tmp_path / "out", group_size=48)
    assert main(flags) == RecipeError.exit_code
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_command_resumes_only_what_it_was_asked_for(tmp_path, capsys):
    folder = tiny.folder("pixart", tmp_path / "model")
    flags = command(folder, tmp_path / "out", group_size=32)
    assert main(flags) == 0
    before = digests(tmp_path / "out")
    assert main([*command(folder, tmp_path / "out", group_size=64), "--resume"]) == 2
    assert "weights.group_size is 32 there, 64 here" in capsys.readouterr().err
    with CalibrationState(tmp_path / "out", json.loads((tmp_path / "out" / ORIGIN_FILE).read_text())):
        assert main([*flags, "--force"]) == 2 and "another calibration" in capsys.readouterr().err
    assert digests(tmp_path / "out") == before


def test_seed_is_that_of_calibration_and_of_sampling():
    recipe = resolve(make_parser().parse_args(["--engine", "pixart_w4a6", "--seed", "5", "--set", "calibrate.seed=2"]))
    assert (recipe.calibrate.seed, recipe.sampling.seed) == (5, 5)


@pytest.mark.torch
def test_command_leaves_other_folders_alone_and_resumes(tmp_path, capsys):
    folder = tiny.folder("pixart", tmp_path / "model")
    flags = command(folder, tmp_path / "out", group_size=32)
    assert main(flags) == 0
    assert main(flags) == 2 and "finished calibration; add --force" in capsys.readouterr().err
    assert main([*flags, "--force"]) == 0
    (tmp_path / "out" / checkpoint.LAYERS_FILE).unlink()
    assert main(flags) == 2 and "interrupted calibration; add --resume" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0 and len(checkpoint.load(tmp_path / "out")) == 20
    assert main([*flags[:4], "-o", str(folder)]) == 2 and "not a calibration" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


@pytest.mark.torch
def test_ctrl_c_within_a_learned_block_keeps_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    folder, draw, drawn = tiny.folder("pixart", tmp_path), reconstruct.Batches.draw, []
    settings = ("calibrate.options={iterations = 2, batch = 2}", "sampling.n_steps=2", "calibrate.timesteps=1")
    extra = ["--calib-size", "1", *(part for setting in ("method=fp4dit", *settings) for part in ("--set", setting))]

    def flags(name):
        return [*command(folder, tmp_path / name, group_size=32), *extra]

    def interrupted(batches):
        drawn.append(batches)
        if len(drawn) == 4:  # the last iteration of the second of two blocks
            signal.raise_signal(signal.SIGINT)
        return draw(batches)

    assert main(flags("whole")) == 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(reconstruct.Batches, "draw", interrupted)
            assert main(flags("parts")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "run the same command again with --resume" in capsys.readouterr().err
    assert len(list((tmp_path / "parts").glob("layers/*/*.json"))) == 10
    monkeypatch.setattr(reconstruct.Batches, "draw", lambda batches: drawn.append(batches) or draw(batches))
    assert main([*flags("parts"), "--resume"]) == 0
    assert len(drawn) == 6 and digests(tmp_path / "parts") == digests(tmp_path / "whole")
