"""The networks of the pipeline: architecture and how each starts."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from benchmarks.zoo.pixart_scenes import board

LATENT_CHANNELS, FACTOR = 4, 4
LATENT_SIZE = board.RESOLUTION // FACTOR
TEXT_WIDTH, TEXT_LAYERS = 128, 3
WIDTH, HEADS, LAYERS, PATCH = 256, 8, 6, 2
SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
)


def autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=board.RESOLUTION,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)


def text_encoder(vocabulary: int) -> T5EncoderModel:
    """The encoder half of a T5 v1.1."""
    config = T5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=TEXT_LAYERS, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def denoiser() -> PixArtTransformer2DModel:
    """On 64 tokens of 2 x 2 latents. Residual branches start small and the output at zero, so that the first steps are
    stable."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=LAYERS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SIZE,
        patch_size=PATCH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        activation_fn="gelu-approximate",
        attention_bias=True,
        use_additional_conditions=False,
    )
    std = 0.02 / math.sqrt(2 * LAYERS)
    for name, module in model.named_modules():
        if name.endswith(("to_out.0", "ff.net.2")):
            torch.nn.init.normal_(module.weight, std=std)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order on the straight paths that the denoiser learns."""
    return DPMSolverMultistepScheduler(**SCHEDULER)
