"""The group search: constraint, optimum, resumption, processes, and what it makes of plans."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ModelError, RecipeError, UserError
from pipeline.calibrate.groups.search import (
    Gene,
    Scores,
    SearchSettings,
    Space,
    first_generation,
    next_generation,
    search,
)
from pipeline.calibrate.groups.space import from_text, layer_sizes, make_space, to_text, with_sizes
from pipeline.calibrate.methods.rtn import quantize_linear
from pipeline.calibrate.plan import make_plans
from pipeline.jobs.processes import in_processes
from tests.calibrate.test_calibrate import make_model, make_recipe

SIZES = (32, 64, 128)


def make_genes(count=4):
    return tuple(Gene(f"g{i}", SIZES, tuple((i + 1) * 1024 // size for size in SIZES)) for i in range(count))


def make_score():
    """Gene i is the more sensitive to large groups, the higher i."""
    return lambda individual: sum(size * (1 + i**2) for i, size in enumerate(individual))


SPACE = Space(make_genes(), sum(gene.size_bytes[1] for gene in make_genes()))
SMALL = SearchSettings(generations=6, population=12, seed=1)


# What a search of 3 generations of 4 asks, in this order: as it did before its individuals were jobs.
FEW = SearchSettings(generations=3, population=4, seed=1)
ASKED = [
    *((64, 64, 64, 64), (128, 128, 128, 128), (64, 64, 128, 128), (32, 32, 128, 128)),
    *((64, 32, 128, 128), (32, 64, 64, 128), (128, 32, 128, 128), (32, 128, 128, 128)),
    *((64, 64, 64, 128), (32, 128, 64, 64), (128, 64, 64, 64), (128, 64, 128, 128)),
]


def best_by_trying_all(space, score):
    every = itertools.product(*(gene.sizes for gene in space.genes))
    return min((one for one in every if space.fits(one)), key=score)


def test_it_finds_what_trying_all_finds(tmp_path):
    result = search(SPACE, SMALL, make_score, tmp_path / "scores.json", {})
    assert result.best == best_by_trying_all(SPACE, make_score())
    assert result.cost == make_score()(result.best)
    assert list(result.trace) == sorted(result.trace, reverse=True) and len(result.trace) == 6
    assert len(result.costs) == len(json.loads((tmp_path / "scores.json").read_text())["costs"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.floats(0, 1))
def test_every_individual_keeps_the_budget_and_is_new(seed, budget):
    genes = make_genes()
    low, high = (sum(pick(gene.size_bytes) for gene in genes) for pick in (min, max))
    space = Space(genes, round(low + budget * (high - low)))
    rng = np.random.default_rng(seed)
    generation = first_generation(space, SMALL, rng)
    seen = set()
    for _ in range(4):
        assert generation or len(seen) > 0
        assert len(set(generation)) == len(generation) and not seen & set(generation)
        assert all(space.fits(one) for one in generation)
        assert all(size in SIZES for one in generation for size in one)
        seen |= set(generation)
        generation = next_generation(space, SMALL, rng, sorted(seen, key=make_score()))


def test_children_mix_parents_and_change_few_genes():
    genes = tuple(Gene(f"g{i}", SIZES, (4, 2, 1)) for i in range(40))
    space, wide = Space(genes, 160), SearchSettings(population=60)
    parents = [(32,) * 40, (128,) * 40]
    children = next_generation(space, wide, np.random.default_rng(0), parents)
    crossed, mutated = children[:30], children[30:]
    assert len(mutated) == 30
    share = np.mean([np.mean(np.array(one) == 32) for one in crossed])
    assert {size for one in crossed for size in one} == {32, 128} and 0.4 < share < 0.6
    changed = [min(sum(a != b for a, b in zip(one, parent, strict=True)) for parent in parents) for one in mutated]
    assert 0.03 < np.mean(changed) / 40 < 0.1  # one gene in ten is drawn anew, two in three of them change


class Counting:
    """A score that stops after `left` individuals and notes what it was asked."""

    def __init__(self, left=10**6):
        self.left, self.asked = left, []

    def __call__(self):
        return self.score

    def score(self, individual):
        if len(self.asked) == self.left:
            raise KeyboardInterrupt
        self.asked.append(individual)
        return make_score()(individual)


@pytest.mark.parametrize("left", [0, 1, 12, 17])
def test_a_stopped_search_goes_on_and_asks_nothing_twice(left, tmp_path):
    whole = Counting()
    expected = search(SPACE, SMALL, whole, tmp_path / "whole.json", {})
    first, second = Counting(left), Counting()
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, SMALL, first, tmp_path / "parts.json", {})
    assert search(SPACE, SMALL, second, tmp_path / "parts.json", {}) == expected
    assert first.asked + second.asked == whole.asked
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_scores_of_another_origin_are_not_used(tmp_path):
    path = tmp_path / "scores.json"
    search(SPACE, SMALL, make_score, path, {"seed": 1})
    again = Counting()
    search(SPACE, SMALL, again, path, {"seed": 2})
    assert again.asked


def test_the_way_of_a_search_is_decided_by_seed_and_scores_alone(tmp_path):
    """So scores that another release has kept lead the same way."""
    counting = Counting()
    search(SPACE, FEW, counting, tmp_path / "scores.json", {})
    assert counting.asked == ASKED
    kept = json.loads((tmp_path / "scores.json").read_text())["costs"]
    assert list(kept.items()) == [(",".join(map(str, one)), make_score()(one)) for one in ASKED]


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ModelError("no such model"), UserError, "no such model"),
        (ValueError("no luck"), RuntimeError, "internal error, ValueError: no luck"),
    ],
)
def test_individuals_that_cannot_be_scored_are_named_and_end_no_other(error, kind, reason, tmp_path):
    def score(individual):
        if individual in ASKED[1:3]:
            raise error
        return make_score()(individual)

    with pytest.raises(kind, match=f"group search 1/3, 2 failed: {reason}; group search 1/3, 3 failed: {reason}"):
        search(SPACE, FEW, lambda: score, tmp_path / "scores.json", {})
    assert len(json.loads((tmp_path / "scores.json").read_text())["costs"]) == 2
    again = Counting()
    search(SPACE, FEW, again, tmp_path / "scores.json", {})
    assert again.asked == ASKED[1:3] + ASKED[4:]


@pytest.mark.process
def test_processes_change_nothing(tmp_path):
    short = SearchSettings(generations=2, population=5, seed=3)
    alone = search(SPACE, short, make_score, tmp_path / "a.json", {})
    with in_processes(2) as runner:
        assert search(SPACE, short, make_score, tmp_path / "b.json", {}, runner) == alone


def test_a_cost_that_is_no_number_is_the_worst(tmp_path):
    scores = Scores(tmp_path / "scores.json", {})
    scores.add((32,), float("nan"))
    scores.add((64,), 1e9)
    assert Scores(tmp_path / "scores.json", {}).ranked([(32,), (64,)]) == [(64,), (32,)]


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(RecipeError, match="may use 10 bytes, but the largest groups take 80"):
        Space(make_genes(), 10)
    with pytest.raises(RecipeError, match="generations 0 must be at least 1"):
        SearchSettings(generations=0)
    with pytest.raises(RecipeError, match="mutation probability 0 must be in"):
        SearchSettings(mutation_probability=0)


# --- plans -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "blocks.0.to_q": ("attn.qkv", 64, 128),
    "blocks.0.to_k": ("attn.qkv", 64, 128),
    "blocks.0.ff_out": ("ff.out", 64, 576),
    "blocks.1.to_q": ("attn.qkv", 64, 128),
}


def plans_of(*chosen):
    model = make_model(shapes=LAYERS)
    return make_plans(model.linears(), make_recipe(*chosen))


@pytest.mark.parametrize("granularity", ["group", "exact_group"])
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("weight", ["E2M1", "INT6"])
def test_bytes_are_those_of_the_quantized_layer(granularity, size, weight):
    plans = plans_of(f"weights.granularity={granularity}", f"weights.group_size={size}", f"formats.weight={weight}")
    for plan in plans:
        assert plan.size_bytes == quantize_linear(plan, "absmax").size_bytes


def test_sizes_that_do_not_divide_k_are_left_out_with_a_message(caplog):
    caplog.set_level("INFO")
    space = make_space(plans_of("weights.granularity=group"), "kind")
    assert [(gene.name, gene.sizes) for gene in space.genes] == [
        ("blocks.0 attn.qkv", (32, 64, 128)),
        ("blocks.0 ff.out", (32, 64, 192, 288)),
        ("blocks.1 attn.qkv", (32, 64, 128)),
    ]
    assert "groups of 192 do not divide K=128, left out for 2 genes" in caplog.text
    assert space.uniform(128) == (128, 64, 128)
    exact = make_space(plans_of(), "layer", budget_bytes=10**6)
    assert len(exact.genes) == 4 and exact.genes[0].sizes == (16, 32, 64, 128) and exact.budget_bytes == 10**6
    assert make_space(plans_of(), "layer", (64, 128)).genes[0].sizes == (64, 128)


def test_a_layer_that_no_size_divides_keeps_its_own(caplog):
    caplog.set_level("INFO")
    space = make_space(plans_of("weights.group_size=32"), "kind", (192, 288))
    assert [gene.sizes for gene in space.genes] == [(32,), (192, 288), (32,)]
    assert "groups of 288 do not divide K=128, left out for 2 genes" in caplog.text
    assert space.fits(space.uniform(288)) and space.uniform(288) == (32, 288, 32)


def test_the_budget_is_what_the_plans_take():
    plans = plans_of("weights.group_size=64")
    space = make_space(plans, "kind")
    assert space.budget_bytes == space.size_bytes(space.uniform(64))
    assert space.budget_bytes == sum(quantize_linear(plan, "absmax").size_bytes for plan in plans)


def test_a_budget_for_the_largest_groups_alone_is_pointed_out(caplog):
    make_space(plans_of("weights.granularity=group"), "kind", (32, 64))
    assert "nothing can be finer; add larger sizes" in caplog.text


def test_plans_follow_the_choice():
    plans = plans_of("weights.granularity=group")
    space = make_space(plans, "kind")
    sizes = layer_sizes(plans, "kind", space, (32, 288, 128))
    assert sizes == [32, 32, 288, 128]
    changed = with_sizes(plans, sizes)
    assert [plan.group_size for plan in changed] == sizes
    assert [quantize_linear(plan, "absmax").scales.shape[1] for plan in changed] == [4, 4, 2, 1]


def test_layers_without_groups_stay_without():
    plans = plans_of('formats.weight_of={"ff.out" = "E3M0"}')
    space = make_space(plans, "layer")
    assert [gene.name for gene in space.genes] == ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"]
    assert layer_sizes(plans, "layer", space, (16, 32, 64)) == [16, 32, 0, 64]
    assert [plan.group_size for plan in with_sizes(plans, [16, 32, 0, 64])] == [16, 32, 0, 64]


@given(st.lists(st.sampled_from([0, 16, 32, 128]), min_size=1, max_size=40))
def test_text_gives_the_sizes_back(sizes):
    assert from_text(to_text(sizes)) == sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([64] * 3, "3 group sizes for 4 layers"),
        ([64, 64, 48, 64], None),
        ([64, 64, 128, 64], r"blocks\.0\.ff_out: group size 128; use a divisor of K=576"),
        ([64, 64, 64, 0], r"blocks\.1\.to_q: group size 0; use a divisor of K=128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    plans = plans_of("weights.granularity=group")
    if message is None:
        assert with_sizes(plans, sizes)
        return
    with pytest.raises(RecipeError, match=message):
        with_sizes(plans, sizes)


def test_words_are_refused():
    with pytest.raises(RecipeError, match="'many' is no size"):
        from_text("32,many")
    with pytest.raises(RecipeError, match="genes 'block' of the group search are unknown; use one of kind, layer"):
        make_space(plans_of(), "block")
    with pytest.raises(RecipeError, match="no layer with groups"):
        make_space(plans_of("weights.granularity=per_channel"), "kind")
    nothing = r"nothing to choose: of the group sizes \[100\] at most one .* K \(\[128, 576\]\).*sizes=16,32,64$"
    with pytest.raises(RecipeError, match=nothing):
        make_space(plans_of(), "kind", [100])
