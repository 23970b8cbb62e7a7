"""The search with pictures as the judge, on few pictures of few steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.quality import drawing as quality_drawing
from benchmarks.quality import search_groups
from benchmarks.quality.drawing import draw, float_engine, make_subject
from benchmarks.quality.judging import features_of
from benchmarks.quality.metrics import frechet, gaussian
from export.errors import RecipeError
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.calibrate.groups.candidates import nearest_layer
from pipeline.calibrate.groups.space import from_text
from pipeline.calibrate.plan import make_plans
from tests.support.ray_stand_in import stand_in  # noqa: F401

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def few_steps(monkeypatch, tmp_path):
    whole = quality_drawing.load_generation
    monkeypatch.setattr(quality_drawing, "load_generation", lambda folder: replace(whole(folder), n_steps=2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arguments(tmp_path, *more, genes="kind"):
    options = {"generations": 1, "population": 3, "sizes": "64,128", "genes": genes}
    settings = ["calibrate.size=2", "calibrate.timesteps=2", "weights.granularity=group"]
    settings += [f"calibrate.options.{key}={value}" for key, value in options.items()]
    flags = ["--count", "6", "-o", str(tmp_path), *(flag for one in settings for flag in ("--set", one))]
    return search_groups.make_parser().parse_args([*flags, *more])


@pytest.mark.parametrize("against", search_groups.AGAINST)
def test_a_candidate_costs_the_distance_of_its_pictures(against, tmp_path):
    options = arguments(tmp_path, "--against", against, "--set", "calibrate.options.candidates=nearest", genes="layer")
    method = search_groups.make_method(search_groups.make_recipe(options), tmp_path)
    plans = make_plans(method.context.model.linears(), method.context.recipe)
    candidates = method.candidates(plans, method.space(plans), tmp_path)
    score = search_groups.make_score(options, method, candidates)()
    individual = tuple([64, 128] * (len(plans) // 2))
    subject = make_subject("dit_mini", 6, 0)
    layers = [
        nearest_layer(replace(plan, group_size=size), "absmax", "token_group")
        for plan, size in zip(plans, individual, strict=True)
    ]
    pictures = draw(subject, ReferenceEngine(fake_quant(subject.model, layers, torch.float32)).run, "test")
    others = subject.judging.real().numpy()
    if against == "float":
        others = draw(subject, float_engine(subject).run, "test")
    expected = frechet(*(gaussian(features_of(subject.judging, torch.from_numpy(part))) for part in (pictures, others)))
    assert score(individual) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fitness", ["fid", "proxy"])
def test_what_is_found_is_a_recipe_that_builds_with_it(fitness, tmp_path):
    document = search_groups.run(arguments(tmp_path, "--fitness", fitness))
    recipe = recipes.load(str(tmp_path / "dit_w4a8_searched.toml"))
    assert recipe.calibrate.method == "qdit"
    sizes = from_text(recipe.calibrate.options["group_sizes"])
    assert len(sizes) == 24 and set(sizes) <= {64, 128}
    assert document["size_bytes"] <= document["budget_bytes"]
    assert document["cost"] <= min(document["uniform"].values())
    written = json.loads((tmp_path / "search_groups.json").read_text())
    assert {"machine", "versions", "commit"} < written.keys() and written["settings"] == document["settings"]
    assert document["unsearched_cost"] == document["uniform"]["64"] >= document["cost"]
    by_hand = recipes.with_settings(recipes.load("dit_w4a8"), document["settings"])
    assert by_hand.calibrate.options["group_sizes"] == recipe.calibrate.options["group_sizes"]
    scores = json.loads((tmp_path / "scores.json").read_text())["costs"]
    assert len(scores) == document["scored"] == 3 and np.isfinite(list(scores.values())).all()


def test_a_stopped_search_goes_on_with_its_scores(tmp_path, monkeypatch):
    """Also where more is asked for than before. Scores are made up here, for speed."""

    asked = []

    def score(individual):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(individual)
        return float(sum(individual))

    monkeypatch.setattr(search_groups.FrechetScore, "__call__", lambda _: score)
    nearest = ["--set", "calibrate.options.candidates=nearest"]
    with pytest.raises(KeyboardInterrupt):
        search_groups.run(arguments(tmp_path, *nearest))
    kept = json.loads((tmp_path / "scores.json").read_text())
    first = list(asked)
    asked.clear()
    more = ["--set", "calibrate.options.generations=2", "--set", "calibrate.options.population=2"]
    document = search_groups.run(arguments(tmp_path, *nearest, *more))
    assert len(first) == 2 and not set(first) & set(asked) and document["scored"] == len(first) + len(asked) > 2
    assert kept["costs"].items() < json.loads((tmp_path / "scores.json").read_text())["costs"].items()


def test_a_cluster_finds_what_this_process_finds(tmp_path, monkeypatch, ray):
    """Also where a candidate's process is lost. Scores are made up here, for speed."""
    models = []

    def make_score(own):
        models.append(own.candidates.model)
        return lambda individual: float(sum(individual))

    monkeypatch.setattr(search_groups.FrechetScore, "__call__", make_score)
    nearest = ["--set", "calibrate.options.candidates=nearest", "--set", "calibrate.options.generations=2"]
    here = search_groups.run(arguments(tmp_path / "here", *nearest))
    ray.machines = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    ray.losses["group search 1/2, 2"] = [ray.errors["WorkerCrashedError"]("gone")]
    there = search_groups.run(arguments(tmp_path / "there", *nearest, "--ray", "head:6379"))
    assert {**there, "seconds": 0} == {**here, "seconds": 0}
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("here", "there")]
    assert scores[0] == scores[1] and ray.joined == ["head:6379"]
    assert [name for name, _ in ray.sent].count("group search 1/2, 2") == 2
    assert {options["num_cpus"] for _, options in ray.sent} == {1}, "a candidate is scored by one thread"
    assert [model is None for model in models] == [False, True], (
        "each process makes the score once; models do not travel"
    )
    with pytest.raises(RecipeError, match="workers=2 with --ray"):
        search_groups.run(arguments(tmp_path / "both", "--set", "calibrate.options.workers=2", "--ray", "head:6379"))


def test_a_model_without_judge_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="other/model has no bundled judge"):
        search_groups.make_recipe(arguments(tmp_path, "--set", "model=other/model"))
