"""An engine in the place of a text encoder of transformers: what it is called with, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.models.families import FAMILIES
from pipeline.backends.base import Arrays
from pipeline.generate.text_stand_in import EngineTextEncoder

pytestmark = [pytest.mark.torch, pytest.mark.fast]


class Echo:
    """An engine whose states say what it was given: [B, tokens, 2] of ids and mask."""

    def run(self, inputs: Arrays) -> Arrays:
        assert set(inputs) == {"input_ids", "attention_mask"} and all(x.dtype == np.int64 for x in inputs.values())
        states = np.stack([inputs["input_ids"], inputs["attention_mask"]], axis=-1).astype(np.float32)
        return {"last_hidden_state": states, "penultimate_hidden_state": -states}

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def encoder() -> EngineTextEncoder:
    return EngineTextEncoder(Echo(), {"d_model": 2})


def test_it_is_called_as_a_diffusers_pipeline_calls_a_text_encoder(encoder: EngineTextEncoder) -> None:
    ids, mask = torch.tensor([[5, 9, 0]], dtype=torch.int32), torch.tensor([[1, 1, 0]])
    states = encoder(ids, attention_mask=mask)[0]
    assert states.tolist() == [[[5.0, 1.0], [9.0, 1.0], [0.0, 0.0]]] and encoder.config.d_model == 2
    assert encoder(ids).last_hidden_state[..., 1].eq(1).all(), "no mask stands for ones"


def test_states_follow_the_type_that_the_pipeline_is_moved_to(encoder: EngineTextEncoder) -> None:
    assert encoder.dtype == torch.float32 and encoder(torch.tensor([[1]]))[0].dtype == torch.float32
    encoder.to(torch.float16)
    assert encoder.dtype == torch.float16 and encoder(torch.tensor([[1]]))[0].dtype == torch.float16


def test_other_outputs_are_refused_by_name(encoder: EngineTextEncoder) -> None:
    with pytest.raises(RecipeError, match="output_hidden_states=True"):
        encoder(torch.tensor([[1]]), output_hidden_states=True)


def test_hidden_states_are_given_by_the_places_that_the_family_knows() -> None:
    encoder = EngineTextEncoder(Echo(), {}, FAMILIES["gemma2"].hidden_states)
    output = encoder(torch.tensor([[3]]), attention_mask=torch.tensor([[True]]), output_hidden_states=True)
    assert output.hidden_states[-1].tolist() == output[0].tolist() == [[[3.0, 1.0]]]
    assert output.hidden_states[-2].tolist() == [[[-3.0, -1.0]]]
    assert encoder(torch.tensor([[3]])).hidden_states is None
    for place in (9, 0, -3):
        with pytest.raises(RecipeError, match=rf"hidden_states\[{place}\]: the engine gives \[-1\], \[-2\] alone"):
            output.hidden_states[place]
    with pytest.raises(RecipeError, match=r"hidden_states\[0\]"):
        list(output.hidden_states)
    with pytest.raises(RecipeError, match="output_attentions=True"):
        encoder(torch.tensor([[3]]), output_attentions=True)
