"""What a target is: its facts, a lowering, a builder, and an engine that runs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NotRequired,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from numpy.typing import NDArray
from typing_extensions import ReadOnly, TypedDict

from export.documents import validated
from export.errors import EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.passes.probes import Choice, ProbeRow

if TYPE_CHECKING:
    from pipeline.backends.feeds import Declared
    from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
# An ONNX graph of a target or the portable one, the part of it that runs once for each condition, their weights.
MODEL, CONDITION, TIMESTEP, DATA = "model.onnx", "condition.onnx", "timestep.onnx", "model.onnx.data"
Arrays = dict[str, NDArray[Any]]
# Calls of the denoiser by what they are -> the call and the first number too large for FP16, in words; None: there is
# none.
OverflowSearch = Callable[[dict[str, Arrays]], tuple[str, object] | None]


@dataclass(frozen=True)
class LoweredGraph:
    """A lowered ONNX file, where its quantized linears are, and what was chosen for each."""

    path: Path
    probes: tuple[ProbeRow, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class BuildResult:
    """Files written by a backend (relative to the bundle), its lowered graph, and facts for the manifest.

    `lowered.path` is an ONNX file that stock onnxruntime runs; for `rtx` it is the very graph given to the builder.
    """

    files: tuple[str, ...]
    lowered: LoweredGraph
    metadata: Mapping[str, object] = field(default_factory=dict)


class ManifestTarget(TypedDict):
    """What a build of the target wrote into its metadata.json."""

    metadata: ReadOnly[NotRequired[Mapping[str, object]]]


class Manifest(TypedDict):
    """What targets read of a bundle's manifest.json, which `bundle` has checked: pipeline/bundle/manifest_schema.py."""

    targets: ReadOnly[Mapping[str, ManifestTarget]]
    tools: ReadOnly[Mapping[str, str]]


def only(outputs: Arrays) -> NDArray[Any]:
    """The output of a model, which has one, whatever its family calls it."""
    (output,) = outputs.values()
    return output


class Engine(Protocol):
    """A built model. Inputs and outputs are NumPy arrays named as in the portable model.

    Both methods may be called from any number of threads at once: each call of `run` gets the results of its own
    inputs, or RecipeError in words where they do not fit (see `feeds`) or the engine is closed.
    """

    def run(self, inputs: Arrays) -> Arrays: ...

    def close(self) -> None: ...


class LoadedEngine(Engine, Protocol):
    """The engine of a target, which says what it takes."""

    @property
    def declared(self) -> tuple[Declared, ...]: ...


# What an engine computes its unquantized parts in: float32; attention and large linears in FP16; or every tensor of
# tokens in FP16. See pipeline/verify/reference_hooks.py.
Arithmetic = Literal["fp32", "fp16", "fp16 tokens"]
# Smaller unquantized weights stay float32 in both: they are a negligible share of an engine.
LARGE_ELEMENTS = 2**20
# Masks add numbers like -10000 or -inf; below this FP16 would make -inf of it, and a row of -inf becomes NaN.
LOWEST_MASK = -30000.0
KEEPS_FLOAT = "--set attention.qk=float --set attention.pv=float keeps it in floats"
PROVEN_NOT_RUN = "numerically proven through onnxruntime; engine built, not run"


@dataclass(frozen=True)
class Options:
    """Options of a target: the table of its name in a recipe, [cpu] for example. A target without any has none of it.

    A field of a Literal type takes one of its values, or what that was called before: former, by field and word, so
    that recipes and bundles of earlier releases are read. Raises RecipeError naming the key, the value and the choices.
    """

    target: ClassVar[str]
    former: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __post_init__(self) -> None:
        for name, words in self.former.items():
            if (value := getattr(self, name)) in words:
                tell_renamed(f"{self.target}.{name}", value, words[value])
                object.__setattr__(self, name, words[value])
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                self.check(getattr(self, name) in get_args(hint), name, f"use {_either(get_args(hint))}")

    def check(self, ok: bool, name: str, remedy: str) -> None:
        """Raise RecipeError for the field `name` unless `ok`."""
        if not ok:
            raise RecipeError(f"{self.target}.{name} {getattr(self, name)!r}; {remedy}")


@cache
def tell_renamed(key: str, word: str, now: str) -> None:
    """Once, however often a recipe with the former word is read."""
    logger.info("%s %s is called %s now", key, word, now)


def _either(choices: Sequence[str]) -> str:
    """The choices in words.

    >>> _either(("fp8", "int8", "int4"))
    'fp8, int8 or int4'
    """
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


@dataclass(frozen=True)
class Flag:
    """A flag of `build` for one option of a target, as `--set` would give it. read: the option's value of a text."""

    name: str
    option: str
    read: Callable[[str], object]
    metavar: str
    help: str


@dataclass(frozen=True)
class Check:
    """One row of `doctor`: what was looked at, what stands there, and if it is not ok, the remedy.

    needed: by the default build.
    """

    name: str
    ok: bool
    found: str
    needed: bool = False
    remedy: str = ""


OptionsT = TypeVar("OptionsT", bound=Options)
T = TypeVar("T")


