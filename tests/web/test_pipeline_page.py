"""The page of a whole pipeline in a browser without a window: each part and the picture are the run time's, but for
codes that flip."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tools import browser
from benchmarks.tools.web import serving
from export.errors import ModelError, RecipeError
from pipeline.bundle.pipeline_bundle import PipelineBundle, load_pipeline
from pipeline.distance import PIXEL_RANGE, psnr_db, sqnr_db
from pipeline.generate.draw import DrawRequest, to_pixels
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.pipeline_classes import find_pipeline_class
from pipeline.text_to_image import Pipeline
from pipeline.verify.gates import ROUNDED_DB
from pipeline.web import page_folder, pipeline_page
from tests.support import numpy_pipeline
from tests.support.bundles import stand_in
from tests.support.pieces import unigram
from tests.support.quick_build import build_unproven
from tests.support.web_page import LEVELS, TWICE_DB, Lowered, canvas, exported, fill_in

logger = logging.getLogger(__name__)

PROMPT, NEGATIVE, SEED, STEPS, SCALE = "A red circle, and the blue ring ", "photo of a dog", 7, 6, 4.5
# Pictures of a run: a code flips in some of them, which shows how far a flip leads.
PICTURES = 4
PARTS = ("text_encoder", "transformer", "vae_decoder")
FAULT_DB = 20.0  # another picture, or one with a wrong part, is nearer than this to none


# --- what the page does not take --------------------------------------------------------------------------------------


def source_of(folder: Path, **changes: Any) -> Any:
    """A pipeline of NumPy, with a tokenizer as T5 has it."""
    folder.mkdir(exist_ok=True)
    unigram([("\u2581a", -1.0)], 120).save(str(folder / "t5.json"))
    made = numpy_pipeline.make_source(folder / "source", numpy_pipeline.Log(), **changes)
    return replace(made, tokenizers={"tokenizer": folder / "t5.json"})


def test_what_the_scripts_read_of_a_pipeline(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    pipeline_page.refuse_source(source, "it")
    row, sizes = find_pipeline_class(source.class_name, "it"), dict.fromkeys(PARTS, 10**6)
    document = pipeline_page.settings(source, row, sizes)
    json.dumps(document, allow_nan=False)
    assert document["hint"] == (
        "3.0 MB are loaded for the first picture: text_encoder 1.0, transformer 1.0, vae_decoder 1.0."
    )
    assert document["latent"] == {"channels": 4, "height": 4, "width": 4, "factor": 0.5, "shift": np.float32(0.1)}
    assert document["prompt"]["tokens"] == 120 and document["prompt"]["plain"]  # type: ignore[index]
    large = pipeline_page.settings(source, row, sizes | {"transformer": pipeline_page.KEPT_BYTES})
    assert not large["keep_loaded"] and "loaded for every picture" in str(large["hint"])


def test_another_tokenizer_scheduler_or_size_is_refused_by_name(tmp_path: Path) -> None:
    other = numpy_pipeline.make_source(tmp_path / "words", numpy_pipeline.Log())
    with pytest.raises(ModelError, match=r"^it: the page does not know model 'WordLevel'; it tokenizes as T5Tokenizer"):
        pipeline_page.refuse_source(other, "it")
    other = source_of(tmp_path / "unipc", scheduler={"_class_name": "UniPCMultistepScheduler"})
    with pytest.raises(ModelError, match=r"^it: the page does not know UniPCMultistepScheduler; it draws with DPM"):
        pipeline_page.refuse_source(other, "it")
    with pytest.raises(
        RecipeError, match=r"^it: pictures of 1024 x 64 are decoded in tiles of 512; the page decodes them"
    ):
        pipeline_page.refuse_source(replace(source_of(tmp_path / "wide"), height=1024, width=64), "it")


def bundle_of(folder: Path, class_name: str, *parts: str) -> PipelineBundle:
    """One whose parts have no files but these, and a portable model."""
    components = {}
    for name in parts:
        components[name] = stand_in(folder, _recipe(), {"family": "dit", "source": "none"}, lambda: None)
        components[name].manifest.update(targets={"onnx": {}}, layers=[])  # type: ignore[typeddict-item]
        components[name].manifest["files"]["model.onnx"] = {"size": 1000, "sha256": ""}
    return PipelineBundle(folder, {"class_name": class_name}, components)  # type: ignore[typeddict-item]


def _recipe() -> Any:
    from pipeline import recipe

    return recipe.Recipe(name="tiny", model="none")


def test_another_class_or_part_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="DiTPipeline draws numbers of classes; the page draws with prompts in words"):
        page_folder.refuse(bundle_of(tmp_path, "DiTPipeline"))
    with pytest.raises(RecipeError, match=r"has 2 text encoders \(text_encoder, text_encoder_2\); the page draws with"):
        page_folder.refuse(bundle_of(tmp_path, "HunyuanDiTPipeline"))
    with pytest.raises(ModelError, match="PixArtAlphaPipeline draws with vae_decoder, which it lacks; build that"):
        page_folder.refuse(bundle_of(tmp_path, "PixArtAlphaPipeline", "text_encoder", "transformer"))
    bundle = bundle_of(tmp_path, "PixArtSigmaPipeline", *PARTS)
    bundle.components["transformer"].manifest["layers"] = [{"shape": (2**16, 2**16), "size_bytes": 2**31}]  # type: ignore[list-item, typeddict-item]
    with pytest.raises(
        RecipeError, match=r"takes 2\.0 GiB in the browser, whose WebAssembly opens models of at most 2 GiB"
    ):
        page_folder.refuse(bundle)
    bundle.components["text_encoder"].manifest["targets"] = {"cpu": {}}  # type: ignore[typeddict-item]
    with pytest.raises(
        RecipeError, match="has no portable model, which the page runs; build it without --drop-portable"
    ):
        page_folder.refuse(bundle)


# --- in the browser ---------------------------------------------------------------------------------------------------


def random(folder: Path) -> Path:
    """A bundle without proof of PixArt-alpha's of random weights, with scheduler and further conditions as the
    published ones have them."""
    from tests.support import pipelines, tiny

    root = pipelines.write_wide(folder / "pipeline", **tiny.SIZES)
    return build_unproven(folder / "engine", "-m", str(root), "--target", "cpu", "--set", "weights.group_size=32")


@dataclass(frozen=True)
class Exported:
    bundle: Path
    page: Path


@pytest.fixture(scope="module", params=["random", "bundled"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle, of random weights or of the bundled pipeline, and its page."""
    folder = tmp_path_factory.mktemp(request.param)
    bundle = request.getfixturevalue("scenes_bundle") if request.param == "bundled" else random(folder)
    return Exported(bundle, exported(bundle, folder / "page"))


