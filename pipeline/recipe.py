"""A recipe: everything that changes the result, read from TOML into frozen dataclasses that check themselves."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tomli_w

from export.checkpoint import Granularity
from export.documents import MOST_TOML_BYTES, Rules, parse_toml, read_text
from export.errors import RecipeError
from export.formats.attention import AttentionFormats
from export.formats.format import get_format
from export.models.adapters import Adapter
from export.models.families import KEPT_BY_RECIPE, LAYER_KINDS, Half
from export.names import check_name
from pipeline.backends import BACKENDS
from pipeline.backends.base import Options, OptionsT
from pipeline.methods import AUTO, AUTO_ROWS, METHODS, PRESETS

if TYPE_CHECKING:
    from export.models.load import LoadedModel

T = TypeVar("T")
HALVES = get_args(Half)
GRANULARITIES = get_args(Granularity)
SEARCHES = ("absmax", "mse")
# What the flags --model, --variant, --config and --lora say, None where one was not given.
ModelFlags = tuple[str | None, str | None, str | None, Sequence[str] | None]
NO_FLAGS: ModelFlags = (None, None, None, None)
# Tables of a pipeline's other parts, by the part's name.
Components = dict[str, dict[str, object]]
# Far beyond what anyone computes: a slip of the finger, or a hostile file, is refused at once.
MOST_SEED, MOST_STEPS, MOST_SAMPLES, MOST_PIXELS, MOST_GROUP = 2**63, 10_000, 65_536, 32_768, 2**20
RULES = Rules(RecipeError, "see recipe.toml in any bundle for the form")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RecipeError(message)


def _check_bounds(table: str, options: object, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Raise RecipeError for a field of `options` that is not within its bounds, both included."""
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        _check(value >= least, f"{table}.{name} {value} must not be below {least}; use {least} to {most}")
        _check(value <= most, f"{table}.{name} {value}; use at most {most}")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"keep: {pattern!r} is no regular expression ({error}); give one such as 'transformer_blocks.0.*'"
        ) from error


def _check_seed(table: str, seed: int) -> None:
    _check(0 <= seed < MOST_SEED, f"{table}.seed {seed} must not be negative, and below 2**63")


@dataclass(frozen=True)
class Formats:
    """Number format of weights and activations; `weight_of` overrides single layer kinds."""

    weight: str = "E2M1"
    activation: str = "E2M3"
    weight_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.weight, self.activation, *self.weight_of.values()):
            get_format(name)
        unknown = sorted(set(self.weight_of) - set(LAYER_KINDS))
        _check(not unknown, f"formats.weight_of: layer kind {unknown} is unknown; use {', '.join(LAYER_KINDS)}")


# In place of a format in `attention`: not quantized, as where the key is absent.
UNQUANTIZED = "float"


@dataclass(frozen=True)
class Attention:
    """Number formats of attention: qk of queries and keys, pv of values. None, or the word "float": in float32; "auto"
    for both: the targets decide (`settled_attention`)."""

    qk: str | None = None
    pv: str | None = None

    def __post_init__(self) -> None:
        for name in ("qk", "pv"):
            if getattr(self, name) == UNQUANTIZED:
                object.__setattr__(self, name, None)
        of_both = f"attention.qk is {self.qk or UNQUANTIZED} and attention.pv {self.pv or UNQUANTIZED}; give"
        _check((self.qk == AUTO) == (self.pv == AUTO), f"{of_both} {AUTO} for both, or for neither: set the other, too")
        _check((self.qk is None) == (self.pv is None), f"{of_both} a format for both, or for neither")
        if not self.is_auto:
            _ = self.formats  # refuses formats that attention cannot have

    @property
    def is_auto(self) -> bool:
        """Are formats still to be chosen by `settled_attention`?"""
        return self.qk == AUTO

    @property
    def formats(self) -> AttentionFormats | None:
        """None where attention stays in float32. Raises RecipeError where that is not decided yet."""
        _check(not self.is_auto, f"attention is {AUTO}, which a build decides by its targets; name formats, or float")
        return None if self.qk is None or self.pv is None else AttentionFormats(self.qk, self.pv)

    def text(self) -> str:
        """The formats in words.

        >>> Attention("INT8", "INT8").text(), Attention().text(), Attention("auto", "auto").text()
        ('INT8/INT8', 'float', 'auto')
        """
        return AUTO if self.is_auto else UNQUANTIZED if self.formats is None else str(self.formats)

    def document(self) -> dict[str, str]:
        """As TOML has it, which knows no None: the keys are absent then."""
        return {key: name for key, name in asdict(self).items() if name is not None}


