"""Tiny models of classes without a row, and pictures by their pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.models.config import defaults_of

if TYPE_CHECKING:
    from torch import nn

    from export.models.recording import Drawing, Recorder

SIZE = (64, 64)  # height and width in pixels
Config = Mapping[str, Any]
WIDE: Config = {"num_attention_heads": 2, "attention_head_dim": 32}
ROPE: Config = {"axes_dims_rope": [8, 8, 16]}
SD3: Config = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 8,
}  # fmt: skip
# name -> (diffusers class, configuration)
MODELS: dict[str, tuple[str, Config]] = {
    "Stable Diffusion 3": ("SD3Transformer2DModel", SD3),
    "Stable Diffusion 3.5": (
        "SD3Transformer2DModel", {**SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"}
    ),
    "FLUX.1": (
        "FluxTransformer2DModel",
        {**WIDE, **ROPE, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
         "pooled_projection_dim": 16, "guidance_embeds": True},
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {**WIDE, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 24, "sample_size": 8},
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {**WIDE, "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 24,
         "caption_projection_dim": 64, "pos_embed_max_size": 64},
    ),
    "CogView4": (
        "CogView4Transformer2DModel",
        {**WIDE, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 24, "time_embed_dim": 16,
         "condition_dim": 8, "sample_size": 8},
    ),
    "Wan 2.1": (
        "WanTransformer3DModel",
        {**WIDE, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2},
    ),
    "Latte": (
        "LatteTransformer3DModel",
        {**WIDE, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 64, "sample_size": 8,
         "patch_size": 2, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "caption_channels": 24,
         "video_length": 4, "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate", "attention_bias": True},
    ),
    "LTX-Video": (
        "LTXVideoTransformer3DModel",
        {**WIDE, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "num_layers": 2,
         "caption_channels": 24},
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        {**WIDE, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 16, "rope_axes_dim": [8, 8, 16]},
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {**WIDE, **ROPE, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24},
    ),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        {**WIDE, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
         "timestep_guidance_channels": 16, "axes_dims_rope": [8, 8, 8, 8]},
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        {**WIDE, **ROPE, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
         "approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 8},
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 96, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3,
         "cap_feat_dim": 24, "axes_dims": [8, 8, 16]},
    ),
    "Lumina 2": (
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": [8, 8, 8],
         "axes_lens": [30, 64, 64], "cap_feat_dim": 24},
    ),
    "HiDream": (
        "HiDreamImageTransformer2DModel",
        {**WIDE, "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "caption_channels": [24, 24], "text_emb_dim": 16, "num_routed_experts": 2, "num_activated_experts": 1,
         "axes_dims_rope": [16, 8, 8], "max_resolution": [16, 16], "llama_layers": [0, 1]},
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        {**WIDE, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 2,
         "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 12},
    ),
    "Mochi": (
        "MochiTransformer3DModel",
        {**WIDE, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 24,
         "time_embed_dim": 16, "max_sequence_length": 16},
    ),
    "Stable Audio": (
        "StableAudioDiTModel",
        {"sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 24, "time_proj_dim": 16,
         "global_states_input_dim": 48, "cross_attention_input_dim": 24},
    ),
}  # fmt: skip


def stated(name: str) -> tuple[str, Config]:
    """Class and whole configuration of the row `name`."""
    class_name, config = MODELS[name]
    return class_name, {**defaults_of(class_name), **config}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """The row's model with random weights, written into `folder`; tensors that start at zero are random, too, so that
    every path counts."""
    import diffusers
    import torch

    class_name, config = MODELS[name]
    torch.manual_seed(seed)
    module = getattr(diffusers, class_name)(**config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    module.half().float().save_pretrained(folder)  # numbers that an engine's kept weights hold
    return folder


def draw(recorder: Recorder, transformer: nn.Module, drawing: Drawing) -> NDArray[np.float32]:
    """Latents that a pipeline of the recorder's kind draws with another transformer."""
    import torch

    names = (name for name in inspect.signature(recorder.pipeline_class).parameters if name in recorder.pipe.components)
    parts = {name: getattr(recorder.pipe, name) for name in names}
    pipe = recorder.pipeline_class(**parts | {"transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    settings = recorder.settings(drawing)
    if "true_cfg_scale" in recorder.arguments:
        settings["true_cfg_scale"] = drawing.guidance_scale
    with torch.inference_mode():
        return np.asarray(next(iter(pipe(**settings).values())).float())
