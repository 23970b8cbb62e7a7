"""config.json of a model: read, its numbers bounded before anything is made by them, and its keys accounted for.

The bounds are far beyond any published model, and keep what a wrong number can cost to a moment and some megabytes.
Keys that the model's class does not read are known to change nothing, or refused by name. diffusers drops them with a
warning; one of them may be what makes the model another than the class computes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from export.documents import Rules, read_json, shown, validated
from export.errors import ModelError, UserError
from export.models.families import Config

logger = logging.getLogger(__name__)
FILE = "config.json"
RULES = Rules(ModelError, "copy or download it again")
# Of any number that diffusers' constructors take: widths, vocabularies, lengths.
MOST = 2**20
# Numbers by which nothing is made: a wavelength.
UNBOUNDED = ("rope_theta",)
# Elements of a table of positions, which is computed in float64: 1 GiB.
MOST_POSITIONS = 2**27

Count = Annotated[int, Ge(1), Le(MOST)]
Side = Annotated[int, Ge(1), Le(256)]  # of a patch; of a video's one for each of frames, rows and columns


class Numbers(TypedDict):
    """What is known of the numbers of every family. The other keys are the class's own."""

    _class_name: NotRequired[str]
    norm_type: NotRequired[str | None]
    num_layers: NotRequired[Annotated[int, Ge(1), Le(512)]]
    num_attention_heads: NotRequired[Annotated[int, Ge(1), Le(1024)]]
    attention_head_dim: NotRequired[Annotated[int, Ge(1), Le(2048)]]
    in_channels: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    out_channels: NotRequired[Annotated[int, Ge(1), Le(8192)] | None]
    sample_size: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    patch_size: NotRequired[Side | Annotated[list[Side], MinLen(1), MaxLen(3)]]
    num_embeds_ada_norm: NotRequired[Count | None]
    caption_channels: NotRequired[Count | None]
    cross_attention_dim: NotRequired[Count | None]
    cross_attention_dim_t5: NotRequired[Count]
    hidden_size: NotRequired[Count]
    num_hidden_layers: NotRequired[Annotated[int, Ge(1), Le(512)]]
    num_key_value_heads: NotRequired[Annotated[int, Ge(1), Le(1024)] | None]
    head_dim: NotRequired[Annotated[int, Ge(2), Le(2048)]]
    query_pre_attn_scalar: NotRequired[Count]
    sliding_window: NotRequired[Count | None]
    pooled_projection_dim: NotRequired[Count | None]
    joint_attention_dim: NotRequired[Count | None]
    pos_embed_max_size: NotRequired[Count | None]
    text_len: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    text_len_t5: NotRequired[Annotated[int, Ge(1), Le(4096)]]
    mlp_ratio: NotRequired[Annotated[float, Ge(0.01), Le(64)]]
    norm_num_groups: NotRequired[Count | None]
    dropout: NotRequired[Annotated[float, Ge(0), Le(1)]]
    norm_eps: NotRequired[Annotated[float, Ge(0), Le(1)]]
    latent_channels: NotRequired[Annotated[int, Ge(1), Le(1024)]]
    scaling_factor: NotRequired[Annotated[float, Ge(1e-6), Le(MOST)]]
    shift_factor: NotRequired[float | None]
    layers_per_block: NotRequired[Annotated[int, Ge(1), Le(16)]]
    block_out_channels: NotRequired[Annotated[list[Annotated[int, Ge(1), Le(8192)]], MinLen(1), MaxLen(8)]]


class EngineConfig(TypedDict):
    """The part of a bundle's config.json that drawing needs."""

    in_channels: Annotated[int, Ge(1), Le(4096)]
    sample_size: Annotated[int, Ge(1), Le(4096)]


def read_config(path: Path, error: type[UserError] = ModelError) -> dict[str, Any]:
    """A model's config.json, its numbers in their bounds. Raises `error`."""
    document = bounded(read_json(path, dict[str, object], Rules(error, RULES.remedy)), str(path), error)
    _check_positions(document, path, error)
    return document


