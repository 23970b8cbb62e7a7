"""The CLIP encoders that are exported compute what transformers' own do, and what the pipelines of diffusers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from export.errors import ModelError
from export.models.clip_modules import end_rows
from export.models.description import end_prompts
from export.models.end_token import LEGACY_END
from export.models.families import FAMILIES
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from export.models.text_modules import ACTIVATIONS, quick_gelu
from tests.support.tiny_text import CLIP, change_config, clip, clip_folder

pytestmark = pytest.mark.torch
PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
LONGEST, END = 77, CLIP["eos_token_id"]
Inputs = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(clip_folder(tmp_path_factory.mktemp("clip"))))


def outputs(model: LoadedModel, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        named = denoiser(model).outputs(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: output.numpy() for name, output in named.items()}


def own_outputs(own: Any, **inputs: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Of transformers' module, under the names of ours."""
    with torch.no_grad():
        of = own(**{name: torch.from_numpy(value) for name, value in inputs.items()}, output_hidden_states=True)
    pooled = of.pooler_output if hasattr(of, "pooler_output") else of.text_embeds
    tensors = of.last_hidden_state, pooled, of.hidden_states[-2]
    return dict(zip(FAMILIES["clip"].outputs, (tensor.numpy() for tensor in tensors), strict=True))


def assert_same(actual: dict[str, Any], expected: dict[str, Any], rows: Any = slice(None)) -> None:
    """rows: those of tokens that are compared."""
    assert actual.keys() == expected.keys()
    for name, output in actual.items():
        of = (lambda array: array) if name == "pooled" else (lambda array: array[rows])
        np.testing.assert_allclose(of(output), of(expected[name]), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [PLAIN, PROJECTED])
@pytest.mark.parametrize("end", [END, LEGACY_END])
def test_it_is_transformers_own(tmp_path: Path, kind: str, end: int) -> None:
    own, model = clip(kind=kind, eos_token_id=end), load(str(clip_folder(tmp_path, kind=kind, eos_token_id=end)))
    assert model.family.name == {PLAIN: "clip", PROJECTED: "clip_projection"}[kind]
    for batch, tokens in ((1, 1), (3, 2), (1, 7), (3, LONGEST)):
        inputs = sample_inputs(model, batch, tokens, tokens=tokens)
        assert_same(outputs(model, inputs), own_outputs(own, **inputs), inputs["attention_mask"].astype(bool))


def test_padding_may_stand_in_front(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 3, 0, tokens=20)
    inputs["attention_mask"] = (np.arange(20) >= np.array([[0], [5], [19]])).astype(np.int64)
    inputs["input_ids"] = np.minimum(inputs["input_ids"], END - 1)
    end_prompts(model, inputs)
    assert_same(outputs(model, inputs), own_outputs(clip(), **inputs), inputs["attention_mask"].astype(bool))


def test_a_mask_of_ones_is_what_pipelines_compute_without_one(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 3, 0)
    ones = {**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])}
    unmasked = own_outputs(clip(), input_ids=inputs["input_ids"])
    assert_same(outputs(model, ones), unmasked)  # rows of padding, too, which Stable Diffusion reads
    counted = inputs["attention_mask"].astype(bool)
    assert not counted.all()
    masked = outputs(model, inputs)  # a tokenizer's mask changes the rows of padding alone
    assert_same(masked, unmasked, counted)
    assert not np.allclose(masked["last_hidden_state"][~counted], unmasked["last_hidden_state"][~counted], atol=1e-2)


@pytest.mark.fast
def test_the_row_of_the_first_end_is_pooled() -> None:
    ids = torch.tensor([[5, 9, 127, 127, 1], [127, 3, 4, 9, 127], [9, 8, 7, 126, 5], [3, 127, 2, 2, 2]])
    starts = torch.arange(len(ids)) * ids.shape[1]
    assert (end_rows(ids, END) - starts).tolist() == [2, 0, 0, 1]
    assert (end_rows(ids, LEGACY_END) - starts).tolist() == [2, 0, 3, 1]


@pytest.mark.fast
def test_its_inputs_outputs_and_kept_layers(model: LoadedModel) -> None:
    assert [(row.name, row.dtype) for row in model.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert {ref.kind for ref in model.linears()} == {"attn.qkv", "attn.out", "ff.in", "ff.out"}
    assert [path for path, _ in model.kept()] == ["embeddings.token_embedding", "embeddings.position_embedding"]
    inputs = sample_inputs(model, 4, 0)
    assert inputs["input_ids"].shape == (4, LONGEST)
    lasts = inputs["attention_mask"].sum(1) - 1
    assert (inputs["input_ids"][np.arange(4), lasts] == END).all() and len(set(lasts)) > 1


@pytest.mark.fast
def test_quick_gelu() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert ACTIVATIONS["quick_gelu"] is quick_gelu
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))


def test_a_projection_is_kept(tmp_path: Path) -> None:
    model = load(str(clip_folder(tmp_path, kind=PROJECTED)))
    assert dict(model.kept())["text_projection"].startswith("projection of the pooled row")
    assert outputs(model, sample_inputs(model, 2, 0))["pooled"].shape == (2, CLIP["projection_dim"])


def test_files_of_older_versions_are_read(tmp_path: Path, model: LoadedModel) -> None:
    folder = clip_folder(tmp_path)
    tensors = {f"text_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    places = "text_model.embeddings.position_ids"
    save_file({**tensors, places: torch.arange(LONGEST)[None]}, folder / "model.safetensors")
    change_config(folder, dropout=0.0)
    older, inputs = load(str(folder)), sample_inputs(model, 2, 0)
    assert dict(older.ignored) == {places: "the places of tokens from 0 on"}
    for name, output in outputs(older, inputs).items():
        np.testing.assert_array_equal(output, outputs(model, inputs)[name])
    save_file({**tensors, places: torch.arange(LONGEST).flip(0)[None]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"position_ids.*no such tensor"):
        load(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["CLIPModel"]}, r"CLIPModel of transformers .* CLIPTextModel, CLIPTextModelWithProjection"),
        ({"architectures": ["GemmaModel"]}, r"GemmaModel of transformers is not a text encoder .* T5EncoderModel"),
        ({"hidden_act": "mish"}, "hidden_act asks for mish, which is none of gelu"),
        ({"eos_token_id": 500}, "eos_token_id is 500, which is none of 128 ids"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is"),
        ({"num_experts": 8}, "does not know 'num_experts': 8"),
        ({"num_hidden_layers": 1}, "layer beyond config.json's num_hidden_layers of 1"),
        ({"intermediate_size": 256}, "config.json and the weights must belong together"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = clip_folder(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(str(folder))
