"""The BERT encoder that is exported computes what transformers' own does, at every length and under every mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.errors import ModelError
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from tests.support.tiny_text import BERT, bert, bert_folder, change_config

pytestmark = pytest.mark.torch
LONGEST = BERT["max_position_embeddings"]
Inputs = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(bert_folder(tmp_path_factory.mktemp("bert"))))


def encoded(model: LoadedModel, inputs: Inputs) -> NDArray[np.float32]:
    with torch.no_grad():
        output: NDArray[np.float32] = denoiser(model)(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
    return output


def assert_own(model: LoadedModel, inputs: Inputs, **changes: object) -> None:
    """In the rows of prompts."""
    with torch.no_grad():
        own = bert(**changes)(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state.numpy()
    counted = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(encoded(model, inputs)[counted], own[counted], atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_it_is_transformers_own(tmp_path: Path, activation: str) -> None:
    model = load(str(bert_folder(tmp_path, hidden_act=activation)))
    assert model.family.name == "bert"
    for batch, tokens in ((1, 1), (3, 2), (1, 7), (3, LONGEST)):
        assert_own(model, sample_inputs(model, batch, tokens, tokens=tokens), hidden_act=activation)


def test_padding_may_stand_on_either_side(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 4, 0, tokens=20)
    place, ends = np.arange(20), np.array([[0, 20], [5, 20], [0, 1], [3, 9]])
    inputs["attention_mask"] = ((place >= ends[:, :1]) & (place < ends[:, 1:])).astype(np.int64)
    assert_own(model, inputs)
    counted = inputs["attention_mask"].astype(bool)
    other = {**inputs, "input_ids": np.where(counted, inputs["input_ids"], 5)}
    np.testing.assert_array_equal(encoded(model, inputs)[counted], encoded(model, other)[counted])


@pytest.mark.fast
def test_its_inputs_and_kept_layers(model: LoadedModel) -> None:
    assert [(row.name, row.dtype) for row in model.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert {ref.kind for ref in model.linears()} == {"attn.qkv", "attn.out", "ff.in", "ff.out"}
    assert [path for path, _ in model.kept()] == [
        f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")
    ]
    assert set(model.ignored.values()) == {"pools the first token's row, which no pipeline reads"}
    assert sample_inputs(model, 1, 0)["input_ids"].shape == (1, 77)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM of transformers is not a text encoder .* BertModel"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; BertModel is"),
        ({"is_decoder": True}, "is_decoder is True; BertModel is compiled with False alone"),
        ({"hidden_act": "mish"}, "hidden_act asks for mish"),
        ({"num_hidden_layers": 1}, "layer beyond config.json's num_hidden_layers of 1"),
        ({"max_position_embeddings": 64}, "config.json and the weights must belong together"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = bert_folder(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(str(folder))


def test_keys_of_published_files_are_known(tmp_path: Path, model: LoadedModel) -> None:
    folder = bert_folder(tmp_path)
    change_config(
        folder, position_embedding_type="absolute", directionality="bidi", pooler_fc_size=768, pooler_num_fc_layers=3,
        pooler_num_attention_heads=12, pooler_size_per_head=128, pooler_type="first_token_transform",
        gradient_checkpointing=False, output_past=True,
    )  # fmt: skip
    inputs = sample_inputs(model, 2, 0)
    np.testing.assert_array_equal(encoded(load(str(folder)), inputs), encoded(model, inputs))