@dataclass(frozen=True)
class Run:
    """states: of prompt and negative prompt. latents, pictures: of several seeds, from -1 to 1 the latter. decoded: of
    the latents of another run."""

    states: Any
    latents: Any
    pictures: Any
    decoded: Any


def run(bundle: PipelineBundle, engines: Mapping[str, Callable[[], Any]], latents: Any = None) -> Run:
    """With the parts that `engines` open."""
    with bundle.source() as source:
        model = LatentModel(replace(source, engines=engines), keep_loaded=True)
    tokens = model.tokenizers["text_encoder"]([model.row.prepare(text) for text in (PROMPT, NEGATIVE)])
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    states = model.components.run("text_encoder", inputs)["last_hidden_state"]
    with Pipeline(model) as pipeline:
        request = DrawRequest((PROMPT,), SEED, PICTURES, STEPS, SCALE, (NEGATIVE,))
        drawings = list(pipeline.drawings(request))
        own = np.concatenate([drawing.latents for drawing in drawings])
        pictures = np.concatenate([drawing.decoded for drawing in drawings])
        decoded = drawings[0].decode(own if latents is None else latents)
    return Run(states, own, pictures, decoded)


def limit_db(expected: Any, others: list[Any], distance: Callable[[Any, Any], float]) -> float:
    """Of float32 runs of one quantized model no two are equal; the page's is one more of them."""
    pairs = [pair for other in others for pair in zip(expected, other, strict=True)]
    return min(ROUNDED_DB, *(distance(*pair) for pair in pairs)) - TWICE_DB


# What the page's own classes compute, without its worker: states of both prompts, the picture of given latents, and the
# one of a seed, in floats.
SCRIPT = """(async () => {{
  const {{ LatentModel }} = await import("./latent_model.js");
  const {{ makeScheduler }} = await import("./schedulers.js");
  const model = await LatentModel.open(await (await fetch("./model/settings.json")).json()), silent = () => true;
  const {{ condition }} = await model.encode({texts}, silent);
  const decoded = await model.decode(Float32Array.from({latents}), silent);
  const scheduler = makeScheduler(model.settings.scheduler, {steps});
  const drawn = await model.denoise(condition, {seed}, scheduler, {scale}, silent, silent);
  const picture = await model.decode(drawn, silent);
  await model.release();
  return [condition[model.settings.prompt.states].data, decoded, picture].map((numbers) => Array.from(numbers));
}})()"""


