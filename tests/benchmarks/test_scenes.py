"""Drawn scenes: captions, tokens, the split, and that a picture shows what its label says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.zoo import scenes
from pipeline.generate.scene_grammar import token_ids


def labels(count, seed=0):
    return scenes.sample_labels(count, torch.Generator().manual_seed(seed))


def drawn(label, seed=0):
    return scenes.draw(torch.tensor([label]), torch.Generator().manual_seed(seed))[0]


def close(pixel, colour):
    """Is a pixel [3] in [-1, 1] the named colour, within the 8 % of shade?"""
    expected = torch.tensor({**scenes.COLOURS, **scenes.BACKGROUNDS}[colour]) * 2 - 1
    return bool((pixel - expected).abs().max() < 0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_labels_are_complete_sentences(seed):
    batch = labels(20, seed)
    alone = batch[:, 2] == 0
    for slot in scenes.SECOND:
        assert ((batch[:, slot] == 0) == alone).all()
    sizes = torch.tensor([len(words) for words in scenes.SLOTS.values()])
    assert ((batch >= 0) & (batch < sizes)).all()


@pytest.mark.torch
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_prompt_grammar_reads_captions_as_the_very_tokens_of_training(seed):
    from benchmarks.zoo.publish import VOCABULARY

    label = labels(1, seed)
    read = token_ids(scenes.caption(label[0]), VOCABULARY["slots"])
    assert read.tolist() == scenes.tokens(label)[0].tolist()


def test_captions():
    assert scenes.caption(torch.tensor([0, 0, 0, 0, 0, 0])) == "a red circle on white"
    assert scenes.caption(torch.tensor([2, 3, 2, 4, 5, 2])) == "a blue ring above a yellow cross on gray"


def test_tokens_are_distinct_and_start_after_the_empty_caption():
    sizes = [len(words) for words in scenes.SLOTS.values()]
    seen = set()
    for slot, size in enumerate(sizes):
        for word in range(size):
            label = torch.zeros(1, len(sizes), dtype=torch.int64)
            label[0, slot] = word
            seen.add(scenes.tokens(label)[0, slot].item())
    assert seen == set(range(1, scenes.vocabulary_size()))


def test_held_out_captions_are_never_trained_on():
    generator = torch.Generator().manual_seed(1)
    trained = {tuple(row) for row in scenes.sample_split(3000, generator, False).tolist()}
    held_out = {tuple(row) for row in scenes.sample_split(300, generator, True).tolist()}
    assert not trained & held_out
    assert scenes.is_held_out(labels(20_000)).float().mean().item() == pytest.approx(1 / 9, abs=0.01)


def test_pictures_are_in_range_and_repeat():
    batch = labels(64)
    first, second = (scenes.draw(batch, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first.shape == (64, 3, 32, 32) and first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("colour", range(len(scenes.COLOURS)))
@pytest.mark.parametrize("ground", range(len(scenes.BACKGROUNDS)))
def test_colour_and_background(colour, ground):
    picture = drawn([colour, 0, 0, 0, 0, ground])
    assert close(picture[:, 16, 16], list(scenes.COLOURS)[colour])
    assert close(picture[:, 1, 1], list(scenes.BACKGROUNDS)[ground])


@pytest.mark.parametrize("relation,first,second", [(1, (16, 8), (16, 24)), (2, (8, 16), (24, 16))])
def test_relations_put_the_first_object_left_or_above(relation, first, second):
    picture = drawn([0, 0, relation, 3, 1, 1])  # a red circle, a blue circle, on black
    assert close(picture[:, first[0], first[1]], "red")
    assert close(picture[:, second[0], second[1]], "blue")


def test_shapes_differ():
    pictures = torch.stack([drawn([0, shape, 0, 0, 0, 1]) for shape in range(len(scenes.SHAPES))])
    gaps = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + torch.eye(len(pictures)) * 1e3
    assert gaps.min() > 3.0  # an object covers hundreds of pixels; two pictures of one shape differ far less
    ring = pictures[scenes.SHAPES.index("ring")]
    assert close(ring[:, 16, 16], "black")
