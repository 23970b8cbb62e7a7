"""Tiny models of classes without a row, which are learned from their pipelines, and pictures by these."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.models import load as models
from export.models.config import defaults_of
from export.models.recording import Drawing, Recorder
from tests.support import tiny

SIZE = (64, 64)
WIDE: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=32)
ROPE = dict(axes_dims_rope=(8, 8, 16))
# name -> (diffusers class, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", tiny.SD3),
    "sd35": ("SD3Transformer2DModel", tiny.SD3 | dict(dual_attention_layers=[0], qk_norm="rms_norm")),
    "flux": (
        "FluxTransformer2DModel",
        WIDE | ROPE | dict(in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32,
                           pooled_projection_dim=16, guidance_embeds=True),
    ),
    "sana": (
        "SanaTransformer2DModel",
        WIDE | dict(in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
                    cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=24, sample_size=8),
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        WIDE | ROPE | dict(in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=24),
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        WIDE | dict(sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=24,
                    caption_projection_dim=64, pos_embed_max_size=64),
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        WIDE | dict(in_channels=4, out_channels=4, num_layers=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
                    sample_size=8),
    ),
    "wan": (
        "WanTransformer3DModel",
        WIDE | dict(in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=96, num_layers=2),
    ),
    "latte": (
        "LatteTransformer3DModel",
        WIDE | dict(in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64, sample_size=8, patch_size=2,
                    norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24, video_length=4,
                    num_embeds_ada_norm=1000, activation_fn="gelu-approximate", attention_bias=True),
    ),
}  # fmt: skip
# Classes that are understood in part.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "zimage": (
        "ZImageTransformer2DModel",
        dict(in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
             axes_dims=[8, 8, 16]),
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        dict(sample_size=8, in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=[8, 8, 8], axes_lens=[30, 64, 64], cap_feat_dim=24),
    ),
}  # fmt: skip


def stated(name: str) -> tuple[str, dict[str, Any]]:
    """Class and whole configuration of the row `name`."""
    class_name, config = MODELS[name]
    return class_name, {**defaults_of(class_name), **config}


def saved(name: str, folder: Path) -> models.LoadedModel:
    """The row's model with random weights, through a folder."""
    class_name, config = MODELS[name]
    tiny.random_module(class_name, config).save_pretrained(folder / name)
    return models.load(str(folder / name))


@torch.inference_mode()
def draw(recorder: Recorder, transformer: torch.nn.Module, drawing: Drawing) -> NDArray[np.float32]:
    """Latents that the recorder's own pipeline draws with another transformer."""
    parts = {name: getattr(recorder.pipe, name, None) for name in inspect.signature(recorder.pipeline_class).parameters
             if name in recorder.pipe.components}  # fmt: skip
    pipe = recorder.pipeline_class(**parts | {"transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    settings = recorder.settings(drawing)
    if "true_cfg_scale" in recorder.arguments:
        settings["true_cfg_scale"] = drawing.guidance_scale
    output = pipe(**settings)
    latents = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return np.asarray(latents.float())
