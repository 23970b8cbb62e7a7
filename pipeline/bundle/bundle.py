"""A bundle: the folder that `build` wrote, opened only after every file has been verified."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import open_file
from export.errors import ContractError, EnvironmentLacksError, RecipeError, UserError
from export.models.config import FILE as CONFIG
from export.models.config import engine_config, read_config
from export.models.families import DENOISER, FAMILIES, RECORDED, TEXT_ENCODER, Config
from export.names import is_hub_link
from pipeline import machine, recipe
from pipeline.backends import BACKENDS
from pipeline.backends.base import LoadedEngine
from pipeline.bundle import manifest
from pipeline.bundle.contents import GENERATION_FILES, HUB_FILES, refuse_strange_files, refuse_unknown_targets
from pipeline.bundle.hub import located
from pipeline.bundle.in_place import HoldingEngine, digest, held_files
from pipeline.bundle.manifest_schema import File, Manifest
from pipeline.bundle.snapshot import REMEDY, verified_copy
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, tree
from pipeline.generate.conditioning import Generation, load_generation

if TYPE_CHECKING:
    from pipeline.generate.diffusers_adapter import EngineTransformer
    from pipeline.generate.text_stand_in import EngineTextEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder and its manifest. threads: of an engine's call; None: what the machine allows.

    What is used later is verified again while it is read, so that a file changed since then is noticed.
    """

    path: Path
    manifest: Manifest
    threads: int | None = None

    @property
    def name(self) -> str:
        return self.manifest["engine"]

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.manifest["targets"])

    @property
    def recipe(self) -> recipe.Recipe:
        return recipe.from_dict(self.manifest["recipe"], str(self.path / MANIFEST_FILE))

    def problem(self, target: str) -> str | None:
        """Why this machine cannot run `target` of the bundle, with a remedy; None if it can."""
        if target not in self.targets:
            return (
                f"{self.path} has no target {target}, only {', '.join(self.targets)}; build it with --target {target}"
            )
        return BACKENDS[target].fitness_problem(self.manifest, self.path / MANIFEST_FILE)

    def choose(self, target: str = "auto") -> str:
        """The target to run: the named one, or the fastest that fits. Raises EnvironmentLacksError or RecipeError."""
        if target != "auto" and target not in self.targets:
            raise RecipeError(self.problem(target))
        fastest_first = sorted(self.targets, key=lambda name: BACKENDS[name].speed_rank)
        problems: list[str] = []
        for name in fastest_first if target == "auto" else [target]:
            problem = self.problem(name)
            if problem is None:
                if target == "auto" and BACKENDS[name].slow:
                    logger.warning(
                        "no faster target fits this machine (%s): the portable model runs, many times slower",
                        "; ".join(problems) or "the bundle has none",
                    )
                return name
            logger.info("target %s does not fit this machine: %s", name, problem)
            problems.append(problem)
        raise EnvironmentLacksError("; ".join(problems) or f"{self.path} has no target that can run")

    def engine(self, target: str = "auto") -> LoadedEngine:
        """Load the engine of `target`, or of the fastest target that fits this machine.

        Small files, and those that other users may change, are loaded from a private copy, hashed while it is made:
        what happens to the bundle's files later cannot change the engine (snapshot.py). Large ones are used where they
        lie, and hashed at the first load of a process alone: a call of an engine whose files were changed raises
        ContractError. What that guarantees against whom is in in_place.py.
        """
        target = self.choose(target)
        backend, threads = BACKENDS[target], machine.threads(self.threads)
        held = held_files(self.path, self._files_of(target))
        if held is None:
            with self.copied(backend.loaded_files.__contains__) as private:
                return backend.load(private.path, threads)
        engine = HoldingEngine(backend.load(self.path, threads), held)
        try:
            held.refuse_replaced()
        except ContractError:
            engine.close()
            raise
        return engine

    def engine_bytes(self, target: str = "auto") -> int:
        """Size of the files that `engine` loads: about the memory that an engine takes before its first call."""
        return sum(row["size"] for row in self._files_of(self.choose(target)).values())

    def _files_of(self, target: str) -> dict[str, File]:
        files = BACKENDS[target].loaded_files
        return {name: row for name, row in self.manifest["files"].items() if name in files}

    @contextmanager
    def copied(self, takes: Callable[[str], object] = lambda name: True) -> Iterator[Bundle]:
        """This bundle as a private, verified copy of the files whose names it `takes`, while the context lasts.

        An error from within that names a file of the copy, which is then gone, names the bundle's instead.
        """
        files = self.manifest["files"]
        with verified_copy(self.path, {name: files[name] for name in files if takes(name)}) as private:
            try:
                yield replace(self, path=private)
            except UserError as error:
                error.args = tuple(str(part).replace(str(private), str(self.path)) for part in error.args)
                raise

    @contextmanager
    def generation(self) -> Iterator[Generation]:
        """How the model makes pictures, from a private, verified copy of its files, while the context lasts."""
        with self.copied(GENERATION_FILES.fullmatch) as private:
            yield load_generation(private.path)

    @property
    def noun(self) -> str:
        """What the model is; a family outside the table is a denoiser's."""
        family = FAMILIES.get(self.manifest["model"]["family"])
        return DENOISER if family is None else family.noun

    @property
    def is_denoiser(self) -> bool:
        """Is it called step by step, to draw? Other parts of a pipeline are called once."""
        return self.noun == DENOISER

    def refuse_other_part(self) -> None:
        """Raise RecipeError where the bundle draws nothing by itself."""
        if not self.is_denoiser:
            raise RecipeError(
                f"{self.path} is a {self.noun}, which draws nothing; give the bundle of a denoiser, and call this one "
                "by load(BUNDLE).engine().run"
            )

    def config(self) -> Config:
        """The model's configuration, of a denoiser with what drawing needs in it. Raises ContractError where it lacks
        that, or the file changed since it was verified."""
        with self.copied({CONFIG}.__contains__) as private:
            if self.is_denoiser and self.manifest["model"]["family"] != RECORDED:
                engine_config(private.path)
            return read_config(private.path / CONFIG, ContractError)

    def as_diffusers(self, target: str = "auto") -> EngineTransformer:
        """A drop-in for the `transformer` of a diffusers pipeline. Raises RecipeError for another part."""
        self.refuse_other_part()
        machine.require(("torch", "diffusers"), "standing in for a diffusers transformer", "build")
        from pipeline.generate.diffusers_adapter import as_diffusers

        return as_diffusers(self, target)

    def as_text_encoder(self, target: str = "auto") -> EngineTextEncoder:
        """A drop-in for the `text_encoder` of a diffusers pipeline. Raises RecipeError for another part."""
        if self.noun != TEXT_ENCODER:
            raise RecipeError(f"{self.path} is a {self.noun}; give the bundle of a text encoder")
        machine.require(("torch", "transformers"), "standing in for a text encoder of transformers", "build")
        from pipeline.generate.text_stand_in import EngineTextEncoder

        states = FAMILIES[self.manifest["model"]["family"]].hidden_states
        return EngineTextEncoder(self.engine(target), self.config(), states)


