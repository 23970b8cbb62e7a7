"""Which quantized weights are read, by what config.json says of them; every tensor is then judged by its name."""

from __future__ import annotations

from collections.abc import Mapping

# Program -> the key of its `quantization_config` that says what it wrote, and the values of which the weights can be
# told from their tensors alone: float8 with scales (float8.py), and NVFP4 (nvfp4.py).
FORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "modelopt": ("quant_algo", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")),
    "compressed-tensors": ("format", ("float-quantized", "nvfp4-pack-quantized")),
}
# Keys that say of a weight more than its tensors do, where they are not empty.
BEYOND = ("transform_config", "sparsity_config")


def unread(quantization: object) -> str | None:
    """What a `quantization_config` says that is not read, in words; None where weights are to be read.

    >>> unread({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})
    'modelopt, quant_algo W4A8_AWQ'
    >>> unread({"quant_method": "modelopt", "quant_algo": "NVFP4"}) is None
    True
    """
    if not isinstance(quantization, dict):
        return str(quantization)
    method = quantization.get("quant_method", "unknown")
    if not isinstance(method, str) or method not in FORMS:
        return str(method)
    key, values = FORMS[method]
    if quantization.get(key) not in values:
        return f"{method}, {key} {quantization.get(key)}"
    more = next((name for name in BEYOND if quantization.get(name)), None)
    return more and f"{method}, with {more}"
