"""Tiny random models of diffusers' classes whose blocks pass on more than one tensor, or are no chain.

Hand-made: each has a row that quantizes all linears of its blocks but those of norms, and random calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from export.models.families import FAMILIES, Family, Input
from export.models.load import LoadedModel
from export.models.weights import WeightsFiles
from pipeline.calibrate.data import CalibrationData, Call
from pipeline.calibrate.plan import LayerPlan
from tests.support import tiny

TEXT, POOLED, TOKENS = 32, 16, 5
HEADS: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=16)
TIME = Input("timestep", ("batch",), "timestep")
CAPTION = Input("encoder_hidden_states", ("batch", TOKENS, TEXT))
POOL = Input("pooled_projections", ("batch", POOLED))
IMAGE = Input("hidden_states", ("batch", 4, 8, 8))
VIDEO = Input("hidden_states", ("batch", 4, 3, 8, 8))
MASK = Input("encoder_attention_mask", ("batch", TOKENS), "mask")
SD3 = tiny.SD3 | HEADS | dict(num_layers=3, caption_projection_dim=32, joint_attention_dim=TEXT)
LATTE = HEADS | dict(
    in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=TEXT, caption_channels=TEXT, sample_size=8,
    patch_size=2, video_length=3, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
)  # fmt: skip
# name -> (diffusers class, configuration, inputs)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[Input, ...]]] = {
    "sd3": ("SD3Transformer2DModel", SD3, (IMAGE, CAPTION, POOL, TIME)),
    "sd35": (
        "SD3Transformer2DModel",
        SD3 | dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        (IMAGE, CAPTION, POOL, TIME),
    ),
    "flux": (
        "FluxTransformer2DModel",
        HEADS
        | dict(in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=TEXT, pooled_projection_dim=POOLED)
        | dict(axes_dims_rope=(4, 4, 8)),
        (
            Input("hidden_states", ("batch", 16, 4)),
            CAPTION,
            POOL,
            TIME,
            Input("img_ids", (16, 3)),
            Input("txt_ids", (TOKENS, 3), "zeros"),
        ),
    ),
    "aura": (
        "AuraFlowTransformer2DModel",
        HEADS
        | dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2)
        | dict(joint_attention_dim=TEXT, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16),
        (IMAGE, CAPTION, TIME),
    ),
    "sana": (
        "SanaTransformer2DModel",
        HEADS
        | dict(in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16)
        | dict(cross_attention_dim=32, caption_channels=TEXT, patch_size=1, sample_size=8),
        (IMAGE, CAPTION, TIME, MASK),
    ),
    "wan": (
        "WanTransformer3DModel",
        HEADS
        | dict(in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=16, ffn_dim=64, num_layers=2)
        | dict(rope_max_seq_len=32),
        (VIDEO, CAPTION, TIME),
    ),
    "latte": ("LatteTransformer3DModel", LATTE, (VIDEO, CAPTION, TIME)),
    "hunyuan": ("HunyuanDiT2DModel", tiny.HUNYUAN, ()),
    "pixart": ("PixArtTransformer2DModel", tiny.PIXART, ()),
}
QUANTIZED = (r".*blocks\.\d+\.(?!.*(norm|ada|emb)).*", "other")


def model_of(name: str, seed: int = 0) -> LoadedModel:
    """The model of a row of MODELS; its inputs and call are the family's own where the table of families has it."""
    class_name, config, rows = MODELS[name]
    module = tiny.random_module(class_name, config, seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)  # as a class starts out, its text hardly moves the picture
    family = FAMILIES.get(name) or Family(
        name, class_name, lambda _: True, (QUANTIZED,), (), lambda _: rows, _call, "as its forward takes it"
    )
    return LoadedModel(family, dict(module.config), Path("nowhere"), name, module, "", "", WeightsFiles(Path(), (), {}))


def _call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs, return_dict=False)[0]


def calls_of(model: LoadedModel, samples: tuple[int, ...] = (3, 2), seed: int = 0) -> CalibrationData:
    """Random calls of so many samples each; what has no batch axis is the same in all."""
    generator = torch.Generator().manual_seed(seed)
    shared = {name: value for name, value in _inputs(model, 1, generator).items() if name in model.shared}
    calls = [Call(_inputs(model, count, generator) | shared, 1.0 - i / 9, i) for i, count in enumerate(samples)]
    return CalibrationData(tuple(calls), len(samples))


def _inputs(model: LoadedModel, batch: int, generator: torch.Generator) -> dict[str, Any]:
    sizes = {"batch": batch, "tokens": TOKENS, "height": 8, "width": 8, "patches": 16}
    arrays = {}
    for row in model.inputs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in row.shape)
        if row.fill == "timestep":
            value = torch.rand(shape, generator=generator) * 900
        elif row.fill in ("zeros", "mask", "image_size"):
            value = torch.full(shape, float(row.fill != "zeros"))
        else:
            value = torch.randn(shape, generator=generator)
        arrays[row.name] = value.numpy().astype(row.dtype)
    return arrays


def plans_of(model: LoadedModel, weight: str = "INT4") -> list[LayerPlan]:
    return [LayerPlan(ref, weight, "INT8", "per_channel", 0, (1,)) for ref in model.linears()]


def context(options: Mapping[str, Any]) -> Any:
    """What the methods of the tests look at in a `Context`."""
    recipe = SimpleNamespace(weights=SimpleNamespace(search="mse", granularity="per_channel"))
    return SimpleNamespace(recipe=recipe, options=options, seed=0)
