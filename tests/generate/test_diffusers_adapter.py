"""The engine as `transformer` of true diffusers pipelines, with tiny models made here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, PixArtAlphaPipeline

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from export.models import load as models
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.diffusers_adapter import as_diffusers
from pipeline.generate.draw import DrawRequest
from pipeline.generate.latent import draw_latent, find_pipeline
from tests.support import tiny
from tests.support.bundles import stand_in

pytestmark = pytest.mark.torch

# One denoiser call and its repetition through NumPy are the same float32 operations on the same inputs.
EQUAL = dict(rtol=0, atol=0)


class CountingEngine(ReferenceEngine):
    """The float model as an engine that counts its calls."""

    calls = 0

    def run(self, inputs):
        self.calls += 1
        return super().run(inputs)


def make_bundle(folder, tmp_path):
    """What the adapter needs of a bundle, with the float model in place of an engine."""
    model = models.load(str(folder))
    path = tmp_path / "bundle"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(model.config)))
    row = {"family": model.family.name, "source": str(folder)}
    stated = recipes.Recipe(name="tiny", model=str(folder))
    bundle = stand_in(path, stated, row, lambda: CountingEngine(models.denoiser(model)))
    return bundle, model


def make_vae():
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).eval()


def make_dit_pipeline(transformer):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    return DiTPipeline(transformer, make_vae(), scheduler, id2label={0: "zero, nought", 1: "one"})


def make_pixart_pipeline(transformer):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "circle": 4}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(2)
    config = T5Config(vocab_size=8, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    return PixArtAlphaPipeline(tokenizer, T5EncoderModel(config).eval(), make_vae(), transformer, scheduler)


CALLS = {
    "dit": (make_dit_pipeline, {"class_labels": [1, 0], "num_inference_steps": 2}),
    "pixart": (
        make_pixart_pipeline,
        {"prompt": ["a red circle", "a circle"], "num_inference_steps": 2, "use_resolution_binning": False},
    ),
}


def pictures(pipeline, arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(**arguments, generator=generator, output_type="np").images


def folder_of(family, tmp_path, monkeypatch):
    if family == "dit":  # DiTPipeline's null class is 1000
        monkeypatch.setitem(tiny.MODELS, "dit", ("DiTTransformer2DModel", tiny.DIT | {"num_embeds_ada_norm": 1000}))
    return tiny.folder(family, tmp_path, half=False)


@pytest.mark.parametrize("family", CALLS)
def test_a_pipeline_draws_the_same_with_engine_and_with_model(family, tmp_path, monkeypatch):
    bundle, model = make_bundle(folder_of(family, tmp_path, monkeypatch), tmp_path)
    make, arguments = CALLS[family]
    expected = pictures(make(model.module), arguments)
    pipeline = make(model.module)
    pipeline.transformer = transformer = as_diffusers(bundle)
    drawn = pictures(pipeline, arguments)
    np.testing.assert_allclose(drawn, expected, **EQUAL)
    assert transformer.engine.calls == 2 and drawn.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("family", CALLS)
def test_a_saved_pipeline_draws_through_generate(family, tmp_path, monkeypatch):
    bundle, model = make_bundle(folder_of(family, tmp_path, monkeypatch), tmp_path)
    make, _ = CALLS[family]
    make(model.module).save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    labels = {"id2label": {"0": "zero, nought", "1": "one"}} if family == "dit" else {}
    index.write_text(json.dumps(json.loads(index.read_text()) | labels))  # as the hub's DiT has it
    bundle.manifest["model"]["source"] = str(tmp_path / "pipeline" / "transformer")
    prompts = {"dit": ("1", "nought"), "pixart": ("a red circle", "a circle")}[family]
    request = DrawRequest(prompts, seed=5, n_steps=2)
    drawn = draw_latent(bundle, request)
    assert drawn.shape == (2, 8, 8, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(draw_latent(bundle, DrawRequest(prompts[1:], seed=5, n_steps=2))[0], drawn[1])


def test_unknown_classes_are_refused(tmp_path, monkeypatch):
    bundle, model = make_bundle(folder_of("dit", tmp_path, monkeypatch), tmp_path)
    make_dit_pipeline(model.module).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(RecipeError, match="'horse' is not a class"):
        draw_latent(bundle, DrawRequest(("horse",), n_steps=1), str(tmp_path / "pipeline"))


def test_a_transformer_without_its_pipeline_is_refused(tmp_path):
    folder = tiny.folder("pixart", tmp_path)
    with pytest.raises(EnvironmentLacksError, match="--pipeline DIR"):
        find_pipeline(str(folder))
    with pytest.raises(EnvironmentLacksError, match="hf download nobody/nothing"):
        find_pipeline("nobody/nothing")


@pytest.fixture
def adapters(tmp_path):
    def make(family):
        bundle, model = make_bundle(tiny.folder(family, tmp_path, half=False), tmp_path)
        return as_diffusers(bundle), model

    return make


@pytest.mark.parametrize("family", ["pixart", "pixart_sizes", "pixart_sigma", "dit", "hunyuan"])
def test_the_call_is_that_of_the_diffusers_class(family, adapters):
    transformer, model = adapters(family)
    height = 8 * model.pixels_per_cell
    size = {} if family == "pixart_sigma" else {"height": height, "width": height}
    inputs = {key: torch.from_numpy(value) for key, value in models.sample_inputs(model, 2, 0, **size).items()}
    nested = {key: inputs.pop(key) for key in ("resolution", "aspect_ratio") if key in inputs}
    if family.startswith("pixart"):
        inputs["added_cond_kwargs"] = nested or {"resolution": None, "aspect_ratio": None}
    if family == "hunyuan":
        inputs["image_rotary_emb"] = (inputs.pop("image_rotary_cos"), inputs.pop("image_rotary_sin"))
    with torch.inference_mode():
        expected = model.module(**inputs).sample
    output = transformer(**inputs)
    np.testing.assert_allclose(output.sample.numpy(), expected.numpy(), **EQUAL)
    (also,) = transformer(inputs.pop("hidden_states"), **inputs, return_dict=False)
    np.testing.assert_array_equal(also.numpy(), output.sample.numpy())


def test_configuration_has_the_model_s_values_and_the_class_s_defaults(adapters):
    transformer, model = adapters("pixart")
    for key, value in model.module.config.items():
        if not key.startswith("_"):
            assert transformer.config[key] == value or list(transformer.config[key]) == list(value)
    assert transformer.config.in_channels == 4


def test_type_follows_the_pipeline(adapters):
    transformer, _ = adapters("dit")
    assert transformer.dtype == torch.float32 and transformer.device.type == "cpu"
    transformer.to(torch.float16)
    x = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    output = transformer(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample
    assert transformer.dtype == output.dtype == torch.float16


def test_a_single_timestep_serves_the_batch_and_a_missing_mask_keeps_all(adapters):
    transformer, model = adapters("pixart")
    inputs = {key: torch.from_numpy(value) for key, value in models.sample_inputs(model, 2, 0).items()}
    inputs |= {
        "timestep": torch.full((2,), 7.0),
        "encoder_attention_mask": torch.ones_like(inputs["encoder_attention_mask"]),
    }
    expected = transformer(**inputs).sample
    for timestep in (torch.tensor(7), torch.tensor([7])):
        sample = transformer(inputs["hidden_states"], inputs["encoder_hidden_states"], timestep).sample
        np.testing.assert_array_equal(sample.numpy(), expected.numpy())


def test_arguments_the_engine_cannot_honour_are_refused(adapters):
    transformer, model = adapters("pixart")
    inputs = {key: torch.from_numpy(value) for key, value in models.sample_inputs(model, 1, 0).items()}
    with pytest.raises(RecipeError, match="no input cross_attention_kwargs"):
        transformer(**inputs, cross_attention_kwargs={"scale": 0.5})
    inputs.pop("encoder_hidden_states")
    with pytest.raises(RecipeError, match=r"states is missing; pass it, with shape \[batch, tokens, \d+\]"):
        transformer(**inputs)


def test_a_family_without_a_row_is_refused(tmp_path):
    bundle, _ = make_bundle(tiny.folder("dit", tmp_path), tmp_path)
    bundle.manifest["model"]["family"] = "other"
    with pytest.raises(ContractError, match="no diffusers form for family other"):
        as_diffusers(bundle)
