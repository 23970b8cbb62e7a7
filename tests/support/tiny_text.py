"""Tiny text encoders of transformers' true classes, saved to disk by the test that needs them. Two layers, width 64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

T5: dict[str, Any] = dict(
    vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
)


def t5(seed: int = 0, kind: str = "T5", **changes: Any) -> Any:
    """The torch module with random weights that fp16 holds, in float32. kind: T5, MT5 or UMT5."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**T5 | changes)
    module = getattr(transformers, f"{kind}EncoderModel")(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("layer_norm.weight"):
            parameter.normal_(1.0, 0.1)
        elif name.endswith("relative_attention_bias.weight"):
            parameter.normal_()  # so that a wrong distance shows
    return module.half().float()


def t5_folder(parent: Path, seed: int = 0, shard_size: str = "10GB", **changes: Any) -> Path:
    """Save one as a pipeline has it, in fp16; returns its folder."""
    path = parent / "text_encoder"
    t5(seed, **changes).half().save_pretrained(path, max_shard_size=shard_size)
    return path


CLIP: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    projection_dim=32, bos_token_id=126, eos_token_id=127, pad_token_id=1,
)  # fmt: skip


def clip(seed: int = 0, kind: str = "CLIPTextModel", **changes: Any) -> Any:
    """The torch module with random weights that fp16 holds, in float32. kind: CLIPTextModel, with or without
    WithProjection."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(**CLIP | changes)
    return randomized(getattr(transformers, kind)(config))


def randomized(module: Any) -> Any:
    """Weights by which attention has preferences, and every bias, norm and position counts; fp16 holds them."""
    module.eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        part = name.rpartition(".")[2]
        if parameter.ndim == 2:
            table = "embed" in name
            parameter.normal_(0, 1 if table else 1.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.normal_(0 if part == "bias" else 1, 0.2)
        parameter.copy_(parameter.half())  # not what is computed of the configuration, as half() of a module would
    return module


def clip_folder(parent: Path, seed: int = 0, **changes: Any) -> Path:
    """Save one as a pipeline has it, in fp16; returns its folder."""
    path = parent / "text_encoder"
    clip(seed, **changes).half().save_pretrained(path)
    return path


BERT: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=96,
)  # fmt: skip


def bert(seed: int = 0, **changes: Any) -> Any:
    """The torch module with random weights that fp16 holds, in float32."""
    import torch
    import transformers

    torch.manual_seed(seed)
    return randomized(transformers.BertModel(transformers.BertConfig(**BERT | changes)))


def bert_folder(parent: Path, seed: int = 0, **changes: Any) -> Path:
    """Save one as a pipeline has it, in fp16; returns its folder."""
    path = parent / "text_encoder"
    bert(seed, **changes).half().save_pretrained(path)
    return path


# Several heads of queries share one of keys; the window is shorter than prompts.
CAUSAL: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96,
)  # fmt: skip
GEMMA2 = CAUSAL | dict(head_dim=32, query_pre_attn_scalar=20, sliding_window=8, attn_logit_softcapping=4.0)
QWEN3 = CAUSAL | dict(head_dim=32)


# Beside CAUSAL, of a model that reads pictures, too.
OF_PICTURES = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
ROPE_OF_THREE = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])


def causal(seed: int = 0, kind: str = "Gemma2Model", **changes: Any) -> Any:
    """The torch module with random weights that fp16 holds, in float32, its attention in plain operations. kind: Model
    or ForCausalLM behind Gemma2, Qwen2 or Qwen3, or Qwen2_5_VLForConditionalGeneration."""
    import torch
    import transformers

    torch.manual_seed(seed)
    of = kind.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").removesuffix("Model")
    sizes = {"Gemma2": GEMMA2, "Qwen2": CAUSAL, "Qwen2_5_VL": CAUSAL, "Qwen3": QWEN3}[of] | changes
    if of == "Qwen2_5_VL":
        text = {"rope_parameters": ROPE_OF_THREE, **sizes}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=OF_PICTURES)
    else:
        config = getattr(transformers, f"{of}Config")(**sizes)
    module = randomized(getattr(transformers, kind)(config))
    module.set_attn_implementation("eager")
    for name, parameter in module.named_parameters():
        if of == "Gemma2" and name.endswith("norm.weight"):  # it multiplies by 1 + weight
            parameter.copy_((parameter - 1).half())
        elif of.startswith("Qwen2") and name.endswith("q_proj.weight"):
            parameter.mul_(0.25)  # without norms of queries, so that attention is not all or nothing
    return module


def causal_folder(parent: Path, seed: int = 0, **changes: Any) -> Path:
    """Save one as a pipeline has it, in fp16; returns its folder."""
    path = parent / "text_encoder"
    causal(seed, **changes).half().save_pretrained(path)
    return path


def change_config(folder: Path, **changes: object) -> None:
    """Other values in a folder's config.json; None takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
