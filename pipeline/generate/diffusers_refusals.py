"""What a diffusers transformer does and an engine cannot, each with the words it is refused in.

An engine's weights are packed, its graph is fixed, it computes no gradients and lies in a folder of its own. What
would quietly change nothing, or leave a pipeline that cannot be loaded, is refused when it is called. What only some
classes have is no attribute of the stand-in: `hasattr` tells the truth, and the error says what to do instead.
These are sentences and tables; what an engine does is in diffusers_adapter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from export.errors import RecipeError
from export.models.weights import GIVE_ADAPTER


class EngineLacksError(RecipeError, AttributeError):
    """The engine has no such attribute, though the float class or an adapter library may have it."""


SAVED = (
    "an engine is not saved with its pipeline; keep its bundle, save the pipeline with its float transformer, and "
    "after loading set pipe.transformer = load(BUNDLE).as_diffusers()"
)
OPENED = "an engine is opened by load(BUNDLE).as_diffusers() of the package pipeline"
FIXED = "an engine's weights are packed and fixed; change the float transformer and build it again"
ADAPTED = f"an engine takes no adapters; build one of the model with them: {GIVE_ADAPTER}"
TRAINED = "an engine computes no gradients; train the float transformer and build it again"
COMPILED = "an engine is compiled already; it is called as it is"
PLACED = "an engine stays where its target runs; choose another with load(BUNDLE).as_diffusers(TARGET)"
COUNTED = "an engine has no torch parameters to count; python -m pipeline.inspect BUNDLE shows its weights and bytes"
GRAPH = "an engine's graph is fixed; use the float transformer for this, or build an engine of a changed one"

# Methods that every diffusers model inherits, and that would do nothing or something wrong here.
METHODS = {
    "save_pretrained": SAVED,
    "push_to_hub": SAVED,
    "load_state_dict": FIXED,
    "dequantize": FIXED,
    "enable_layerwise_casting": FIXED,
    "enable_gradient_checkpointing": TRAINED,
    "compile": COMPILED,
    "compile_repeated_blocks": COMPILED,
    "set_attention_backend": GRAPH,
    "enable_group_offload": PLACED,
    "enable_parallelism": PLACED,
    "num_parameters": COUNTED,
    "get_memory_footprint": COUNTED,
}
CLASS_METHODS = {"from_pretrained": OPENED, "from_config": OPENED}
# Of adapter libraries, which look for them by name.
ADAPTERS = (
    "add_adapter", "set_adapter", "set_adapters", "delete_adapters", "disable_adapters", "enable_adapters",
    "disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "load_lora_adapter", "load_lora_weights",
    "save_lora_adapter", "load_attn_procs", "save_attn_procs",
)  # fmt: skip


def refuse_methods(cls: type) -> type:
    """Class decorator: every inherited method of the tables raises RecipeError with its sentence."""
    for name, why in METHODS.items():
        setattr(cls, name, _refusal(name, why))
    for name, why in CLASS_METHODS.items():
        setattr(cls, name, classmethod(_refusal(name, why)))
    return cls


def _refusal(name: str, why: str) -> Callable[..., NoReturn]:
    def refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise RecipeError(f"{name}: {why}")

    refuse.__name__, refuse.__doc__ = name, f"Raises RecipeError: {why}."
    return refuse


def lacking(name: str, float_class: type) -> EngineLacksError | None:
    """The error for an attribute that the float class or an adapter library has; None for an unknown name."""
    if name in ADAPTERS:
        return EngineLacksError(f"{name}: {ADAPTED}")
    if not name.startswith("_") and hasattr(float_class, name):
        return EngineLacksError(f"{name}: {GRAPH}")
    return None
