"""The compiler of whole pipelines: from a folder of diffusers to a bundle of component bundles.

Each component is compiled by itself (pipeline/compiler.py), and taken over where the same was built before. Then the
pipeline's own gate compares a picture of the run time with that of diffusers on the same components.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from export.documents import sha256, shown
from export.errors import ContractError, ParityError, RecipeError
from export.models.adapters import merged_sha256
from export.models.weights import find_weights
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import PORTABLE, tool_versions
from pipeline.bundle import manifest, pipeline_bundle
from pipeline.bundle.bundle import load_bundle
from pipeline.bundle.contents import PIPELINE_VERSION
from pipeline.bundle.manifest_schema import File
from pipeline.bundle.pipeline_bundle import Component, PipelineBundle, PipelineManifest, is_pipeline
from pipeline.bundle.stages import WorkFolder, refuse_interrupted, timed
from pipeline.compiler import BuildRequest, Prepared, compile_prepared, prepare, refuse_existing
from pipeline.files import (
    MANIFEST_FILE,
    PIPELINE_FILE,
    publish,
    refuse_unwritable,
    remove,
    sha256_json,
    tree,
    write_json,
)
from pipeline.generate.conditioning import GENERATION_FILE
from pipeline.generate.convert_tokenizer import convert_tokenizer
from pipeline.generate.example_prompts import PROMPTS_FILE
from pipeline.generate.pipeline_classes import TRANSFORMER
from pipeline.generate.schedulers.config import CONFIG_FILE, SCHEDULER, scheduler_class, write_scheduler_config
from pipeline.parts import Part, PipelineFolder, read_folder
from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
# What the other components are built for, whatever the denoiser is: they run once for a picture.
OTHERS_TARGETS = ("cpu", PORTABLE)
REPORT = "report"


def compile_pipeline(request: BuildRequest, only: str | None = None) -> Path:
    """Build the pipeline bundle of `request`, whose recipe's model is a pipeline's folder; returns its own folder.

    only: the component to build again, or to add; the others are those of the bundle that is there. Raises what
    `compile_engine` raises; components that are finished by then stay in the work folder, for --resume.
    """
    folder = read_folder(request.recipe)
    parts = chosen_parts(request, folder, only)
    refuse_early(request, only)
    prepared = {part.name: prepare(part_request(request, part)) for part in parts}
    key = sha256_json([str(folder.root), folder.index])
    with WorkFolder(request.work_path, key, request.resume, request.force) as work:
        work.keeps = bool(finished(work.bundle))  # those of an interrupted build, should the first part fail
        for part in parts:
            build_part(request, part, prepared.pop(part.name), work.bundle)
            work.keeps = True
        if only is not None:
            take_over_others(request.output, work.bundle)
        write_others(folder, work.bundle)
        proven(request, folder, work)
        document = composed(request, folder, work)
        stages = [asdict(row) for row in document["stages"]]
        write_json(work.bundle / PIPELINE_FILE, {**document, "stages": stages})
        publish(work.bundle, request.output, aside=work.path / "replaced")
        work.keeps = False
    return request.output


def chosen_parts(request: BuildRequest, folder: PipelineFolder, only: str | None) -> tuple[Part, ...]:
    """The parts to build. Raises RecipeError for one that is to be put into a bundle which is not there."""
    if only is None:
        return folder.parts
    if not is_pipeline(request.output):
        raise RecipeError(
            f"--component {only}: {request.output} is no pipeline bundle to put it into; build the whole without "
            "--component first, or name that bundle by --output-dir"
        )
    part = folder.part(only)
    refuse_others_of_another(pipeline_bundle.load_pipeline(request.output), request.recipe, folder, only)
    return (part,)


def refuse_others_of_another(whole: PipelineBundle, recipe: Recipe, folder: PipelineFolder, only: str) -> None:
    """Raise RecipeError where a component that stays in the bundle was made by another recipe, or of other weights than
    the folder has: pipeline.json says one of each for all."""
    made = recipes.from_dict(whole.manifest["recipe"], str(whole.path / PIPELINE_FILE))
    parts = read_folder(replace(made, model=recipe.model))  # wherever the folder was by then
    for name in sorted(whole.components.keys() - {only}):
        own, asked = parts.part(name).recipe, folder.part(name).recipe
        differing = _first_difference(own.document(), asked.document())
        if differing is None and weights_sha256(asked) != whole.components[name].manifest["model"]["sha256"]:
            differing = f"file of weights than {asked.model} has"
        if differing is not None:
            raise RecipeError(
                f"--component {only}: {name} stays in {whole.path}, and was made with another {differing}; give the "
                "folder and the flags of that build beside what is new, or build the whole with --force, which takes "
                "over what is the same"
            )


def weights_sha256(recipe: Recipe) -> str:
    """As of a loaded model, of which a recipe's folder holds the weights; nothing is loaded."""
    files = find_weights(Path(recipe.model), recipe.model_variant)
    return merged_sha256(files.sha256(), recipe.adapters)


