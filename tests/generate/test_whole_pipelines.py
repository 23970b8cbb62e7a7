"""Whole pipelines without PyTorch: parts in turn, prompts, classes, pictures to begin with, previews, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.errors import ContractError, ModelError, RecipeError
from pipeline.generate import __main__ as generate
from pipeline.generate.draw import DrawRequest, Picture
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.latent_preview import LatentPreview
from pipeline.generate.pipeline_classes import class_names, class_number
from pipeline.generate.schedulers.dpmsolver import DpmSolverConfig
from pipeline.serve.images_request import read
from pipeline.text_to_image import Pipeline
from tests.support.numpy_pipeline import CHANNELS, COLOURS, LABELS, SIDE, Log, make_source

PARTS = ["text_encoder", "transformer", "vae_decoder"]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def pipeline(tmp_path: Path, log: Log) -> Pipeline:
    return Pipeline(LatentModel(make_source(tmp_path, log)))


# --- parts in turn ---------------------------------------------------------------------------------------------------


def test_one_part_is_in_memory_at_a_time(pipeline: Pipeline, log: Log) -> None:
    assert not log.parts, "nothing is loaded before it is needed"

    def look(*_: Any) -> None:
        assert log.open == ["transformer"]

    output = pipeline(["a cat", "a ring"], num_images_per_prompt=5, num_inference_steps=2, callback_on_step_end=look)
    assert len(output.images) == 10 and output.images[0].size == (8, 8)
    assert log.names == PARTS, "each once, for all three batches"
    assert not log.open, "at the end none is"
    assert list(output.seconds) == PARTS and all(taken > 0 for taken in output.seconds.values())
    assert len(log.last("text_encoder").calls) == 1, "both prompts and the empty one at once"
    assert [len(call["latents"]) for call in log.last("vae_decoder").calls] == [1] * 10


def test_parts_are_kept_on_demand(tmp_path: Path, log: Log) -> None:
    with Pipeline(LatentModel(make_source(tmp_path, log), keep_loaded=True)) as pipeline:
        for _ in range(2):
            pipeline("a cat", num_inference_steps=1)
        assert log.names == log.open == PARTS
    assert not log.open
    with pytest.raises(RecipeError, match="the pipeline is closed; load it again"):
        pipeline("a cat", num_inference_steps=1)


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_several_threads_get_their_own_pictures(keep_loaded: bool, tmp_path: Path, log: Log) -> None:
    pipeline = Pipeline(LatentModel(make_source(tmp_path, log), keep_loaded))

    def drawn(seed: int) -> Any:
        return pipeline("a cat", seed=seed, num_inference_steps=3, output_type="np").images

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(drawn, range(6)))
    for seed, images in enumerate(together):
        np.testing.assert_array_equal(images, drawn(seed))
    assert keep_loaded or log.names == PARTS * 12, "one request after the other"


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_a_callback_may_draw_with_the_pipeline_that_calls_it(keep_loaded: bool, tmp_path: Path, log: Log) -> None:
    pipeline = Pipeline(LatentModel(make_source(tmp_path, log), keep_loaded))
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    alone = [pipeline(prompt, **arguments).images for prompt in ("a red ring", "a blue cat")]
    within: list[Any] = []

    def draw(*_: Any) -> None:
        within.append(pipeline("a blue cat", **arguments).images)

    with ThreadPoolExecutor(1) as pool:  # a lock that is waited for would be waited for for ever
        outer = pool.submit(pipeline, "a red ring", callback_on_step_end=draw, **arguments).result(60)
    np.testing.assert_array_equal(outer.images, alone[0])
    assert len(within) == 2
    for picture in within:
        np.testing.assert_array_equal(picture, alone[1])
    assert keep_loaded or not log.open


def test_a_drawing_that_is_given_up_half_way_blocks_no_other(pipeline: Pipeline, log: Log) -> None:
    drawings = pipeline.drawings(DrawRequest(("a cat",) * 6, n_steps=2))
    next(drawings)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(pipeline, "a ring", num_inference_steps=2)
        pipeline("a red ring", num_inference_steps=2)  # of this thread, whose turn it is
        assert not later.done()
        drawings.close()
        assert len(later.result(60).images) == 1
    assert not log.open


def test_a_part_that_fails_leaves_the_pipeline_usable(tmp_path: Path, log: Log) -> None:
    source = make_source(tmp_path, log)

    def broken(_: Any) -> Any:
        raise ContractError("broken")

    engines = {**source.engines, "transformer": log.loader("transformer", broken)}
    pipeline = Pipeline(LatentModel(replace(source, engines=engines)))
    for _ in range(2):
        with pytest.raises(ContractError, match="broken"):
            pipeline("a cat")
        assert not log.open


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_prepared_and_masked(pipeline: Pipeline, log: Log) -> None:
    pipeline("  A RED Cat ", negative_prompt="Blue", num_inference_steps=1, guidance_scale=2.0)
    (call,) = log.last("text_encoder").calls
    assert call["input_ids"][:, :5].tolist() == [[3, 4, 7, 1, 0], [5, 1, 0, 0, 0]]
    assert call["attention_mask"].sum(axis=1).tolist() == [4, 2] and call["input_ids"].shape == (2, 120)
    (step,) = log.last("transformer").calls
    assert step["encoder_attention_mask"].dtype == np.float32 and step["encoder_hidden_states"].shape == (2, 120, 6)
    np.testing.assert_array_equal(step["encoder_attention_mask"], call["attention_mask"])
    assert "resolution" not in step, "the model has no such input"


def test_guidance_is_off_up_to_1_and_the_empty_prompt_is_not_encoded(pipeline: Pipeline, log: Log) -> None:
    for scale in (1.0, 0.5):
        pipeline("a cat", num_inference_steps=1, guidance_scale=scale)
        assert len(log.last("transformer").calls[0]["hidden_states"]) == 1
        assert len(log.last("text_encoder").calls[0]["input_ids"]) == 1


def test_sizes_are_told_to_a_model_that_takes_them(tmp_path: Path, log: Log) -> None:
    source = make_source(tmp_path, log, width=12)
    source = replace(source, transformer={**source.transformer, "use_additional_conditions": True})
    pipeline = Pipeline(LatentModel(source))
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (12, 8)
    call = log.last("transformer").calls[0]
    assert call["resolution"].tolist() == [[8, 12]] * 2 and call["hidden_states"].shape == (2, CHANNELS, 4, 6)
    np.testing.assert_array_equal(call["aspect_ratio"], np.full((2, 1), 8 / 12, np.float32))


def test_a_prompt_too_long_is_cut_with_a_word(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline(["a " * 119 + "red ring"] * 2, num_images_per_prompt=2, num_inference_steps=1)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]  # parts are told of, too
    assert "has 2 tokens more than the 120 that fit: 'red ring' is left out" in record.message


# --- classes ---------------------------------------------------------------------------------------------------------


def test_what_is_cut_is_said_once_and_of_which_prompt(pipeline: Pipeline) -> None:
    long = "a red ring " * 100
    output = pipeline([long, long.upper()], negative_prompt=[long, "a cat"], guidance_scale=2.0, num_inference_steps=1)
    positive, negative = output.warnings
    assert negative == f"negative prompt: {positive}"
    assert not pipeline("a cat", negative_prompt=long, guidance_scale=1.5, num_inference_steps=1).warnings[1:]


def test_classes_by_name_number_and_label(tmp_path: Path, log: Log) -> None:
    pipeline = Pipeline(LatentModel(make_source(tmp_path, log, "DiTPipeline")))
    assert pipeline.examples == ("zero", "nought", "last") and pipeline.n_steps == 50
    pipeline(["nought", "9"], num_inference_steps=1)
    assert log.last("transformer").calls[0]["class_labels"].tolist() == [0, 9, 10, 10]
    pipeline(class_labels=[3, 9], num_inference_steps=1, guidance_scale=1.0)
    assert log.last("transformer").calls[0]["class_labels"].tolist() == [3, 9]
    for prompt in ("horse", "10", "-1"):
        with pytest.raises(RecipeError, match="is not a class; use a number below 10, or a name such as zero, nought"):
            pipeline(prompt)


def test_an_index_without_labels_has_numbers_alone() -> None:
    assert class_names({}) == {} and class_names({"id2label": LABELS})["last"] == 9
    assert class_number("3", {}, 10) == 3 and class_number("", {}, 10) == 10
    with pytest.raises(RecipeError, match=r"use a number below 10$"):
        class_number("cat", {}, 10)


# --- pictures to begin with ------------------------------------------------------------------------------------------


def picture(height: int = 8, width: int = 8) -> Any:
    """Of colours that the decoder can make, in cells of 2 x 2 pixels."""
    cells = np.random.default_rng(1).random((height // 2, width // 2, 3)).astype(np.float32)
    return cells.repeat(2, axis=0).repeat(2, axis=1)


def test_little_strength_leaves_the_picture(tmp_path: Path, log: Log) -> None:
    """The first of 1000 timesteps has next to no noise, sqrt(1e-4) of it, and this model takes none of that off."""
    source = make_source(tmp_path, log)
    idle = log.loader("transformer", lambda inputs: {"sample": inputs["hidden_states"] * np.float32(0)})
    pipeline = Pipeline(LatentModel(replace(source, engines={**source.engines, "transformer": idle})))
    for kind in (picture(), Image.fromarray(np.rint(picture() * 255).astype(np.uint8))):
        output = pipeline("a cat", image=kind, strength=0.001, num_inference_steps=1000, output_type="np")
        assert len(log.last("transformer").calls) == 1 and log.names[-4:] == ["vae_encoder", *PARTS]
        np.testing.assert_allclose(output.images[0], picture(), atol=0.1)


def test_strength_is_a_share_of_the_steps(pipeline: Pipeline, log: Log) -> None:
    steps = []

    def count(drawing: Any, step: int, *_: Any) -> None:
        steps.append((step, drawing.n_steps))

    pipeline("a cat", image=picture(), num_inference_steps=10, callback_on_step_end=count)
    assert steps == [(i, 8) for i in range(8)]
    pipeline(["a cat", "a ring"], image=[picture(), 1 - picture()], strength=0.5, num_inference_steps=10)
    assert len(log.last("transformer").calls) == 5 and len(log.last("vae_encoder").calls) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": picture(16, 8)}, "image of (16, 8, 3); the engine draws (8, 8, 3)"),
        ({"image": "cat.png"}, "image of str; give a PIL picture or an array"),
        ({"image": picture() * 2}, "image of float32; give uint8, or floats from 0 to 1"),
        ({"image": picture(), "strength": 0.0}, "strength 0.0 must be above 0"),
        ({"image": picture(), "strength": 0.1, "num_inference_steps": 5}, "strength 0.1 of 5 steps leaves no step"),
        ({"image": [picture()] * 3}, "3 images for 1 prompts"),
        ({"strength": 0.5}, "strength 0.5 without an image"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents of (4, 8, 8) for a picture; this model draws from (4, 4, 4)"),
        ({"latents": np.zeros((2, 4, 4, 4))}, "latents of 2 pictures for 1"),
        ({"latents": [1]}, "latents of list; give an array of floats [B, C, h, w]"),
        ({"latents": np.zeros(4)}, "latents of float64 (4,); give an array"),
        ({"guidance_scale": 0.5, "negative_prompt": "a ring"}, "no effect at a guidance scale of 0.5"),
        ({"height": 512}, "height x width 512 x 8; the engine draws 8 x 8"),
        ({"prompt": []}, "no prompt was given"),
        ({"prompt": None}, "no prompt was given"),
        ({"class_labels": [1]}, "prompt and class_labels both say what to draw"),
        ({"prompt": None, "class_labels": [1]}, "draws from text; give a prompt"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"clean_caption": True}, "argument 'clean_caption' is unknown to this pipeline"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments: Any, words: str, pipeline: Pipeline, log: Log) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        pipeline(**({"prompt": "a cat"} | arguments))
    assert "transformer" not in log.names


# --- batches that others share out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_pictures_leave_a_batch_without_changing_the_others(scheduler: str, tmp_path: Path, log: Log) -> None:
    keys: dict[str, Any] = {"_class_name": scheduler} | ({"clip_sample": False} if scheduler[0] in "DH" else {})
    pipeline = Pipeline(LatentModel(make_source(tmp_path, log, scheduler=keys), keep_loaded=True))
    pictures = [Picture("a cat", 1), Picture("a ring", 2, "red"), Picture("blue", 3)]
    whole, left = pipeline.start(pictures, 6), pipeline.start(pictures, 6)
    while not whole.is_over:
        whole.step()
    for _ in range(3):
        left.step()
    left.keep([2, 1])
    while not left.is_over:
        left.step()
    np.testing.assert_array_equal(left.latents, whole.latents[[2, 1]])
    np.testing.assert_array_equal(left.result(), whole.result()[[2, 1]])
    np.testing.assert_array_equal(left.picture(0), whole.picture(2))
    assert left.seconds["transformer"] > 0


def test_previews_are_decoded_once_and_then_learned_from_that(pipeline: Pipeline, log: Log) -> None:
    """The decoder of this test is linear, so that a linear map can be equal to it."""
    drawing = pipeline.start([Picture("a cat", 1), Picture("a ring", 2)], 5)
    with pytest.raises(RecipeError, match="previews exist from the first one on"):
        drawing.previews()
    drawing.step()
    first = drawing.previews()
    assert first.shape == (2, 8, 8, 3) and log.names.count("vae_decoder") == 1
    drawing.step()
    drawing.preview(1)
    assert log.names.count("vae_decoder") == 1
    for _ in range(3):
        drawing.step()
    before = drawing.previews().astype(int)
    assert np.abs(before - drawing.result()).max() <= 2


def test_a_preview_is_the_best_linear_map() -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    pictures = np.tanh(np.einsum("bchw,ck->bkhw", latents, COLOURS)).astype(np.float32).repeat(2, 2).repeat(2, 3)
    preview = LatentPreview(CHANNELS, 2)
    assert not preview.is_ready
    preview.learn(latents * np.float32(np.nan), pictures)
    assert not preview.is_ready
    preview.learn(latents, pictures)
    wrong, spread = np.abs(preview(latents) - pictures).mean(), np.abs(pictures - pictures.mean()).mean()
    assert preview.is_ready and wrong < spread / 10


def test_a_broken_denoiser_draws_nothing(tmp_path: Path, log: Log) -> None:
    source = make_source(tmp_path, log)
    broken = log.loader("transformer", lambda inputs: {"sample": inputs["hidden_states"] * np.float32("nan")})
    with pytest.raises(ContractError, match="NaN or Inf"):
        Pipeline(LatentModel(replace(source, engines={**source.engines, "transformer": broken})))("a cat")


# --- pipelines that are none -----------------------------------------------------------------------------------------


def test_pipelines_that_cannot_draw_are_refused(tmp_path: Path, log: Log) -> None:
    source = make_source(tmp_path, log)
    without = {name: load for name, load in source.engines.items() if name != "vae_decoder"}
    cases: dict[str, Any] = {
        "pipeline 'FluxPipeline' is not supported; use one of PixArtAlphaPipeline": {"class_name": "FluxPipeline"},
        "draws with vae_decoder, which it does not have": {"engines": without},
        "draws with tokenizer, which it does not have": {"tokenizers": {}},
        "configurations lack 'cross_attention_dim'": {"transformer": {"in_channels": 4}},
        "configurations lack 'block_out_channels'": {"vae": {"scaling_factor": 0.5}},
    }
    for words, changes in cases.items():
        with pytest.raises((ModelError, ContractError), match=re.escape(words)):
            LatentModel(replace(source, **changes))
    assert not log.parts


def test_an_autoencoder_that_states_no_scale_has_diffusers_own(tmp_path: Path, log: Log) -> None:
    model = LatentModel(make_source(tmp_path, log, vae={"block_out_channels": [8, 8]}))
    assert (model.factor, model.shift) == (np.float32(0.18215), 0)


def test_the_index_of_a_pipeline_says_which_scheduler_it_draws_with(tmp_path: Path, log: Log) -> None:
    index = {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    model = LatentModel(make_source(tmp_path, log, index=index))
    assert isinstance(model.scheduler, DpmSolverConfig)
    with pytest.raises(ModelError, match=r"model_index\.json states, 'PNDMScheduler' is not supported; use one of"):
        LatentModel(make_source(tmp_path, log, index={"scheduler": ["diffusers", "PNDMScheduler"]}))


def test_schedulers_that_a_pipeline_cannot_use(tmp_path: Path, log: Log) -> None:
    learned = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    with pytest.raises(ModelError, match="PixArtAlphaPipeline takes no variance from the model; use a fixed one"):
        LatentModel(make_source(tmp_path, log, scheduler=learned))
    with pytest.raises(ModelError, match="DiTPipeline with 1, as in diffusers"):
        LatentModel(make_source(tmp_path, log, "DiTPipeline", scheduler={"_class_name": "EulerDiscreteScheduler"}))


def test_a_pipeline_without_an_encoder_says_so(tmp_path: Path, log: Log) -> None:
    source = make_source(tmp_path, log)
    engines = {name: load for name, load in source.engines.items() if name != "vae_encoder"}
    pipeline = Pipeline(LatentModel(replace(source, engines=engines)))
    with pytest.raises(RecipeError, match="tiny has no vae_encoder, which a picture is read with; build it"):
        pipeline("a cat", image=picture())


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_generate_draws_and_tells_the_seconds_of_each_part(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda *_: Pipeline(LatentModel(make_source(tmp_path, log))))
    whole, start = tmp_path / "whole", tmp_path / "start.png"
    whole.mkdir()
    (whole / "pipeline.json").write_text("{}")
    Image.fromarray(np.rint(picture() * 255).astype(np.uint8)).save(start)
    flags = [str(whole), "--prompt", "a cat", "--prompt", "a ring", "--n-steps", "4", "-o", str(tmp_path / "out.png")]
    assert (
        generate.main([*flags, "--json", "--negative-prompt", "red", "--image", str(start), "--strength", "0.5"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["seconds"]) == {"vae_encoder", *PARTS} and (result["width"], result["height"]) == (
        17 * 32,
        8 * 32,
    )
    assert generate.main(flags) == 0
    answer = capsys.readouterr().out
    assert all(re.search(rf"^{part}: \d+\.\d s$", answer, re.MULTILINE) for part in PARTS)
    for more, words in (
        (["--strength", "0.5"], "without --image"),
        (["--image", str(tmp_path / "none.png")], "none.png is missing"),
        (["--image", str(whole / "pipeline.json")], "pipeline.json cannot be read"),
        (["--pipeline", "x"], "draws by itself"),
    ):
        assert generate.main([*flags, *more]) == 2
        assert words in capsys.readouterr().err


def test_a_server_s_request_goes_by_the_pipeline(pipeline: Pipeline) -> None:
    asked = read(json.dumps({"prompt": "a cat", "size": "8x8", "steps": 3}).encode(), pipeline)
    assert asked.request.n_steps == 3 and asked.request.guidance_scale == 4.5
    assert len(pipeline.examples) == 6


RUN = """
import sys
from tests.support.absent import hide, visible
hide()
from pathlib import Path
from ditc import Pipeline
from pipeline.generate.latent_model import LatentModel
from tests.support.numpy_pipeline import Log, make_source
for name in ("PixArtAlphaPipeline", "DiTPipeline"):
    pipeline = Pipeline(LatentModel(make_source(Path(sys.argv[1]) / name, Log(), name)))
    output = pipeline("9", image=None, num_inference_steps=3)
    print(output.images[0].size, list(output.seconds))
print(visible())
"""


@pytest.mark.process
def test_the_compiler_s_packages_are_not_needed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=False)
    rows = [f"(8, 8) {PARTS}", f"(8, 8) {PARTS[1:]}", "[]"]
    assert done.stdout.splitlines() == rows, done.stderr
