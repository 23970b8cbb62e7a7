"""What config.json says and the model's class does not read: true configurations pass, anything else is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.errors import ModelError
from export.models import load as models
from export.models.config import read_config, unread_keys
from tests.support import tiny

PATH = Path("config.json")
# As diffusers wrote them for the published models; "Transformer2DModel" of releases before 0.29.
WHOLE = dict(activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=72, dropout=0.0, in_channels=4)
WHOLE |= dict(norm_elementwise_affine=False, norm_num_groups=32, num_attention_heads=16, num_embeds_ada_norm=1000)
WHOLE |= dict(num_layers=28, out_channels=8, patch_size=2, upcast_attention=False)
OLDER: dict[str, Any] = dict(num_vector_embeds=None, only_cross_attention=False, use_linear_projection=False)
PIXART = WHOLE | dict(norm_type="ada_norm_single", norm_eps=1e-6, caption_channels=4096, cross_attention_dim=1152)
PIXART |= dict(attention_type="default")
HUNYUAN: dict[str, Any] = dict(activation_fn="gelu-approximate", attention_head_dim=88, cross_attention_dim=1024)
HUNYUAN |= dict(cross_attention_dim_t5=2048, hidden_size=1408, in_channels=4, learn_sigma=True, mlp_ratio=4.3637)
HUNYUAN |= dict(norm_type="layer_norm", num_attention_heads=16, num_layers=40, patch_size=2, sample_size=128)
HUNYUAN |= dict(pooled_projection_dim=1024, text_len=77, text_len_t5=256)
ORIGIN = {"_diffusers_version": "0.30.0.dev0", "_name_or_path": "/trained/here", "_use_default_values": ["norm_eps"]}
EMA = dict(decay=0.9999, min_decay=0.0, optimization_step=1000, update_after_step=0, use_ema_warmup=False)
EMA |= dict(inv_gamma=1.0, power=0.6667)
# name -> (class, configuration)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "PixArt-alpha": ("PixArtTransformer2DModel", PIXART | OLDER | {"double_self_attention": False, "sample_size": 64}),
    "PixArt-alpha 1024": ("PixArtTransformer2DModel", PIXART | OLDER | {"sample_size": 128}),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        PIXART | OLDER | {"interpolation_scale": 2, "use_additional_conditions": False, "sample_size": 128},
    ),
    "PixArt-Sigma, trained on": ("PixArtTransformer2DModel", PIXART | EMA | {"sample_size": 128}),
    "DiT": ("DiTTransformer2DModel", WHOLE | OLDER | dict(norm_type="ada_norm_zero", cross_attention_dim=None)),
    "DiT, saved again": (
        "DiTTransformer2DModel",
        WHOLE | OLDER | dict(norm_type="ada_norm_zero", attention_type="default", caption_channels=None),
    ),
    "HunyuanDiT 1.1": ("HunyuanDiT2DModel", HUNYUAN),
    "HunyuanDiT 1.2": ("HunyuanDiT2DModel", HUNYUAN | {"use_style_cond_and_image_meta_size": False}),
}
# What would make another model, for each class.
STRANGE = {
    "PixArtTransformer2DModel": ({"only_cross_attention": True}, {"qk_norm": "rms"}, {"kv_compress": [1, 2]}),
    "DiTTransformer2DModel": ({"cross_attention_dim": 1152}, {"use_linear_projection": True}, {"hidden_size": 1152}),
    "HunyuanDiT2DModel": ({"qk_norm": False}, {"num_vector_embeds": 3}, {"self": 1}, {"kwargs": {}}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_pass(name: str) -> None:
    class_name, config = PUBLISHED[name]
    harmless = unread_keys(config | ORIGIN | {"_class_name": class_name}, class_name, PATH)
    assert set(harmless) <= {*OLDER, *EMA, "double_self_attention", "cross_attention_dim", "attention_type",
                             "caption_channels"}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_anything_else_is_named(name: str) -> None:
    class_name, config = PUBLISHED[name]
    for strange in STRANGE[class_name]:
        (key,) = strange
        with pytest.raises(ModelError, match=f"{class_name} does not know '{key}': "):
            unread_keys(config | strange, class_name, PATH)


def test_only_the_notes_that_diffusers_writes_may_begin_with_an_underscore() -> None:
    with pytest.raises(ModelError, match="DiTTransformer2DModel does not know '_qk_norm': 'rms'; "):
        unread_keys(ORIGIN | {"_qk_norm": "rms"}, "DiTTransformer2DModel", PATH)


def test_of_many_the_first_are_named() -> None:
    with pytest.raises(ModelError, match="'k3': 3 and 96 more; "):
        unread_keys({f"k{i}": i for i in range(100)}, "DiTTransformer2DModel", PATH)


@pytest.mark.torch
@pytest.mark.parametrize("row", ["pixart", "pixart_sigma", "hunyuan", "dit", "unknown"])
def test_a_model_is_loaded_or_refused_by_its_keys(row: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With keys that are known to be harmless as without; with any other not at all."""
    path = tiny.folder(row, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | EMA | {"comes_later": None}))
    with caplog.at_level("INFO"):
        models.load(str(path.parent))
    assert "decay is not read: how it was trained" in caplog.text and "comes_later" in caplog.text
    path.write_text(json.dumps(config | {"qk_norm_of_mine": True}))
    with pytest.raises(ModelError, match=r"config.json: .* does not know 'qk_norm_of_mine': True"):
        models.load(str(path.parent))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("scaling_factor", "0", "scaling_factor is 0; it should be greater than or equal to 0.000001"),
        ("scaling_factor", "-0.18215", "scaling_factor is -0.18215; it should be"),
        ("scaling_factor", "1e-300", "scaling_factor is 1e-300; it should be"),
        ("scaling_factor", "null", "scaling_factor is None; it should be a valid number"),
        ("scaling_factor", "NaN", "NaN is not a number"),
        ("shift_factor", "NaN", "NaN is not a number"),
        ("shift_factor", '"0"', "shift_factor is '0'; it should be a valid number"),
    ],
)
def test_a_scale_of_latents_that_leaves_none_is_refused(key: str, value: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(f'{{"{key}": {value}}}')
    with pytest.raises(ModelError, match=words):
        read_config(path)
