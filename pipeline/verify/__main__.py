"""`python -m pipeline.verify BUNDLE`: check a bundle again, from its files to all parity gates."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import sha256
from export.errors import ContractError, ParityError
from export.models.config import FILE as CONFIG
from export.models.config import read_config
from pipeline import machine
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, PORTABLE, opened
from pipeline.backends.base import LoweredGraph
from pipeline.backends.metadata_file import LoweredHashes
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.bundle.contents import GENERATION_FILES
from pipeline.bundle.pipeline_bundle import is_pipeline, load_pipeline
from pipeline.bundle.stages import timed
from pipeline.command import Answer, Parser, add_model_flags, add_threads, parser, run
from pipeline.compiler import describe
from pipeline.files import MANIFEST_FILE, PIPELINE_FILE, refuse_in_bundle, refuse_unwritable, tree
from pipeline.parts import read_folder
from pipeline.recipe import ModelFlags, load_float_model, with_model
from pipeline.signals import leave
from pipeline.verify.report import Report

if TYPE_CHECKING:
    from export.models.load import LoadedModel

RECIPE = "recipe.toml"


def make_parser() -> Parser:
    """All flags of `verify`."""
    flags = parser("verify", "Check a bundle again: file hashes, lowering repeated, all parity gates.")
    flags.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    add_model_flags(flags, "the float model, if it moved since the build")
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="write the new report here")
    text = "write calls, what the reference gives in them, and scripts of `polygraphy run` for every target here"
    flags.add_argument("--polygraphy", type=Path, metavar="DIR", help=text)
    add_threads(flags)
    return flags


def verify_bundle(
    path: Path,
    report_dir: Path,
    flags: ModelFlags = (None, None, None),
    threads: int | None = None,
    polygraphy_dir: Path | None = None,
) -> Report:
    """Verify files, repeat the lowering and compare, run all gates into `report_dir`. Raises UserError subclasses.

    All of it on a private copy of the bundle, whose files nobody changes meanwhile. flags: another model, variant and
    configuration than the bundle was built from, None for the same. polygraphy_dir: where files for Polygraphy go,
    whether the gates pass or not.
    """
    machine.require_compiler("verifying a bundle")
    from export.portable import read_layers
    from pipeline.verify.proof import verify

    original, _ = timed("files", lambda: load_bundle(path, threads))
    model, _ = timed("model", lambda: load_float_model(with_model(original.recipe, *flags)))
    if model.sha256 != original.manifest["model"]["sha256"]:
        remedy = "name the model that the bundle was built from with -m"
        raise ContractError(f"{model.source} has other weights than the bundle was built from; {remedy}")
    if PORTABLE not in original.targets:
        raise ContractError(
            f"{original.path} has no portable model, from which engines are lowered again; it was built with "
            "--drop-portable, build it without"
        )
    with original.copied() as bundle, tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        refuse_other_description(bundle, model)
        layers = read_layers(bundle.path / "model.onnx") if model.family.quantizes else []
        lowered, _ = timed("lower", lambda: lower_again(bundle, Path(folder)))
        with opened(bundle.path, bundle.targets, machine.threads(threads)) as engines:
            report, _ = timed(
                "gates", lambda: verify(model, layers, lowered, engines, bundle.recipe, report_dir, threads)
            )
        if polygraphy_dir is not None:
            from pipeline.polygraphy.folder import write_folder

            judged = (original, bundle, model, layers, lowered, machine.threads(threads))
            timed("polygraphy", lambda: write_folder(polygraphy_dir, *judged))
    return report


def verify_pipeline(
    path: Path,
    report_dir: Path,
    flags: ModelFlags = (None, None, None),
    threads: int | None = None,
    polygraphy_dir: Path | None = None,
) -> Report:
    """Verify a pipeline bundle: its own gates, whose report goes into `report_dir`, and every component as
    `verify_bundle` does, with a report in a folder of its name there. What is returned has the gates of all, the
    components' with their names in front. flags: another folder of the pipeline
    than it was built from, and the variant of its weights. polygraphy_dir: a folder for Polygraphy of each component
    goes there, by its name."""
    machine.require_compiler("verifying a bundle")
    from pipeline.verify.pipeline_gates import pipeline_report
    from pipeline.verify.pipeline_page import write_pipeline_page

    whole, _ = timed("files", lambda: load_pipeline(path, threads))
    recipe = with_model(recipes.from_dict(whole.manifest["recipe"], str(path / PIPELINE_FILE)), *flags)
    folder = read_folder(recipe)
    own, _ = timed("pipeline", lambda: pipeline_report(whole, folder))
    report = Report(list(own.gates))
    for name in whole.components:
        part = folder.part(name).recipe
        of_part = (part.model, part.model_variant, None)
        of_polygraphy = None if polygraphy_dir is None else polygraphy_dir / name
        component = verify_bundle(path / name, report_dir / name, of_part, threads, of_polygraphy)
        report.gates += [replace(gate, name=f"{name}/{gate.name}") for gate in component.gates]
    write_pipeline_page(own, whole, {name: report_dir / name for name in whole.components}, report_dir)
    return report


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


def lower_again(bundle: Bundle, folder: Path) -> dict[str, LoweredGraph]:
    """Lower the portable model anew for every target; the bytes must be those that the bundle holds or was built from.

    Raises ContractError where they are not: then the engine does not belong to the portable model, or to this code.
    """
    from export.onnx_files import reading

    lowered = {}
    for target in bundle.targets:
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


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Verify and answer with the verdict and every gate."""
    if args.output_dir:
        refuse_unwritable(args.output_dir, True, "--output-dir")
        refuse_in_bundle([args.output_dir], args.output_dir, "--output-dir")
    if args.polygraphy:
        machine.require(("polygraphy",), "verify --polygraphy", "polygraphy")
        refuse_unwritable(args.polygraphy, True, "--polygraphy")
        refuse_in_bundle([args.polygraphy], args.polygraphy, "--polygraphy")
    with tempfile.TemporaryDirectory(prefix="ditc-") as folder:
        flags = (args.model, args.variant, args.config)
        verify = verify_pipeline if is_pipeline(args.bundle) else verify_bundle
        report = verify(args.bundle, args.output_dir or Path(folder), flags, args.threads, args.polygraphy)
    for gate in report.gates:
        row = {"name": gate.name, "value": gate.value, "limit": gate.limit, "unit": gate.unit, "passed": gate.passed}
        answer.event(event="gate", **row)
        answer.line(
            f"{'ok  ' if gate.passed else 'FAIL'}  {gate.name} = {gate.value:g} {gate.unit} (limit {gate.limit:g})"
        )
    if not report.passed:
        kept = f"see {args.output_dir / 'index.html'}" if args.output_dir else "give -o DIR to keep the report"
        raise ParityError(f"{report.sentence()}; {kept}")
    answer.event(event="result", passed=True, exit_code=0, path=str(args.bundle))
    answer.line(f"PASSED {args.bundle}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv, verdict=True)


if __name__ == "__main__":
    leave(main)
