"""Pipeline, called as a diffusers pipeline is: pictures, batches, callbacks, refusals; an engine of NumPy stands in."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import ditc
from export.errors import ContractError, RecipeError
from pipeline.generate.draw import BATCH_SIZE, DrawRequest, Picture
from pipeline.generate.pixel_model import PixelModel
from pipeline.text_to_image import Pipeline
from tests.generate.test_generate import GENERATION, LevelEngine, draw, make_bundle


@pytest.fixture
def bundle(tmp_path: Any) -> Any:
    return make_bundle(tmp_path)


@pytest.fixture
def pipeline(bundle: Any) -> Pipeline:
    return Pipeline(PixelModel(bundle))


def levels(*digits: int) -> Any:
    """What LevelEngine draws of these digits without guidance, as bytes."""
    return np.rint(np.array(digits) / 4.5 * 127.5)


def test_images_are_pictures_of_the_prompts(pipeline: Pipeline) -> None:
    output = pipeline(["0", "9"], guidance_scale=1.0, num_images_per_prompt=2, seed=5)
    assert [image.size for image in output.images] == [(8, 8)] * 4 and output.images[0].mode == "L"
    for image, level in zip(output.images, levels(0, 0, 9, 9), strict=True):
        assert np.abs(np.asarray(image) - level).max() <= 1  # four float32 steps, then rounding to bytes
    assert output.seeds == (5, 6, 5, 6) and not output.interrupted


def test_arrays_are_floats_from_0_to_1(pipeline: Pipeline) -> None:
    output = pipeline("9", guidance_scale=1.0, output_type="np")
    assert output.images.shape == (1, 8, 8, 1) and output.images.dtype == np.float32
    np.testing.assert_allclose(output.images, 1.0, atol=2.0**-20)


def test_one_picture_is_the_same_alone_in_a_batch_and_through_generate(bundle: Any, pipeline: Pipeline) -> None:
    together = pipeline([str(i) for i in range(6)], seed=3).images
    for index in (0, BATCH_SIZE - 1, BATCH_SIZE, 5):
        alone = pipeline(str(index), seed=3).images[0]
        np.testing.assert_array_equal(np.asarray(together[index]), np.asarray(alone))
    pictures = draw(bundle, DrawRequest(("4",), seed=3))
    np.testing.assert_array_equal(pictures[0, :, :, 0], np.asarray(together[4]))


def test_the_engine_is_loaded_once_and_closed_with_the_context(bundle: Any) -> None:
    loads: list[LevelEngine] = []

    def load() -> LevelEngine:
        loads.append(LevelEngine())
        return loads[-1]

    with Pipeline(PixelModel(replace(bundle, make_engine=load))) as pipeline:
        pipeline("1")
        pipeline("2")
        assert not loads[0].closed
    assert len(loads) == 1 and loads[0].closed


def test_guidance_leads_away_from_the_negative_prompt(pipeline: Pipeline) -> None:
    engine: Any = pipeline.model.engine
    pipeline(["1", "2"], negative_prompt=["3", ""], guidance_scale=2.0)
    assert engine.calls[-1]["class_labels"].tolist() == [1, 2, 3, 10]
    pipeline(["1", "2"], negative_prompt="3")
    assert engine.calls[-1]["class_labels"].tolist() == [1, 2, 3, 3]


def test_several_threads_get_the_pictures_of_their_own(pipeline: Pipeline) -> None:
    barrier = threading.Barrier(8)

    def drawn(digit: int) -> Any:
        barrier.wait()
        return np.asarray(pipeline(str(digit), seed=digit, output_type="np").images)

    with ThreadPoolExecutor(8) as pool:
        side_by_side = list(pool.map(drawn, range(8)))
    for digit, images in enumerate(side_by_side):
        np.testing.assert_array_equal(images, pipeline(str(digit), seed=digit, output_type="np").images)


# --- callbacks ---------------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_of_every_batch(pipeline: Pipeline) -> None:
    seen = []

    def look(drawing: Any, step: int, timestep: float, kwargs: Any) -> Any:
        assert kwargs["latents"].shape == (len(drawing.pictures), 1, 8, 8)
        seen.append((step, timestep, [picture.seed for picture in drawing.pictures]))
        np.testing.assert_allclose(drawing.previews(), levels(9)[0], atol=1)  # of straight paths, from the first step
        return kwargs

    pipeline("9", guidance_scale=1.0, num_images_per_prompt=5, callback_on_step_end=look)
    first, second = [0, 1, 2, 3], [4]
    times = [1000.0, 750.0, 500.0, 250.0]
    assert seen == [*((i, times[i], first) for i in range(4)), *((i, times[i], second) for i in range(4))]


@pytest.mark.parametrize("stop", ["interrupt", "_interrupt"])
def test_the_callback_may_stop_the_drawing(stop: str, pipeline: Pipeline) -> None:
    def after_two(drawing: Any, step: int, timestep: float, kwargs: Any) -> None:
        if step == 1:
            drawing.interrupt() if stop == "interrupt" else setattr(drawing, stop, True)

    output = pipeline("9", num_images_per_prompt=5, callback_on_step_end=after_two)
    engine: Any = pipeline.model.engine
    assert output.interrupted and len(output.images) == BATCH_SIZE and len(engine.calls) == 2


def test_the_callback_may_exchange_latents(pipeline: Pipeline) -> None:
    def black(drawing: Any, step: int, timestep: float, kwargs: Any) -> Any:
        return {"latents": np.full_like(kwargs["latents"], -1)} if step == 3 else kwargs

    assert np.asarray(pipeline("9", callback_on_step_end=black).images[0]).max() == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"latents": np.zeros((1, 1, 8, 8))}, "latents of float64 (1, 1, 8, 8); the batch goes on with float32"),
        ({"latents": np.zeros((2, 1, 8, 8), np.float32)}, "latents of float32 (2, 1, 8, 8); the batch"),
        ({"latents": None}, "latents of NoneType; the batch"),
        ({"prompt_embeds": np.zeros(1)}, "the callback answers 'prompt_embeds'; it may exchange latents alone"),
        ({"latents": np.full((1, 1, 8, 8), np.nan, np.float32)}, "latents with NaN or Inf"),
        (True, "the callback answers True; it may give None, or a dictionary with latents"),
        ([], "the callback answers []; it may give None"),
    ],
)
def test_what_a_callback_may_not_answer(answer: Any, words: str, pipeline: Pipeline) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        pipeline("9", callback_on_step_end=lambda *_: answer)


def test_a_callback_makes_no_step_that_is_not_there(pipeline: Pipeline) -> None:
    with pytest.raises(RecipeError, match="all 3 steps are done; no further one can be made"):
        pipeline("9", num_inference_steps=3, callback_on_step_end=lambda drawing, *_: drawing.step())


# --- batches that others share out ----------------------------------------------------------------------------------


def test_pictures_leave_a_batch_without_changing_the_others(pipeline: Pipeline) -> None:
    pictures = [Picture("1", 1), Picture("2", 2, "7"), Picture("3", 3)]
    whole, left = pipeline.start(pictures), pipeline.start(pictures)
    while not whole.is_over:
        whole.step()
    left.step()
    left.step()
    left.keep([2, 1])
    assert len(left.previews()) == 2
    while not left.is_over:
        left.step()
    assert left.pictures == [pictures[2], pictures[1]]
    np.testing.assert_array_equal(left.result(), whole.result()[[2, 1]])


def test_there_is_no_preview_before_the_first_step(pipeline: Pipeline) -> None:
    with pytest.raises(RecipeError, match="previews exist from the first one on"):
        pipeline.start([Picture("1", 1)]).previews()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "horse"}, "'horse' is not a class"),
        ({"prompt": []}, "no prompt was given"),
        ({"prompt": None}, "no prompt was given"),
        ({"prompt": 5}, "prompt 5 is no text; give a sentence, or a list of them"),
        ({"prompt": ["1", None]}, "prompt: None is no text"),
        ({"negative_prompt": 5}, "negative_prompt 5 is no text"),
        ({"negative_prompt": ["1", 2]}, "negative_prompt: 2 is no text"),
        ({"class_labels": [1]}, "prompt and class_labels both say"),
        ({"prompt": None, "class_labels": 3}, "class_labels 3; give a list of numbers"),
        ({"height": 0}, "height x width 0 x 8; the engine draws 8 x 8"),
        ({"width": "8"}, "height x width 8 x '8'; the engine draws 8 x 8"),
        ({"guidance_scale": 10**400}, "is not a number; give one such as 4.5"),
        ({"guidance_scale": np.complex64(1)}, "is not a number; give one such as 4.5"),
        ({"guidance_scale": 1e308}, "guidance scale 1e+308; it must be from -100 to 100"),
        ({"latents": np.full((1, 1, 8, 8), np.nan)}, "latents with NaN, Inf or numbers beyond float32"),
        ({"latents": np.full((1, 1, 8, 8), 1e300)}, "latents with NaN, Inf or numbers beyond float32"),
        ({"image": np.zeros((8, 8, 1)), "strength": "x"}, "strength 'x' is not a number"),
        ({"callback_on_step_end": 5}, "callback_on_step_end 5 is no function"),
        ({"negative_prompt": "horse"}, "'horse' is not a class"),
        ({"height": 16}, "height x width 16 x 8; the engine draws 8 x 8"),
        ({"width": 512, "height": 512}, "height x width 512 x 512; the engine draws 8 x 8"),
        (
            {"generator": None},
            "argument 'generator' is unknown to this pipeline; it takes prompt, class_labels, height, width",
        ),
        ({"output_type": "pt"}, "output_type 'pt'; use 'pil', 'np' or 'latent'"),
        ({"num_inference_steps": 0}, "number of denoising steps 0"),
        ({"num_images_per_prompt": 0}, "number of pictures of a prompt 0"),
        ({"guidance_scale": float("nan")}, "guidance scale nan"),
        ({"seed": 0.5}, "seed 0.5; it must be a whole number"),
        ({"guidance_scale": 1.0, "negative_prompt": "2"}, "no effect at a guidance scale of 1"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_engine_is_called(
    arguments: Any, words: str, pipeline: Pipeline
) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        pipeline(**({"prompt": "1"} | arguments))
    engine: Any = pipeline.model.engine
    assert not engine.calls


def test_the_engine_s_own_size_may_be_named(pipeline: Pipeline) -> None:
    assert pipeline("1", height=8, width=8).images[0].size == (8, 8)


def test_a_model_of_latents_is_refused_with_the_way_it_draws(tmp_path: Any) -> None:
    for generation in (None, GENERATION | {"output": "latents"}):
        with pytest.raises(RecipeError, match=r"text encoder and VAE .*as_diffusers\(\)"):
            PixelModel(make_bundle(tmp_path, generation))


def test_a_broken_engine_draws_nothing(pipeline: Pipeline) -> None:
    engine: Any = pipeline.model.engine
    engine.run = lambda inputs: {"sample": inputs["hidden_states"] * np.float32("nan")}
    with pytest.raises(ContractError, match="NaN or Inf"):
        pipeline("1")
    with pytest.raises(ContractError, match="NaN or Inf"):
        pipeline("1", output_type="np")


def test_ditc_has_what_users_need(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.text_to_image.load", lambda path, threads: bundle)
    with ditc.Pipeline.load(bundle.path) as pipeline:
        assert len(pipeline("1").images) == 1
    # pytest gives names that begin with "@" to the modules of a package that brings it a plugin.
    assert {name for name in vars(ditc) if not name.startswith(("_", "@"))} - {"annotations"} == set(ditc.__all__)
