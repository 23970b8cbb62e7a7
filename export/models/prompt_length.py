"""How many tokens of a prompt a causal language model takes, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# At most so many, by the size of the tables of positions: no pipeline gives as many, and models are trained for more.
LONGEST_PROMPT = 4096


def longest_prompt(config: Mapping[str, Any]) -> int:
    """Tokens that the model has positions for."""
    return min(int(config["max_position_embeddings"]), LONGEST_PROMPT)
