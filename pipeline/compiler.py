"""The compiler as one straight line: model -> calibrate -> export -> targets -> verify -> bench -> bundle."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export import checkpoint
from export.about import About
from export.checkpoint import QuantizedLinear
from export.documents import open_file
from export.errors import ContractError, EnvironmentLacksError, ParityError, RecipeError, ResourceError
from export.names import inside
from pipeline import machine
from pipeline.backends import BACKENDS, PORTABLE, lowering_file, opened, tool_versions
from pipeline.backends.base import KEEPS_FLOAT, BuildResult
from pipeline.backends.mapped_pages import give_back_weights
from pipeline.bundle import manifest
from pipeline.bundle.card import license_of
from pipeline.bundle.stages import Listener, StageTime, WorkFolder, refuse_interrupted, timed
from pipeline.calibrate import origin, refuse_unfit, with_method
from pipeline.calibrate.plan import make_plans
from pipeline.files import is_bundle, publish, refuse_unwritable, remove, sha256_json, write_json
from pipeline.generate.case import Case, make_case
from pipeline.generate.conditioning import GENERATION_FILE, load_generation
from pipeline.generate.sampling import make_sampler
from pipeline.recipe import Attention, Recipe, load_float_model, settled_attention, to_toml

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)

# Disk while building, in bytes per parameter, whatever the targets: checkpoint by layer and joined, and the portable
# model.
BYTES_PER_PARAMETER = 2.0
# The baselines of the measurement (see bench), and up to how many parameters there are any: in float32 in PyTorch and
# in onnxruntime they take 8 bytes of memory for each, besides the disk.
BASELINE_BYTES, MOST_COMPARED = 9.0, 1_000_000_000
REPORT_PAGE = "report/index.html"
PARTIAL = ".partial"  # how the name of a work folder ends
# In the work folder: the page as verification leaves it, and the section that the measurement adds.
PAGE, MEASURED = "page.html", "measured.html"


@dataclass(frozen=True)
class BuildRequest:
    """One build: a resolved recipe, the targets, the destination folder, and what to do with what stands there.

    targets: the portable model is always among them. checkpoint: a folder of `python -m pipeline.calibrate` whose
    layers are taken instead of calibrating. drop_portable: the portable model is what engines are lowered from and no
    more: neither proven nor in the bundle, which it would double. rejected: where an engine goes that fails its gates;
    None: into `rejected/` beside the destination.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    output: Path
    resume: bool = False
    force: bool = False
    checkpoint: Path | None = None
    drop_portable: bool = False
    rejected: Path | None = None
    listener: Listener = lambda event: None

    def __post_init__(self) -> None:
        if PORTABLE not in self.targets:
            object.__setattr__(self, "targets", (*self.targets, PORTABLE))

    @property
    def work_path(self) -> Path:
        return Path(f"{os.path.abspath(self.output)}{PARTIAL}")

    @property
    def rejected_path(self) -> Path:
        return self.rejected or self.work_path.parent / "rejected" / self.work_path.stem


def compile_engine(request: BuildRequest) -> Path:
    """Build the bundle of `request`; returns its folder, which is there only when it is complete.

    Raises export.errors.UserError: before work starts for whatever cannot be done, ParityError when a gate fails (the
    engine and its report are kept at `request.rejected_path`).
    """
    return compile_prepared(request, prepare(request))


@dataclass(frozen=True)
class Prepared:
    """What is known when work starts. recipe: with what it means in place of every "auto"; time: what loading the model
    took."""

    recipe: Recipe
    model: LoadedModel
    time: StageTime

    @property
    def key(self) -> str:
        """Hash of everything that decides the bytes of the bundle; files that the recipe or the model names by their
        content. Raises RecipeError for a prompt file that cannot be used."""
        from pipeline.calibrate.data import sampled_by

        row, config = model_row(self.model), self.model.config_sha256
        layers = origin(self.model, self.recipe) if self.model.family.quantizes else None
        sampled = sampled_by(self.model) if (self.model.folder / GENERATION_FILE).is_file() else None
        named = [layers, sampled, license_of(self.model.source).text]  # every graph states the licence
        return sha256_json([self.recipe.document(), row, config, named, tool_versions(), machine.code_version()])


