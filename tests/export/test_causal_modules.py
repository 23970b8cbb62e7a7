"""The causal encoders that are exported compute what transformers' own do: Gemma 2, Qwen 2, Qwen 3, with and without a
head, at every length and under every mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from export.errors import ModelError
from export.models import causal_modules
from export.models.families import FAMILIES, TEXT_PARTS, WITHOUT_HEAD
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from export.models.prompt_length import LONGEST_PROMPT
from export.models.text_modules import HOLE, causal_bias
from tests.support.tiny_text import CAUSAL, GEMMA2, causal, causal_folder, change_config

pytestmark = pytest.mark.torch
LONGEST = CAUSAL["max_position_embeddings"]
HEADLESS = tuple(name for name in WITHOUT_HEAD.values() if name not in TEXT_PARTS)
LAST, PENULTIMATE = FAMILIES["gemma2"].outputs
# A row of hidden states is of order 1; the angles of transformers' positions are float32.
NEAR = 2e-5
Inputs = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module", params=HEADLESS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(causal_folder(tmp_path_factory.mktemp(request.param), kind=request.param)))


def outputs(model: LoadedModel, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        named = denoiser(model).outputs(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: output.numpy() for name, output in named.items()}


def assert_own(model: LoadedModel, own: Any, inputs: Inputs) -> None:
    """In the rows of prompts, the states that pipelines read: hidden_states[-1] and [-2]."""
    with torch.no_grad():
        of = own(**{name: torch.from_numpy(value) for name, value in inputs.items()}, output_hidden_states=True)
    counted, actual = inputs["attention_mask"].astype(bool), outputs(model, inputs)
    for name, place in ((LAST, -1), (PENULTIMATE, -2)):
        expected = of.hidden_states[place].numpy()
        scale = np.abs(expected[counted]).max()
        np.testing.assert_allclose(actual[name][counted], expected[counted], atol=NEAR * scale, err_msg=name)
    if hasattr(of, LAST):
        np.testing.assert_array_equal(of.last_hidden_state, of.hidden_states[-1])


@pytest.mark.parametrize("kind", [*HEADLESS, *(name for name in WITHOUT_HEAD if WITHOUT_HEAD[name] in HEADLESS)])
def test_it_is_transformers_own(tmp_path: Path, kind: str) -> None:
    model = load(str(causal_folder(tmp_path, kind=kind)))
    assert model.family.class_name == WITHOUT_HEAD.get(kind, kind)
    own = causal(kind=kind)
    for batch, tokens in ((1, 1), (3, 2), (1, 7), (3, LONGEST)):
        assert_own(model, own, sample_inputs(model, batch, tokens, tokens=tokens))


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "no cap of scores": ("Gemma2Model", {"attn_logit_softcapping": None}),
    "no sliding window": ("Gemma2Model", {"layer_types": ["full_attention"] * 2}),
    "a window beyond every prompt": ("Gemma2Model", {"sliding_window": LONGEST}),
    "another scale of scores": ("Gemma2Model", {"query_pre_attn_scalar": 64}),
    "biases of attention": ("Gemma2Model", {"attention_bias": True}),
    "a long wavelength": ("Qwen3Model", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "every query with keys of its own": ("Qwen3Model", {"num_key_value_heads": 4}),
    "one head of keys": ("Qwen2Model", {"num_key_value_heads": 1}),
    "windows in the last layers": (
        "Qwen2Model", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "a single layer": ("Qwen3Model", {"num_hidden_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_configuration_may_ask_for(tmp_path: Path, change: str) -> None:
    kind, changes = CHANGES[change]
    model = load(str(causal_folder(tmp_path, kind=kind, **changes)))
    assert_own(model, causal(kind=kind, **changes), sample_inputs(model, 3, 0, tokens=30))


# --- of a model that reads pictures, too ------------------------------------------------------------------------------

PICTURES = "Qwen2_5_VLForConditionalGeneration"


def test_the_part_that_reads_text_is_the_whole_on_text(tmp_path: Path) -> None:
    model, own = load(str(causal_folder(tmp_path, kind=PICTURES))), causal(kind=PICTURES)
    assert model.family.name == "qwen2_5_vl" and model.config["num_hidden_layers"] == 2
    assert {why for name, why in model.ignored.items() if "visual." in name} == {
        "of visual, which the model does without"
    }
    for batch, tokens in ((1, 1), (3, LONGEST)):
        assert_own(model, own, sample_inputs(model, batch, tokens, tokens=tokens))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model."])
def test_other_layouts_of_its_files_are_read(tmp_path: Path, prefix: str) -> None:
    folder = causal_folder(tmp_path, kind=PICTURES)
    tensors = load_file(folder / "model.safetensors")
    outer = prefix.removesuffix("language_model.")
    renamed = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else f"{outer}{name}": value
        for name, value in tensors.items()
    }
    inputs, model = sample_inputs(load(str(folder)), 2, 0), load(str(folder))
    save_file({name.replace(f"{outer}lm_head", "lm_head"): value for name, value in renamed.items()},
              folder / "model.safetensors")  # fmt: skip
    for name, output in outputs(load(str(folder)), inputs).items():
        np.testing.assert_array_equal(output, outputs(model, inputs)[name])


def test_configurations_of_its_older_files_are_read(tmp_path: Path) -> None:
    """Without a table of the text's keys, and with both: transformers reads the table alone then."""
    folder = causal_folder(tmp_path, kind=PICTURES)
    inputs, text = (
        sample_inputs(load(str(folder)), 2, 0),
        json.loads((folder / "config.json").read_text())["text_config"],
    )
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1e6, "rope_parameters": None}
    change_config(folder, **text | {"model_type": "qwen2_5_vl", "text_config": None} | rope, vision_token_id=151654)
    assert_own(load(str(folder)), causal(kind=PICTURES), inputs)
    change_config(folder, text_config=text, rope_theta=1e4)
    assert_own(load(str(folder)), causal(kind=PICTURES), inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, "does not know 'num_experts': 8"),
        ({"text_config": {"num_experts": 8}}, "does not know 'num_experts': 8"),
        ({"text_config": {"hidden_size": 10**9}}, "text_config: hidden_size is 1000000000"),
        ({"text_config": 3}, "text_config: the document is 3"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"]}, "Qwen3VLForConditionalGeneration of transformers is"),
    ],
)
def test_what_is_not_understood_of_it_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = causal_folder(tmp_path, kind=PICTURES)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    if isinstance(changes.get("text_config"), dict):
        changes = {"text_config": text | changes["text_config"]}
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(str(folder))


