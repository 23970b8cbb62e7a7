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


class EngineTextEncoder(torch.nn.Module):
    """Called as a text encoder of transformers: ids and mask of B prompts -> last hidden states [B, tokens, C].

    `config` has the keys of the float model's. What the engine does not give is refused.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.engine, self.config = engine, SimpleNamespace(**config)
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
        """No mask stands for one of ones. Raises RecipeError for options that ask for more than the last states."""
        for name, value in options.items():
            if value and name != "return_dict":
                raise RecipeError(f"{name}={value!r}: the engine gives last hidden states alone; leave it away")
        ids = input_ids.cpu().numpy().astype(np.int64)
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        states = torch.from_numpy(self.engine.run({IDS: ids, MASK: mask})["last_hidden_state"])
        return BaseModelOutput(last_hidden_state=states.to(self.place))
