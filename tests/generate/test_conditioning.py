"""Prompts to inputs: the scene grammar, classes, synthetic inputs, and damaged descriptions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from benchmarks.zoo import scenes
from export.errors import ContractError, RecipeError
from pipeline.generate.conditioning import from_dict, load_generation
from pipeline.generate.scene_grammar import parse, token_ids

SLOTS = [{"name": name, "words": list(words)} for name, words in scenes.SLOTS.items()]
COLOURS, SHAPES, GROUNDS = list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.BACKGROUNDS)


def test_every_caption_gives_the_tokens_it_was_trained_with():
    labels = scenes.sample_labels(300, torch.Generator().manual_seed(0))
    for label, ids in zip(labels, scenes.tokens(labels), strict=True):
        np.testing.assert_array_equal(token_ids(scenes.caption(label), SLOTS), ids.numpy())


OBJECT = st.tuples(st.sampled_from(["a ", "an ", "the ", ""]), st.sampled_from(COLOURS), st.sampled_from(SHAPES))


@given(
    OBJECT, OBJECT, st.sampled_from(["left of", "right of", "above", "below"]), st.sampled_from(GROUNDS), st.booleans()
)
def test_relations_say_the_same_scene_from_both_sides(first, second, relation, ground, upper):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]

    def text(a, relation, b):
        sentence = f"{a[0]}{a[1]} {a[2]} {relation} {b[0]}{b[1]} {b[2]} on {ground}"
        return sentence.upper() if upper else sentence

    one, other = parse(text(first, relation, second), SLOTS), parse(text(second, opposite, first), SLOTS)
    assert one == other and one["background"] == ground
    left_or_upper = first if relation in ("left of", "above") else second
    assert (one["colour"], one["shape"]) == left_or_upper[1:]


def test_grey_is_gray_and_punctuation_does_not_matter():
    assert parse("A red Circle on grey.", SLOTS)["background"] == "gray"


WRONG = [
    ("a red circle", "a relation or 'on'", "the end"),
    ("a red blob on sky", "a shape", "'blob'"),
    ("a circle on sky", "a colour", "'circle'"),
    ("a red circle on a table", "a background", "'table'"),
    ("a red circle besides a blue ring on sky", "a relation or 'on'", "'besides'"),
    ("a red circle left of a none ring on sky", "a second colour", "'none'"),
    ("a red circle on sky with a hat", "the end", "'with'"),
    ("", "a colour", "the end"),
]


@pytest.mark.parametrize(("prompt", "expected", "word"), WRONG)
def test_other_prompts_are_refused_with_the_grammar_and_the_word(prompt, expected, word):
    with pytest.raises(RecipeError) as error:
        token_ids(prompt, SLOTS)
    message = str(error.value)
    assert f"expected {expected}" in message and f"found {word}" in message
    assert "a COLOUR SHAPE [RELATION a COLOUR SHAPE] on BACKGROUND" in message


def vocabulary_folder(tmp_path, rows=None):
    table = np.random.default_rng(0).standard_normal((rows or scenes.vocabulary_size(), 8)).astype(np.float16)
    save_file({"other": table + 1, "token_embedding.weight": table}, tmp_path / "embedding.safetensors")
    conditioning = {
        "kind": "vocabulary",
        "embedding": "embedding.safetensors",
        "tensor": "token_embedding.weight",
        "null_token": 0,
        "slots": SLOTS,
    }
    document = {"sampler": "flow_euler", "guidance_scale": 3.0, "conditioning": conditioning, "schema_version": 1}
    (tmp_path / "generation.json").write_text(json.dumps(document))
    return table


def test_vocabulary_prompts_become_token_embeddings(tmp_path):
    table = vocabulary_folder(tmp_path)
    generation = load_generation(tmp_path)
    assert generation.guidance_scale == 3.0 and generation.files == ("generation.json", "embedding.safetensors")
    prompts = ["a red circle on white", "a blue ring above a yellow cross on sky"]
    conditional, plain = generation.encode(prompts)
    ids = np.stack([token_ids(prompt, SLOTS) for prompt in prompts])
    np.testing.assert_array_equal(conditional["encoder_hidden_states"], table.astype(np.float32)[ids])
    assert conditional["encoder_hidden_states"].dtype == np.float32
    assert (plain["encoder_hidden_states"] == table[0]).all() and (plain["encoder_attention_mask"] == 1).all()


def test_an_embedding_that_does_not_fit_is_refused(tmp_path):
    vocabulary_folder(tmp_path, rows=5)
    with pytest.raises(ContractError, match="5 rows, but the vocabulary"):
        load_generation(tmp_path).encode(["a red circle on sky"])
    (tmp_path / "embedding.safetensors").unlink()
    with pytest.raises(ContractError, match="is missing"):
        load_generation(tmp_path).encode(["a red circle on sky"])


DIGITS = {"kind": "classes", "names": [str(i) for i in range(10)], "null_class": 10}


@pytest.mark.parametrize("prompt", ["7", "a 7", "digit 7", "class 7", " 7 ", "A digit 7."])
def test_classes_by_name(prompt, tmp_path):
    generation = from_dict({"sampler": "ddim", "conditioning": DIGITS}, tmp_path)
    conditional, plain = generation.encode([prompt, "0"])
    assert conditional["class_labels"].tolist() == [7, 0] and plain["class_labels"].tolist() == [10, 10]
    assert conditional["class_labels"].dtype == np.int64


@pytest.mark.parametrize("prompt", ["11", "seven", "", "a"])
def test_an_unknown_class_is_refused(prompt, tmp_path):
    with pytest.raises(RecipeError, match="is not a class; use one of 0, 1, 2"):
        from_dict({"sampler": "ddim", "conditioning": DIGITS}, tmp_path).encode([prompt])


def test_class_names_of_several_words(tmp_path):
    names = {"kind": "classes", "names": ["tench", "a bell", "great white shark"], "null_class": 3}
    generation = from_dict({"sampler": "ddim", "conditioning": names}, tmp_path)
    assert generation.encode(["a great white shark", "a bell", "A TENCH"])[0]["class_labels"].tolist() == [2, 1, 0]


def test_no_prompt_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="at least one"):
        from_dict({"sampler": "ddim", "conditioning": DIGITS}, tmp_path).encode([])


DAMAGED = [
    ("{", "not valid JSON"),
    ("{}", "'sampler' is missing"),
    ('{"sampler": "ddim"}', "'conditioning' is missing"),
    ('{"sampler": "ddim", "conditioning": {"kind": "magic"}}', "kind 'magic'"),
]


@pytest.mark.parametrize(("text", "words"), DAMAGED)
def test_damaged_descriptions_are_refused(text, words, tmp_path):
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(ContractError, match=words):
        load_generation(tmp_path)


def test_a_missing_description_is_refused(tmp_path):
    with pytest.raises(ContractError, match=r"generation\.json is missing"):
        load_generation(tmp_path)


SYNTHETIC = {
    "kind": "synthetic",
    "inputs": {
        "encoder_hidden_states": {"shape": [5, 8]},
        "encoder_attention_mask": {"shape": [5], "value": 1},
        "style": {"shape": [], "dtype": "int64", "value": 0},
    },
}


def test_synthetic_inputs_depend_on_the_prompt_alone(tmp_path):
    generation = from_dict({"sampler": "ddim", "conditioning": SYNTHETIC}, tmp_path)
    conditional, plain = generation.encode(["a cat", "a dog", "a cat"])
    states = conditional["encoder_hidden_states"]
    assert states.shape == (3, 5, 8) and states.dtype == np.float32
    assert np.array_equal(states[0], states[2]) and not np.array_equal(states[0], states[1])
    np.testing.assert_array_equal(generation.encode(["a dog"])[0]["encoder_hidden_states"][0], states[1])
    assert np.array_equal(plain["encoder_hidden_states"][0], plain["encoder_hidden_states"][1])
    assert not np.array_equal(plain["encoder_hidden_states"][0], states[0])
    assert (conditional["encoder_attention_mask"] == 1).all() and conditional["style"].tolist() == [0, 0, 0]
    assert conditional["style"].dtype == np.int64
