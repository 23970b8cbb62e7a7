"""An engine in the place of a diffusers pipeline's `text_encoder`.

pipe.text_encoder = load("engines/pixart/text_encoder").as_text_encoder()
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from export.errors import RecipeError
from export.models.families import IDS, MASK
from pipeline.backends.base import Engine

NO_STATES: Mapping[int, str] = {}


class EngineTextEncoder(torch.nn.Module):
    """Called as a text encoder of transformers: ids and mask of B prompts -> last hidden states [B, tokens, C].

    `config` has the keys of the float model's. states: output of the engine by its place in transformers'
    `hidden_states`, which a caller may ask for where there are any. What the engine does not give is refused.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any], states: Mapping[int, str] = NO_STATES) -> None:
        super().__init__()
        self.engine, self.config, self.states = engine, SimpleNamespace(**config), states
        # Follows pipe.to(...), so that the pipeline gets tensors of the type and in the place that it was asked for.
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        return self.place.device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: object
    ) -> BaseModelOutput:
        """No mask stands for one of ones. Raises RecipeError for options that ask for what the engine does not give."""
        taken = {"return_dict", "output_hidden_states"} if self.states else {"return_dict"}
        for name, value in options.items():
            if value and name not in taken:
                raise RecipeError(f"{name}={value!r}: the engine gives last hidden states alone; leave it away")
        ids = input_ids.cpu().numpy().astype(np.int64)
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        outputs = self.engine.run({IDS: ids, MASK: mask})
        tensors = {name: torch.from_numpy(array).to(self.place) for name, array in outputs.items()}
        given = {place: tensors[name] for place, name in self.states.items()}
        asked = options.get("output_hidden_states")
        return BaseModelOutput(
            last_hidden_state=tensors["last_hidden_state"],
            hidden_states=GivenStates(given) if asked else None,
        )


class GivenStates:
    """Hidden states by their places from the end, of which an engine gives some."""

    def __init__(self, given: Mapping[int, torch.Tensor]) -> None:
        self._given = given

    def __getitem__(self, place: int) -> torch.Tensor:
        """Raises RecipeError for one that the engine does not give."""
        if place not in self._given:
            known = ", ".join(f"[{known}]" for known in self._given)
            raise RecipeError(f"hidden_states[{place}]: the engine gives {known} alone; use the float text encoder")
        return self._given[place]
