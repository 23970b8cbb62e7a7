"""Families that are learned from their diffusers pipelines: what a class without a row is called with, which of its
linears see every token, and what is refused. Nothing is built, and no weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.errors import ModelError, RecipeError
from export.models import load as models
from export.models.description import sample_inputs
from export.models.recorded import LATENTS, TIMESTEP, Recordings, recorded_family
from export.models.recording import N_STEPS, Drawing, leaves, pipeline_class
from export.models.torch_modules import TabledTimesteps, set_resolution
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.diffusers_adapter import DrawnSize, EngineTransformer
from tests.support import recorded_models, tiny

pytestmark = pytest.mark.torch
CAPTION, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
# name -> pipeline, and the inputs: axes that count something, and what samples hold.
LEARNED: dict[str, tuple[str, dict[str, tuple[tuple[object, ...], str]]]] = {
    "sd3": (
        "StableDiffusion3Pipeline",
        {
            LATENTS: (("batch", 4, "height", "width"), "normal"),
            CAPTION: (("batch", "tokens", 32), "normal"),
            POOLED: (("batch", 16), "normal"),
            TIMESTEP: (("batch",), "timestep"),
        },
    ),
    "flux": (
        "FluxPipeline",
        {
            LATENTS: (("batch", "hidden_states.1", 16), "normal"),
            CAPTION: (("batch", "tokens", 32), "normal"),
            POOLED: (("batch", 16), "normal"),
            TIMESTEP: (("batch",), "timestep:1"),
            "guidance": (("batch",), "upto:10"),
        },
    ),
    "sana": (
        "SanaPipeline",
        {
            LATENTS: (("batch", 4, "height", "width"), "normal"),
            CAPTION: (("batch", "tokens", 24), "normal"),
            TIMESTEP: (("batch",), "timestep"),
            MASK: (("batch", "tokens"), "mask"),
        },
    ),
    "wan": (
        "WanPipeline",
        {
            LATENTS: (("batch", 4, 21, "height", "width"), "normal"),
            TIMESTEP: (("batch",), "timestep"),
            CAPTION: (("batch", "tokens", 24), "normal"),
        },
    ),
    "qwen": (
        "QwenImagePipeline",
        {
            LATENTS: (("batch", "hidden_states.1", 16), "normal"),
            CAPTION: (("batch", "tokens", 24), "normal"),
            "encoder_hidden_states_mask": (("batch", "tokens"), "mask"),
            TIMESTEP: (("batch",), "timestep:1"),
        },
    ),
    "zimage": (
        "ZImagePipeline",
        {
            LATENTS: (("batch", 4, 1, "height", "width"), "normal"),
            TIMESTEP: (("batch",), "timestep:1"),
            CAPTION: (("batch", "tokens", 24), "normal"),
            MASK: (("batch", "tokens"), "mask:1"),
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoPipeline",
        {
            LATENTS: (("batch", 4, 33, "height", "width"), "normal"),
            TIMESTEP: (("batch",), "timestep"),
            CAPTION: (("batch", "tokens", 24), "normal"),
            MASK: (("batch", "tokens"), "mask:1"),
            POOLED: (("batch", 16), "normal"),
            "guidance": (("batch",), "upto:10"),
        },
    ),
    "latte": (
        "LattePipeline",
        {
            LATENTS: (("batch", 4, 4, "height", "width"), "normal"),
            TIMESTEP: (("batch",), "timestep"),
            CAPTION: (("batch", "tokens", 24), "normal"),
        },
    ),
}


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recordings]:
    """Each is recorded once."""
    return {name: Recordings(*recorded_models.stated(name)) for name in recorded_models.MODELS}


@pytest.mark.parametrize("name", LEARNED)
def test_inputs_are_what_the_pipeline_gives(name: str, recordings: dict[str, Recordings]) -> None:
    pipeline, inputs = LEARNED[name]
    assert recordings[name].recorder.pipeline_class.__name__ == pipeline
    assert {each.row.name: (each.row.shape, each.row.fill) for each in recordings[name].learned} == inputs


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("sd3", 4.5, {"guidance_scale": 4.5}),
        ("flux", 4.5, {"guidance_scale": 4.5}),  # which it is told; its true_cfg_scale is 1 by default
        ("zimage", 1.0, {"guidance_scale": 0.0}),
        ("zimage", 4.5, {"guidance_scale": 3.5}),
        ("qwen", 1.0, {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "negative_prompt": None}),
        ("qwen", 4.0, {"guidance_scale": 4.0, "true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}),
    ],
)
def test_a_scale_of_guidance_is_what_the_pipeline_means_by_it(
    name: str, scale: float, expected: dict[str, object], recordings: dict[str, Recordings]
) -> None:
    """1 is without guidance: each picture goes through the model once a step then, and above it twice, unless the model
    is told the scale."""
    recorder = recordings[name].recorder
    assert recorder.guided(scale, 2) == expected
    drawing = Drawing(height=64, width=64, guidance_scale=scale)
    latents = "x" if name == "zimage" else LATENTS
    pictures = sum(len(call[latents]) for call in recorder.record(drawing).calls)
    told = recordings[name].is_told_guidance
    assert pictures == drawing.pictures * N_STEPS * (1 if told or scale == 1 else 2)


@pytest.mark.parametrize("name", recorded_models.MODELS)
def test_pictures_are_those_of_the_pipeline_with_the_float_model(name: str, tmp_path: Path) -> None:
    """The pipeline itself with the module of diffusers, and with a stand-in that has the inputs of ours by name."""
    model = recorded_models.saved(name, tmp_path)
    untouched = getattr(diffusers, model.family.class_name).from_pretrained(tmp_path / name)
    recordings = model.family.recordings
    assert recordings is not None
    recorder, size = recordings.recorder, recorded_models.SIZE
    cells = model.cells(*size)
    set_resolution(model.module, *cells)
    engine = ReferenceEngine(models.denoiser(model), torch.float32)
    stand_in = EngineTransformer(engine, model.family, model.config, DrawnSize(cells, model.pixels_per_cell))
    drawn = [
        recorded_models.draw(recorder, part, Drawing(2, 7, *size, guidance_scale=scale))
        for part in (untouched, stand_in)
        for scale in (1.0, 3.0)
    ]
    for of_module, of_stand_in in zip(drawn[:2], drawn[2:], strict=True):
        # The same float32 arithmetic but for the order of some products: units in the last place of two steps.
        np.testing.assert_allclose(of_stand_in, of_module, rtol=0, atol=1e-5 * np.abs(of_module).max())
    assert np.abs(drawn[0] - drawn[1]).max() > 0  # the guidance counts


def test_what_hangs_on_the_size_alone_is_no_input_and_is_refused_where_it_differs(tmp_path: Path) -> None:
    model = recorded_models.saved("flux", tmp_path)
    recordings = model.family.recordings
    assert recordings is not None
    call = recordings.call((8, 8))
    assert set(recordings.first) - {each.place for each in recordings.learned} >= {("img_ids",), ("txt_ids",)}
    given = {name: torch.from_numpy(value) for name, value in sample_inputs(model, 2, 0, 64, 64).items()}
    arguments = call.arguments(given)
    assert arguments["img_ids"].shape == (16, 3) and arguments["txt_ids"].shape == (model.tokens, 3)
    assert call.named(arguments).keys() == given.keys()
    with pytest.raises(RecipeError, match="img_ids is not what the engine was compiled with, which is what FluxPipel"):
        call.named({**arguments, "img_ids": arguments["img_ids"] + 1})
    with pytest.raises(RecipeError, match="controlnet_block_samples"):
        call.named({**arguments, "controlnet_block_samples": [torch.ones(1)]})


def test_linears_that_see_every_token_are_quantized_and_the_others_kept(tmp_path: Path) -> None:
    model = recorded_models.saved("flux", tmp_path)
    kinds = {ref.name: ref.kind for ref in model.linears()}
    assert kinds["transformer_blocks.0.attn.add_k_proj"] == "attn.qkv"
    assert kinds["transformer_blocks.0.ff_context.net.2"] == "ff.out"
    assert kinds["single_transformer_blocks.0.proj_out"] == "other"
    kept = dict(model.kept())
    assert kept["transformer_blocks.0.norm1.linear"].startswith("runs once per picture")
    assert kept["x_embedder"] == kept["proj_out"] == "outside the repeated blocks"
    assert kinds.keys() | kept.keys() >= {path for path, part in model.module.named_modules()
                                          if isinstance(part, torch.nn.Linear)}  # fmt: skip


def test_a_linear_that_runs_for_the_picture_and_again_for_the_text_is_kept(tmp_path: Path) -> None:
    model = recorded_models.saved("cogview4", tmp_path)
    kept = dict(model.kept())
    assert kept["transformer_blocks.1.ff.net.0.proj"].startswith("runs several times in a call")
    assert {ref.name for ref in model.linears()} == {
        f"transformer_blocks.{block}.attn1.{name}" for block in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


@pytest.mark.parametrize("name", ["qwen", "zimage", "hunyuan_video", "flux2"])
def test_a_call_gives_what_the_class_of_diffusers_gives(name: str, tmp_path: Path) -> None:
    """With prompts of two lengths, where the pipeline gives such."""
    model = recorded_models.saved(name, tmp_path)
    recordings = model.family.recordings
    assert recordings is not None
    untouched = getattr(diffusers, model.family.class_name).from_pretrained(tmp_path / name)
    size = recorded_models.SIZE
    arguments = recordings.recorder.record(Drawing(2, 7, *size)).calls[0]
    cells = model.cells(*size)
    set_resolution(model.module, *cells)
    engine = ReferenceEngine(models.denoiser(model), torch.float32)
    stand_in = EngineTransformer(engine, model.family, model.config, DrawnSize(cells, model.pixels_per_cell))
    with torch.no_grad():
        expected, given = (part(**arguments, return_dict=False)[0] for part in (untouched, stand_in))
    assert type(given) is type(expected) and len(given) == len(expected) == 2
    for of_stand_in, of_class in zip(given, expected, strict=True):
        # The order of sums over tokens, some of which are masked, is another: units in the last place of each layer.
        torch.testing.assert_close(of_stand_in, of_class, rtol=0, atol=2e-5 * float(of_class.abs().max()))


def test_a_linear_that_no_output_hangs_on_is_kept(tmp_path: Path) -> None:
    """The text's of the last block, which gives the picture alone."""
    model = recorded_models.saved("qwen", tmp_path)
    kept = dict(model.kept())
    idle = {path for path, reason in kept.items() if reason == "no output hangs on what it gives"}
    last = "transformer_blocks.1."
    assert idle == {f"{last}attn.to_add_out", f"{last}txt_mlp.net.0.proj", f"{last}txt_mlp.net.2"}
    kinds = {ref.name: ref.kind for ref in model.linears()}
    assert kinds["transformer_blocks.0.attn.to_add_out"] == "attn.out" and f"{last}attn.add_k_proj" in kinds