def _first_difference(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """The key of a recipe, as `--set` has it, in which two differ, with both values; None where they are equal."""
    for key in sorted(one.keys() | other.keys()):
        own, asked = one.get(key), other.get(key)
        if isinstance(own, Mapping) and isinstance(asked, Mapping):
            inner = _first_difference(own, asked)
            if inner is not None:
                return f"{key}.{inner}"
        elif own != asked:
            return f"{key} ({shown(own)}, not {shown(asked)})"
    return None


def refuse_early(request: BuildRequest, only: str | None) -> None:
    """Refuse, before any part is looked at, to replace what was not to be replaced."""
    if only is None:
        refuse_existing(request)
    refuse_unwritable(request.output, True, "--output-dir")
    refuse_interrupted(request.work_path, request.resume, request.force)


def part_request(request: BuildRequest, part: Part) -> BuildRequest:
    """The request of one component, built in the work folder of the whole."""
    is_denoiser = part.name == TRANSFORMER

    def heard(event: Mapping[str, object]) -> None:
        request.listener({"component": part.name, **event})

    return replace(
        request,
        recipe=part.recipe,
        targets=request.targets if is_denoiser else OTHERS_TARGETS,
        output=request.work_path / "bundle" / part.name,
        rejected=request.rejected_path / part.name,
        force=True,  # what is in the work folder is the build's own
        checkpoint=request.checkpoint if is_denoiser else None,
        listener=heard,
    )


def build_part(request: BuildRequest, part: Part, prepared: Prepared, folder: Path) -> None:
    """Compile a component into `folder`, or take over the same one from an interrupted or an earlier build."""
    own, earlier = part_request(request, part), request.output / part.name
    if is_same(own.output, own, prepared):
        logger.info("%s: built before, taken over", part.name)
    elif is_same(earlier, own, prepared):
        logger.info("%s: as in %s, taken over", part.name, request.output)
        link_tree(earlier, own.output)
    else:
        logger.info("component %s", part.name)
        compile_prepared(own, prepared)


def is_same(bundle: Path, request: BuildRequest, prepared: Prepared) -> bool:
    """Is there a whole bundle that this request would make again? Layers of a checkpoint are in no bundle's key."""
    if request.checkpoint is not None or not (bundle / MANIFEST_FILE).is_file():
        return False
    try:
        document = load_bundle(bundle).manifest
    except ContractError as error:
        logger.warning("%s; the component is built again", error)
        return False
    dropped = {PORTABLE} if request.drop_portable else set()
    return document.get("key") == prepared.key and set(document["targets"]) == set(request.targets) - dropped


def take_over_others(bundle: Path, folder: Path) -> None:
    """Put the components of a pipeline bundle into `folder`, but for those that are there."""
    for name in pipeline_bundle.read(bundle)["components"]:
        if not (folder / name).exists():
            link_tree(bundle / name, folder / name)


def link_tree(source: Path, destination: Path) -> None:
    """A folder of the same files, without their bytes a second time where the file system can."""
    remove(destination)
    shutil.copytree(source, destination, copy_function=_link)


def _link(source: str, destination: str) -> None:
    try:
        os.link(os.path.realpath(source), destination)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, destination)


def write_others(folder: PipelineFolder, bundle: Path) -> None:
    """Tokenizers, each as one file, the scheduler's configuration, and the pipeline's prompts and settings where it has
    files of them."""
    for name, class_name in folder.tokenizers.items():
        (bundle / name).mkdir(exist_ok=True)
        convert_tokenizer(folder.root / name, class_name, bundle / name)
    (bundle / SCHEDULER).mkdir(exist_ok=True)
    scheduler = f"{SCHEDULER}/{CONFIG_FILE}"
    write_scheduler_config(bundle / scheduler, scheduler_class(folder.index), folder.root / scheduler)
    for name in (PROMPTS_FILE, GENERATION_FILE):
        remove(bundle / name)  # of an interrupted build, before the pipeline lost its own
        if os.path.lexists(folder.root / name):
            shutil.copyfile(folder.root / name, bundle / name)


def proven(request: BuildRequest, folder: PipelineFolder, work: WorkFolder) -> None:
    """Stage: the pipeline's own gates, and its page. A failure raises ParityError; the report is kept among the
    rejected."""
    from pipeline.verify.pipeline_gates import pipeline_report
    from pipeline.verify.pipeline_page import PAGE, write_pipeline_page

    remove(work.bundle / REPORT)
    # pipeline.json is written last: it seals the folder, in which an interrupted build goes on
    whole = pipeline_bundle.opened(work.bundle, composed(request, folder, work))
    report, spent = timed("pipeline", lambda: pipeline_report(whole, folder), request.listener)
    work.times.append(spent)
    reports = {name: bundle.path / REPORT for name, bundle in whole.components.items()}
    write_pipeline_page(report, whole, reports, work.bundle / REPORT)
    if not report.passed:
        rejected = request.rejected_path / REPORT
        write_pipeline_page(report, whole, reports, rejected)
        raise ParityError(f"{report.sentence()}; see {rejected / PAGE}")
    for gate in report.gates:
        logger.info("pipeline/%s: %g %s, limit %g", gate.name, gate.value, gate.unit, gate.limit)


def finished(bundle: Path) -> list[str]:
    """Names of the components in a growing bundle."""
    return [path.name for path in sorted(bundle.iterdir()) if (path / MANIFEST_FILE).is_file()]


def composed(request: BuildRequest, folder: PipelineFolder, work: WorkFolder) -> PipelineManifest:
    """pipeline.json of the finished folder."""
    bundle = work.bundle
    names = finished(bundle)
    own = [name for name in tree(bundle) if name.split("/")[0] not in names and name != PIPELINE_FILE]
    files: dict[str, File] = {
        name: {"size": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)} for name in own
    }
    components: dict[str, Component] = {
        name: {"engine": manifest.read(bundle / name)["engine"], "sha256": sha256(bundle / name / MANIFEST_FILE)}
        for name in names
    }
    return {
        "schema_version": PIPELINE_VERSION,
        "pipeline": request.recipe.name,
        "class_name": folder.class_name,
        "index": folder.index,
        "components": components,
        "files": files,
        "left_out": folder.left_out,
        "recipe": request.recipe.document(),
        "source": {"path": request.recipe.model, "revision": folder.revision},
        "tools": tool_versions(),
        "code": machine.code_version(),
        "machine": dict(machine.facts()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": list(work.times),
    }
