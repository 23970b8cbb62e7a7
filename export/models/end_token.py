"""Which token ends a prompt of CLIP, whose row is pooled: a rule of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.errors import ModelError

# Configurations from before transformers 4.31 state this number in the place of the end token's, which was then the
# largest of all.
LEGACY_END = 2


def end_token(config: Mapping[str, Any]) -> int:
    """The id that ends a CLIP's prompt, whose row is pooled. Raises ModelError where eos_token_id is no such id."""
    stated, vocabulary = config["eos_token_id"], config["vocab_size"]
    if not isinstance(stated, int) or not 0 <= stated < vocabulary:
        raise ModelError(f"eos_token_id is {stated!r}, which is none of {vocabulary} ids; a prompt's end is pooled")
    return vocabulary - 1 if stated == LEGACY_END else stated
