"""True diffusers pipelines of tiny random parts, written as folders: text encoders, tokenizers, VAE, scheduler.

Nothing is downloaded: vocabularies are listed here. The VAE halves three times, as those of all latent families do, so
that 64 pixels are 8 latent cells. HunyuanDiT's pipeline fixes its text lengths, and DiT's its null class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import tiny

WORDS = ("a", "the", "red", "blue", "circle", "ring", "on", "white", "of", "photo", "cat", "dog", "and", "with")
LABELS = {"0": "zero, nought", "1": "one", "999": "last"}
TEXT = tiny.HUNYUAN | {"text_len": 77, "text_len_t5": 256}
STYLELESS = {"use_style_cond_and_image_meta_size": False}  # version 1.2
SIGMA = tiny.PIXART | {"sample_size": 128, "use_additional_conditions": False}
HALVINGS = 3


def vae() -> Any:
    """Latents of 4 channels, 8 pixels a cell."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    channels = (8,) * (HALVINGS + 1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=channels, latent_channels=4, norm_num_groups=4, **blocks).eval()


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(seed: int = 2) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: rank for rank, word in enumerate(words)})


def bert_encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=77,
    )  # fmt: skip
    return BertModel(config).eval()


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)


def solver() -> Any:
    """The published PixArt pipelines' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")


def ddpm() -> Any:
    """The published HunyuanDiT pipelines' scheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False, prediction_type="epsilon")


def pixart_alpha(transformer: Any) -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(t5_tokenizer(), t5_encoder(), vae(), transformer, solver())


def pixart_sigma(transformer: Any) -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(t5_tokenizer(), t5_encoder(), vae(), transformer, solver())


def hunyuan(transformer: Any) -> Any:
    from diffusers import HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae(), bert_encoder(), bert_tokenizer(), transformer, ddpm(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=t5_encoder(4), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def dit(transformer: Any) -> Any:
    from diffusers import DiTPipeline

    return DiTPipeline(transformer, vae(), ddim(), id2label={int(key): value for key, value in LABELS.items()})


@dataclass(frozen=True)
class Row:
    """One family's pipeline: the class and configuration of its transformer, and what makes the pipeline around it."""

    class_name: str
    config: dict[str, Any]
    pipeline: Callable[[Any], Any]
    recipe: str


ROWS = {
    "alpha": Row("PixArtTransformer2DModel", tiny.PIXART, pixart_alpha, "pixart_w4a6"),
    "sigma": Row("PixArtTransformer2DModel", SIGMA, pixart_sigma, "pixart_sigma_w4a6"),
    "hunyuan11": Row("HunyuanDiT2DModel", TEXT, hunyuan, "hunyuan_w4a6"),
    "hunyuan12": Row("HunyuanDiT2DModel", TEXT | STYLELESS, hunyuan, "hunyuan_w4a6"),
    "dit": Row("DiTTransformer2DModel", tiny.DIT | {"num_embeds_ada_norm": 1000}, dit, "dit_w4a8"),
}


def write(name: str, folder: Path, **config: Any) -> Path:
    """Save the pipeline `name` into `folder` as diffusers does; `config` changes its transformer's configuration."""
    row = ROWS[name]
    row.pipeline(tiny.random_module(row.class_name, row.config | config)).save_pretrained(folder)
    if name == "dit":  # as the hub's DiT has it
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    return folder
