"""A pipeline bundle: a folder of component bundles under diffusers' names, with tokenizers and a scheduler.

`pipeline.json` lists the components with the hash of each one's manifest, and size and hash of every other file, so
that whoever trusts it trusts all. A component is a bundle of its own: it may be opened, proven and replaced alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen
from typing_extensions import TypedDict

from export.documents import Rules, read_json, sha256
from export.errors import ContractError
from export.names import distinct, inside, is_hub_link
from pipeline.bundle.bundle import Bundle, load_bundle, verify_listed
from pipeline.bundle.contents import HUB_FILES, PIPELINE_FILES, PIPELINE_VERSION, STRANGE
from pipeline.bundle.hub import located
from pipeline.bundle.manifest_schema import File, Name
from pipeline.bundle.snapshot import REMEDY, verified_copy
from pipeline.bundle.stages import StageTime
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, tree
from pipeline.generate.components import PipelineSource
from pipeline.generate.example_prompts import own_prompts
from pipeline.generate.own_settings import own_settings
from pipeline.generate.pipeline_classes import DECODER, TRANSFORMER
from pipeline.generate.schedulers.config import CONFIG_FILE as SCHEDULER_FILE
from pipeline.generate.schedulers.config import SCHEDULER
from pipeline.generate.tokenizer import TOKENIZER_FILE

RULES = Rules(version=PIPELINE_VERSION)


class Component(TypedDict):
    """One component bundle. sha256: of its manifest."""

    engine: Name
    sha256: str


class PipelineManifest(TypedDict):
    """The whole document. class_name: of the diffusers pipeline. index: its model_index.json. left_out: parts of it
    that the bundle does without, and why. recipe: see pipeline/recipe.py."""

    schema_version: int
    pipeline: Name
    class_name: Name
    index: dict[str, object]
    components: Annotated[dict[str, Component], MinLen(1)]
    files: dict[str, File]
    left_out: dict[str, str]
    recipe: dict[str, object]
    source: dict[str, str]
    tools: dict[str, str]
    code: str
    machine: dict[str, object]
    created: str
    stages: list[StageTime]


@dataclass(frozen=True)
class PipelineBundle:
    """A verified pipeline bundle. components: in the order of diffusers' names."""

    path: Path
    manifest: PipelineManifest
    components: Mapping[str, Bundle]

    @property
    def name(self) -> str:
        return self.manifest["pipeline"]

    @property
    def class_name(self) -> str:
        return self.manifest["class_name"]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Their folders, as "tokenizer_2"."""
        return tuple(name.partition("/")[0] for name in self.manifest["files"] if name.endswith(f"/{TOKENIZER_FILE}"))

    def height_and_width(self) -> tuple[int | None, int | None]:
        """Of a picture in pixels, that the denoiser's engine was made for; None for the model's own size."""
        size = self.components[TRANSFORMER].recipe.sampling
        return size.height or None, size.width or None

    def engine_bytes(self, target: str = "auto") -> int:
        """As of a Bundle, of all components together. target: of the denoiser."""
        return sum(self.components[name].engine_bytes(own) for name, own in self._targets(target).items())

    @contextmanager
    def copied_others(self) -> Iterator[Path]:
        """A private, verified copy of what the bundle holds beside its components and its report, while the context
        lasts."""
        rows = {name: row for name, row in self.manifest["files"].items() if not name.startswith("report/")}
        with verified_copy(self.path, rows) as private:
            yield private

    def _targets(self, target: str) -> dict[str, str]:
        return {name: target if name == TRANSFORMER else "auto" for name in self.components}

    @contextmanager
    def source(self, target: str = "auto") -> Iterator[PipelineSource]:
        """What a run time draws with, while the context lasts; engines may be loaded after it. Its files are a private,
        verified copy. target: of the denoiser. Raises what `Bundle.choose` raises."""
        targets = self._targets(target)
        self.components[TRANSFORMER].choose(target)  # refused before a text encoder has run
        height, width = self.height_and_width()
        with self.copied_others() as private:
            yield PipelineSource(
                name=self.name,
                class_name=self.class_name,
                index=self.manifest["index"],
                engines={name: partial(bundle.engine, targets[name]) for name, bundle in self.components.items()},
                transformer=self.components[TRANSFORMER].config(),
                vae=self.components[DECODER].config() if DECODER in self.components else {},
                tokenizers={name: private / name / TOKENIZER_FILE for name in self.tokenizers},
                scheduler=private / SCHEDULER / SCHEDULER_FILE,
                prompts=own_prompts(private),
                settings=own_settings(private),
                height=height,
                width=width,
            )


def is_pipeline(folder: Path) -> bool:
    """Is the folder a pipeline bundle, rather than a bundle of one model?"""
    return (folder / PIPELINE_FILE).is_file()


def load_pipeline(path: str | Path, threads: int | None = None) -> PipelineBundle:
    """Open a pipeline bundle; every file of it and of its components is verified before anything is deserialized.

    path: as of `load_bundle`. threads: of an engine's call on the CPU; None: what the machine allows. Raises
    ContractError for one that is damaged or of another version.
    """
    with located(path) as folder:
        return opened(folder, read(folder), threads)


def opened(folder: Path, manifest: PipelineManifest, threads: int | None = None) -> PipelineBundle:
    """The pipeline bundle in `folder` that `manifest` describes, verified as by `load_pipeline`."""
    own = {name for name in tree(folder) if name.split("/")[0] not in manifest["components"]}
    own = {name for name in own if not HUB_FILES.fullmatch(name)}
    verify_listed(folder, own - {PIPELINE_FILE}, manifest["files"], PIPELINE_FILE)
    components = {}
    for name, row in manifest["components"].items():
        document = folder / name / MANIFEST_FILE
        if not document.is_file():
            raise ContractError(f"{document} is missing; {REMEDY}")
        if sha256(document) != row["sha256"]:
            raise ContractError(f"{document} differs from {folder / PIPELINE_FILE} (sha256); {REMEDY}")
        components[name] = load_bundle(folder / name, threads)
    return PipelineBundle(folder, manifest, components)


def read(folder: Path) -> PipelineManifest:
    """The pipeline.json of a folder, its form and names checked. Raises ContractError."""
    path = folder / PIPELINE_FILE
    if not path.is_file() or (path.is_symlink() and not is_hub_link(path, folder)):
        raise ContractError(f"{folder} is not a pipeline bundle: it has no {PIPELINE_FILE}; give the folder of a build")
    manifest = read_json(path, PipelineManifest, RULES)
    for name in (*manifest["files"], *manifest["components"]):
        inside(folder, name, path)
    for name in manifest["components"]:
        if "/" in name:
            raise ContractError(f"{path}: component {name!r} is no plain name; {REMEDY}")
    distinct([*manifest["files"], *manifest["components"], PIPELINE_FILE], path)
    refuse_strange_files(path, manifest["files"])
    return manifest


def refuse_strange_files(path: Path, files: Iterable[str]) -> None:
    """Raise ContractError for the first file that no build makes. path: of pipeline.json."""
    for name in sorted(files):
        if not PIPELINE_FILES.fullmatch(name):
            raise ContractError(f"{path}: {name} {STRANGE}")


def manifest_sha256(bundle: Path) -> str:
    """Of the document of a bundle, or of a whole pipeline, which leads to the SHA-256 of every other file."""
    return sha256(bundle / (PIPELINE_FILE if is_pipeline(bundle) else MANIFEST_FILE))