@dataclass(frozen=True)
class Weights:
    """Weight scales: granularity, input channels per group, and how the clip is found."""

    granularity: str = "exact_group"
    group_size: int = 64
    search: str = "mse"

    def __post_init__(self) -> None:
        _check(self.granularity in GRANULARITIES, f"weights.granularity {self.granularity!r}; use {GRANULARITIES}")
        _check(self.search in SEARCHES, f"weights.search {self.search!r}; use one of {SEARCHES}")
        _check_bounds("weights", self, {"group_size": (1, MOST_GROUP)})

    def scales_text(self) -> str:
        """Granularity and group size in words.

        >>> Weights("exact_group", 64).scales_text(), Weights("per_channel", 64).scales_text()
        ('exact_group(64)', 'per_channel')
        """
        return self.granularity + (f"({self.group_size})" if self.granularity != "per_channel" else "")


@dataclass(frozen=True)
class Calibrate:
    """Calibration method and its data.

    method: a row of pipeline/methods.py, or "auto", which the model's size decides (`settled`). size: prompts whose
    sampling trajectories are used; timesteps: how many steps of each, spread evenly. prompts: a file with one prompt
    per line, "" for the model's own. options: the method's, see pipeline/methods.py.
    """

    method: str = "rtn"
    preset: str = "fast"
    size: int = 32
    timesteps: int = 10
    seed: int = 0
    prompts: str = ""
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join((AUTO, *METHODS))
        _check(
            self.method in (AUTO, *METHODS), f"calibrate.method {self.method!r} is not available; use one of {known}"
        )
        _check(self.preset in PRESETS, f"calibrate.preset {self.preset!r}; use one of {', '.join(PRESETS)}")
        _check_bounds("calibrate", self, {"size": (1, MOST_SAMPLES), "timesteps": (1, MOST_STEPS)})
        _check_seed("calibrate", self.seed)
        if self.method == AUTO:
            _check(
                not self.options, "calibrate.options belong to a method; name it in calibrate.method instead of auto"
            )
        else:
            METHODS[self.method].resolve(self.preset, self.options)


@dataclass(frozen=True)
class Sampling:
    """How images are made when the engine is verified and measured. height and width 0: the model's own size."""

    n_steps: int = 20
    guidance_scale: float = 2.0
    batch_size: int = 1
    height: int = 0
    width: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"height": (0, MOST_PIXELS), "width": (0, MOST_PIXELS)}
        _check_bounds("sampling", self, {"n_steps": (1, MOST_STEPS), "batch_size": (1, MOST_SAMPLES), **sizes})
        _check_seed("sampling", self.seed)
        _check(math.isfinite(self.guidance_scale), f"sampling.guidance_scale {self.guidance_scale} is not a number")


@dataclass(frozen=True)
class Budgets:
    """What quantization may cost against the float model (the gates against the reference are derived, not set)."""

    quant_sqnr_db: float = 10.0
    final_psnr_fp_db: float = 20.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check(math.isfinite(value), f"budgets.{name} is {value}, which is no budget; give a number of dB")


