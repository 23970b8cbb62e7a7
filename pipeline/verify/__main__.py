"""`python -m pipeline.verify BUNDLE`: check a bundle again, from its files to all parity gates."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import Rules, read_json, sha256
from export.errors import ContractError, ParityError, RecipeError, RegressionError, UserError
from export.models.config import FILE as CONFIG
from export.models.config import read_config
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, PORTABLE, opened
from pipeline.backends.base import LoweredGraph
from pipeline.backends.metadata_file import LoweredHashes
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.bundle.contents import GENERATION_FILES
from pipeline.bundle.pipeline_bundle import PipelineBundle, is_pipeline, load_pipeline
from pipeline.bundle.stages import timed
from pipeline.command import Answer, Parser, add_model_flags, add_threads, parser, run
from pipeline.compile_pipeline import write_others
from pipeline.compiler import describe
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, new_folder, refuse_in_bundle, refuse_unwritable, tree
from pipeline.generate.example_prompts import prompt_lines
from pipeline.generate.tokenizer import TOKENIZER_FILE, canonical
from pipeline.parts import PipelineFolder, read_folder
from pipeline.recipe import NO_FLAGS, ModelFlags, load_float_model, with_model
from pipeline.signals import leave
from pipeline.verify.baseline import Comparison, load_tolerances
from pipeline.verify.baseline import compare as compare_with
from pipeline.verify.effort import quick_note, quick_recipe, quick_targets
from pipeline.verify.junit import write_error, write_junit
from pipeline.verify.record import Record, open_any, read_bench, read_record, record_of, write_record
from pipeline.verify.report import Report
from pipeline.verify.summary import add_summary, failure_summary, summary

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
RECIPE = "recipe.toml"

# Flags that name a file of results.
RESULTS = ("junit", "summary", "write_baseline")


def make_parser() -> Parser:
    """All flags of `verify`."""
    flags = parser("verify", "Check a bundle again: file hashes, lowering repeated, all parity gates.")
    flags.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    add_model_flags(flags, "the float model, if it moved since the build")
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="write the new report here")
    flags.add_argument(
        "--quick",
        action="store_true",
        help="less of it, within the same limits: targets that run here, not the slow one, in two steps and few calls",
    )
    flags.add_argument(
        "--baseline",
        metavar="BUNDLE|FILE",
        help="exit with 6 where gates, quality, bytes or speed are worse than those of a bundle (a folder, "
        "hf://OWNER/NAME) or of a file that --write-baseline wrote",
    )
    flags.add_argument(
        "--tolerances", type=Path, metavar="FILE.toml", help="by how much they may be worse (default: see docs/ci.md)"
    )
    flags.add_argument(
        "--bench",
        type=Path,
        metavar="FILE.json",
        help="speed as bench -o wrote it, in place of the build's own numbers",
    )
    flags.add_argument(
        "--write-baseline", type=Path, metavar="FILE.json", help="write what --baseline takes, if all gates passed"
    )
    flags.add_argument("--junit", type=Path, metavar="FILE.xml", help="write every gate as a test case, for CI systems")
    flags.add_argument(
        "--summary", type=Path, metavar="FILE.md", help="add a summary in Markdown to the end of this file"
    )
    text = "write calls, what the reference gives in them, and scripts of `polygraphy run` for every target here"
    flags.add_argument("--polygraphy", type=Path, metavar="DIR", help=text)
    add_threads(flags)
    return flags


def verify_bundle(
    path: Path,
    report_dir: Path,
    flags: ModelFlags = NO_FLAGS,
    threads: int | None = None,
    quick: bool = False,
    polygraphy_dir: Path | None = None,
) -> Report:
    """Verify files, repeat the lowering and compare, run all gates into `report_dir`. Raises UserError subclasses.

    All of it on a private copy of the bundle, whose files nobody changes meanwhile. flags: another model, variant,
    configuration and adapters than the bundle was built from, None for the same. quick: of the files all, of the
    targets those that run here, and less of them (see effort.py), within the same limits; the report says so.
    polygraphy_dir: where files for Polygraphy go, whether the gates pass or not.
    """
    machine.require_compiler("verifying a bundle")
    from export.portable import read_layers
    from pipeline.verify.proof import verify

    original, _ = timed("files", lambda: load_bundle(path, threads))
    model, _ = timed("model", lambda: load_float_model(with_model(original.recipe, *flags)))
    if model.sha256 != original.manifest["model"]["sha256"]:
        remedy = "name the model that the bundle was built from with -m"
        if rows := original.manifest["model"].get("adapters"):
            named = ", ".join(f"{row['file']}:{row['scale']!r}" for row in rows)
            remedy += f", and its adapters with --lora, unchanged and in their order: {named}"
        raise ContractError(f"{model.source} has other weights than the bundle was built from; {remedy}")
    if PORTABLE not in original.targets:
        raise ContractError(
            f"{original.path} has no portable model, from which engines are lowered again; it was built with "
            "--drop-portable, build it without"
        )
    with original.copied() as bundle, tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        refuse_other_description(bundle, model)
        layers = read_layers(bundle.path / "model.onnx") if model.family.quantizes else []
        running = [target for target in bundle.targets if bundle.problem(target) is None]
        targets = quick_targets(bundle.targets, running) if quick else bundle.targets
        recipe = quick_recipe(bundle.recipe) if quick else bundle.recipe
        lowered, _ = timed("lower", lambda: lower_again(bundle, Path(folder), targets))
        with opened(bundle.path, targets, machine.threads(threads)) as engines:
            steps = recipe.sampling.n_steps if model.family.quantizes else None
            note = quick_note(targets, bundle.targets, steps) if quick else None
            judged = (model, layers, lowered, engines, recipe, report_dir, threads, note)
            report, _ = timed("gates", lambda: verify(*judged))
        if polygraphy_dir is not None:
            from pipeline.polygraphy.folder import write_folder

            with new_folder(polygraphy_dir) as part:
                shown = (part, original, bundle, model, layers, lowered, machine.threads(threads))
                timed("polygraphy", lambda: write_folder(*shown))
    return report


def verify_pipeline(
    path: Path,
    report_dir: Path,
    flags: ModelFlags = NO_FLAGS,
    threads: int | None = None,
    quick: bool = False,
    polygraphy_dir: Path | None = None,
) -> Report:
    """Verify a pipeline bundle: its own gates, whose report goes into `report_dir`, and every component as
    `verify_bundle` does, with a report in a folder of its name there. What is returned has the gates of all, the
    components' with their names in front. flags: another folder of the pipeline
    than it was built from, and the variant of its weights. quick: of every component, as of `verify_bundle`.
    polygraphy_dir: a folder for Polygraphy of each component goes there, by its name."""
    machine.require_compiler("verifying a bundle")
    from pipeline.verify.pipeline_gates import pipeline_report
    from pipeline.verify.pipeline_page import write_pipeline_page

    whole, _ = timed("files", lambda: load_pipeline(path, threads))
    recipe = with_model(recipes.from_dict(whole.manifest["recipe"], str(path / PIPELINE_FILE)), *flags)
    folder = read_folder(recipe)
    refuse_other_pipeline(whole, folder)
    own, _ = timed("pipeline", lambda: pipeline_report(whole, folder))
    report = Report(list(own.gates))
    for name in whole.components:
        part = folder.part(name).recipe
        of_part = (part.model, part.model_variant, None, part.lora)
        of_polygraphy = None if polygraphy_dir is None else polygraphy_dir / name
        component = verify_bundle(path / name, report_dir / name, of_part, threads, quick, of_polygraphy)
        report.gates += [replace(gate, name=f"{name}/{gate.name}") for gate in component.gates]
        report.notes += [f"{name}: {note}" for note in component.notes]
    write_pipeline_page(own, whole, {name: report_dir / name for name in whole.components}, report_dir)
    return report


def refuse_other_pipeline(whole: PipelineBundle, folder: PipelineFolder) -> None:
    """Raise ContractError where what a pipeline bundle holds beside its components (tokenizers, scheduler, prompts,
    settings, the index) is not what its folder makes: in what it says, however it is written."""
    with tempfile.TemporaryDirectory(prefix="ditc-") as name, whole.copied_others() as private:
        write_others(folder, Path(name))
        own, held = (_contents(place) for place in (Path(name), private))
    own[PIPELINE_FILE], held[PIPELINE_FILE] = _described(folder.index), _described(whole.manifest["index"])
    if differing := sorted(file for file in own.keys() | held.keys() if own.get(file) != held.get(file)):
        raise ContractError(
            f"{whole.path / differing[0]} is not what {folder.root} makes; build the bundle again, or name the folder "
            "that it was built from with -m"
        )


def _contents(folder: Path) -> dict[str, object]:
    """What every file below a folder says."""
    return {file: _content(folder / file) for file in tree(folder)}


def _content(path: Path) -> object:
    if path.name == TOKENIZER_FILE:
        return canonical(path)
    if path.suffix != ".json":
        return prompt_lines(path)
    return _described(read_json(path, dict[str, object], Rules(infinite=True)))  # which schedulers of diffusers state


def _described(document: Mapping[str, object]) -> dict[str, object]:
    """A document of diffusers without notes on its origin (keys that begin with "_"), but for the class."""
    return _stated(document) | {"_class_name": document.get("_class_name")}


def refuse_other_description(bundle: Bundle, model: LoadedModel) -> None:
    """Raise ContractError where a bundle's recipe.toml, config.json or generation.json is not that of what is verified.

    Pictures are drawn by what these files say, and no gate looks at them. Of config.json, notes on its origin
    (keys that begin with "_") do not matter.
    """
    with tempfile.TemporaryDirectory(prefix="ditc-") as name:
        describe(Path(name), model, bundle.recipe)
        own = {file: sha256(Path(name) / file) for file in tree(Path(name))}
    rows = bundle.manifest["files"]
    held = {file: rows[file]["sha256"] for file in rows if file in own or GENERATION_FILES.fullmatch(file)}
    # By their content: the same may be written in several ways.
    if _stated(read_config(bundle.path / CONFIG, ContractError)) == _stated(model.config):
        held[CONFIG] = own[CONFIG]
    if recipes.load(str(bundle.path / RECIPE)) == bundle.recipe:
        held[RECIPE] = own[RECIPE]
    if differing := sorted(file for file in own.keys() | held.keys() if own.get(file) != held.get(file)):
        remedy = "build the bundle again, or name the model that it was built from with -m"
        raise ContractError(f"{bundle.path / differing[0]} is not what the manifest's model and recipe make; {remedy}")


def _stated(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def lower_again(bundle: Bundle, folder: Path, targets: Sequence[str]) -> dict[str, LoweredGraph]:
    """Lower the portable model anew for `targets`; the bytes must be those that the bundle holds or was built from.

    Raises ContractError where they are not: then the engine does not belong to the portable model, or to this code.
    """
    from export.onnx_files import reading

    lowered = {}
    for target in targets:
        backend = BACKENDS[target]
        scratch, out = folder / "lowered" / target, folder / "built" / target
        scratch.mkdir(parents=True)
        with reading(bundle.path / "model.onnx"):
            lowered[target] = backend.lower(bundle.path / "model.onnx", scratch, bundle.recipe)
        if backend.repeatable:
            out.mkdir(parents=True)
            backend.build(lowered[target], out, bundle.recipe)
            compare(out, target, {name: row["sha256"] for name, row in bundle.manifest["files"].items()})
        else:
            hashes = backend.metadata(bundle.manifest, bundle.path / MANIFEST_FILE, LoweredHashes)
            source = {"model.onnx": hashes["onnx_sha256"], "model.onnx.data": hashes["onnx_data_sha256"]}
            compare(scratch, target, {f"{target}/{name}": digest for name, digest in source.items()})
            if problem := backend.kept_problem(bundle.path / target, lowered[target], bundle.recipe):
                raise ContractError(f"{target}: {problem}; build the bundle again with this version")
    return lowered


def compare(folder: Path, target: str, expected: Mapping[str, str]) -> None:
    """The hash of every file in `folder` against that of `target`/file in `expected`."""
    for name in tree(folder):
        if expected.get(f"{target}/{name}") != sha256(folder / name):
            remedy = "build the bundle again with this version"
            raise ContractError(f"{target}: the portable model now lowers to another {name} than was built; {remedy}")


@dataclass(frozen=True)
class Outcome:
    """What a verification found. comparison: with the baseline, None without one."""

    report: Report
    record: Record
    comparison: Comparison | None

    def raise_if_wrong(self, kept: str) -> None:
        """Raise ParityError where a gate failed, RegressionError where a number is worse. kept: where the report is."""
        if not self.report.passed:
            raise ParityError(f"{self.report.sentence()}; {kept}")
        if self.comparison is not None and self.comparison.worse:
            raise RegressionError(f"{self.comparison.sentence()}; {kept}")


def outcome_of(args: argparse.Namespace, report_dir: Path) -> Outcome:
    """Verify, and compare with the baseline. What the flags name is read before work starts."""
    tolerances = load_tolerances(args.tolerances)
    baseline = None if args.baseline is None else read_record(args.baseline)
    if baseline is not None and baseline.quick != args.quick:
        theirs, remedy = ("quick", "add --quick") if baseline.quick else ("whole", "leave --quick out")
        raise RecipeError(
            f"{args.baseline} is of a {theirs} verification; {remedy}, or write a baseline of the other kind"
        )
    measured = None if args.bench is None else read_bench(args.bench, args.bundle)
    verify = verify_pipeline if is_pipeline(args.bundle) else verify_bundle
    flags = (args.model, args.variant, args.config, args.lora)
    report = verify(args.bundle, report_dir, flags, args.threads, args.quick, args.polygraphy)
    record = record_of(open_any(args.bundle), report.gates, measured, args.quick)
    return Outcome(report, record, None if baseline is None else compare_with(baseline, record, tolerances))


def write_results(args: argparse.Namespace, outcome: Outcome, seconds: float) -> None:
    """The files that flags ask for. A bundle that failed a gate is no baseline. One that is worse does not take the
    place of its own: the next run would find nothing wrong with it."""
    if args.junit:
        write_junit(args.junit, outcome.record.engine, outcome.report.gates, outcome.comparison, seconds)
    if args.summary:
        add_summary(args.summary, summary(outcome.record.engine, outcome.report, outcome.comparison))
    if not (args.write_baseline and outcome.report.passed):
        return
    if (
        outcome.comparison
        and outcome.comparison.worse
        and Path(args.baseline).resolve() == args.write_baseline.resolve()
    ):
        remedy = "--write-baseline without --baseline takes the worse numbers for good"
        logger.warning("%s stays as it is; %s", args.write_baseline, remedy)
    else:
        write_record(outcome.record, args.write_baseline)


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Verify and answer with the verdict, every gate, and what is not as in the baseline."""
    refuse_unwritable_results(args)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        try:
            outcome = outcome_of(args, args.output_dir or Path(folder))
        except UserError as error:
            if args.junit:
                write_error(args.junit, str(args.bundle), error, time.monotonic() - started)
            if args.summary:
                add_summary(args.summary, failure_summary(str(args.bundle), error))
            raise
    write_results(args, outcome, time.monotonic() - started)
    tell(outcome, answer)
    outcome.raise_if_wrong(
        f"see {args.output_dir / 'index.html'}" if args.output_dir else "give -o DIR to keep the report"
    )
    answer.event(event="result", passed=True, exit_code=0, path=str(args.bundle))
    answer.line(f"PASSED {args.bundle}")
    return 0


