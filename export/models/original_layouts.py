"""Tensor names of the models' own repositories, translated into those of diffusers.

DiT (facebookresearch/DiT), PixArt-alpha and -Sigma (PixArt-alpha/*) and HunyuanDiT (Tencent/HunyuanDiT) publish
weights under names of their own, with q, k and v in one matrix. diffusers reads such files with scripts, not with its
library (`from_single_file` knows none of the three).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.errors import ModelError

if TYPE_CHECKING:
    import torch


# All three call the patch embedding so, and diffusers' classes do not.
MARK = "x_embedder.proj.weight"
# What wrappers and training programs put before every name; several may nest.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "_orig_mod.")
# torch.compile puts this into the middle, where single blocks are compiled.
COMPILED = "_orig_mod."
# A file of a whole pipeline has the denoiser under the first of PREFIXES, and other parts under these.
OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def _swapped_halves(tensor: torch.Tensor) -> torch.Tensor:
    """HunyuanDiT makes (shift, scale) where diffusers makes (scale, shift)."""
    return tensor.roll(len(tensor) // 2, 0)


def _first_row(tensor: torch.Tensor) -> torch.Tensor:
    """All pictures are of style 0; diffusers has a table of that row alone."""
    return tensor[:1]


@dataclass(frozen=True)
class Rename:
    r"""Regex of a module path -> its paths in diffusers. Several: an equal part of the rows for each.

    "*" in a target stands for every block, which all get the same tensor. `change` is applied to the tensor.
    """

    pattern: str
    targets: tuple[str, ...]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def _rows(*rows: tuple[str, ...]) -> tuple[Rename, ...]:
    return tuple(Rename(pattern, tuple(targets)) for pattern, *targets in rows)


def _mlp(path: str, target: str) -> tuple[Rename, ...]:
    """A perceptron of two linears around an activation."""
    return _rows((rf"{path}\.0", f"{target}.linear_1"), (rf"{path}\.2", f"{target}.linear_2"))


BLOCK = r"blocks\.(\d+)"
PATCHES = _rows((r"x_embedder\.proj", "pos_embed.proj"))
# Self-attention and feed-forward as timm's blocks name them.
TIMM_BLOCK = _rows(
    (rf"{BLOCK}\.attn\.qkv", *(rf"transformer_blocks.\1.attn1.to_{part}" for part in "qkv")),
    (rf"{BLOCK}\.attn\.proj", r"transformer_blocks.\1.attn1.to_out.0"),
    (rf"{BLOCK}\.mlp\.fc1", r"transformer_blocks.\1.ff.net.0.proj"),
    (rf"{BLOCK}\.mlp\.fc2", r"transformer_blocks.\1.ff.net.2"),
)
DIT = (
    *PATCHES,
    *TIMM_BLOCK,
    # One embedding for all blocks; diffusers keeps a copy in each.
    *_mlp(r"t_embedder\.mlp", "transformer_blocks.*.norm1.emb.timestep_embedder"),
    *_rows(
        (r"y_embedder\.embedding_table", "transformer_blocks.*.norm1.emb.class_embedder.embedding_table"),
        (rf"{BLOCK}\.adaLN_modulation\.1", r"transformer_blocks.\1.norm1.linear"),
        (r"final_layer\.adaLN_modulation\.1", "proj_out_1"),
        (r"final_layer\.linear", "proj_out_2"),
    ),
)
PIXART = (
    *PATCHES,
    *TIMM_BLOCK,
    *_mlp(r"t_embedder\.mlp", "adaln_single.emb.timestep_embedder"),
    *_mlp(r"csize_embedder\.mlp", "adaln_single.emb.resolution_embedder"),
    *_mlp(r"ar_embedder\.mlp", "adaln_single.emb.aspect_ratio_embedder"),
    *_rows(
        (r"t_block\.1", "adaln_single.linear"),
        (r"y_embedder\.y_proj\.fc1", "caption_projection.linear_1"),
        (r"y_embedder\.y_proj\.fc2", "caption_projection.linear_2"),
        (rf"{BLOCK}\.cross_attn\.q_linear", r"transformer_blocks.\1.attn2.to_q"),
        (rf"{BLOCK}\.cross_attn\.kv_linear", *(rf"transformer_blocks.\1.attn2.to_{part}" for part in "kv")),
        (rf"{BLOCK}\.cross_attn\.proj", r"transformer_blocks.\1.attn2.to_out.0"),
        (BLOCK, r"transformer_blocks.\1"),  # scale_shift_table
        (r"final_layer\.linear", "proj_out"),
        (r"final_layer", ""),  # scale_shift_table
    ),
)
HUNYUAN = (
    *PATCHES,
    *_mlp(r"t_embedder\.mlp", "time_extra_emb.timestep_embedder"),
    *_mlp(r"extra_embedder", "time_extra_emb.extra_embedder"),
    *_mlp(r"mlp_t5", "text_embedder"),
    Rename(r"style_embedder", ("time_extra_emb.style_embedder",), _first_row),
    Rename(r"final_layer\.adaLN_modulation\.1", ("norm_out.linear",), _swapped_halves),
    *_rows(
        (r"pooler", "time_extra_emb.pooler"),  # positional_embedding
        (r"pooler\.([qkvc]_proj)", r"time_extra_emb.pooler.\1"),
        (r"final_layer\.linear", "proj_out"),
        (rf"{BLOCK}\.attn1\.Wqkv", *(rf"blocks.\1.attn1.to_{part}" for part in "qkv")),
        (rf"{BLOCK}\.attn2\.q_proj", r"blocks.\1.attn2.to_q"),
        (rf"{BLOCK}\.attn2\.kv_proj", *(rf"blocks.\1.attn2.to_{part}" for part in "kv")),
        (rf"{BLOCK}\.(attn[12])\.out_proj", r"blocks.\1.\2.to_out.0"),
        (rf"{BLOCK}\.(attn[12])\.([qk])_norm", r"blocks.\1.\2.norm_\3"),
        (rf"{BLOCK}\.default_modulation\.1", r"blocks.\1.norm1.linear"),
        (rf"{BLOCK}\.norm1", r"blocks.\1.norm1.norm"),
        # diffusers numbers the norms in the order of use, HunyuanDiT does not.
        (rf"{BLOCK}\.norm2", r"blocks.\1.norm3"),
        (rf"{BLOCK}\.norm3", r"blocks.\1.norm2"),
        (rf"{BLOCK}\.mlp\.fc1", r"blocks.\1.ff.net.0.proj"),
        (rf"{BLOCK}\.mlp\.fc2", r"blocks.\1.ff.net.2"),
    ),
)
# Attention as diffusers itself called it in the autoencoders of its first releases, which are still in use.
OLDER_ATTENTION = r"((?:en|de)coder\.mid_block\.attentions\.\d+)"
AUTOENCODER = _rows(
    (rf"{OLDER_ATTENTION}\.query", r"\1.to_q"),
    (rf"{OLDER_ATTENTION}\.key", r"\1.to_k"),
    (rf"{OLDER_ATTENTION}\.value", r"\1.to_v"),
    (rf"{OLDER_ATTENTION}\.proj_attn", r"\1.to_out.0"),
)
LAYOUTS = {
    "DiTTransformer2DModel": DIT,
    "PixArtTransformer2DModel": PIXART,
    "HunyuanDiT2DModel": HUNYUAN,
    "AutoencoderKL": AUTOENCODER,
}
# Classes of which a file may have older names for some of its tensors alone.
WITHOUT_MARK = frozenset(("AutoencoderKL",))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the file -> name without what wrappers add. A prefix is one where most names have it.

    Names without it stay as they are, to be judged as such; those of other parts of a pipeline are left out.
    """
    plain = {name: name for name in names}
    if any(name.startswith(PREFIXES[0]) for name in plain):
        plain = {name: name for name in plain if not name.startswith(OTHER_PARTS)}
    while prefix := next((prefix for prefix in PREFIXES if _leads(prefix, plain)), ""):
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    return {name: short.replace(COMPILED, "") for name, short in plain.items()}