def test_positions_that_count_tokens_are_compiled_in_and_others_refused(tmp_path: Path) -> None:
    model = recorded_models.saved("flux2", tmp_path)
    assert model.family.recordings is not None
    call = model.family.recordings.call((8, 8))
    given = {name: torch.from_numpy(value) for name, value in sample_inputs(model, 2, 0, 64, 64, tokens=5).items()}
    arguments = call.arguments(given)
    ids = arguments["txt_ids"]
    assert isinstance(ids, torch.Tensor) and ids.shape == (2, 5, 4) and ids[1, :, 3].tolist() == [0, 1, 2, 3, 4]
    assert call.named(arguments).keys() == given.keys()
    with pytest.raises(RecipeError, match="txt_ids is not what the engine was compiled with"):
        call.named({**arguments, "txt_ids": ids.flip(1)})


def test_lists_of_other_things_than_pictures_and_prompts_are_refused(recordings: dict[str, Recordings]) -> None:
    call, latents = recordings["zimage"].call((8, 8)), torch.zeros(4, 1, 8, 8)
    arguments = {"x": [latents, latents], "t": torch.ones(2), "cap_feats": [torch.ones(3, 24), torch.ones(5, 24)]}
    named = call.named(arguments)
    mask = named["encoder_attention_mask"]
    assert isinstance(mask, torch.Tensor) and mask.sum(dim=1).tolist() == [3, 5]
    for odd in ([latents, latents[:, :, :4]], [[latents], [latents]]):
        with pytest.raises(RecipeError, match="x is not a list of latents of one size"):
            call.named({**arguments, "x": odd})