@dataclass(frozen=True)
class Recipe:
    """One engine: model, number formats, calibration, sampling, budgets, target options.

    model_variant, model_config: which of the model's weights files, and its config.json where it is elsewhere; both as
    `export.models.load.load` takes them, "" for the plain ones. lora: adapters that are merged into the model, each
    FILE or FILE:SCALE. half: which of an autoencoder, None for other models.
    targets: options by the target's name; those of targets
    that are not named are the defaults. In TOML each is a table of the target's name.

    keep: regular expressions of the paths of linears that are not quantized, beside those that the family keeps.

    components: for the parts of a pipeline beside its denoiser, such as "text_encoder", tables of their own: `recipe`,
    the name of the recipe that the part begins with, and keys as here that differ from it (`component_recipe`).
    """

    name: str
    model: str
    description: str = ""
    model_variant: str = ""
    model_config: str = ""
    lora: tuple[str, ...] = ()
    half: Half | None = None
    formats: Formats = Formats()
    attention: Attention = Attention()
    weights: Weights = Weights()
    calibrate: Calibrate = Calibrate()
    sampling: Sampling = Sampling()
    budgets: Budgets = Budgets()
    targets: Mapping[str, Options] = field(default_factory=dict)
    components: Components = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, Path("recipe"), RecipeError)
        _check("/" not in self.name, f"recipe name {self.name!r} must be a plain file name")
        _check(bool(self.model), f"recipe {self.name}: model is empty; give a folder, a hub id or zoo:NAME")
        _check(self.half in (None, *HALVES), f"recipe {self.name}: half {self.half!r}; use {' or '.join(HALVES)}")
        _check(
            self.half is None or self.attention == Attention(),
            f"recipe {self.name}: attention of an autoencoder's {self.half} stays in float; leave attention.qk and "
            "attention.pv out",
        )
        defaults = {name: backend.options_type() for name, backend in BACKENDS.items()}
        for name, options in self.targets.items():
            _check(type(options) is type(defaults.get(name)), f"recipe {self.name}: {name} has no options {options!r}")
        object.__setattr__(self, "targets", defaults | dict(self.targets))
        for pattern in self.keep:
            _check_pattern(pattern)
        paths = [os.path.realpath(adapter.path) for adapter in self.adapters]
        if twice := [adapter.path for adapter, path in zip(self.adapters, paths, strict=True) if paths.count(path) > 1]:
            raise RecipeError(f"recipe {self.name}: adapter {twice[0]} stands there twice; give it once, at one scale")
        for name, table in self.components.items():
            if BASE in table:
                component_recipe(self, name, "", self.model)  # refuses keys and values that no recipe has

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What `lora` names."""
        return tuple(map(Adapter.parse, self.lora))

    def options(self, kind: type[OptionsT]) -> OptionsT:
        """The options of the target that has such."""
        return cast(OptionsT, self.targets[kind.target])

    def with_options(self, options: Options) -> Recipe:
        """The recipe with other options of their target."""
        return replace(self, targets={**self.targets, options.target: options})

    def document(self) -> dict[str, Any]:
        """Everything as TOML has it; `from_dict` gives an equal recipe back."""
        common = {**asdict(self), "attention": self.attention.document()}
        tables: dict[str, dict[str, object]] = common.pop("targets")
        if not self.components:
            del common["components"]
        for key in ("keep", "lora"):
            if common[key]:
                common[key] = list(common[key])
            else:
                del common[key]
        if self.half is None:  # which TOML does not know
            del common["half"]
        return common | {name: table for name, table in tables.items() if table}


def from_dict(document: Mapping[str, object], source: str) -> Recipe:
    """A recipe from parsed TOML. Raises RecipeError naming `source` and the unknown or ill-typed key."""
    tables = {name: backend.options_type for name, backend in BACKENDS.items() if fields(backend.options_type)}
    hints = _hints(Recipe)
    del hints["targets"]
    values = _typed_values({**hints, **tables}, document, source, "")
    if missing := [name for name in ("name", "model") if name not in values]:
        raise RecipeError(f"{source}: key {missing[0]} is missing; a recipe needs a name and a model")
    targets = {name: values.pop(name) for name in tables if name in values}
    return _instance(Recipe, {**values, "targets": targets}, source)


def _hints(kind: type) -> dict[str, object]:
    """Types of the fields of a dataclass by name."""
    hints = get_type_hints(kind)
    return {row.name: hints[row.name] for row in fields(kind)}


def _typed_values(
    hints: Mapping[str, object], document: Mapping[str, object], source: str, prefix: str
) -> dict[str, object]:
    """The values of a table, each as the type of its key wants it."""
    for key in document:
        if key not in hints:
            raise RecipeError(f"{source}: key {prefix}{key} is unknown; use one of {', '.join(hints)}")
    return {key: _typed(value, hints[key], source, prefix + key) for key, value in document.items()}


def _instance(kind: type[T], values: Mapping[str, object], source: str) -> T:
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


# Type of a field -> what a value must be, in words; the test; what makes the field of it.
TYPES: dict[object, tuple[str, Callable[[Any], bool], Callable[[Any], object]]] = {
    Components: (
        "a table for each part of a pipeline",
        lambda value: type(value) is dict and all(type(table) is dict for table in value.values()),
        copy.deepcopy,
    ),
    str: ("text", lambda value: type(value) is str, str),
    str | None: ("text", lambda value: type(value) is str, str),  # None is an absent key
    Half | None: ("text", lambda value: type(value) is str, str),
    Literal: ("text", lambda value: type(value) is str, str),  # which, its class checks
    int: ("an integer", lambda value: type(value) is int, int),
    float: ("a number", lambda value: type(value) in (int, float), float),
    dict: ("a table of texts", lambda value: type(value) is dict and all(type(v) is str for v in value.values()), dict),
    dict[str, object]: (
        "a table of numbers, texts and truth values",
        lambda value: type(value) is dict and all(type(v) in (int, float, str, bool) for v in value.values()),
        dict,
    ),
    tuple[str, ...]: (
        "a list of texts",
        lambda value: type(value) in (list, tuple) and all(type(v) is str for v in value),
        tuple,
    ),
    tuple: (
        "a list of integers",
        lambda value: type(value) in (list, tuple) and all(type(v) is int for v in value),
        tuple,
    ),
}


def _typed(value: object, hint: object, source: str, key: str) -> object:
    """`value` as the field type `hint` wants it. Raises RecipeError naming `key`."""
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{source}: {key} must be a table, found {value!r}")
        return _instance(hint, _typed_values(_hints(hint), value, source, f"{key}."), source)
    words, fits, convert = TYPES.get(hint) or TYPES[get_origin(hint) or hint]
    if not fits(value):
        raise RecipeError(f"{source}: {key} is {value!r}; expected {words}")
    return convert(value)


def settled(recipe: Recipe, parameters: int) -> Recipe:
    """The recipe with a method in place of "auto" for a model of so many parameters; any other comes back as it is."""
    if recipe.calibrate.method != AUTO:
        return recipe
    method = next(name for limit, name in AUTO_ROWS if parameters <= limit)
    return replace(recipe, calibrate=replace(recipe.calibrate, method=method))


# What "auto" means where attention can be quantized: it costs nothing that was measurable on the bundled PixArt
# (docs/quality.md) and at the size of PixArt-XL, and the kernel library computes it faster at every size.
AUTO_ATTENTION = Attention("E2M3", "E2M3")


def settled_attention(recipe: Recipe, targets: Iterable[str]) -> Recipe:
    """The recipe with what attention "auto" means for these targets: AUTO_ATTENTION where all of them
    quantize it by default, else float; any other recipe comes back as it is."""
    if not recipe.attention.is_auto:
        return recipe
    everywhere = all(BACKENDS[target].quantizes_attention_by_default(recipe) for target in targets)
    return replace(recipe, attention=AUTO_ATTENTION if everywhere else Attention())


# Keys that `--set` knows by a shorter name.
SHORT_KEYS = {"method": "calibrate.method", "preset": "calibrate.preset"}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("pipeline") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or a recipe file by path (ending in .toml)."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(
                f"recipe file {path} does not exist; give a path to a .toml file or one of {recipe_names()}"
            )
        text = read_text(path, RULES, MOST_TOML_BYTES)
    elif name_or_path in recipe_names():
        text = (resources.files("pipeline") / "recipes" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        raise RecipeError(
            f"recipe {name_or_path!r} is unknown; use one of {', '.join(recipe_names())}, or a .toml file"
        )
    return from_dict(parse_toml(text, name_or_path, RULES), name_or_path)


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` settings applied, keys and values as in TOML, quotes around a text not needed.

    For example `weights.group_size=32`, `weights.search=absmax`, `formats.weight_of."ff.in"=E3M0`, `rtx.sm=[89]`.
    Checked when all are applied: some keys go with others, as attention.qk and attention.pv.
    """
    document = recipe.document()
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {setting!r}: expected key=value, for example weights.group_size=32")
        *tables, last = _path(SHORT_KEYS.get(key, key), setting)
        table: object = document
        if tables[:1] == [COMPONENTS]:  # tables of parts that the recipe does not mention yet
            document.setdefault(COMPONENTS, {})
        for name in tables:
            if tables[0] == COMPONENTS and isinstance(table, dict):
                table.setdefault(name, {})
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise RecipeError(f"--set {setting!r}: {key} is not a key of the recipe; see recipe.toml in any bundle")
        value = _value(text.strip())
        if tables == ["calibrate"] and last == "method" and value != table.get(last):
            table["options"] = {}  # they were another method's
        table[last] = value
    return from_dict(document, " ".join(f"--set {setting}" for setting in settings)) if settings else recipe


