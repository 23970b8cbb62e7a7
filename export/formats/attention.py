"""Number formats of quantized attention: one for queries and keys, one for values."""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import RecipeError
from export.formats.format import FORMATS, get_format
from export.formats.operands import FP32_BITS, INT8_MAX, INT32_MAX, UINT8_MAX, embeds

# The largest exponential of a row becomes this code.
WEIGHT_MAX = UINT8_MAX
# So many keys that the weights of a row add up exactly in float32, and times integers of values in int32.
MOST_KEYS = min(2**FP32_BITS // WEIGHT_MAX, INT32_MAX // (WEIGHT_MAX * INT8_MAX))
# So many channels that the products of a query's and a key's integers add up exactly in float32.
MOST_CHANNELS = 2**FP32_BITS // INT8_MAX**2


def attention_format_names() -> tuple[str, ...]:
    """Formats that attention may have: signed ones whose integers are bytes."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.sign_bits and embeds(name, "INT8"))


@dataclass(frozen=True)
class AttentionFormats:
    """qk: of queries and keys, a scale per token; pv: of values, a scale per channel. The weights between them are
    integers of 0 to WEIGHT_MAX. Raises RecipeError for a format that attention cannot have."""

    qk: str
    pv: str

    def __post_init__(self) -> None:
        for key, name in (("qk", self.qk), ("pv", self.pv)):
            get_format(name)
            if name not in attention_format_names():
                raise RecipeError(
                    f"attention.{key} {name}: not a signed format whose integers are bytes; "
                    f"use one of {', '.join(attention_format_names())}"
                )

    def __str__(self) -> str:
        return f"{self.qk}/{self.pv}"

    @staticmethod
    def parsed(text: str) -> AttentionFormats:
        """What `str` gives, read back. Raises RecipeError.

        >>> AttentionFormats.parsed("INT8/E2M3")
        AttentionFormats(qk='INT8', pv='E2M3')
        """
        names = text.split("/")
        if len(names) != 2:
            raise RecipeError(f"attention {text!r}: expected two formats, for example INT8/INT8")
        return AttentionFormats(*names)