def test_coverage_is_said_in_parameters_and_adds_up(tmp_path: Path) -> None:
    model = recorded_models.saved("sana", tmp_path)
    words = model.coverage()
    linears = [ref.module for ref in model.linears()]
    inside = sum(part.weight.numel() + (part.bias is not None and part.bias.numel()) for part in linears)
    share = f"{inside / model.parameters:.1%}"
    assert words.startswith(
        f"{len(linears)} linears to quantize hold {share} of {model.parameters:,} parameters; kept: "
    )
    shares = [float(number) for number in re.findall(r"(\d+\.\d) ?%", words)]
    assert abs(sum(shares) - 100) <= 0.05 * len(shares)
    assert "convolution or table of a block" in words  # of its feed-forward parts


def test_convolutions_of_a_video_are_counted_among_the_kept(tmp_path: Path) -> None:
    assert "patch_embedding" in dict(recorded_models.saved("wan", tmp_path).kept())


def test_a_size_between_two_that_are_drawn_is_refused(recordings: dict[str, Recordings]) -> None:
    assert recordings["flux"].unit == 16 and recordings["wan"].unit == 16 and recordings["sana"].unit == 32
    with pytest.raises(RecipeError, match="image size 72 x 64: FluxPipeline needs multiples of 16 pixels"):
        recordings["flux"].cells(72, 64)
    assert recordings["flux"].cells(0, 0) == recordings["flux"].own_cells == (128, 128)


