"""sweep.toml: which builds it gives, and what of it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.errors import RecipeError
from pipeline.sweep.plan import MOST_BUILDS, Build, read_sweep

ZOO = "zoo:pixart_mini"
HEAD = 'schema_version = 1\nrecipes = ["pixart_w4a6"]\ntargets = "cpu"\n'


def read(folder: Path, text: str) -> list[Build]:
    path = folder / "sweep.toml"
    path.write_text(text)
    return read_sweep(path)


def test_every_combination_is_a_build_whose_name_has_a_part_for_each_axis(tmp_path: Path) -> None:
    text = """
        schema_version = 1
        recipes = ["pixart_w4a6", "pixart_w8a8"]
        methods = ["rtn", "msfp"]
        targets = "cpu"
        [models]
        small = "zoo:pixart_mini"
        [set]
        sampling.n_steps = 3
        [options.g32]
        weights.group_size = 32
        [options.g64]
        weights = { group_size = 64, search = "absmax" }
        """
    builds = read(tmp_path, text)
    assert [build.name for build in builds][:3] == [
        "pixart_w4a6-small-rtn-g32",
        "pixart_w4a6-small-rtn-g64",
        "pixart_w4a6-small-msfp-g32",
    ]
    assert len(builds) == 8 and all(build.recipe.sampling.n_steps == 3 for build in builds)
    last = builds[-1]
    assert last.axes == {"recipe": "pixart_w8a8", "model": "small", "method": "msfp", "options": "g64"}
    assert last.recipe.formats.weight == "INT8" and last.recipe.calibrate.method == "msfp"
    assert (last.recipe.weights.group_size, last.recipe.weights.search) == (64, "absmax")
    assert last.targets == ("cpu",)


def test_without_axes_it_is_the_recipe_itself(tmp_path: Path) -> None:
    [build] = read(tmp_path, HEAD)
    assert build.name == "pixart_w4a6" and build.recipe.model == "zoo:pixart_mini"


def test_files_have_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("{}")
    settings = '[set]\ncalibrate.prompts = "prompts.txt"\nmodel_config = "config.json"\n'
    [build] = read(tmp_path, f'{HEAD}[models]\na = "model"\n{settings}')
    assert build.recipe.model == str(tmp_path / "model")
    assert build.recipe.model_config == str(tmp_path / "config.json")
    assert build.recipe.calibrate.prompts == str(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "colour = 1\n", "key 'colour' is unknown; a sweep has the keys schema_version, recipes, models"),
        (HEAD.replace("1", "2", 1), "schema version 2, this version reads 1"),
        ("schema_version = 1\nrecipes = []\n", "recipes is"),
        ("recipes = ['pixart_w4a6']\n", "'schema_version' is missing"),
        (HEAD.replace("pixart_w4a6", "no_such"), "recipe 'no_such' is unknown"),
        (HEAD.replace('["pixart_w4a6"]', '["pixart_w4a6", "pixart_w4a6"]'), "two have one name"),
        (HEAD + 'methods = ["magic"]\n', "calibrate.method 'magic' is not available"),
        (HEAD + 'methods = ["rtn", "rtn"]\n', "state each value of an axis once"),
        (HEAD.replace("cpu", "abacus"), "target 'abacus' is unknown"),
        (HEAD + "[options.a]\nweights.colour = 3\n", "pixart_w4a6-a: key weights.colour is unknown"),
        (HEAD + "[options.a]\n[options.A]\n", "would have one folder"),
        (
            HEAD + f"[models]\na = '{ZOO}'\na-b = '{ZOO}'\n[options.b-c]\n[options.c]\n",
            "one folder; .*when joined by -",
        ),
        (HEAD + '[options.a]\n[options."a.Partial"]\n', r"w4a6-a\.Partial ends in '\.partial', which no bundle's may"),
        (HEAD + '[options."a."]\n', r"w4a6-a\. ends in '\.', which no bundle's may; rename"),
        (HEAD + f"[options.{'a' * 189}]\n", "has 201 bytes; use shorter names, of 200"),
        (HEAD + '[models]\na = ""\n', "models.a is empty; give a folder, a hub id"),
        (HEAD + '[options."../a"]\n', "use letters, digits"),
        (HEAD + '[set]\nmodel = "x"\n', r"it is an axis, state it as \[models\]"),
        (HEAD + '[options.a]\ncalibrate.method = "rtn"\n', "state it as methods"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'sweep.toml'}: ")


def test_a_whole_pipeline_is_refused_with_a_model_of_it(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/model_index.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"is a whole pipeline; name one model of it, as .*/pipe/transformer"):
        read(tmp_path, f'{HEAD}[models]\na = "{tmp_path / "pipe"}"\n')


def test_more_than_anybody_builds_is_refused(tmp_path: Path) -> None:
    options = "".join(f"[options.a{number}]\n" for number in range(MOST_BUILDS + 1))
    with pytest.raises(RecipeError, match=r"1 \(recipe\) x 1001 \(options\) are 1,001 engines"):
        read(tmp_path, HEAD + options)
