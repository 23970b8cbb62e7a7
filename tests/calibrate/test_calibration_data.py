"""Calibration data and the observation of blocks, on tiny models of the true classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from export.cache_folder import cache_folder
from export.errors import ModelError, RecipeError, ResourceError
from export.models.load import denoiser, load
from pipeline import calibrate as package
from pipeline import machine
from pipeline.calibrate.blocks import BlockRunner, WeightOnlyLinear, block_of, group_by_block
from pipeline.calibrate.data import calibration_data, kept_steps, read_prompts
from pipeline.calibrate.method import Method, Unit
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.generate import pipeline_folder
from pipeline.methods import METHODS, MethodRow, Option
from pipeline.recipe import load as load_recipe
from pipeline.recipe import with_settings
from tests.generate.test_diffusers_adapter import CALLS, folder_of
from tests.support import tiny

pytestmark = pytest.mark.torch

FAMILIES = ("pixart", "dit", "hunyuan")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))


def model_and_recipe(family, tmp_path, *settings):
    model = load(str(tiny.folder(family, tmp_path / family)))
    small = ["weights.group_size=32", "calibrate.size=3", "calibrate.timesteps=2", "sampling.n_steps=3", *settings]
    return model, replace(with_settings(load_recipe("pixart_w4a6"), small), model=str(model.folder))


def test_steps_are_spread_and_end_where_the_trajectory_ends():
    assert kept_steps(20, 10)[0] == 0 and kept_steps(20, 10)[-1] == 19 and len(kept_steps(20, 10)) == 10
    assert kept_steps(1, 5) == [0]


def test_data_hold_both_halves_of_guidance_and_are_made_once(tmp_path, monkeypatch):
    model, recipe = model_and_recipe("pixart", tmp_path)
    data = calibration_data(model, recipe)
    assert [call.step for call in data.calls] == [0, 2] and data.n_steps == 3 and data.samples == 2 * 3 * 2
    captions = data.calls[0].inputs["encoder_hidden_states"]
    assert not np.array_equal(captions[:3], captions[3:])
    assert np.array_equal(data.calls[0].inputs["hidden_states"][:3], data.calls[0].inputs["hidden_states"][3:])
    monkeypatch.setattr("pipeline.calibrate.data._collect", None)
    again = calibration_data(model, recipe)
    assert all(
        np.array_equal(a.inputs[key], b.inputs[key])
        for a, b in zip(data.calls, again.calls, strict=True)
        for key in a.inputs
    )


def test_an_interrupted_collection_goes_on(tmp_path):
    model, recipe = model_and_recipe("pixart", tmp_path, "calibrate.size=20")
    whole = calibration_data(model, recipe)
    folder = next((cache_folder("calibration")).iterdir())
    (folder / "data.json").unlink()
    sorted(folder.glob("batch0001*"))[0].unlink()
    again = calibration_data(model, recipe)
    assert len(whole.calls) == 4
    for a, b in zip(whole.calls, again.calls, strict=True):
        np.testing.assert_array_equal(a.inputs["hidden_states"], b.inputs["hidden_states"])


def test_other_settings_give_other_data(tmp_path):
    model, recipe = model_and_recipe("pixart", tmp_path)
    first = calibration_data(model, recipe)
    other = calibration_data(model, replace(recipe, calibrate=replace(recipe.calibrate, seed=1)))
    assert not np.array_equal(first.calls[0].inputs["hidden_states"], other.calls[0].inputs["hidden_states"])


def test_another_configuration_of_the_same_weights_gives_other_data(tmp_path):
    """A position table for pictures half as large, say."""
    model, recipe = model_and_recipe("pixart", tmp_path)
    for changes, folders in (({}, 1), ({"interpolation_scale": 0.5}, 2), ({"_name_or_path": "elsewhere"}, 2)):
        calibration_data(replace(model, config={**model.config, **changes}), recipe)
        assert len(list((cache_folder("calibration")).iterdir())) == folders


def synthetic(model, sampler):
    """Write a generation.json that draws by this sampler on random captions."""
    inputs = {
        "encoder_hidden_states": {"shape": [5, 32]},
        "encoder_attention_mask": {"shape": [5], "value": 1},
    }
    document = {"sampler": sampler, "conditioning": {"kind": "synthetic", "inputs": inputs}}
    (model.folder / "generation.json").write_text(json.dumps(document))


def test_another_description_beside_the_model_gives_other_data(tmp_path):
    model, recipe = model_and_recipe("pixart", tmp_path, "calibrate.size=1", "sampling.n_steps=2")
    latents = []
    for sampler in ("ddim", "flow_euler"):
        synthetic(model, sampler)
        latents.append(calibration_data(model, recipe).calls[-1].inputs["hidden_states"])
    assert not np.array_equal(*latents)


@pytest.mark.parametrize("damage", [None, 100, 10_000])
def test_missing_and_broken_files_are_made_again(damage, tmp_path, caplog):
    """damage: to how many bytes a file is cut (its head alone takes more than 100), None to remove it."""
    model, recipe = model_and_recipe("pixart", tmp_path, "calibrate.size=17")
    whole = calibration_data(model, recipe)
    folder = next((cache_folder("calibration")).iterdir())
    named = json.loads((folder / "data.json").read_text())["files"]
    assert sorted(named) == sorted(path.name for path in folder.glob("batch*")) and len(named) == 4
    path = folder / named[2]
    path.unlink() if damage is None else path.write_bytes(path.read_bytes()[:damage])
    kept = (folder / named[0]).stat().st_mtime_ns
    again = calibration_data(model, recipe)
    assert f"1 of 4 files missing or broken ({named[2]}); making them again" in caplog.text
    assert (folder / named[0]).stat().st_mtime_ns == kept and again.samples == whole.samples == 2 * 17 * 2
    for a, b in zip(whole.calls, again.calls, strict=True):
        np.testing.assert_array_equal(a.inputs["hidden_states"], b.inputs["hidden_states"])


def test_a_sampler_that_ends_early_is_told(tmp_path, monkeypatch):
    model, recipe = model_and_recipe("pixart", tmp_path)
    monkeypatch.setattr("pipeline.generate.case.Case.draw", lambda *_: None)
    with pytest.raises(ModelError, match=r"without the call of batch0000_step0000.* and 1 others; use fewer"):
        calibration_data(model, recipe)


def test_a_resumed_run_refuses_other_data(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "watching", ROW)
    model, recipe = model_and_recipe("pixart", tmp_path, "method=watching", "calibrate.size=1", "sampling.n_steps=2")
    synthetic(model, "ddim")
    lines, moved = tmp_path / "a.txt", tmp_path / "b.txt"
    lines.write_text("a red circle")

    def by(path):
        return replace(recipe, calibrate=replace(recipe.calibrate, prompts=str(path)))

    package.calibrate(model, by(lines), tmp_path / "out")
    lines.rename(moved)
    assert package.calibrate(model, by(moved), tmp_path / "out", resume=True), "the texts count, not where they are"
    moved.write_text("a blue circle")
    with pytest.raises(RecipeError, match=r"other settings \(data\.prompts_sha256 is \w+ there, \w+ here\)"):
        package.calibrate(model, by(moved), tmp_path / "out", resume=True)
    moved.write_text("a red circle")
    synthetic(model, "flow_euler")
    with pytest.raises(RecipeError, match=r"other settings \(data\.generation_sha256 is"):
        package.calibrate(model, by(moved), tmp_path / "out", resume=True)


def test_prompts_come_from_a_file(tmp_path):
    recipe = with_settings(load_recipe("pixart_w4a6"), ["calibrate.size=3"])
    model = load("zoo:pixart_mini")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle on white\n\na blue ring on black\n")
    texts = read_prompts(model, replace(recipe, calibrate=replace(recipe.calibrate, prompts=str(lines))))
    assert texts == ("a red circle on white", "a blue ring on black", "a red circle on white")
    with pytest.raises(RecipeError, match=r"none\.txt is missing; calibrate\.prompts takes a text file"):
        read_prompts(model, replace(recipe, calibrate=replace(recipe.calibrate, prompts=str(tmp_path / "none.txt"))))
    own = read_prompts(model, recipe)
    assert len(own) == 3 and own == read_prompts(model, recipe)


def test_prompts_need_a_model_that_encodes_them(tmp_path):
    model, recipe = model_and_recipe("pixart", tmp_path)
    with pytest.raises(RecipeError, match="nothing encodes prompts for"):
        read_prompts(model, replace(recipe, calibrate=replace(recipe.calibrate, prompts="some.txt")))


@pytest.mark.parametrize("family", CALLS)
def test_a_real_pipeline_samples_with_its_own_text_encoder(family, tmp_path, monkeypatch):
    folder = folder_of(family, tmp_path, monkeypatch)
    root = tmp_path / "real"
    CALLS[family][0](load(str(folder)).module).save_pretrained(root)
    model, recipe = load(str(root)), model_and_recipe(family, tmp_path / "other")[1]
    data = calibration_data(model, recipe)
    assert [call.step for call in data.calls] == [0, 2] and data.samples == 2 * 3 * 2
    inputs, half = data.calls[0].inputs, 3
    name = "class_labels" if family == "dit" else "encoder_hidden_states"
    assert not np.array_equal(inputs[name][:half], inputs[name][half:]), "the halves of guidance have one condition"
    assert np.array_equal(inputs["hidden_states"][:half], inputs["hidden_states"][half:])
    if family == "dit":
        assert (inputs[name][half:] == 1000).all()  # the pipeline's null class
        return
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\na circle\n")
    captioned = calibration_data(model, replace(recipe, calibrate=replace(recipe.calibrate, prompts=str(lines))))
    first, second, third = captioned.calls[0].inputs[name][half:]  # this pipeline has the empty prompt first
    assert np.array_equal(first, third) and not np.array_equal(first, second)  # two lines serve three prompts
    (root / "text_encoder").rename(root / "elsewhere")
    assert read_prompts(model, recipe) == ("random",) * 3


def test_a_pipeline_of_one_variant_samples_with_it(tmp_path, monkeypatch):
    folder = folder_of("pixart", tmp_path, monkeypatch)
    plain, root = tmp_path / "plain", tmp_path / "real"
    for path, variant in ((plain, None), (root, "fp16")):
        CALLS["pixart"][0](load(str(folder)).module).save_pretrained(path, variant=variant)
    recipe = model_and_recipe("pixart", tmp_path / "other")[1]
    expected, data = (calibration_data(load(str(path)), recipe) for path in (plain, root))
    for call, other in zip(expected.calls, data.calls, strict=True):
        assert all(np.array_equal(call.inputs[name], other.inputs[name]) for name in call.inputs)
    assert pipeline_folder.shared_variant(plain) is None and pipeline_folder.shared_variant(root) == "fp16"
    assert pipeline_folder.float32_bytes(plain) == pipeline_folder.float32_bytes(root) > 0
    file = root / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(
        ModelError, match=r"must share one variant \(text_encoder: fp16; vae: bf16\); download the plain"
    ):
        pipeline_folder.shared_variant(root)


def test_a_text_encoder_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = folder_of("pixart", tmp_path, monkeypatch)
    root = tmp_path / "real"
    CALLS["pixart"][0](load(str(folder)).module).save_pretrained(root)
    parts = [getattr(DiffusionPipeline.from_pretrained(root), name) for name in ("text_encoder", "vae")]
    weights = {id(weight): weight.numel() for part in parts for weight in part.parameters()}  # tied ones once
    (root / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant, not read")
    assert pipeline_folder.float32_bytes(root) == 4 * sum(weights.values())
    monkeypatch.setattr(machine, "free_memory", lambda: machine.FreeMemory(1000))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(ResourceError, match=r"other parts take in float32 0\.0 GiB, 0\.0 GiB are free"):
        calibration_data(load(str(root)), model_and_recipe("pixart", tmp_path / "other")[1])


def test_layers_belong_to_the_repeated_block():
    assert block_of("transformer_blocks.11.ff.net.0.proj") == "transformer_blocks.11"
    assert block_of("decoder.blocks.2.attn.to_q") == "decoder.blocks.2"
    assert block_of("proj_out") == "proj_out"


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_see_what_the_whole_model_gives_them(family, tmp_path):
    model, recipe = model_and_recipe(family, tmp_path)
    plans = make_plans(model.linears(), recipe)
    blocks, data = group_by_block(plans), calibration_data(model, recipe)
    runner = BlockRunner(model, data, list(blocks))
    assert runner.is_chain == (family != "hunyuan")  # its second half gets long skips
    done = {}
    for name, group in blocks.items():
        observed = runner.observe(name, group)
        inputs, outputs = spied(denoiser(model), name, data)
        noisy, _ = spied(denoiser(model, {key: WeightOnlyLinear(layer) for key, layer in done.items()}), name, data)
        for i, call in enumerate(observed.calls):
            torch.testing.assert_close(call.args[0], inputs[i])
            torch.testing.assert_close(observed.outputs[i], (outputs[i],))
            torch.testing.assert_close(observed.noisy[i].args[0], noisy[i], rtol=1e-4, atol=1e-5)
        done |= {plan.name: quantize_linear(plan, "absmax") for plan in group}
        runner.advance(observed, [done[plan.name] for plan in group])


def spied(module, name, data):
    """Hidden states into and out of a block in every call of the whole model."""
    seen = []

    def keep(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden, output[0] if isinstance(output, tuple) else output))

    handle = module.transformer.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for call in data.calls:
            module(**{key: torch.from_numpy(value) for key, value in call.inputs.items()})
    handle.remove()
    return [a for a, _ in seen], [b for _, b in seen]


def test_layer_inputs_are_rows_all_or_spread(tmp_path):
    model, recipe = model_and_recipe("pixart", tmp_path)
    blocks = group_by_block(make_plans(model.linears(), recipe))
    name, group = next(iter(blocks.items()))
    observed = BlockRunner(model, calibration_data(model, recipe), list(blocks)).observe(name, group)
    layer = f"{name}.ff.net.2"
    whole, some = observed.layer_inputs(layer), observed.layer_inputs(layer, rows=5)
    assert whole[0].shape == (6 * 16, 4 * tiny.WIDTH) and some[0].shape == (5, 4 * tiny.WIDTH)
    torch.testing.assert_close(some[0][[0, -1]], whole[0][[0, -1]])


# --- the flow of `calibrate` with an observing method ---------------------------------------------------------------


class Watching(Method):
    """Rounds to nearest; remembers its units, and changes a bias at the end."""

    seen: list[str] = []  # noqa: RUF012  # shared on purpose
    stop_after = 10**9

    def quantize(self, unit: Unit):
        if len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        assert unit.observed is not None and self.context.data is not None
        self.seen.append(unit.name)
        size = float(unit.observed.noisy[0].args[0].square().mean())  # so that the result depends on earlier blocks
        return [replace(layer, scales=layer.scales * np.float32(1 + 1e-3 * size))
                for layer in (quantize_linear(plan, "absmax") for plan in unit.plans)]  # fmt: skip

    def finish(self, layers):
        return [replace(layer, bias=layer.bias + np.float32(self.context.options["shift"])) for layer in layers]


ROW = MethodRow("watching", f"{__name__}:Watching", "for tests", {"shift": Option(1.0, 2.0)})


def test_an_observing_method_is_resumed_to_the_same_layers(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "watching", ROW)
    model, recipe = model_and_recipe("pixart", tmp_path, "method=watching", "calibrate.options={shift = 3}")
    Watching.seen, Watching.stop_after = [], 10**9
    whole = package.calibrate(model, recipe, tmp_path / "whole")
    assert Watching.seen == ["transformer_blocks.0", "transformer_blocks.1"]
    Watching.seen, Watching.stop_after = [], 1
    with pytest.raises(KeyboardInterrupt):
        package.calibrate(model, recipe, tmp_path / "parts")
    Watching.seen, Watching.stop_after = [], 10**9
    again = package.calibrate(model, recipe, tmp_path / "parts")
    assert Watching.seen == ["transformer_blocks.1"]
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a.scales, b.scales)
        np.testing.assert_array_equal(a.bias, b.bias)
    plain = {plan.name: quantize_linear(plan, "absmax") for plan in make_plans(model.linears(), recipe)}
    np.testing.assert_array_equal(whole[0].bias, plain[whole[0].name].bias + 3)
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("method", ["watching", "fp4dit", "msfp"])
def test_too_many_samples_are_refused_before_work(method, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "watching", ROW)
    monkeypatch.setattr("pipeline.calibrate.data.calibration_data", None)
    monkeypatch.setattr(machine, "free_memory", lambda: machine.FreeMemory(1000))
    model, recipe = model_and_recipe("pixart", tmp_path, f"method={method}")
    with pytest.raises(ResourceError, match="--calib-size, now 3"):
        package.calibrate(model, recipe, tmp_path / "out")


def test_options_follow_the_preset_and_are_checked():
    assert ROW.resolve("fast", {}) == {"shift": 1.0} and ROW.resolve("full", {}) == {"shift": 2.0}
    assert ROW.resolve("full", {"shift": 5}) == {"shift": 5.0}
    with pytest.raises(RecipeError, match="has no option 'lift'; it has shift"):
        ROW.resolve("fast", {"lift": 1})
    with pytest.raises(RecipeError, match="expected float, found 'a'"):
        ROW.resolve("fast", {"shift": "a"})


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_every_row_loads_a_method(row):
    assert issubclass(row.load(), Method) and row.name == row.name.lower() and row.summary
