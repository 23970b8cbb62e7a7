"""config.json of a model: read, and its numbers bounded before anything is made by them.

The bounds are far beyond any published model, and keep what a wrong number can cost to a moment and some megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from export.documents import Rules, read_json, shown
from export.errors import ModelError, UserError

FILE = "config.json"
RULES = Rules(ModelError, "copy or download it again")
# Of any number that diffusers' constructors take: widths, vocabularies, lengths.
MOST = 2**20
# Elements of a table of positions, which is computed in float64: 1 GiB.
MOST_POSITIONS = 2**27

Count = Annotated[int, Ge(1), Le(MOST)]


class Config(TypedDict):
    """What is known of the numbers of every family. The other keys are the class's own."""

    _class_name: NotRequired[str]
    norm_type: NotRequired[str | None]
    num_layers: NotRequired[Annotated[int, Ge(1), Le(512)]]
    num_attention_heads: NotRequired[Annotated[int, Ge(1), Le(1024)]]
    attention_head_dim: NotRequired[Annotated[int, Ge(1), Le(2048)]]
    in_channels: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    out_channels: NotRequired[Annotated[int, Ge(1), Le(8192)] | None]
    sample_size: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    patch_size: NotRequired[Annotated[int, Ge(1), Le(256)]]
    num_embeds_ada_norm: NotRequired[Count | None]
    caption_channels: NotRequired[Count | None]
    cross_attention_dim: NotRequired[Count | None]
    cross_attention_dim_t5: NotRequired[Count]
    hidden_size: NotRequired[Count]
    pooled_projection_dim: NotRequired[Count | None]
    joint_attention_dim: NotRequired[Count | None]
    pos_embed_max_size: NotRequired[Count | None]
    text_len: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    text_len_t5: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    mlp_ratio: NotRequired[Annotated[float, Ge(0.01), Le(64)]]
    norm_num_groups: NotRequired[Count | None]
    dropout: NotRequired[Annotated[float, Ge(0), Le(1)]]
    norm_eps: NotRequired[Annotated[float, Ge(0), Le(1)]]


class EngineConfig(TypedDict):
    """The part of a bundle's config.json that drawing needs."""

    in_channels: Annotated[int, Ge(1), Le(4096)]
    sample_size: Annotated[int, Ge(1), Le(4096)]


def read_config(path: Path, error: type[UserError] = ModelError) -> dict[str, Any]:
    """A model's config.json, its numbers in their bounds. Raises `error`."""
    rules = Rules(error, RULES.remedy)
    document: Any = read_json(path, Config, rules)
    for key, value in document.items():
        if type(value) in (int, float) and abs(value) > MOST:
            raise error(f"{path}: {key} is {shown(value)}; no number of a model is beyond {MOST}, {rules.remedy}")
    _check_positions(document, path, error)
    return dict(document)


def _check_positions(config: Mapping[str, Any], path: Path, error: type[UserError]) -> None:
    side = -(-config.get("sample_size", 1) // config.get("patch_size", 1))
    width = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
    if side * side * width > MOST_POSITIONS:
        raise error(
            f"{path}: {side} x {side} patches of width {width} make a table of positions beyond {MOST_POSITIONS:,} "
            "numbers; check sample_size, patch_size and the heads"
        )


def engine_config(folder: Path) -> EngineConfig:
    """What drawing needs of a bundle's config.json. Raises ContractError."""
    return read_json(folder / FILE, EngineConfig, Rules())


def least_parameters(config: Mapping[str, Any]) -> int:
    """Parameters that the blocks of a model have at least: four projections of its width in each attention.

    What config.json asks for is compared with the size of the weights file by this, before a module is made.
    """
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    return int(config.get("num_layers", 0)) * 4 * width * width