def load_bundle(path: str | Path, threads: int | None = None) -> Bundle:
    """Open a bundle: form, file names, links, sizes and hashes are verified before anything is deserialized.

    path: a folder, or `hf://OWNER/NAME[@REVISION]`, which is downloaded into the hub's cache first. threads: of an
    engine's call on the CPU; None: what the machine allows. Raises ContractError for a bundle that is damaged, not a
    bundle, of another version, or holds what no build makes; RecipeError for a wrong number of threads, and for the hub
    what `hub.located` does.
    """
    machine.threads(threads)
    with located(path) as folder:
        return _verified(folder, threads)


def _verified(folder: Path, threads: int | None) -> Bundle:
    if not folder.is_dir():
        raise ContractError(
            f"{folder} is not a folder; give the folder that build wrote, for example engines/pixart_w4a6"
        )
    if (folder / PIPELINE_FILE).is_file():
        raise RecipeError(
            f"{folder} is a pipeline bundle; give a component of it, as {folder / 'transformer'}, or draw with the "
            "whole by `ditc generate` or ditc.Pipeline"
        )
    document = manifest.read(folder)
    refuse_unknown_targets(document, folder)
    refuse_strange_files(folder, document["files"], document["targets"])
    verify_files(folder, document["files"])
    return Bundle(folder, document, threads)


def verify_files(folder: Path, files: Mapping[str, File]) -> None:
    """Compare the folder with the manifest's table of files. Raises ContractError naming the first difference."""
    names = {name for name in tree(folder) if not HUB_FILES.fullmatch(name)}
    verify_listed(folder, names - {MANIFEST_FILE}, files, "manifest")


def verify_listed(folder: Path, names: AbstractSet[str], files: Mapping[str, File], table: str) -> None:
    """Compare the files `names` of a folder, relative to it, with the table of files of the document called `table`.

    A file that this process has hashed, and that did not change since, is not read again. Raises ContractError naming
    the first difference.
    """
    links = (name for name in sorted(names) if (folder / name).is_symlink())  # open_file refuses pipes and devices
    foreign = [name for name in links if not is_hub_link(folder / name, folder)]
    if foreign:
        raise ContractError(f"{folder / foreign[0]} is a link; a bundle has plain files only, copy it with cp -rL")
    for text, differing in (("is missing", files.keys() - names), (f"is not in the {table}", names - files.keys())):
        if differing:
            raise ContractError(f"{folder / min(differing)} {text}; {REMEDY}")
    for path, row in ((folder / name, row) for name, row in files.items()):
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != row["size"]:
                raise ContractError(f"{path} has {size} bytes, the {table} says {row['size']}; {REMEDY}")
            found = digest(file)
        if found != row["sha256"]:
            raise ContractError(f"{path} differs from the {table} (sha256); {REMEDY}")
