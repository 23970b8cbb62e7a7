"""Layers with everything that a calibration method may learn: the cases that tests carry through the pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from export.checkpoint import QuantizedLinear
from export.router import Router, frequencies

BRANCHES, RANK, WIDTH, HIDDEN = 3, 2, 8, 5


def router(seed: int = 0, branches: int = BRANCHES) -> Router:
    """A random router that uses all of its branches somewhere in 0..999."""
    rng = np.random.default_rng([seed, branches])

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return Router(
        frequencies(WIDTH), 2 * normal(HIDDEN, WIDTH), normal(HIDDEN), normal(branches, HIDDEN), 0 * normal(branches)
    )


def with_scaling(layer: QuantizedLinear, scaling: str, group: int = 8, reach: float = 3.0) -> QuantizedLinear:
    """The layer with another activation scaling, for inputs of about `reach`.

    scaling: "per_token", "token_group", "per_tensor", or "zero": per_tensor in UE2M2 from -0.2 up.
    """
    if scaling == "zero":
        scale, zero = np.float32([(reach + 0.2) / 7]), np.float32([-0.2])
        changes: dict[str, Any] = {"activation_format": "UE2M2", "activation_scale": scale, "activation_zero": zero}
        return replace(layer, activation_scaling="per_tensor", **changes)
    if scaling == "per_tensor":
        from export.formats.format import get_format

        scale = np.float32([reach / get_format(layer.activation_format).max_value])
        return replace(layer, activation_scaling="per_tensor", activation_scale=scale)
    return replace(layer, activation_scaling=scaling, activation_group=group if scaling == "token_group" else 0)  # type: ignore[arg-type]


def with_balance(layer: QuantizedLinear, seed: int = 0, offset: bool = True) -> QuantizedLinear:
    """The layer behind a factor per input channel, and an offset."""
    rng = np.random.default_rng([seed, 1])
    k = layer.in_features
    shift = rng.normal(scale=0.1, size=k).astype(np.float32) if offset else None
    return replace(layer, input_multiplier=rng.uniform(0.5, 2, k).astype(np.float32), input_offset=shift)


def with_low_rank(
    layer: QuantizedLinear, of: Router | None, seed: int = 0, rank: int = RANK, half: bool = False
) -> QuantizedLinear:
    """The layer with random low-rank branches, or a single one where there is no router; half: of numbers that float16
    holds."""
    rng = np.random.default_rng([seed, 2])
    branches = 1 if of is None else of.branches
    shapes = ((branches, rank, layer.in_features), (branches, layer.out_features, rank))
    down, up = (rng.normal(scale=0.05, size=shape).astype(np.float16 if half else np.float32) for shape in shapes)
    return replace(layer, lora_down=down.astype(np.float32), lora_up=up.astype(np.float32), router=of)


def expected_output(layer: QuantizedLinear, x: Any, timesteps: Any) -> Any:
    """What the layer stands for, sample by sample and token by token in float64: x [B, S, K] -> [B, S, N]."""
    from export.formats.format import decode, get_format, quantize

    fmt, weight = get_format(layer.activation_format), layer.dequantized()
    output = np.zeros((*x.shape[:-1], layer.out_features))
    for b, sample in enumerate(np.asarray(x, np.float64)):
        for s, token in enumerate(sample):
            balanced = token * (1 if layer.input_multiplier is None else layer.input_multiplier.astype(np.float64))
            balanced = balanced + (0 if layer.input_offset is None else layer.input_offset.astype(np.float64))
            zero = 0.0 if layer.activation_zero is None else float(layer.activation_zero[0])
            group = layer.activation_group or layer.in_features
            rounded = np.zeros_like(token)
            for start in range(0, layer.in_features, group):
                part = balanced[start : start + group]
                static = layer.activation_scale
                scale = np.abs(part).max() / fmt.max_value if static is None else float(static[0])
                u = (part - zero) / scale
                u = u if fmt.sign_bits else np.maximum(u, 0)
                rounded[start : start + group] = decode(fmt, quantize(fmt, u)) * scale + zero
            y = weight @ rounded + (0 if layer.bias is None else layer.bias.astype(np.float64))
            if layer.lora_down is not None:
                h = 0 if layer.router is None else layer.router.choose([timesteps[b]])[0]
                y = y + layer.lora_up[h].astype(np.float64) @ (layer.lora_down[h].astype(np.float64) @ token)
            output[b, s] = y
    return output


def mixed(layers: list[QuantizedLinear], of: Router | None = None) -> list[QuantizedLinear]:
    """Layers of a model, each with something else that a method may have learned; q, k and v of one input differ."""
    of = of or router()
    return [CASES[index % len(CASES)](layer, of) for index, layer in enumerate(layers)]


CASES: tuple[Any, ...] = (
    lambda layer, of: with_scaling(layer, "per_tensor"),
    lambda layer, of: with_scaling(layer, "zero"),
    lambda layer, of: with_scaling(layer, "token_group"),
    lambda layer, of: with_balance(layer),
    lambda layer, of: with_low_rank(layer, of, half=True),
    lambda layer, of: layer,
    lambda layer, of: with_low_rank(with_balance(with_scaling(layer, "zero")), of),
)