REFUSED = {
    "lumina2": "reads sizes from the numbers in its inputs",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str) -> None:
    class_name, config = recorded_models.REFUSED[name]
    with pytest.raises(ModelError, match=REFUSED[name]):
        recorded_family(class_name, config, Path("config.json"))


def test_a_class_that_is_not_there_or_has_no_pipeline_is_refused() -> None:
    with pytest.raises(ModelError, match=r"config\.json: diffusers .* has no model 'GoneModel'; check the name"):
        recorded_family("GoneModel", {}, Path("config.json"))
    with pytest.raises(ModelError, match="no pipeline that draws with AutoencoderTiny alone"):
        pipeline_class("AutoencoderTiny")


@pytest.mark.parametrize(
    ("index", "vae", "words"),
    [
        (
            {"_class_name": "WanImageToVideoPipeline"},
            {},
            "is of 'WanImageToVideoPipeline'; what is known .* WanPipeline's",
        ),
        ({"_class_name": "WanPipeline", "expand_timesteps": True}, {}, "expand_timesteps gives each token a timestep"),
        (
            {"_class_name": "WanPipeline", "expand_timesteps": False},
            {"scale_factor_spatial": 16},
            "16 pixels of a side of a cell, and WanPipeline takes 8",
        ),
    ],
)
def test_a_model_of_another_pipeline_is_refused(
    index: dict[str, Any], vae: dict[str, Any], words: str, tmp_path: Path
) -> None:
    recorded_models.save("wan", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    with pytest.raises(ModelError, match=words):
        models.load(str(tmp_path / "transformer"))


def test_a_model_in_its_own_pipeline_is_taken(tmp_path: Path) -> None:
    recorded_models.save("wan", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": False}))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scale_factor_spatial": 8}))
    assert models.load(str(tmp_path / "transformer")).pixels_per_cell == 8


def test_guidance_that_is_an_input_leaves_no_half_without_a_prompt(recordings: dict[str, Recordings]) -> None:
    assert recordings["flux"].is_told_guidance
    assert not any(recordings[name].is_told_guidance for name in ("sd3", "sana", "wan", "latte", "cogview4"))
    assert recordings["sana"].sampler == ("flow_euler", 1000.0) and recordings["latte"].sampler == ("ddim", 1000.0)
    assert recordings["zimage"].sampler == ("flow_euler_rising", 1.0)
    assert recordings["flux"].sampler == ("flow_euler", 1.0) and recordings["flux"].recorder.most_tokens == 512


def test_a_part_of_a_timestep_reaches_a_model_that_its_pipeline_gives_whole_ones(tmp_path: Path) -> None:
    model = recorded_models.saved("latte", tmp_path)
    assert model.family.recordings is not None
    inputs = {name: torch.from_numpy(value) for name, value in sample_inputs(model, 1, 0, 64, 64, tokens=3).items()}
    inputs[TIMESTEP] += 0.5
    given = model.family.recordings.call((8, 8)).arguments(inputs)
    assert torch.equal(given["timestep"], inputs[TIMESTEP])


def test_a_configuration_that_makes_no_model_is_refused() -> None:
    class_name, config = recorded_models.stated("sd3")
    with pytest.raises(ModelError, match="SD3Transformer2DModel cannot be made of its configuration"):
        recorded_family(class_name, {**config, "attention_head_dim": "wide"}, Path("config.json"))


def test_timesteps_from_a_table_are_those_of_diffusers_to_the_bit() -> None:
    from diffusers.models.embeddings import Timesteps

    times = torch.tensor([0.0, 0.3, 999.0, 10_000.0])
    for channels, cosine_first, shift, scale in ((256, True, 0, 1), (7, False, 1, 1000), (32, True, 0.5, 3)):
        theirs = Timesteps(channels, cosine_first, shift, scale)
        assert torch.equal(TabledTimesteps(theirs)(times), theirs(times))


def test_leaves_have_places() -> None:
    tree: Any = {"a": [1, (2, {"b": 3})], "c": None}
    assert dict(leaves(tree)) == {("a", 0): 1, ("a", 1, 0): 2, ("a", 1, 1, "b"): 3, ("c",): None}


def test_a_drawing_differs_from_the_first_in_what_is_asked(recordings: dict[str, Recordings]) -> None:
    first = recordings["sd3"].drawing()
    assert recordings["sd3"].drawing(prompt_seed=1) == replace(first, prompt_seed=1)
    assert tiny.SD3["sample_size"] * 8 == recordings["sd3"].recorder.own_size[0]