# --- masks, lengths, files --------------------------------------------------------------------------------------------


def test_padding_may_stand_on_either_side(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 4, 0, tokens=20)
    place, ends = np.arange(20), np.array([[0, 20], [5, 20], [0, 1], [3, 9]])
    inputs["attention_mask"] = ((place >= ends[:, :1]) & (place < ends[:, 1:])).astype(np.int64)
    assert_own(model, causal(kind=model.family.class_name), inputs)
    counted = inputs["attention_mask"].astype(bool)
    other = {**inputs, "input_ids": np.where(counted, inputs["input_ids"], 5)}
    for name, output in outputs(model, inputs).items():
        np.testing.assert_array_equal(output[counted], outputs(model, other)[name][counted])


def test_a_prompt_of_no_token_gives_numbers(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 2, 0, tokens=12)
    for mask in (inputs["attention_mask"] * np.array([[1], [0]]), 0 * inputs["attention_mask"]):
        assert all(np.isfinite(output).all() for output in outputs(model, {**inputs, "attention_mask": mask}).values())


@pytest.mark.fast
def test_a_window_counts_the_query_itself() -> None:
    bias = causal_bias(5, torch.zeros(1), window=2)[0, 0]
    assert torch.equal(bias == 0, torch.tensor([[key in (query - 1, query) for key in range(5)] for query in range(5)]))
    assert set(bias.unique().tolist()) == {0.0, HOLE}


@pytest.mark.fast
def test_its_inputs_outputs_and_kept_layers(model: LoadedModel) -> None:
    assert [(row.name, row.dtype) for row in model.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert {ref.kind for ref in model.linears()} == {"attn.qkv", "attn.out", "ff.in", "ff.out"}
    assert len(model.linears()) == 14 and [path for path, _ in model.kept()] == ["embed_tokens"]
    assert sample_inputs(model, 1, 0)["input_ids"].shape == (1, LONGEST)


@pytest.mark.fast
def test_tables_of_positions_end_where_prompts_do() -> None:
    assert FAMILIES["gemma2"].longest({"max_position_embeddings": 8192}) == LONGEST_PROMPT
    assert FAMILIES["qwen3"].longest({"max_position_embeddings": 96}) == 96
    tables = causal_modules.RotaryTables(LONGEST_PROMPT, 8, 1e4)
    cosines, sines = tables(LONGEST_PROMPT, torch.device("cpu"))
    angles = np.arange(LONGEST_PROMPT)[:, None] * 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sines, np.sin(angles), atol=1e-7)