def refuse_unwritable_results(args: argparse.Namespace) -> None:
    """Refuse, before any work, what cannot be written, and flags that would have no effect."""
    if args.tolerances and not args.baseline:
        raise RecipeError("--tolerances says by how much a bundle may be worse than its --baseline; give that, too")
    if args.bench and not (args.baseline or args.write_baseline):
        raise RecipeError("--bench is speed for --baseline or --write-baseline; give one of them, too")
    if args.output_dir:
        refuse_unwritable(args.output_dir, True, "--output-dir")
        refuse_in_bundle([args.output_dir], args.output_dir, "--output-dir")
    if args.polygraphy:
        machine.require(("polygraphy",), "verify --polygraphy", "polygraphy")
        if args.quick:
            raise RecipeError(
                "--polygraphy writes files for every target, and --quick leaves some out; give one of them"
            )
        refuse_unwritable(args.polygraphy, True, "--polygraphy")
        refuse_in_bundle([args.polygraphy], args.polygraphy, "--polygraphy")
        if args.polygraphy.is_dir() and any(args.polygraphy.iterdir()):
            raise RecipeError(f"{args.polygraphy} is not empty; name a folder for --polygraphy that is new or empty")
    for flag in RESULTS:
        if path := getattr(args, flag):
            refuse_unwritable(path, False, _spelled(flag))
            refuse_shared(args, flag)


