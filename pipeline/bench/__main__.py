"""`python -m pipeline.bench BUNDLE`: measure a bundle's engines on this machine."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import ContractError, EnvironmentLacksError, RecipeError, ResourceError
from export.models.config import FILE as CONFIG
from export.models.description import Description
from export.models.families import FAMILIES, RECORDED, stated_inputs
from pipeline import machine
from pipeline.backends import opened
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.bundle.stages import timed
from pipeline.command import Answer, Parser, Table, add_model_flags, add_threads, parser, run
from pipeline.compiler import parse_targets
from pipeline.files import refuse_unwritable, write_json
from pipeline.recipe import NO_FLAGS, ModelFlags, Recipe, load_float_model, with_model
from pipeline.signals import leave

if TYPE_CHECKING:
    from export.models.load import LoadedModel
    from pipeline.bench import contest
    from pipeline.bench.measure import Document
    from pipeline.bench.profile import Profile

logger = logging.getLogger(__name__)


def make_parser() -> Parser:
    """All flags of `bench`."""
    flags = parser("bench", "Measure the engines of a bundle on this machine, against the float model.")
    flags.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    add_model_flags(flags, "the float model, if it moved since the build")
    flags.add_argument(
        "--target",
        default="auto",
        help="one of the bundle's, or several with commas; auto: all but onnx, the portable model, which is slow",
    )
    flags.add_argument(
        "--profile",
        action="store_true",
        help="say instead where a call of target cpu spends its time, beside what bounds it",
    )
    flags.add_argument(
        "--peers",
        metavar="NAMES",
        help="measure beside these instead, each contestant in a process of its own: names of "
        "pipeline/bench/peers.py with commas, or all; with each its error against float32, load time and memory",
    )
    flags.add_argument(
        "--work-dir", type=Path, metavar="FOLDER", help="keep what --peers converts here, for the next time"
    )
    flags.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the numbers here too")
    add_threads(flags)
    return flags


def bench_bundle(
    path: Path, flags: ModelFlags = NO_FLAGS, target: str = "auto", threads: int | None = None
) -> Document:
    """Verify the files, then measure every engine of `target` that runs here, and what it is compared with, with as
    many threads. Raises UserError subclasses.

    flags: another model, variant, configuration and adapters than the bundle was built from, None for the same. Where
    the compiler is not installed, there is no float model to compare with, and the engines are measured alone.
    """
    from pipeline.bench.baselines import baselines
    from pipeline.bench.measure import bench

    bundle, _ = timed("files", lambda: load_bundle(path, threads))
    targets = chosen_targets(bundle, target)
    count, recipe = machine.threads(threads), bundle.recipe
    model, _ = timed("model", lambda: float_model(with_model(recipe, *flags), named=any(flags)))
    with (
        bundle.copied() as private,
        opened(private.path, targets, count) as engines,
        tempfile.TemporaryDirectory(prefix="ditc-") as folder,
    ):
        others = [] if model is None else baselines(model, recipe, Path(folder), count)
        described = model or description(private)
        document, _ = timed("bench", lambda: bench(described, engines, recipe, private.path, others, count))
    return document


def bench_beside_peers(
    path: Path,
    names: Sequence[str],
    flags: ModelFlags = NO_FLAGS,
    target: str = "auto",
    threads: int | None = None,
    work_dir: Path | None = None,
) -> contest.Document:
    """Verify the files, then measure every engine of `target` beside peers. Raises UserError subclasses.

    work_dir: where what peers run is kept; None for a folder that is removed. Other arguments: as for `bench_bundle`.
    """
    from pipeline.bench.contest import beside_peers
    from pipeline.bench.worker import WorkerError

    bundle, _ = timed("files", lambda: load_bundle(path, threads))
    targets = chosen_targets(bundle, target)
    count, recipe = machine.threads(threads), with_model(bundle.recipe, *flags)
    model = float_model(recipe, named=any(flags))
    sha256 = None if model is None else model.sha256
    del model  # each peer loads its own
    with bundle.copied() as private, tempfile.TemporaryDirectory(prefix="ditc-") as scratch:
        folder = Path(scratch) if work_dir is None else work_dir
        arguments = (description(private), sha256, recipe, private.path, targets, names, folder, count)
        try:
            document, _ = timed("bench", lambda: beside_peers(*arguments))
        except WorkerError as error:
            raise ResourceError(f"the float model, which errors are measured against, does not run: {error}") from error
    return document


def chosen_targets(bundle: Bundle, target: str) -> tuple[str, ...]:
    """The targets of a bundle that the flag --target means. Raises RecipeError for one that the bundle lacks."""
    from pipeline.bench.measure import measured

    targets = measured(bundle.targets) if target == "auto" else parse_targets(target)
    for missing in [name for name in targets if name not in bundle.targets]:
        raise RecipeError(bundle.problem(missing))
    return targets


def profile_bundle(path: Path, threads: int | None = None) -> Profile:
    """Verify the files, then say where a call of the engine of `cpu` spends its time. Raises UserError subclasses."""
    from export.models.description import sample_inputs
    from pipeline.bench.profile import profile

    bundle, _ = timed("files", lambda: load_bundle(path, threads))
    if problem := bundle.problem("cpu"):
        raise EnvironmentLacksError(f"--profile is of target cpu: {problem}")
    size = bundle.recipe.sampling
    with bundle.copied() as private:
        inputs = sample_inputs(description(private), size.batch_size, size.seed, size.height, size.width)
        document, _ = timed("profile", lambda: profile(private.path / "cpu", inputs, machine.threads(threads)))
    return document


def float_model(recipe: Recipe, named: bool) -> LoadedModel | None:
    """What engines are compared with; None where the compiler is not installed. named: by a flag, then it must be."""
    try:
        machine.require_compiler("comparing with the float model")
    except EnvironmentLacksError as error:
        if named:
            raise
        logger.warning("the engines are measured alone: %s", error)
        return None
    return load_float_model(recipe)


def description(bundle: Bundle) -> Description:
    """Of the model in a bundle, by its own files. Raises EnvironmentLacksError for a family that must be learned."""
    family, config = str(bundle.manifest["model"]["family"]), bundle.config()
    if family == RECORDED:
        machine.require_compiler("measuring a model whose inputs are learned from its pipeline")
        from export.models.recorded import recorded_family

        row = recorded_family(str(config["_class_name"]), config, bundle.path / CONFIG)
        return Description(row, config, bundle.path, str(bundle.path))
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ContractError(f"{bundle.path}: family {family} is unknown, only {known} and {RECORDED}; build it again")
    stated_inputs(FAMILIES[family], config, bundle.path / CONFIG)  # refuses a key that is missing
    if FAMILIES[family].steps and "patch_size" not in config:
        raise ContractError(f"{bundle.path / CONFIG} lacks 'patch_size', by which sizes are checked; build it again")
    return Description(FAMILIES[family], config, bundle.path, str(bundle.path))


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Measure and answer with the numbers."""
    from pipeline.bench import contest, measure, profile
    from pipeline.bench.peers import parse_peers

    if args.output:
        refuse_unwritable(args.output, False, "--output")
    if args.profile:
        found = profile_bundle(args.bundle, args.threads)
        if args.output:
            write_json(args.output, found)
        answer.document({"event": "profile", **found}, Table(*profile.summary(found)), profile.conditions(found))
        return 0
    model_flags = (args.model, args.variant, args.config, args.lora)
    if args.peers:
        names = parse_peers(args.peers)
        beside = bench_beside_peers(args.bundle, names, model_flags, args.target, args.threads, args.work_dir)
        if args.output:
            write_json(args.output, beside)
        answer.document({"event": "peers", **beside}, Table(*contest.summary(beside)), contest.conditions(beside))
        return 0
    document = bench_bundle(args.bundle, model_flags, args.target, args.threads)
    if args.output:
        write_json(args.output, document)
    answer.document({"event": "bench", **document}, Table(*measure.summary(document)), measure.conditions(document))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