def compile_prepared(request: BuildRequest, prepared: Prepared) -> Path:
    """As `compile_engine`, of what `prepare` gave."""
    recipe, model, key = prepared.recipe, prepared.model, prepared.key
    with WorkFolder(request.work_path, key, request.resume, request.force, request.listener, [prepared.time]) as work:
        layers = calibrated(work, model, recipe, request.checkpoint)
        exported(work, model, layers, recipe)
        results = {target: built(work, target, recipe) for target in request.targets}
        if request.drop_portable:
            del results[PORTABLE]
        facts = manifest.BuildFacts(key, recipe, model_row(model), layers, list(model.kept()), results, work.times)
        drop_other_targets(work.bundle, request.targets)
        describe(work.bundle, model, recipe)
        verified(work, model, facts, request.rejected_path)
        benched(work, model, facts)
        if request.drop_portable:
            drop_portable(work.bundle)
        refuse_existing(request)  # another build may have finished since this one began
        manifest.write(manifest.compose(facts, work.bundle), work.bundle)
        publish(work.bundle, request.output, aside=work.path / "replaced")
    return request.output


def prepare(request: BuildRequest) -> Prepared:
    """The recipe without any "auto", and the model: all that can be refused before work starts is refused here."""
    recipe = request.recipe
    refuse_early(request)
    logger.info("%s of %s for %s into %s", recipe.name, recipe.model, ", ".join(request.targets), request.output)
    model, model_time = timed("model", lambda: load_float_model(recipe), request.listener)
    give_back_weights(model)  # all were read, to check them
    if model.family.quantizes:
        logger.info("%s: %s", recipe.model, model.coverage())
    model.cells(recipe.sampling.height, recipe.sampling.width)  # refuses an image size that the model cannot make
    if model.family.recordings is not None:
        from export.to_onnx import refuse_untraceable

        refuse_untraceable(model, recipe.sampling.height, recipe.sampling.width)
    recipe = with_method(recipe, model)
    for target in request.targets:
        recipe = BACKENDS[target].settled(recipe)
    refuse_full_disk(request, model.parameters)
    make_plans(model.linears(), recipe)  # refuses groups that do not fit
    recipe = with_attention(recipe, model, request.targets)
    case = make_case(model, recipe)
    if isinstance(case, Case):
        make_sampler(case.sampler, case.n_steps, case.timestep_scale)  # refuses a generation.json not to be drawn by
    if request.checkpoint:
        refuse_unfit(model, recipe, request.checkpoint)
    refuse_interrupted(request.work_path, request.resume, request.force)
    return Prepared(recipe, model, model_time)


def with_attention(recipe: Recipe, model: LoadedModel, targets: Sequence[str]) -> Recipe:
    """The recipe with what attention "auto" means for this model and these targets, which is said with the reason; any
    other comes back as it is.

    Raises RecipeError where the recipe names formats and the model has no attention that can be quantized.
    """
    chosen = settled_attention(recipe, targets)
    if chosen.attention.formats is None:
        if recipe.attention.is_auto:
            lacking = " and ".join(
                name for name in targets if not BACKENDS[name].quantizes_attention_by_default(recipe)
            )
            logger.info("attention auto: float, for want of a kernel for quantized attention in target %s", lacking)
        return chosen
    from export.models.attention_calls import attention_names

    try:
        count = len(attention_names(model))
    except ContractError as error:
        if not recipe.attention.is_auto:
            raise RecipeError(f"{recipe.model}: {error}") from error
        logger.info("attention auto: float, since the model's cannot be quantized: %s", error)
        return replace(recipe, attention=Attention())
    if recipe.attention.is_auto:
        words = "attention auto: %s for %d attentions, which every target (%s) computes; %s"
        logger.info(words, chosen.attention.text(), count, ", ".join(targets), KEEPS_FLOAT)
    else:
        logger.info("%d attentions to quantize at %s", count, chosen.attention.text())
    return chosen


