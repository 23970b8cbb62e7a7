"""Tiny models of the true diffusers classes, saved to disk by the test that needs them. Two layers, width 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.families import models as families
from export.checkpoint import QuantizedLinear
from export.formats.format import encode, fold_negative_zero, get_format
from tests.support.portable import make_linear

HEADS, HEAD_DIM, LAYERS = 2, 32, 2
WIDTH = HEADS * HEAD_DIM
COMMON: dict[str, Any] = dict(
    num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=LAYERS, activation_fn="gelu-approximate"
)
PIXART = COMMON | dict(
    in_channels=4,
    out_channels=8,
    cross_attention_dim=WIDTH,
    caption_channels=32,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
)
HUNYUAN = COMMON | dict(
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=WIDTH,
    num_layers=4,  # the fourth block is the first with a long skip
    cross_attention_dim=32,
    cross_attention_dim_t5=32,
    pooled_projection_dim=16,
    text_len=5,
    text_len_t5=6,
)
DIT = COMMON | dict(
    in_channels=4,
    out_channels=8,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    norm_elementwise_affine=False,
)
SD3 = dict(families.SD3)
# Size conditions take a third of the width each.
SIZES = PIXART | dict(attention_head_dim=48, cross_attention_dim=96, use_additional_conditions=True)
# name -> (diffusers class, configuration). "unknown" has no row in the table of families.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "pixart_sizes": ("PixArtTransformer2DModel", SIZES),
    "pixart_sigma": ("PixArtTransformer2DModel", PIXART | {"sample_size": 128, "use_additional_conditions": False}),
    "hunyuan": ("HunyuanDiT2DModel", HUNYUAN),
    "dit": ("DiTTransformer2DModel", DIT),
    "unknown": ("SD3Transformer2DModel", SD3),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The torch module of the row `name`, its configuration with `changes`, see `random_module`."""
    class_name, config = MODELS[name]
    return random_module(class_name, config | changes, seed)


def random_module(class_name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """The torch module with random weights; tensors that start at zero are made random, so that every path counts."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    module = getattr(diffusers, class_name)(**config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return module


def folder(name: str, tmp_path: Path, seed: int = 0, half: bool = True, shard_size: str = "10GB") -> Path:
    """Save the model `name` with diffusers below `tmp_path`; returns its folder. half: fp16 weights, as on the hub."""
    path = tmp_path / name
    module = build(name, seed)
    (module.half() if half else module).save_pretrained(path, max_shard_size=shard_size)
    return path


def quantized(
    model: Any, weight: str = "E2M1", activation: str = "E2M3", granularity: Any = "per_channel", group_size: int = 32
) -> list[QuantizedLinear]:
    """Every linear to quantize by plain absmax per channel (per group for "group"); exact_group multipliers cycle."""
    return [_quantize(ref, weight, activation, granularity, group_size) for ref in model.linears()]


def _quantize(ref: Any, weight: str, activation: str, granularity: Any, group_size: int) -> QuantizedLinear:
    fmt, w = get_format(weight), ref.module.weight.float().numpy().astype(np.float64)
    size = w.shape[1] if granularity == "per_channel" else group_size
    grouped = w.reshape(len(w), -1, size)
    groups = grouped.shape[1]
    axis: Any = 2 if granularity == "group" else (1, 2)
    scales = np.maximum(np.abs(grouped).max(axis).reshape(len(w), -1), 1e-8).astype(np.float32) / fmt.max_value
    multipliers = None
    if granularity == "exact_group":
        multipliers = np.resize(np.array([1, 2, 3], np.uint8), (len(w), groups))
    unit = scales[..., None].astype(np.float64) * (1 if multipliers is None else multipliers[..., None])
    codes = fold_negative_zero(fmt, encode(fmt, (grouped / unit).reshape(w.shape)))
    return make_linear(
        codes,
        name=ref.name,
        kind=ref.kind,
        weight_format=weight,
        activation_format=activation,
        granularity=granularity,
        group_size=0 if granularity == "per_channel" else size,
        scales=scales,
        multipliers=multipliers,
        bias=None if ref.module.bias is None else ref.module.bias.float().numpy(),
    )