def test_the_head_is_left_out(tmp_path: Path) -> None:
    """Of Qwen's alone the head has a tensor of its own; Gemma's is the table of tokens."""
    why = "makes words of hidden states, which no pipeline reads"
    for kind, ignored in (("Qwen3ForCausalLM", {"lm_head.weight": why}), ("Gemma2ForCausalLM", {})):
        assert dict(load(str(causal_folder(tmp_path / kind, kind=kind))).ignored) == ignored


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """Rotary positions by their old keys, other spellings beside those that are read, no list of layers."""
    folder = causal_folder(tmp_path, num_hidden_layers=3)
    inputs, own = sample_inputs(load(str(folder)), 2, 0), causal(num_hidden_layers=3)
    change_config(
        folder, rope_parameters=None, rope_theta=10000.0, rope_scaling=None, layer_types=None, hidden_act="gelu",
        cache_implementation="hybrid", sliding_window_size=4096, torch_dtype="float16",
    )  # fmt: skip
    older = load(str(folder))
    assert_own(older, own, inputs)
    assert older.config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    change_config(folder, rope_theta=500.0)
    with pytest.raises(AssertionError, match=LAST):
        assert_own(load(str(folder)), own, inputs)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("Gemma2Model", {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM of .* Gemma2ForCausalLM"),
        ("Gemma2Model", {"hidden_activation": "mish"}, "hidden_activation asks for mish"),
        ("Gemma2Model", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("Gemma2Model", {"layer_types": ["sliding_attention", "linear_attention"]}, "linear_attention"),
        ("Qwen2Model", {"layer_types": ["sliding_attention"] * 2}, "sliding_attention without a sliding_window"),
        ("Gemma2Model", {"layer_types": ["full_attention"]}, "Gemma2Model refuses it .*layer"),
        ("Gemma2Model", {"query_pre_attn_scalar": 2.5}, "query_pre_attn_scalar"),
        ("Gemma2Model", {"is_decoder": True}, "is_decoder is True; Gemma2Model is compiled with False alone"),
        ("Qwen3Model", {"hidden_act": "mish"}, "hidden_act asks for mish"),
        ("Qwen3Model", {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM of transformers is not a text"),
        ("Qwen3Model", {"architectures": ["Qwen2Model"], "head_dim": None}, "Qwen2Model|config.json and the weights"),
        ("Qwen3Model", {"num_experts": 8}, "does not know 'num_experts': 8"),
        ("Qwen3Model", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ("Qwen3Model", {"num_hidden_layers": 1, "layer_types": None}, "layer beyond .*num_hidden_layers of 1"),
        ("Qwen2Model", {"intermediate_size": 256}, "config.json and the weights must belong together"),
        ("Qwen2Model", {"hidden_act": "mish"}, "hidden_act asks for mish"),
        ("Gemma2Model", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0, which must be above 0"),
        ("Qwen3Model", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ("Qwen3Model", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ("Qwen3Model", {"rope_theta": 0.0, "rope_parameters": None}, "rope_theta is 0"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path: Path, kind: str, changes: dict[str, object], words: str) -> None:
    folder = causal_folder(tmp_path, kind=kind)
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(str(folder))


def test_heads_of_an_odd_number_of_channels_have_no_rotary_positions(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path, kind="Qwen3Model")
    change_config(folder, head_dim=15)
    with pytest.raises(ModelError, match=r"15.*even|even.*15"):
        load(str(folder))


def test_biases_that_the_configuration_denies_are_refused(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path, kind="Qwen3Model", attention_bias=True)
    change_config(folder, attention_bias=False)
    with pytest.raises(ModelError, match='set "attention_bias": true in'):
        load(str(folder))


def test_norms_of_queries_are_no_part_of_qwen2(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path, kind="Qwen2Model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layers.0.self_attn.q_norm.weight": torch.ones(16).half()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="a norm of queries or keys, which the class does not compute"):
        load(str(folder))


def test_the_large_table_of_tokens_is_widened_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.models import load as loading

    monkeypatch.setattr(loading, "LARGE_ELEMENTS", 128 * 64)
    model = load(str(causal_folder(tmp_path, **GEMMA2)))
    assert model.module.get_submodule("embed_tokens").weight.dtype == torch.float16
    assert_own(model, causal(), sample_inputs(model, 2, 0, tokens=20))
