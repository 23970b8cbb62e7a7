"""How many bytes AttentionOperands (plugins/cpu/quantized_attention.h) makes of the keys and values of a head."""

from __future__ import annotations

LABEL, PANEL, OCTET = 64, 16, 8


def head_bytes(keys: str, size: int) -> str:
    """An expression of the number, or its name, of keys that have `size` channels each: integers, names, +, * and //.

    As `quantized_attention_labelled` counts them: of each key, in whole panels, its codes in whole octets, scale and
    sum; of each channel, in whole panels, the codes of whole octets of keys, and a scale.

    >>> head_bytes("tokens", 72)
    '384 + (tokens + 15) // 16 * 1280 + (tokens + 7) // 8 * 640'
    """
    wide, channels = -(-size // OCTET) * OCTET, -(-size // PANEL) * PANEL
    of_keys = f"({keys} + {PANEL - 1}) // {PANEL} * {PANEL * (wide + 8)}"
    of_values = f"({keys} + {OCTET - 1}) // {OCTET} * {OCTET * channels}"
    return f"{LABEL + 4 * channels} + {of_keys} + {of_values}"
