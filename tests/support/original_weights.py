"""The tensors of a diffusers model as the model's own repository names and joins them.

Written down from the original models' definitions, one line for each of their modules, and not from the table that
reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

State = Mapping[str, Any]


def _both(state: State, path: str, target: str) -> dict[str, Any]:
    """Weight and bias of one module under another path."""
    return {f"{target}.{leaf}": state[f"{path}.{leaf}"] for leaf in ("weight", "bias") if f"{path}.{leaf}" in state}


def _joined(state: State, paths: list[str], target: str) -> dict[str, Any]:
    return {f"{target}.{leaf}": torch.cat([state[f"{path}.{leaf}"] for path in paths]) for leaf in ("weight", "bias")}


def _mlp(state: State, path: str, target: str) -> dict[str, Any]:
    return _both(state, f"{path}.linear_1", f"{target}.0") | _both(state, f"{path}.linear_2", f"{target}.2")


def _timm_block(state: State, path: str, target: str) -> dict[str, Any]:
    return {
        **_joined(state, [f"{path}.attn1.to_{part}" for part in "qkv"], f"{target}.attn.qkv"),
        **_both(state, f"{path}.attn1.to_out.0", f"{target}.attn.proj"),
        **_both(state, f"{path}.ff.net.0.proj", f"{target}.mlp.fc1"),
        **_both(state, f"{path}.ff.net.2", f"{target}.mlp.fc2"),
    }


def dit(state: State, layers: int) -> dict[str, Any]:
    first = "transformer_blocks.0.norm1.emb"
    table = "embedding_table.weight"
    result = {
        **_both(state, "pos_embed.proj", "x_embedder.proj"),
        **_mlp(state, f"{first}.timestep_embedder", "t_embedder.mlp"),
        f"y_embedder.{table}": state[f"{first}.class_embedder.{table}"],
        **_both(state, "proj_out_1", "final_layer.adaLN_modulation.1"),
        **_both(state, "proj_out_2", "final_layer.linear"),
    }
    for i in range(layers):
        result |= _timm_block(state, f"transformer_blocks.{i}", f"blocks.{i}")
        result |= _both(state, f"transformer_blocks.{i}.norm1.linear", f"blocks.{i}.adaLN_modulation.1")
    return result


def pixart(state: State, layers: int) -> dict[str, Any]:
    result = {
        **_both(state, "pos_embed.proj", "x_embedder.proj"),
        **_mlp(state, "adaln_single.emb.timestep_embedder", "t_embedder.mlp"),
        **_both(state, "adaln_single.linear", "t_block.1"),
        **_both(state, "caption_projection.linear_1", "y_embedder.y_proj.fc1"),
        **_both(state, "caption_projection.linear_2", "y_embedder.y_proj.fc2"),
        **_both(state, "proj_out", "final_layer.linear"),
        "final_layer.scale_shift_table": state["scale_shift_table"],
        # A model of captions of 120 tokens holds as many rows.
        "y_embedder.y_embedding": torch.randn(4, state["caption_projection.linear_1.weight"].shape[1]),
    }
    if "adaln_single.emb.resolution_embedder.linear_1.weight" in state:
        result |= _mlp(state, "adaln_single.emb.resolution_embedder", "csize_embedder.mlp")
        result |= _mlp(state, "adaln_single.emb.aspect_ratio_embedder", "ar_embedder.mlp")
    for i in range(layers):
        path, target = f"transformer_blocks.{i}", f"blocks.{i}"
        result |= _timm_block(state, path, target)
        result |= {f"{target}.scale_shift_table": state[f"{path}.scale_shift_table"]}
        result |= _both(state, f"{path}.attn2.to_q", f"{target}.cross_attn.q_linear")
        result |= _joined(state, [f"{path}.attn2.to_k", f"{path}.attn2.to_v"], f"{target}.cross_attn.kv_linear")
        result |= _both(state, f"{path}.attn2.to_out.0", f"{target}.cross_attn.proj")
    return result


def hunyuan(state: State, layers: int) -> dict[str, Any]:
    extra = "time_extra_emb"
    result = {
        "text_embedding_padding": state["text_embedding_padding"],
        **_both(state, "pos_embed.proj", "x_embedder.proj"),
        **_mlp(state, f"{extra}.timestep_embedder", "t_embedder.mlp"),
        **_mlp(state, f"{extra}.extra_embedder", "extra_embedder"),
        **_mlp(state, "text_embedder", "mlp_t5"),
        **{key.removeprefix(f"{extra}."): value for key, value in state.items() if key.startswith(f"{extra}.pooler.")},
        **_both(state, "proj_out", "final_layer.linear"),
    }
    if f"{extra}.style_embedder.weight" in state:
        row = state[f"{extra}.style_embedder.weight"]
        result["style_embedder.weight"] = torch.cat([row, torch.randn_like(row)])  # the styles that are never asked for
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        result[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in range(layers):
        block = f"blocks.{i}"
        result |= _joined(state, [f"{block}.attn1.to_{part}" for part in "qkv"], f"{block}.attn1.Wqkv")
        result |= _both(state, f"{block}.attn2.to_q", f"{block}.attn2.q_proj")
        result |= _joined(state, [f"{block}.attn2.to_{part}" for part in "kv"], f"{block}.attn2.kv_proj")
        for attention in ("attn1", "attn2"):
            result |= _both(state, f"{block}.{attention}.to_out.0", f"{block}.{attention}.out_proj")
            for part in "qk":
                result |= _both(state, f"{block}.{attention}.norm_{part}", f"{block}.{attention}.{part}_norm")
        result |= _both(state, f"{block}.norm1.norm", f"{block}.norm1")
        result |= _both(state, f"{block}.norm1.linear", f"{block}.default_modulation.1")
        result |= _both(state, f"{block}.norm2", f"{block}.norm3")
        result |= _both(state, f"{block}.norm3", f"{block}.norm2")
        result |= _both(state, f"{block}.ff.net.0.proj", f"{block}.mlp.fc1")
        result |= _both(state, f"{block}.ff.net.2", f"{block}.mlp.fc2")
        result |= _both(state, f"{block}.skip_linear", f"{block}.skip_linear")
        result |= _both(state, f"{block}.skip_norm", f"{block}.skip_norm")
    return result


# Tiny model of tests.support.tiny -> its state in the original layout. DiT's blocks share their embedders there.
LAYOUTS = {"dit": dit, "pixart": pixart, "pixart_sizes": pixart, "pixart_sigma": pixart, "hunyuan": hunyuan}
