"""The search with pictures as the judge, on few pictures of few steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import quality_drawing, search_groups
from benchmarks.judges import frechet_distance, load
from benchmarks.quality_drawing import draw, float_engine, make_subject
from export import models
from export.errors import RecipeError
from pipeline import recipe as recipes
from pipeline.calibrate.group_search import Gene, Space
from pipeline.calibrate.group_space import from_text


@pytest.fixture(autouse=True)
def few_steps(monkeypatch, tmp_path):
    whole = quality_drawing.load_generation
    monkeypatch.setattr(quality_drawing, "load_generation", lambda folder: replace(whole(folder), n_steps=2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arguments(tmp_path, *more):
    flags = ["--generations", "1", "--population", "3", "--count", "6", "--sizes", "64,128", "-o", str(tmp_path)]
    small = [flag for one in ("calibrate.size=2", "calibrate.timesteps=2") for flag in ("--set", one)]
    return search_groups.make_parser().parse_args([*flags, *small, "--set", "weights.granularity=group", *more])


@pytest.mark.parametrize("against", search_groups.AGAINST)
def test_a_candidate_costs_the_distance_of_its_pictures(against, tmp_path):
    wanted = arguments(tmp_path, "--against", against)
    recipe = search_groups.make_recipe(wanted)
    linears = models.load(recipe.model).linears()
    genes = tuple(Gene(ref.name, (64, 128), (2, 1)) for ref in linears)
    score = search_groups.score_of(replace_genes(wanted), recipe, Space(genes, 2 * len(genes)))()
    individual = tuple([64, 128] * (len(linears) // 2))
    subject = make_subject("dit_mini", 6, 0)
    engine = search_groups.ReferenceEngine(score.models.module(individual), torch.float32)
    pictures = torch.from_numpy(draw(subject, engine.run, "test"))
    goal = search_groups.real_features("dit_mini") if against == "real" else None
    judge = load("dit_mini")
    if goal is None:
        others = torch.from_numpy(draw(subject, float_engine(subject).run, "test"))
    else:
        others = quality_drawing.judges.JUDGES["dit_mini"].test()[1]
    assert score(individual) == pytest.approx(frechet_distance(judge, pictures, others), rel=1e-3)


def replace_genes(wanted):
    wanted.genes = "layer"
    return wanted


@pytest.mark.parametrize("fitness", ["fid", "proxy"])
def test_what_is_found_is_a_recipe_that_builds_with_it(fitness, tmp_path):
    document = search_groups.run(arguments(tmp_path, "--fitness", fitness))
    recipe = recipes.load(str(tmp_path / "dit_w4a8_searched.toml"))
    assert recipe.calibrate.method == "qdit"
    sizes = from_text(recipe.calibrate.options["group_sizes"])
    assert len(sizes) == 24 and set(sizes) <= {64, 128}
    assert document["size_bytes"] <= document["budget_bytes"]
    assert document["cost"] <= min(document["uniform"].values())
    scores = json.loads((tmp_path / "scores.json").read_text())["costs"]
    assert len(scores) == document["scored"] == 3 and np.isfinite(list(scores.values())).all()


def test_a_model_without_judge_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="other/model has no bundled judge"):
        search_groups.make_recipe(arguments(tmp_path, "--set", "model=other/model"))
