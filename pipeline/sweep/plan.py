"""sweep.toml: which engines a sweep builds, as one recipe for each; read strictly and resolved before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from export.documents import MOST_TOML_BYTES, Rules, check_version, parse_toml, read_text, validated
from export.errors import RecipeError
from export.names import as_one_name
from pipeline import recipe as recipes
from pipeline.compiler import PARTIAL, fitting_targets, parse_targets
from pipeline.parts import is_whole
from pipeline.recipe import Recipe

SCHEMA_VERSION = 1
# More are a slip of the finger: a product of a few axes is a large number soon.
MOST_BUILDS = 1000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
MOST_NAME_BYTES = 200  # of an engine's name; the files of its name have endings, and systems end at 255
# Keys of a recipe that are axes of their own: key -> how it is said.
AXES = {"name": "recipes", "model": "[models]", "calibrate.method": "methods"}
Settings = dict[str, object]


class SweepFile(TypedDict):
    """The whole file. models: name -> what -m takes; set: keys of every recipe; options: name -> such keys."""

    schema_version: int
    recipes: Annotated[list[str], MinLen(1)]
    models: NotRequired[Annotated[dict[str, str], MinLen(1)]]
    methods: NotRequired[Annotated[list[str], MinLen(1)]]
    targets: NotRequired[str]
    set: NotRequired[Settings]
    options: NotRequired[Annotated[dict[str, Settings], MinLen(1)]]


RULES = Rules(
    RecipeError,
    f"a sweep has the keys {', '.join(SweepFile.__annotations__)}; see docs/calibration.md",
    SCHEMA_VERSION,
    "write it by this version's docs/calibration.md, or install the version that it is for",
    extra="forbid",
)


@dataclass(frozen=True)
class Build:
    """One engine of a sweep. name: a part for each axis that the file has, which is a folder's name; axes: the same by
    the axis ("recipe", "model", "method", "options")."""

    name: str
    recipe: Recipe
    targets: tuple[str, ...]
    axes: Mapping[str, str]


def read_sweep(path: Path) -> list[Build]:
    """Every combination, in the order of the file, the last axis fastest.

    Raises RecipeError naming the file for a key, value or recipe that is wrong, EnvironmentLacksError where no target
    can be built.
    """
    source = str(path)
    document = parse_toml(read_text(path, RULES, MOST_TOML_BYTES), source, RULES)
    stated = validated(document, source, SweepFile, RULES)
    check_version(stated, source, RULES)
    try:
        for table in (stated.get("set", {}), *stated.get("options", {}).values()):
            _refuse_axes(table)
        builds = list(_builds(stated))
        _refuse_equal([build.name for build in builds])
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error
    return builds


def _refuse_axes(settings: Settings) -> None:
    """Raise RecipeError for settings of what the file has axes for."""
    for key, axis in AXES.items():
        table: object = settings
        for part in key.split("."):
            table = table.get(part) if isinstance(table, dict) else None
        if table is not None:
            raise RecipeError(f"{key} = {table!r} among the settings; it is an axis, state it as {axis}")


def _builds(stated: SweepFile) -> Iterator[Build]:
    bases = {recipe.name: recipe for recipe in map(recipes.load, stated["recipes"])}
    if len(bases) < len(stated["recipes"]):
        raise RecipeError(f"recipes: two have one name, of {', '.join(bases)}; give each its own")
    models, options = stated.get("models", {}), stated.get("options", {})
    for name in (*models, *options):
        if not NAME.fullmatch(name):
            raise RecipeError(f"the name {name!r} becomes a part of a folder's; use letters, digits, _, . and -")
    if empty := [name for name, model in models.items() if not model.strip()]:
        raise RecipeError(f"models.{empty[0]} is empty; give a folder, a hub id or zoo:NAME, as to -m")
    axes: dict[str, Sequence[str]] = {
        "recipe": list(bases),
        "model": list(models),
        "method": stated.get("methods", []),
        "options": list(options),
    }
    used = {axis: names for axis, names in axes.items() if names}
    count = math.prod(map(len, used.values()))
    if count > MOST_BUILDS:
        sizes = " x ".join(f"{len(names)} ({axis})" for axis, names in used.items())
        raise RecipeError(f"{sizes} are {count:,} engines; a sweep has at most {MOST_BUILDS}, split it")
    for chosen in product(*used.values()):
        place = dict(zip(used, chosen, strict=True))
        name = "-".join(chosen)
        _refuse_name(name)
        recipe = bases[place["recipe"]]
        model = models[place["model"]] if "model" in place else None
        settings = [stated.get("set", {}), options[place["options"]] if "options" in place else {}]
        recipe = _resolved(recipe, model, place.get("method"), settings, name)
        yield Build(name, recipe, _targets(stated.get("targets", "auto"), recipe), place)


def _refuse_name(name: str) -> None:
    """Raise RecipeError for a name, of parts that are names, that cannot be a folder's, or is a work folder's."""
    if (size := len(name.encode())) > MOST_NAME_BYTES:
        raise RecipeError(f"the engine's name {name[:40]}... has {size} bytes; use shorter names, of {MOST_NAME_BYTES}")
    ending = next((end for end in (PARTIAL, ".") if name.lower().endswith(end)), None)
    if ending:
        raise RecipeError(f"the engine's name {name} ends in {ending!r}, which no bundle's may; rename that part of it")


def _resolved(recipe: Recipe, model: str | None, method: str | None, settings: Sequence[Settings], name: str) -> Recipe:
    """The recipe of one combination, with whole paths: a job may be done by another machine, in another folder."""
    if model is None:
        recipe = recipes.with_model(recipe, recipe.model, recipe.model_variant, recipe.model_config, recipe.lora)
    else:
        recipe = recipes.with_model(recipe, model, None, None, recipe.lora)
    if is_whole(recipe.model):
        raise RecipeError(
            f"{name}: {recipe.model} is a whole pipeline; name one model of it, as {Path(recipe.model) / 'transformer'}"
        )
    recipe = recipes.with_settings(recipe, [] if method is None else [f"method={method}"])
    document: dict[str, object] = recipe.document()
    for table in settings:
        document = recipes.merged_tables(document, table)
    recipe = recipes.from_dict(document, name)
    recipe = recipes.with_model(recipe, None, None, recipe.model_config, recipe.lora)
    if not recipe.calibrate.prompts:
        return recipe
    return replace(recipe, calibrate=replace(recipe.calibrate, prompts=str(Path(recipe.calibrate.prompts).absolute())))


def _targets(stated: str, recipe: Recipe) -> tuple[str, ...]:
    targets = parse_targets(stated)
    return fitting_targets(targets, recipe) if stated == "auto" else targets


def _refuse_equal(names: Sequence[str]) -> None:
    """Raise RecipeError where two engines would have one folder, also where a file system takes a for A."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(as_one_name(name), name)) is not name:
            remedy = "state each value of an axis once, by names that differ when joined by - and in lower case"
            raise RecipeError(f"{other} and {name} would have one folder; {remedy}")