def bounded(document: object, source: str, error: type[UserError] = ModelError) -> dict[str, Any]:
    """A configuration, or a part of one, whose numbers are in their bounds. Raises `error` naming one that is not."""
    rules = Rules(error, RULES.remedy)
    config: dict[str, Any] = dict(validated(document, source, Numbers, rules))
    for key, value in config.items():
        if type(value) in (int, float) and abs(value) > MOST and key not in UNBOUNDED:
            raise error(f"{source}: {key} is {shown(value)}; no number of a model is beyond {MOST}, {rules.remedy}")
    return config


def _check_positions(config: Config, path: Path, error: type[UserError]) -> None:
    patch = config.get("patch_size", 1)
    side = -(-config.get("sample_size", 1) // (patch[-1] if isinstance(patch, list) else patch))
    width = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
    if side * side * width > MOST_POSITIONS:
        raise error(
            f"{path}: {side} x {side} patches of width {width} make a table of positions beyond {MOST_POSITIONS:,} "
            "numbers; check sample_size, patch_size and the heads"
        )


def engine_config(folder: Path) -> EngineConfig:
    """What drawing needs of a bundle's config.json. Raises ContractError."""
    return read_json(folder / FILE, EngineConfig, Rules())


def least_parameters(config: Config) -> int:
    """Parameters that the blocks of a model have at least: four projections of its width in each attention.

    What config.json asks for is compared with the size of the weights file by this, before a module is made.
    """
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    return int(config.get("num_layers", 0)) * 4 * width * width


# --- keys that a class does not read -------------------------------------------------------------------------------

# What constructors of diffusers and transformers raise for values that they were not made for.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refused(error: Exception, class_name: str, path: Path) -> ModelError:
    """The error of a class that does not take what `path` says."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ModelError(f"{path}: {class_name} refuses it ({reason}); check the values")


# The class whose modes have become the classes of PixArt and DiT. Their published folders, and what newer releases of
# diffusers write from them, have keys of its other modes; each at its default asks for nothing.
OLDER_CLASS = "Transformer2DModel"
# Its norm_type -> the class that it has become.
SUCCESSORS = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
# What diffusers itself notes on the origin of a configuration; it drops any key with such a name without a word.
NOTES = frozenset(("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"))
MOST_SHOWN = 4
TRAINING = "how it was trained"
# Keys of no class, and what they are about.
HARMLESS = {
    **dict.fromkeys(
        # of diffusers' EMAModel, which saves its settings beside those of the model
        ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
        TRAINING,
    ),
    "gradient_checkpointing": TRAINING,
    "dtype": "the type that weights were saved in, which their file states",
    "torch_dtype": "the type that weights were saved in, which their file states",
    "transformers_version": "a note on its origin",
}


def unread_keys(config: Config, class_name: str, path: Path, also_read: Collection[str] = ()) -> dict[str, str]:
    """The keys that the class of diffusers does not read, each with why that is harmless; those of NOTES left out.

    config: as read from `path`; also_read: keys that are read of every configuration. Raises ModelError naming the
    others that the class does not read.
    """
    parameters = {*defaults_of(class_name), *also_read}
    older: dict[str, object] = defaults_of(OLDER_CLASS) if class_name in SUCCESSORS.values() else {}
    harmless, strange = {}, []
    for key, value in config.items():
        if key in parameters or key in NOTES:
            continue
        if key in HARMLESS:
            harmless[key] = HARMLESS[key]
        elif value is None:
            harmless[key] = "null asks for nothing"
        elif key in older and value == older[key]:
            harmless[key] = f"the default of {OLDER_CLASS}, which asks for nothing"
        else:
            strange.append(f"{shown(key)}: {shown(value)}")
    if strange:
        more = f" and {len(strange) - MOST_SHOWN} more" if len(strange) > MOST_SHOWN else ""
        raise ModelError(
            f"{path}: {class_name} does not know {', '.join(strange[:MOST_SHOWN])}{more}; if the model is the same "
            "without, take it out of the file, else it is a model that this class does not compute"
        )
    for key, reason in harmless.items():
        logger.info("%s: %s is not read: %s", path, key, reason)
    return harmless


def defaults_of(class_name: str) -> dict[str, object]:
    """Parameters of a diffusers class's constructor, with their defaults."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: row.default for name, row in parameters.items() if row.kind is not row.VAR_KEYWORD and name != "self"}