# Of a recipe, the tables of a pipeline's other parts; in such a table, the recipe that it begins with.
COMPONENTS, BASE = "components", "recipe"


def component_recipe(recipe: Recipe, name: str, base: str, model: str) -> Recipe:
    """The recipe of the part `name` of a pipeline, whose folder is `model`: what the table `components.NAME` of
    `recipe` begins with, or the recipe `base`, with the keys of that table, and the targets' options of `recipe`.

    Raises RecipeError for a table that makes no recipe.
    """
    table = dict(recipe.components.get(name, {}))
    source, base_name = f"{recipe.name}: {COMPONENTS}.{name}", table.pop(BASE, base)
    if not isinstance(base_name, str):
        raise RecipeError(f"{source}.{BASE} is {base_name!r}; give the name of a recipe, or a .toml file")
    if COMPONENTS in table:
        raise RecipeError(f"{source}.{COMPONENTS}: a part of a pipeline has none of its own; remove the table")
    own = {key: value for key, value in table.items() if key in BACKENDS}
    merged = merged_tables(load(base_name).document() | {"model": model}, table)
    whole = from_dict(merged, source)
    return whole if own else replace(whole, targets=recipe.targets)


def merged_tables(document: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """`document` with the keys of `changes`; a table in both is merged in the same way.

    >>> merged_tables({"a": 1, "formats": {"weight": "E2M1"}}, {"formats": {"activation": "INT8"}})
    {'a': 1, 'formats': {'weight': 'E2M1', 'activation': 'INT8'}}
    """
    result = dict(document)
    for key, value in changes.items():
        before = result.get(key)
        result[key] = merged_tables(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _path(key: str, setting: str) -> list[str]:
    """The parts of a dotted TOML key; a part may be in quotes."""
    remedy = f"{key!r} is not a key, expected for example weights.group_size"
    document: object = parse_toml(f"{key} = 0", f"--set {setting!r}", Rules(RecipeError, remedy))
    path = []
    while isinstance(document, dict):
        name, document = next(iter(document.items()))
        path.append(name)
    return path


def _value(text: str) -> object:
    try:
        return parse_toml(f"value = {text}", "--set", RULES)["value"]
    except RecipeError:
        return text


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` gives an equal recipe back."""
    return tomli_w.dumps(recipe.document())


def with_model(
    recipe: Recipe, model: str | None, variant: str | None, config: str | None, lora: Sequence[str] | None = None
) -> Recipe:
    """The recipe for what the flags --model, --variant, --config and --lora name, None where one was not given.

    A variant or a configuration of the recipe's own belongs to its own model, and goes with it. Adapters stay: they are
    refused by a model that they were not made for, and no bundle may be compared with its model without them.
    """
    if model:
        recipe = replace(recipe, model=_absolute(model), model_variant="", model_config="")
    if config:
        recipe = replace(recipe, model_config=_absolute(config))
    if lora is not None:
        given = map(Adapter.parse, lora)
        placed = (replace(adapter, path=Path(_absolute(str(adapter.path)))) for adapter in given)
        recipe = replace(recipe, lora=tuple(map(str, placed)))
    return recipe if variant is None else replace(recipe, model_variant=variant)


def _absolute(source: str) -> str:
    """The full path of a folder or file that is here; anything else, a hub id for example, as it is."""
    if source.encode(errors="replace").decode() != source:  # bytes that are no text here would be lost in recipe.toml
        raise RecipeError(f"{source!r} is not text in this locale; set PYTHONUTF8=1, or rename the folder or file")
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    # A file keeps its name: the hub's cache links it to one that is named by its hash.
    return str(path.parent.resolve() / path.name) if path.is_file() else source


def load_float_model(recipe: Recipe) -> LoadedModel:
    """The float model that the recipe names. Raises RecipeError for a pattern of `keep` that no linear has."""
    from export.models.load import load

    keep = (lambda path: any(re.fullmatch(pattern, path) for pattern in recipe.keep)) if recipe.keep else None
    model = load(recipe.model, False, recipe.model_variant, recipe.model_config, recipe.half, keep, recipe.adapters)
    if model.family.recordings is not None:  # what it is given beside its inputs is of one size
        from export.models.torch_modules import set_resolution

        set_resolution(model.module, *model.cells(recipe.sampling.height, recipe.sampling.width))
    for pattern in recipe.keep:
        if not any(re.fullmatch(pattern, path) for path, reason in model.kept() if reason == KEPT_BY_RECIPE):
            paths = ", ".join([ref.name for ref in model.linears()][:3])
            raise RecipeError(
                f"keep: no linear that would be quantized is called {pattern!r}; they are called as {paths}"
            )
    if not model.linears() and model.family.quantizes:
        raise RecipeError(f"keep = {list(recipe.keep)} leaves nothing to quantize; keep fewer")
    return model
