"""What the drop-in says of itself, ignores as its class does, and refuses in words. Nothing is built."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.models import load as models
from export.models.families import FAMILIES, shared_names
from pipeline.backends.reference import ReferenceEngine
from pipeline.generate.diffusers_adapter import DrawnSize, EngineTransformer
from pipeline.generate.diffusers_refusals import ADAPTERS, CLASS_METHODS, METHODS
from tests.support import pipelines, tiny

pytestmark = pytest.mark.torch

# Alpha for 1024 pixels: whether it takes sizes follows from sample_size alone. They take a third of the width each.
ALPHA_1024 = tiny.SIZES | {"sample_size": 128, "use_additional_conditions": None}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (row.class_name, row.config) for name, row in pipelines.ROWS.items()},
    "alpha1024": ("PixArtTransformer2DModel", ALPHA_1024),
}


@pytest.fixture
def stand_in(tmp_path: Path) -> Any:
    """(name, cells) -> the float model, and a drop-in that draws this size by it; cells None: every size."""

    def make(name: str, cells: tuple[int, int] | None = None) -> tuple[models.LoadedModel, EngineTransformer]:
        tiny.random_module(*CONFIGS[name]).save_pretrained(tmp_path / name)
        model = models.load(str(tmp_path / name))
        size = None if cells is None else DrawnSize(cells, model.pixels_per_cell)
        engine = ReferenceEngine(models.denoiser(model))
        return model, EngineTransformer(engine, model.family, model.config, size)

    return make


def call_of(model: models.LoadedModel, height: int = 64, width: int = 64) -> dict[str, Any]:
    """The class's own arguments for two samples."""
    inputs: dict[str, Any] = {
        name: torch.from_numpy(value) for name, value in models.sample_inputs(model, 2, 0, height, width).items()
    }
    if "image_rotary_cos" in inputs:
        inputs["image_rotary_emb"] = (inputs.pop("image_rotary_cos"), inputs.pop("image_rotary_sin"))
    if "resolution" in inputs:
        inputs["added_cond_kwargs"] = {name: inputs.pop(name) for name in ("resolution", "aspect_ratio")}
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_it_has_the_plain_attributes_of_its_class(name: str, stand_in: Any) -> None:
    """So that pipelines may read them (HunyuanDiT's reads inner_dim and num_heads)."""
    _, transformer = stand_in(name)
    module = tiny.random_module(*CONFIGS[name])
    plain = {key: value for key, value in vars(module).items() if isinstance(value, int) and key[0] != "_"}
    assert {key: getattr(transformer, key) for key in plain} == plain | {"training": False}


def test_tables_of_the_picture_s_size_have_no_batch_axis() -> None:
    assert shared_names(FAMILIES["hunyuan"].inputs(pipelines.TEXT)) == {"image_rotary_cos", "image_rotary_sin"}
    assert not shared_names(FAMILIES["pixart"].inputs(tiny.PIXART)) | shared_names(FAMILIES["dit"].inputs(tiny.DIT))


def test_size_conditions_follow_from_the_engine_s_size(stand_in: Any) -> None:
    """The pipeline passes none where sample_size is not 128, and the engine of a model for 1024 pixels needs them."""
    model, transformer = stand_in("alpha1024", (8, 8))
    assert transformer.config.sample_size == transformer.height == 8 and transformer.config.use_additional_conditions
    call = call_of(model)
    with torch.inference_mode():
        expected = model.module(**call).sample
    call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    np.testing.assert_array_equal(transformer(**call).sample.numpy(), expected.numpy())


