"""The bundled models: training resumes exactly, folders are complete, cards and claims agree with the JSON."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtAlphaPipeline
from safetensors.torch import load_file

from benchmarks.quality.judging import JUDGINGS, SCENES, features_of, read
from benchmarks.quality.metrics import frechet, gaussian
from benchmarks.record import RESULTS
from benchmarks.zoo import judges
from benchmarks.zoo import publish as publish_zoo
from benchmarks.zoo import train as train_zoo
from benchmarks.zoo.pixart_scenes import board
from benchmarks.zoo.pixart_scenes import publish as pixart_scenes_publish
from benchmarks.zoo.pixart_scenes.picture import draw
from benchmarks.zoo.pixart_scenes.publish import size_bytes
from benchmarks.zoo.pixart_scenes.reader import SLOTS
from benchmarks.zoo.pixart_scenes.train import PLAN
from benchmarks.zoo.publish import SIZE_LIMIT_BYTES, WEIGHTS_FILE, ZOO
from benchmarks.zoo.tasks import TASKS, digits
from pipeline.generate.conditioning import load_generation
from pipeline.generate.sampling import SAMPLERS
from pipeline.recipe import load as load_recipe

pytestmark = pytest.mark.torch

REQUIRED_ACCURACY = 0.95
NAMES = list(TASKS)


def tiny_task(steps):
    """The digits task with one small block."""

    def build():
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=16,
            patch_size=4, num_embeds_ada_norm=10,
        )  # fmt: skip

    return dataclasses.replace(TASKS["dit_mini"], name="tiny", build=build, batch_size=4, steps=steps)


def weights(path):
    return torch.load(path, weights_only=True)["ema"]


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_zoo, "SAVE_EVERY", 2)
    # The plan must be the same (the learning rate depends on it): stop by an exception after four steps.
    task, track = tiny_task(6), train_zoo.track
    straight = weights(train_zoo.train(task, tmp_path, seed=1))
    monkeypatch.setattr(train_zoo, "track", lambda items, *rest, **named: track(list(items)[:4], *rest, **named))
    (tmp_path / "b").mkdir()
    train_zoo.train(task, tmp_path / "b", seed=1)
    monkeypatch.setattr(train_zoo, "track", track)
    resumed = weights(train_zoo.train(task, tmp_path / "b", seed=1))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_learning_rate_warms_up_and_decays():
    task = tiny_task(1000)
    rates = [train_zoo.learning_rate(task, step) for step in range(1000)]
    assert rates[0] == pytest.approx(task.peak_lr / 300)
    assert max(rates) == rates[500] == task.peak_lr
    assert rates[-1] == pytest.approx(task.peak_lr / 100)


def test_digits_are_split_four_to_one():
    pictures, classes = digits()
    assert pictures.shape == (1797, 1, 16, 16) and classes.shape == (1797,)
    trained, _ = TASKS["dit_mini"].sample(50, torch.Generator().manual_seed(0))
    assert trained.shape == (50, 1)
    assert len(judges.JUDGES["dit_mini"].test()[0]) == 360


def initial_state(task):
    """The state of a model that was not trained, in the form that training saves."""
    return {"ema": task.build().state_dict(), "step": 0, "hours": 0.0, "loss": float("nan"), "seed": 0}


@pytest.mark.parametrize("name", NAMES)
def test_publishing_writes_a_folder_that_diffusers_reads(name, tmp_path):
    task = TASKS[name]
    publish_zoo.publish(task, initial_state(task), tmp_path)
    publish_zoo.write_card(name, tmp_path)
    model = type(task.build()).from_pretrained(tmp_path, local_files_only=True)
    assert {weight.dtype for weight in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float16}
    assert (
        sum(p.numel() for p in model.parameters()) == json.loads((tmp_path / "training.json").read_text())["parameters"]
    )
    assert "0 of" in (tmp_path / "README.md").read_text()


def test_a_weight_that_overflows_fp16_is_refused(tmp_path):
    task = TASKS["dit_mini"]
    state = initial_state(task)
    state["ema"]["proj_out_2.bias"][0] = 1e5
    with pytest.raises(ValueError, match=r"proj_out_2\.bias is not finite in fp16"):
        publish_zoo.publish(task, state, tmp_path)


# --- what is committed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_bundled_folder_is_complete_small_and_finite(name):
    stored = load_file(ZOO / name / WEIGHTS_FILE)
    assert (ZOO / name / WEIGHTS_FILE).stat().st_size <= SIZE_LIMIT_BYTES
    assert all(value.isfinite().all() for value in stored.values())
    assert {key: value.shape for key, value in stored.items()} == {
        key: value.shape for key, value in TASKS[name].build().state_dict().items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_described_by_the_script_and_encodes_its_examples(name):
    stored = json.loads((ZOO / name / "generation.json").read_text())
    assert stored == json.loads(json.dumps(publish_zoo.generation(name)))
    generation = load_generation(ZOO / name)
    conditioned, plain = generation.encode(stored["conditioning"]["examples"])
    assert conditioned.keys() == plain.keys()
    assert any(not np.array_equal(conditioned[key], plain[key]) for key in conditioned)
    assert generation.sampler in SAMPLERS


@pytest.mark.parametrize("name", NAMES)
def test_the_published_model_was_trained_to_the_end_and_is_good_enough(name):
    facts = json.loads((ZOO / name / "training.json").read_text())
    assert facts["step"] == facts["planned_steps"] == TASKS[name].steps
    measured = json.loads((RESULTS / f"zoo_{name}.json").read_text())
    assert measured["training"] == facts
    assert measured["count"] == 500 and measured["n_steps"] == 20
    assert min(measured["accuracy"].values()) >= REQUIRED_ACCURACY


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_what_the_script_writes(name, tmp_path):
    for file in ("config.json", "training.json"):
        (tmp_path / file).write_bytes((ZOO / name / file).read_bytes())
    publish_zoo.write_card(name, tmp_path)
    assert (tmp_path / "README.md").read_text() == (ZOO / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_reads_its_held_out_data(name):
    task = judges.JUDGES[name]
    accuracy = judges.own_accuracy(task, judges.load(name))
    stated = json.loads((RESULTS / f"zoo_{name}.json").read_text())["judge_test_accuracy"]
    # Another processor may round one picture at the border of two classes differently.
    assert accuracy == pytest.approx(stated, abs=1.5 / 360)
    assert min(accuracy.values()) >= 0.98


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_noise():
    _, pictures = judges.JUDGES["dit_mini"].test()
    noisy = pictures + 0.3 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    features, noisy_features = (features_of(JUDGINGS["dit_mini"], part) for part in (pictures, noisy))
    own = frechet(gaussian(features), gaussian(features))
    # Eigenvalues of a singular 64 x 64 product: the square root of 1e-16, relative to the trace.
    assert abs(own) < 1e-5 * max(features.var(0, ddof=1).sum(), 1)
    assert frechet(gaussian(noisy_features), gaussian(features)) > 100 * abs(own) + 1e-3


# --- the bundled pipeline --------------------------------------------------------------------------------------------


def test_the_pipeline_was_trained_to_the_end_by_the_plan_and_is_small():
    facts = json.loads((ZOO / SCENES / "training.json").read_text())
    for planned in (PLAN.reader, PLAN.autoencoder, PLAN.denoiser):
        stated = facts["stages"][planned.name]
        assert stated["step"] == stated["planned_steps"] == planned.steps
        assert (stated["batch_size"], stated["peak_lr"]) == (planned.batch_size, planned.peak_lr)
    assert facts["latents"] == PLAN.latents
    assert size_bytes(ZOO / SCENES) <= pixart_scenes_publish.SIZE_LIMIT_BYTES
    for part in pixart_scenes_publish.PARTS:
        [path] = (ZOO / SCENES / part).glob("*.safetensors")
        stored = load_file(path)
        assert all(value.dtype == torch.float16 and value.isfinite().all() for value in stored.values())


def test_the_pipeline_s_card_is_what_the_script_writes():
    assert (ZOO / SCENES / "README.md").read_text() == pixart_scenes_publish.card(ZOO / SCENES)


def test_its_reader_reads_held_out_scenes_as_stated():
    judging, count = JUDGINGS[SCENES], 200
    labels = board.sample_split(count, torch.Generator().manual_seed(5), held_out=True)
    seen = read(judging, board.draw(labels, torch.Generator().manual_seed(5)), labels)
    stated = json.loads((ZOO / SCENES / "quality.json").read_text())["accuracy_of_scenes"]
    # Three standard deviations of a share of so many pictures, and one picture.
    share, spread = stated["everything"], (stated["everything"] * (1 - stated["everything"]) / count) ** 0.5
    assert abs(seen.all_right.double().mean().item() - share) <= 3 * spread + 1 / count


def test_it_draws_held_out_captions_as_well_as_stated():
    judging, count = JUDGINGS[SCENES], 24
    labels, prompts = (part[:count] for part in judging.prompts(seed=3))
    pipeline = PixArtAlphaPipeline.from_pretrained(ZOO / SCENES, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    stated = json.loads((ZOO / SCENES / "quality.json").read_text())
    seen = read(judging, draw(pipeline, prompts, 3, stated["n_steps"], most_tokens=40), labels)
    # A mean of shares has at most the mean of their standard deviations, however they go together: three of it.
    shares = torch.tensor([stated["accuracy"][slot] for slot in SLOTS])
    spread = (shares * (1 - shares) / seen.asked.sum(0).clamp(min=1)).sqrt().mean().item()
    assert abs(sum(seen.by_slot) / len(seen.by_slot) - shares.mean().item()) <= 3 * spread


def test_the_default_recipe_uses_a_bundled_model():
    assert load_recipe("pixart_w4a6").model == "zoo:pixart_mini"


@pytest.mark.parametrize("arguments,expected", [([], NAMES), (["dit_mini"], ["dit_mini"])])
def test_scripts_take_all_models_by_default(arguments, expected, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(publish_zoo, "write_card", lambda name, folder: written.append(name))
    monkeypatch.setattr("sys.argv", ["publish_zoo", "--cards", "--output-dir", str(tmp_path), *arguments])
    publish_zoo.main()
    assert written == expected