class Backend(ABC, Generic[OptionsT]):
    """A target: every fact of it, and what makes, judges and loads its engines.

    The package of the target, pipeline/backends/TARGET, holds its class and is light: recipes are read with it. What a
    method needs beyond that it imports itself.
    """

    options_type: type[OptionsT]
    # Without it nothing of the target runs here.
    package: ClassVar[str]
    # Does it run on a GPU?
    needs_gpu: ClassVar[bool] = False
    # 1 is the fastest: the order in which `Bundle.engine("auto")` looks for a target that fits the machine.
    speed_rank: ClassVar[int]
    # Does it compute the dialect's QuantizedAttention?
    quantizes_attention: ClassVar[bool] = False
    # Made to run anywhere and not to be fast: verified with less effort, not measured beside others.
    slow: ClassVar[bool] = False
    # What a build of it may make, in the target's folder of the bundle; and what of that no engine is loaded from,
    # kept for other programs.
    file_names: ClassVar[frozenset[str]]
    kept_names: ClassVar[frozenset[str]] = frozenset()
    # Disk that a build takes besides what every build does: the lowered graph and the engine.
    disk_bytes_per_parameter: ClassVar[float]
    # A build takes a moment and gives equal bytes, so that `verify` repeats it. Other engines come from a vendor's
    # compiler, and the graph that it was given is compared: metadata.json has its hashes.
    repeatable: ClassVar[bool] = False
    flags: ClassVar[tuple[Flag, ...]] = ()
    # What `verify --polygraphy` writes commands for, by a table of pipeline/polygraphy/commands.py: "engine" is the
    # engine alone, by this package.
    polygraphy: ClassVar[str] = "engine"

    @property
    def name(self) -> str:
        return self.options_type.target

    def options(self, recipe: Recipe) -> OptionsT:
        """The recipe's table of this target."""
        return recipe.options(self.options_type)

    @property
    def files(self) -> frozenset[str]:
        """Names in the bundle of all files that a build of it may make."""
        return frozenset(f"{self.name}/{name}" for name in self.file_names)

    @property
    def loaded_files(self) -> frozenset[str]:
        """Those of `files` that its engine is loaded from."""
        return self.files - {f"{self.name}/{name}" for name in self.kept_names}

    # --- this machine ------------------------------------------------------------------------------------------------

    def in_auto(self) -> bool:
        """Does `--target auto` build it on this machine?"""
        return find_spec(self.package) is not None

    def package_problems(self) -> list[str]:
        """One message with a remedy where its package is not installed, else none."""
        try:
            machine.require((self.package,), f"target {self.name}")
        except EnvironmentLacksError as error:
            return [str(error)]
        return []

    def problems_of_gpus(self, recipe: Recipe) -> list[str]:
        """A message for each thing in the recipe that no target for GPUs takes: quantized attention, autoencoders."""
        found = []
        attention = recipe.attention
        if not (self.quantizes_attention or attention.is_auto or attention.formats is None):
            remedy = f"{KEEPS_FLOAT}, --target cpu takes it"
            found.append(f"target {self.name} has no quantized attention (the recipe's: {attention.text()}); {remedy}")
        if recipe.half is not None:
            found.append(f"target {self.name} builds no {recipe.half} of an autoencoder; --target cpu does")
        return found

    @abstractmethod
    def checks(self) -> list[Check]:
        """Rows of `doctor`. A row that several targets have in common is equal in all of them."""

    @abstractmethod
    def fitness_problem(self, manifest: Manifest, source: Path) -> str | None:
        """Why this machine cannot run the target of a bundle, with a remedy; None if it can.

        source: the manifest's file. Raises ContractError where it lacks what the target needs to be judged.
        """

    def metadata(self, manifest: Manifest, source: Path, schema: type[T]) -> T:
        """metadata.json as the manifest has it, too. schema: what is read of it. Raises ContractError."""
        row = manifest["targets"][self.name].get("metadata", {})
        return validated(row, f"{source}: targets.{self.name}.metadata", schema, metadata_file.RULES)

    # --- build and load ----------------------------------------------------------------------------------------------

    def quantizes_attention_by_default(self, recipe: Recipe) -> bool:
        """May attention "auto" be quantized, with the recipe's options on this machine?"""
        return self.quantizes_attention

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with what "auto" means on this machine for this target's options, as the bundle records it."""
        return recipe

    @abstractmethod
    def problems(self, recipe: Recipe) -> list[str]:
        """What this machine or recipe lacks for a build, as messages with a remedy; empty if nothing."""

    @abstractmethod
    def lower(self, portable: Path, work_dir: Path, recipe: Recipe) -> LoweredGraph:
        """Lower the portable model (path of model.onnx) into an ONNX file under `work_dir`; deterministic bytes."""

    @abstractmethod
    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Recipe) -> BuildResult:
        """Make the engine from the lowered graph and write it into `out_dir` (the target's folder of the bundle)."""

    @abstractmethod
    def load(self, bundle_dir: Path, threads: int = 0) -> LoadedEngine:
        """Engine of a folder of verified files that may go once it is loaded.

        threads: of one call, for engines that compute on the CPU; 0: as many as `machine.threads` allows. Raises
        EnvironmentLacksError where it would not run, or not exactly.
        """

    def kept_problem(self, folder: Path, lowered: LoweredGraph, recipe: Recipe) -> str | None:
        """Why what a bundle keeps for other programs in the target's folder is not what the builder got that the
        engine is from, where `lowered` is; None where it is, and where nothing is kept."""
        return None

    # --- verification ------------------------------------------------------------------------------------------------

    def arithmetic(self, recipe: Recipe, runs_here: bool) -> Arithmetic:
        """What its unquantized parts are computed in: by the engine where it runs here, else by its lowered graph."""
        return "fp32"

    def not_run_note(self, graph: LoweredGraph) -> str:
        """What a report says of an engine that does not run here, of which `graph` is judged instead."""
        return PROVEN_NOT_RUN

    def overflow(self, graph: LoweredGraph, recipe: Recipe) -> OverflowSearch | None:
        """Finds where FP16 between the engine's steps overflows; None where the lowered graph shows that itself."""
        return None