def refuse_shared(args: argparse.Namespace, result: str) -> None:
    """Refuse a file of results that another flag names, too: one of both would be lost. A baseline may be renewed."""
    path = getattr(args, result)
    for flag in (*RESULTS, "baseline", "tolerances", "bench"):
        other = getattr(args, flag)
        if other is None or flag == result or (result, flag) == ("write_baseline", "baseline"):
            continue
        if Path(other).resolve() == path.resolve() or (path.exists() and Path(other).exists() and path.samefile(other)):
            raise RecipeError(f"{_spelled(result)} and {_spelled(flag)} are one file, {path}; give each its own")


def _spelled(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


def tell(outcome: Outcome, answer: Answer) -> None:
    """Every gate, and of a comparison what is better or worse; notes go to the log."""
    for note in outcome.report.notes:
        logger.info("%s", note)
    for gate in outcome.report.gates:
        row = {"name": gate.name, "value": gate.value, "limit": gate.limit, "unit": gate.unit, "passed": gate.passed}
        answer.event(event="gate", **row)
        answer.line(
            f"{'ok  ' if gate.passed else 'FAIL'}  {gate.name} = {gate.value:g} {gate.unit} (limit {gate.limit:g})"
        )
    if outcome.comparison is None:
        return
    for note in outcome.comparison.notes:
        logger.warning("%s", " ".join(note.split()))
    for compared in outcome.comparison.rows:
        answer.event(event="baseline", **compared.document())
        if compared.verdict in ("better", "worse"):
            answer.line(f"{compared.verdict:<6}  {compared.sentence()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv, verdict=True)


if __name__ == "__main__":
    leave(main)