@pytest.mark.slow
@pytest.mark.torch
def test_the_page_draws_the_pipeline_s_picture(made: Exported, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.BROWSERS)}")
    whole = load_pipeline(made.bundle, threads=1)
    expected = run(whole, {name: part.engine for name, part in whole.components.items()})
    portable = {name: partial(part.engine, "onnx") for name, part in whole.components.items()}
    others = [run(whole, portable, expected.latents)]
    for level in LEVELS:
        graphs = {name: partial(Lowered, made.page / "model" / name / "model.onnx", level) for name in PARTS}
        others.append(run(whole, graphs, expected.latents))
    picture_psnr = partial(psnr_db, peak=PIXEL_RANGE)
    limits = {
        "states": limit_db(expected.states, [other.states for other in others], sqnr_db),
        "decoded": limit_db(expected.decoded, [other.decoded for other in others], sqnr_db),
        "picture": limit_db(expected.pictures, [other.pictures for other in others], picture_psnr),
    }

    with serving(made.page) as address, browser.opened(executable) as tab:
        tab.show(800, 1100)
        tab.open(address)
        tab.wait("document.getElementById('state').textContent === 'ready'")
        latents = expected.latents[0].ravel().tolist()
        script = SCRIPT.format(texts=[PROMPT, NEGATIVE], latents=latents, steps=STEPS, seed=SEED, scale=SCALE)
        states, decoded, picture = (np.array(values, np.float32) for values in tab.run(script))
        states, picture = states.reshape(expected.states.shape), picture.reshape(expected.pictures[0].shape)
        reached = {
            "states": min(sqnr_db(*pair) for pair in zip(expected.states, states, strict=True)),
            "decoded": sqnr_db(expected.decoded[0], decoded.reshape(expected.decoded[0].shape)),
            "picture": picture_psnr(picture, expected.pictures[0]),
        }
        logger.info("dB to the run time: %s, limits: %s", reached, limits)
        assert min(limits.values()) > FAULT_DB  # else nothing would be shown
        assert all(reached[name] >= limit for name, limit in limits.items()), (reached, limits)
        fill_in(tab, prompt=PROMPT, negative=NEGATIVE, seed=SEED, steps=STEPS, guidance=str(SCALE))
        tab.wait("document.getElementById('picture').dataset.drawn === '1'")
        tab.screenshot(tmp_path / "page.png")
        drawn = canvas(tab)
        np.testing.assert_array_equal(drawn, to_pixels(picture[None])[0])
        assert np.ptp(drawn) > 50 and not tab.complaints


@pytest.mark.slow
@pytest.mark.torch
def test_parts_in_turn_long_prompts_and_errors(made: Exported, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.BROWSERS)}")
    in_turn = shutil.copytree(made.page, tmp_path / "page")
    settings = json.loads((in_turn / "model/settings.json").read_text())
    assert settings["keep_loaded"]
    (in_turn / "model/settings.json").write_text(json.dumps(settings | {"keep_loaded": False}))
    pictures = []
    for page in (made.page, in_turn):
        with serving(page) as address, browser.opened(executable) as tab:
            tab.open(address)
            tab.wait("document.getElementById('state').textContent === 'ready'")
            for count in (1, 2):
                fill_in(tab, prompt="a red circle " * 60, negative=NEGATIVE, seed=SEED, steps=2)
                tab.wait(f"document.getElementById('picture').dataset.drawn === '{count}'")
                said = tab.run("document.getElementById('state').textContent")
                assert "tokens of the prompt do not fit" in said, said
                pictures.append(canvas(tab))
            fill_in(tab, prompt=PROMPT, guidance=1)
            tab.wait("document.getElementById('state').classList.contains('error')")
            assert "has no effect at a guidance of 1; use" in tab.run("document.getElementById('state').textContent")
            fill_in(tab, prompt=PROMPT, negative="", steps=500)
            tab.wait("document.getElementById('state').textContent.startsWith('step')")
            tab.run("document.getElementById('stop').click()")
            tab.wait("document.getElementById('state').textContent === 'stopped'")
            assert not tab.complaints
    for other in pictures[1:]:
        np.testing.assert_array_equal(other, pictures[0])