def _leads(prefix: str, plain: Mapping[str, str]) -> bool:
    return 2 * sum(name.startswith(prefix) for name in plain.values()) > len(plain)


def translated(class_name: str, key: str, tensor: torch.Tensor, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in diffusers, tensor) for a tensor in the layout of the model's own repository.

    A tensor without a row keeps its name. Raises ModelError where it cannot be split into equal parts.
    """
    path, dot, leaf = key.rpartition(".")
    for row in LAYOUTS[class_name]:
        match = re.fullmatch(row.pattern, path) if dot else None
        if match:
            changed = row.change(tensor) if row.change and tensor.ndim else tensor
            parts = _parts(key, changed, len(row.targets))
            for target, part in zip(row.targets, parts, strict=True):
                name = match.expand(target)
                for spread in [name.replace("*", str(layer)) for layer in range(layers)] if "*" in name else [name]:
                    yield f"{spread}.{leaf}".removeprefix("."), part
            return
    yield key, tensor


def _parts(key: str, tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if count == 1:
        return (tensor,)
    if not tensor.ndim or not len(tensor) or len(tensor) % count:
        raise ModelError(
            f"tensor {key} of shape {tuple(tensor.shape)} does not hold {count} equal parts; check the file"
        )
    return tensor.chunk(count)