IGNORED = {
    "alpha": {"added_cond_kwargs": {"resolution": torch.ones(2, 2), "aspect_ratio": torch.ones(2, 1)}},
    "hunyuan12": {"image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_the_class_ignores_is_ignored(name: str, stand_in: Any) -> None:
    model, transformer = stand_in(name)
    call = call_of(model)
    with torch.inference_mode():
        expected = model.module(**call | IGNORED[name]).sample
    np.testing.assert_array_equal(transformer(**call | IGNORED[name]).sample.numpy(), expected.numpy())


REFUSED = (
    ("alpha", {"cross_attention_kwargs": {"scale": 0.5}}, "no input cross_attention_kwargs"),
    ("alpha", {"attention_mask": torch.ones(2, 16)}, "no input attention_mask"),
    ("alpha", {"added_cond_kwargs": {"micro": torch.ones(2)}}, "no input micro"),
    ("alpha", {"encoder_attention_mask": torch.ones(2, 1, 120)}, r"encoder_attention_mask has shape \(2, 1, 120\)"),
    (
        "alpha",
        {"encoder_hidden_states": torch.ones(2, 120, 7)},
        r"the engine takes \[2 \(batch\), 120 \(tokens\), 32\]",
    ),
    ("alpha", {"encoder_hidden_states": torch.ones(3, 120, 32)}, r"has shape \(3, 120, 32\)"),
    ("hunyuan11", {"controlnet_block_samples": [torch.ones(2)]}, "no input controlnet_block_samples"),
    ("hunyuan11", {"image_meta_size": None}, "input image_meta_size is missing"),
    ("hunyuan11", {"image_rotary_emb": (torch.ones(4, 32),) * 2}, r"image_rotary_cos has shape \(4, 32\)"),
    ("hunyuan11", {"style": torch.ones(2, dtype=torch.int64)}, "style holds"),
    ("dit", {"class_labels": torch.tensor([-1, 3])}, r"holds \[-1, 3\]; the model knows 0 to 1000, pass one of"),
    ("dit", {"hidden_states": torch.ones(4, 8, 8)}, r"hidden_states has shape \(4, 8, 8\), .*; pass that shape"),
)


@pytest.mark.parametrize(
    ("name", "arguments", "words"), REFUSED, ids=[f"{row[0]}-{next(iter(row[1]))}" for row in REFUSED]
)
def test_what_it_cannot_honour_is_refused_by_name(
    name: str, arguments: dict[str, Any], words: str, stand_in: Any
) -> None:
    model, transformer = stand_in(name, (8, 8))
    with pytest.raises(RecipeError, match=words):
        transformer(**call_of(model) | arguments)


def test_arguments_that_say_nothing_are_none(stand_in: Any) -> None:
    model, transformer = stand_in("dit")
    call = call_of(model)
    expected = transformer(**call).sample
    np.testing.assert_array_equal(transformer(**call, cross_attention_kwargs={}).sample.numpy(), expected.numpy())
    with pytest.raises(TypeError, match="joint_attention_kwargs"):
        transformer(**call, joint_attention_kwargs={"scale": 1.0})


def test_gradients_are_refused_where_they_are_asked_for(stand_in: Any) -> None:
    model, transformer = stand_in("dit")
    call = call_of(model)
    call["hidden_states"].requires_grad_(True)
    with pytest.raises(RecipeError, match="hidden_states asks for its gradient: an engine computes no gradients"):
        transformer(**call)
    with torch.no_grad():
        assert torch.isfinite(transformer(**call).sample).all()


def test_another_size_names_the_engine_s_and_the_remedy(stand_in: Any) -> None:
    model, transformer = stand_in("alpha", (24, 40))
    assert transformer.config.sample_size == 8, "no square, so pipelines must be told; this is the model's own"
    assert (transformer.height, transformer.width) == (24, 40)
    words = r"this engine draws 192 x 320, .* 64 x 64; .* height=192, width=320, use_resolution_binning=False .*"
    with pytest.raises(RecipeError, match=words + "build another with --height 64 --width 64"):
        transformer(**call_of(model))
    model, transformer = stand_in("dit", (16, 16))
    with pytest.raises(RecipeError, match="draws 128 x 128, the latents are for 64 x 64; build another with --height"):
        transformer(**call_of(model))


def test_a_pipeline_without_sizes_draws_the_engine_s(stand_in: Any) -> None:
    """A model for 64 pixels, an engine for 256, which is one of the sizes that the pipeline bins to."""
    _, transformer = stand_in("alpha", (32, 32))
    pipe = pipelines.pixart_alpha(transformer)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 256, 256, 3)


# --- beside calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, *CLASS_METHODS])
def test_inherited_methods_that_would_do_nothing_are_refused(name: str, stand_in: Any) -> None:
    _, transformer = stand_in("dit")
    assert hasattr(torch.nn.Module, name) or hasattr(diffusers.ModelMixin, name) or hasattr(diffusers.ConfigMixin, name)
    with pytest.raises(RecipeError, match=f"{name}: an engine"):
        getattr(transformer, name)("anything")


def test_methods_of_its_class_and_of_adapters_are_refused_when_looked_up(stand_in: Any) -> None:
    _, transformer = stand_in("hunyuan11")
    lacking = ("fuse_qkv_projections", "set_attn_processor", "attn_processors", "enable_forward_chunking")
    for name in lacking:
        assert hasattr(diffusers.HunyuanDiT2DModel, name) and not hasattr(transformer, name)
        with pytest.raises(RecipeError, match=f"{name}: an engine's graph is fixed"):
            getattr(transformer, name)
    for name in ADAPTERS:
        assert not hasattr(transformer, name)
        with pytest.raises(RecipeError, match=f"{name}: an engine takes no adapters"):
            getattr(transformer, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        transformer.nothing_like_it  # noqa: B018


def test_training_is_refused_and_evaluation_is_what_it_does(stand_in: Any) -> None:
    _, transformer = stand_in("dit")
    for ask in (transformer.train, transformer.requires_grad_):
        with pytest.raises(RecipeError, match="an engine computes no gradients"):
            ask()
    assert transformer.eval().requires_grad_(False) is transformer and not transformer.training
    assert [parameter.numel() for parameter in transformer.parameters()] == [0]


def test_copies_share_the_engine_and_nothing_is_pickled(stand_in: Any) -> None:
    _, transformer = stand_in("dit", (8, 8))
    for twin in (copy.deepcopy(transformer), copy.copy(transformer)):
        twin.to(torch.float16)
        assert twin.engine is transformer.engine and twin.size is transformer.size
        assert (twin.dtype, transformer.dtype) == (torch.float16, torch.float32) and twin.config == transformer.config
    for store in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(RecipeError, match="pickle: an engine is not saved"):
            store(transformer)