def refuse_early(request: BuildRequest) -> None:
    """Refuse what can be refused without the model."""
    machine.require_compiler("building an engine")
    if request.drop_portable and set(request.targets) == {PORTABLE}:
        raise RecipeError("--drop-portable leaves a bundle without any engine; name another --target, such as cpu")
    problems = [problem for target in request.targets for problem in BACKENDS[target].problems(request.recipe)]
    if problems:
        raise EnvironmentLacksError("; ".join(problems))
    refuse_existing(request)
    refuse_unwritable(request.output, True, "--output-dir")


def refuse_existing(request: BuildRequest) -> None:
    """Refuse to replace what was not to be replaced, or is no bundle."""
    if request.output.exists() and not request.force:
        raise RecipeError(f"{request.output} exists; add --force to replace it, or choose another --output-dir")
    if request.output.exists() and not is_bundle(request.output):
        raise RecipeError(f"{request.output} is not a bundle and is not replaced; choose another --output-dir")


def refuse_full_disk(request: BuildRequest, parameters: int) -> None:
    """Refuse a build that cannot fit beside what is on the disk already."""
    of_targets = sum(BACKENDS[target].disk_bytes_per_parameter for target in request.targets)
    of_baselines = BASELINE_BYTES if parameters <= MOST_COMPARED else 0.0
    needed = parameters * (BYTES_PER_PARAMETER + of_baselines + of_targets)
    existing = next(parent for parent in request.output.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        sizes = f"{free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed"
        raise ResourceError(f"{existing}: {sizes} for {parameters:,} parameters; free some space or choose another -o")


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets of `--target`: names with commas, or `auto` for all that can be built here."""
    if text == "auto":
        return tuple(name for name, backend in BACKENDS.items() if backend.in_auto())
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise RecipeError(f"target {name!r} is unknown; use auto or some of {', '.join(BACKENDS)}")
    return names


def fitting_targets(targets: tuple[str, ...], recipe: Recipe, named: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`targets` of `auto` without those that refuse the recipe or lack something here; the log says which, and why.

    Those in `named` were asked for and stay: `refuse_early` refuses them by name. Raises EnvironmentLacksError with
    all reasons if none is left.
    """
    machine.require_compiler("building an engine")
    problems = {target: BACKENDS[target].problems(recipe) for target in targets if target not in named}
    left = tuple(target for target in targets if not problems.get(target))
    reasons = [f"{target}: {problem}" for target, listed in problems.items() for problem in listed]
    if not left:
        raise EnvironmentLacksError(f"no target can be built from this recipe here; {'; '.join(reasons)}")
    for reason in reasons:
        logger.warning("left out of --target auto, %s", reason)
    return left


def tensor_counts(model: LoadedModel) -> dict[str, object]:
    """How many tensors of the model's files are used, and which are not, with the reason why that is harmless."""
    return {"used": len(model.used), "ignored": dict(model.ignored)}


def model_row(model: LoadedModel) -> dict[str, object]:
    """Where the model came from and what of its files is in it, for the manifest."""
    adapters = {"adapters": [adapter.row() for adapter in model.adapters]} if model.adapters else {}
    return {
        "source": model.source,
        "revision": model.revision,
        "sha256": model.sha256,
        "family": model.family.name,
        "tensors": tensor_counts(model),
        **adapters,
    }


def calibrated(
    work: WorkFolder, model: LoadedModel, recipe: Recipe, source: Path | None = None
) -> list[QuantizedLinear]:
    """Stage: quantize every linear, or take the layers in `source`; the method keeps its own finer state in the same
    folder."""
    from pipeline.calibrate import adopt, calibrate

    if not model.family.quantizes:
        return []
    folder = work.scratch("calibrate")

    def quantize() -> list[QuantizedLinear]:
        return adopt(model, recipe, source, folder) if source else calibrate(model, recipe, folder)

    return work.run("calibrate", ("calibrate",), quantize, lambda: checkpoint.load(folder))


def exported(work: WorkFolder, model: LoadedModel, layers: list[QuantizedLinear], recipe: Recipe) -> None:
    """Stage: write the portable model, model.onnx and its data file."""
    from export.to_onnx import export_portable

    def export() -> None:
        size = recipe.sampling
        path = work.bundle / "model.onnx"
        about = About(recipe.name, license_of(model.source).text)
        export_portable(model, layers, path, size.height, size.width, recipe.attention.formats, about)

    work.run("export", ("bundle/model.onnx", "bundle/model.onnx.data"), export, lambda: None)


def built(work: WorkFolder, target: str, recipe: Recipe) -> BuildResult:
    """Stage: passes and backend of one target."""
    backend, scratch, out = BACKENDS[target], work.scratch(f"lower-{target}"), work.bundle / target

    def build() -> BuildResult:
        for folder in (out, scratch):
            remove(folder)
            folder.mkdir()
        lowered = backend.lower(work.bundle / "model.onnx", scratch, recipe)
        result = backend.build(lowered, out, recipe)
        for folder in (out, scratch):
            if not any(folder.iterdir()):  # the portable model's files are the export's
                folder.rmdir()
        lowering_file.write_record(result, work.path, target)
        return result

    outputs = (f"bundle/{target}", scratch.name, *lowering_file.record_names(target))
    return work.run(target, outputs, build, lambda: lowering_file.read_record(work.path, target))


def drop_other_targets(folder: Path, targets: tuple[str, ...]) -> None:
    """Remove engines that an interrupted build made for targets which this one was not asked for."""
    for target in set(BACKENDS) - set(targets):
        remove(folder / target)


def drop_portable(folder: Path) -> None:
    """Remove the portable model from a finished bundle."""
    for name in BACKENDS[PORTABLE].file_names:
        remove(folder / name)


def describe(folder: Path, model: LoadedModel, recipe: Recipe) -> None:
    """Write what a bundle needs to be used alone: recipe, config, and how the model generates."""
    (folder / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    write_json(folder / "config.json", dict(model.config))
    if (model.folder / GENERATION_FILE).is_file():
        for name in load_generation(model.folder).files:
            source = model.folder / name
            open_file(source).close()  # refuses what is no file
            shutil.copyfile(source, inside(folder, name, source))


def verified(work: WorkFolder, model: LoadedModel, facts: manifest.BuildFacts, rejected: Path) -> None:
    """Stage: all gates. A failure moves the engine with its report to `rejected` and raises ParityError.

    The report's page waits in the work folder for the section that `benched` adds.
    """
    from pipeline.verify.proof import verify

    def prove() -> None:
        lowered = {target: result.lowered for target, result in facts.results.items()}
        with opened(work.bundle, tuple(lowered)) as engines:
            report = verify(model, facts.layers, lowered, engines, facts.recipe, work.bundle / "report")
        if not report.passed:  # the engine is kept, complete with manifest and report, apart from the good ones
            rejected.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(manifest.compose(facts, work.bundle), work.bundle)
            publish(work.bundle, rejected, aside=work.path / "replaced")
            raise ParityError(f"{report.sentence()}; see {rejected / REPORT_PAGE}")
        (work.bundle / REPORT_PAGE).replace(work.path / PAGE)

    work.run("verify", ("bundle/report", PAGE), prove, lambda: None, depends=sorted(facts.results))


def benched(work: WorkFolder, model: LoadedModel, facts: manifest.BuildFacts) -> None:
    """Stage: measure the engines that run here against the float model. Then the report's page shows the numbers."""
    from pipeline.bench.baselines import baselines
    from pipeline.bench.measure import bench, measured
    from pipeline.verify.page import MEASURED_SLOT, measured_section

    def measure() -> None:
        threads = machine.threads()
        with opened(work.bundle, measured(facts.results), threads) as engines:
            compared = model.parameters <= MOST_COMPARED
            others = baselines(model, facts.recipe, work.scratch("bench"), threads) if compared else []
            if not compared:
                logger.info("measured alone: a model of more than %.0e parameters has no baselines", MOST_COMPARED)
            document = bench(model, engines, facts.recipe, work.bundle, others, threads)
        remove(work.path / "bench")
        write_json(work.bundle / "bench.json", document)
        (work.path / MEASURED).write_text(measured_section(document), encoding="utf-8")

    work.run("bench", ("bundle/bench.json", MEASURED), measure, lambda: None, depends=sorted(facts.results))
    page, section = ((work.path / name).read_bytes() for name in (PAGE, MEASURED))
    (work.bundle / REPORT_PAGE).write_bytes(page.replace(MEASURED_SLOT.encode(), section))
