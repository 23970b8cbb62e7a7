"""Keys of a config.json that the model's class does not read: known to change nothing, or refused by name.

diffusers drops such keys with a warning. One of them may be what makes the model another than the class computes, so
here only those pass of which it is known that they do not.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from pathlib import Path

from export.documents import shown
from export.errors import ModelError
from export.models.families import Config

logger = logging.getLogger(__name__)
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
    parameters = {*_defaults(class_name), *also_read}
    older: dict[str, object] = _defaults(OLDER_CLASS) if class_name in SUCCESSORS.values() else {}
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


def _defaults(class_name: str) -> dict[str, object]:
    """Parameters of a diffusers class's constructor, with their defaults."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: row.default for name, row in parameters.items() if row.kind is not row.VAR_KEYWORD and name != "self"}
