"""Tiny autoencoders of diffusers' true class, saved to disk by the test that needs them. Three levels, 16 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LEVELS = 3
VAE: dict[str, Any] = dict(
    block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
    down_block_types=("DownEncoderBlock2D",) * LEVELS, up_block_types=("UpDecoderBlock2D",) * LEVELS,
)  # fmt: skip


def vae(seed: int = 0, **changes: Any) -> Any:
    """The torch module with random weights that fp16 holds, in float32; no norm is one that does nothing."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    module = AutoencoderKL(**VAE | changes).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.normal_(float(name.endswith("weight")), 0.2)
    return module.half().float()


def vae_folder(parent: Path, seed: int = 0, **changes: Any) -> Path:
    """Save one as a pipeline has it, in fp16; returns its folder."""
    path = parent / "vae"
    vae(seed, **changes).half().save_pretrained(path)
    return path
