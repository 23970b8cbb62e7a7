"""A block with attention and feed-forward linears, observed: what a calibration method is given, made in code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.models.load import LinearRef
from pipeline.calibrate.blocks import Observed
from pipeline.calibrate.data import CalibrationData, Call
from pipeline.calibrate.method import Context, Unit
from pipeline.calibrate.plan import make_plans
from pipeline.calibrate.streams import BlockCall
from pipeline.methods import METHODS
from pipeline.recipe import Recipe, with_settings

WIDTH, TOKENS, SAMPLES, STEPS = 16, 6, 4, 5
KINDS = {
    "to_q": "attn.qkv",
    "to_k": "attn.qkv",
    "to_v": "attn.qkv",
    "to_out": "attn.out",
    "up": "ff.in",
    "down": "ff.out",
}


class Block(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x)); `adaln` gives the norm's shift from the mean token."""

    def __init__(self) -> None:
        super().__init__()
        for name in KINDS:
            setattr(self, name, nn.Linear(2 * WIDTH if name == "down" else WIDTH, 2 * WIDTH if name == "up" else WIDTH))
        self.adaln = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("gain", torch.linspace(-2, 2, WIDTH).exp())

    def forward(self, hidden_states: Tensor) -> Tensor:
        shift = self.adaln(hidden_states.mean(1))[:, None]
        x = nn.functional.layer_norm(hidden_states, (WIDTH,)) * self.gain + shift
        mixed = torch.softmax(self.to_q(x) @ self.to_k(x).mT / 4, -1) @ self.to_v(x)
        x = hidden_states + self.to_out(mixed)
        inner = nn.functional.gelu(self.up(nn.functional.layer_norm(x, (WIDTH,)) * self.gain))
        return x + self.down(inner)


def make(method: str, *settings: str, seed: int = 0, adaln: bool = False) -> tuple[Any, Unit]:
    """(the method, one unit of six or seven layers) with INT4 weights and INT8 activations."""
    torch.manual_seed(seed)
    block = Block().requires_grad_(False)
    steps = [step for step in range(STEPS) for _ in range(2)]
    calls = [BlockCall((torch.randn(SAMPLES, TOKENS, WIDTH) * (1 + step),), {}) for step in steps]
    timesteps = [1000.0 * (1 - step / STEPS) for step in steps]
    kinds = KINDS | ({"adaln": "adaln"} if adaln else {})
    linears = [LinearRef(f"blocks.0.{name}", kind, getattr(block, name)) for name, kind in kinds.items()]
    names = {ref.name: ref.name.removeprefix("blocks.0.") for ref in linears}
    observed = Observed(block, names, calls, calls, timesteps, [SAMPLES] * len(calls), (1,))
    recipe = with_settings(
        Recipe("test", "none"),
        ["formats.weight=INT4", "formats.activation=INT8", "weights.group_size=8", f"method={method}", *settings],
    )
    data = CalibrationData(
        tuple(Call({"hidden_states": np.zeros((SAMPLES, 1))}, t, s) for t, s in zip(timesteps, steps, strict=True)),
        STEPS,
    )
    section = recipe.calibrate
    row = METHODS[method]
    options = row.resolve(section.preset, section.options)
    loaded_method = row.load()(Context(SimpleNamespace(), recipe, options, None, data))
    return loaded_method, Unit("blocks.0", loaded_method.plan(make_plans(linears, recipe)), observed)
