"""A family row made up for a diffusers class that the table does not know, if its shape is the usual one.

Quantized are the linears of its repeated blocks, except those that make modulation or norms. Inputs are read from
`forward`'s signature and the configuration; an input without a rule here needs a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import ModelError
from export.models.config import FILE as CONFIG
from export.models.families import OUTPUT, PATCH_EMBED, Config, Family, Input, call_plain

if TYPE_CHECKING:
    from torch import nn

BLOCKS = r"(transformer_blocks|single_transformer_blocks|joint_transformer_blocks|blocks)\.\d+\."
MODULATION = r"(?!.*(norm|ada|modulation|emb))"
# Ending of a linear's path -> layer kind; the first row that fits counts (`cross_attn` ends in `attn`), the last takes
# the rest.
ENDINGS = (
    (r".*(attn2|cross_attn)\.to_q", "cross.q"),
    (r".*(attn2|cross_attn)\.to_[kv]", "cross.kv"),
    (r".*(attn2|cross_attn)\.to_out\.0", "cross.out"),
    (r".*attn1?\.(to_[qkv]|to_qkv|add_[qkv]_proj)", "attn.qkv"),
    (r".*attn1?\.(to_out\.0|to_add_out)", "attn.out"),
    (r".*(ff|mlp)(_context)?\.(net\.0\.proj|fc1)", "ff.in"),
    (r".*(ff|mlp)(_context)?\.(net\.2|fc2)", "ff.out"),
    (r".*", "other"),
)
CAPTION_WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim", "text_dim", "text_embed_dim")
TOKENS = 77


def _caption(config: Config) -> Input | None:
    width = next((config[key] for key in CAPTION_WIDTHS if config.get(key)), None)
    return width and Input("encoder_hidden_states", ("batch", "tokens", width))


def _pooled(config: Config) -> Input | None:
    width = config.get("pooled_projection_dim")
    return width and Input("pooled_projections", ("batch", width))


# Parameter of forward -> its input row, or None where the configuration does not give its size.
RULES: Mapping[str, Callable[[Config], Input | None]] = {
    "hidden_states": lambda config: Input("hidden_states", ("batch", config["in_channels"], "height", "width")),
    "encoder_hidden_states": _caption,
    "pooled_projections": _pooled,
    "timestep": lambda config: Input("timestep", ("batch",), "timestep"),
    "encoder_attention_mask": lambda config: Input("encoder_attention_mask", ("batch", "tokens"), "mask"),
}
# Optional parameters that a denoiser is nevertheless called with.
WANTED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
ADD_A_ROW = "add a row for this class to FAMILIES in export/models/families.py"


def generic_family(class_name: str, config: Config, folder: Path) -> Family:
    """The made-up row. Raises ModelError if diffusers lacks the class, or an input cannot be guessed."""
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None or not hasattr(cls, "forward"):
        raise ModelError(
            f"{folder / CONFIG}: diffusers {diffusers.__version__} has no model {class_name!r}; check the name"
        )
    for key in ("in_channels", "sample_size", "patch_size"):
        if not isinstance(config.get(key), int):
            raise ModelError(f"{folder / CONFIG}: {class_name} has no number {key!r}; {ADD_A_ROW}")
    rows = _inputs(class_name, cls, config)
    return Family(
        name="generic",
        class_name=class_name,
        matches=lambda _: True,
        quantized=tuple((BLOCKS + MODULATION + ending, kind) for ending, kind in ENDINGS),
        kept=(
            PATCH_EMBED,
            OUTPUT,
            (f"{BLOCKS}.*", "modulation or norm of a block"),
            (".*", "outside the repeated blocks"),
        ),
        inputs=lambda _: rows,
        call=call_plain,
        conditioning="as its forward takes it; this class has no row of its own",
        tokens=TOKENS,
    )


def _inputs(class_name: str, cls: type[nn.Module], config: Config) -> tuple[Input, ...]:
    rows = []
    for name, parameter in inspect.signature(cls.forward).parameters.items():
        required = parameter.default is inspect.Parameter.empty and name != "self"
        row = RULES[name](config) if name in RULES and (required or name in WANTED) else None
        if required and row is None:
            raise ModelError(f"{class_name}.forward needs {name!r}, which the generic rule cannot make; {ADD_A_ROW}")
        rows += [row] if row else []
    return tuple(rows)
