"""`python -m pipeline.sweep`: recipes x models x methods x options, from a TOML file, as bundles, tables and a page."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from export.documents import listed
from export.errors import EnvironmentLacksError, RecipeError, ResourceError, SweepError, UserError
from pipeline import machine
from pipeline.bundle.stages import SAVED
from pipeline.command import Answer, Parser, Table, parser, run
from pipeline.files import locked, refuse_unwritable, remove
from pipeline.jobs.flags import add_flags, chosen
from pipeline.jobs.jobs import Runner
from pipeline.progress import track
from pipeline.signals import leave
from pipeline.sweep import results
from pipeline.sweep.plan import Build, read_sweep
from pipeline.sweep.work import STATE, WRITTEN, Checked, Place, check_jobs, remove_fragments, work_jobs

logger = logging.getLogger(__name__)
DESCRIPTION = "Build every combination of a TOML file's recipes, models, methods and options, and compare the bundles."


def make_parser() -> Parser:
    """All flags of `sweep`."""
    flags = parser("sweep", DESCRIPTION)
    flags.add_argument("sweep", type=Path, metavar="SWEEP.toml", help="what to build, see docs/calibration.md")
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="where to write (default: sweeps/NAME)")
    flags.add_argument(
        "--calibrations", type=Path, metavar="DIR", help="layers that sweeps share (default: calibrations/ in theirs)"
    )
    add_flags(flags)
    text = "go on with a sweep: what is built stays, what failed or was interrupted is done again"
    flags.add_argument("--resume", action="store_true", help=text)
    flags.add_argument("--force", action="store_true", help="replace all of an existing sweep")
    flags.add_argument("--dry-run", action="store_true", help="check every job, say what would be done, write nothing")
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Check every job, do them, and say how each ended."""
    machine.require_compiler("building engines")
    folder = args.output_dir or Path("sweeps") / args.sweep.stem
    place = Place(folder.absolute(), (args.calibrations or folder / "calibrations").absolute())
    _refuse_occupied(place.folder, args.resume, args.force)
    _refuse_calibrations(place)
    builds = read_sweep(args.sweep)
    with chosen(args, "a sweep") as runner:
        if args.resume and not args.dry_run:
            remove_fragments(place)
        checked = _checked(builds, place, runner, args.force)
        if args.dry_run:
            return _dry_run(builds, checked, place, answer)
        with _kept_for_resume(place.folder, args.force):
            rows = _done(builds, checked, place, runner, answer)
            rows = {name: results.with_result(row, place) for name, row in rows.items()}
            _write(rows, place)
    failed = results.failures(rows.values())
    documents = [row.document() for row in rows.values()]
    answer.document({"event": "sweep", "path": str(place.folder), "builds": documents}, results.summary(rows.values()))
    if failed:
        named = [f"{row.build.name}: {row.ended.reason}" for row in failed if row.ended]
        raise SweepError(f"{len(failed)} of the {len(rows)} engines in {place.folder} failed: {listed(named)}")
    answer.event(event="result", passed=True, exit_code=0, path=str(place.folder))
    answer.line(f"PASSED {place.folder}")
    return 0


def _refuse_occupied(folder: Path, resume: bool, force: bool) -> None:
    """Refuse to touch what another sweep left, unless told to, or what is no sweep at all."""
    refuse_unwritable(folder, True, "--output-dir")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    names = {path.name.removesuffix(".part") for path in folder.iterdir()}
    copied = resume and not force and names <= {STATE, *WRITTEN}  # in part, without the file that tells
    if not (folder / STATE).is_file() and not copied:
        raise RecipeError(f"{folder} is not a sweep and is not touched; choose another --output-dir")
    if not (resume or force):
        remedy = "add --resume to go on with it, or --force to start again"
        raise RecipeError(f"{folder} holds a sweep; {remedy}, or choose another --output-dir")


def _refuse_calibrations(place: Place) -> None:
    """Refuse a folder for layers that cannot be written, or lies among what a sweep itself writes and removes."""
    refuse_unwritable(place.calibrations, True, "--calibrations")
    own, layers = (path.resolve() for path in (place.folder, place.calibrations))
    if layers.is_relative_to(own) and layers != own / "calibrations":
        raise RecipeError(f"--calibrations {place.calibrations} is in the sweep's own folder; leave it out for its own")


def _checked(builds: list[Build], place: Place, runner: Runner, anew: bool) -> dict[str, Checked]:
    """What is known of each build by its name. Raises UserError with all that cannot be built, before any is begun.

    anew: whether what is there is to be replaced.
    """
    jobs = check_jobs(builds, place)
    ended = list(track(runner(jobs), len(jobs), "check"))
    refused = [row for row in ended if not row.passed]
    if refused:
        kinds: dict[int, type[UserError]] = {kind.exit_code: kind for kind in (EnvironmentLacksError, ResourceError)}
        codes = {row.exit_code for row in refused}
        kind = kinds.get(codes.pop(), RecipeError) if len(codes) == 1 else RecipeError
        named = listed([f"{row.name}: {row.reason}" for row in refused])
        raise kind(f"{len(refused)} of {len(builds)} engines cannot be built, so nothing was begun: {named}")
    return {row.name: replace(row.result, done=row.result.done and not anew) for row in ended}


def _dry_run(builds: list[Build], checked: dict[str, Checked], place: Place, answer: Answer) -> int:
    """Say what would be done."""
    shared = Counter(row.calibration for row in checked.values())
    rows = [
        (
            build.name,
            build.recipe.model,
            ", ".join(build.targets),
            "kept" if checked[build.name].done else "to build",
            checked[build.name].calibration[:12] or "none",
            shared[checked[build.name].calibration],
        )
        for build in builds
    ]
    header = ("", "model", "targets", "status", "calibration", "shared by")
    documents = [dict(zip(("name", *header[1:]), row, strict=True)) for row in rows]
    jobs = work_jobs(builds, checked, place)
    todo = sum(not row.done for row in checked.values())
    text = f"{todo} engines to build, {len(jobs) - todo} calibrations; nothing was written"
    answer.document({"event": "plan", "builds": documents}, Table(header, rows), text)
    return 0


@contextmanager
def _kept_for_resume(folder: Path, force: bool) -> Iterator[None]:
    """Within, the folder is this sweep's. Adds to an interruption that finished jobs are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "sweep"):
        for name in WRITTEN if force else ():
            remove(folder / name)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, UserError):
                error.__notes__ = [f"{SAVED}{folder}; run the same command again with --resume"]
            raise


def _done(
    builds: list[Build], checked: dict[str, Checked], place: Place, runner: Runner, answer: Answer
) -> dict[str, results.Row]:
    """Do the jobs; sweep.json tells of each as it ends."""
    rows = results.first_rows(builds, checked)
    results.write_state(rows, place)
    jobs = work_jobs(builds, checked, place)
    for ended in track(runner(jobs), len(jobs), "sweep"):
        logger.info("%s: %s", ended.name, f"{ended.seconds:.0f} s" if ended.passed else "failed")
        answer.event(event="job", name=ended.name, exit_code=ended.exit_code, reason=ended.reason, tries=ended.tries)
        if ended.name in rows:  # the others are calibrations
            rows[ended.name] = results.with_end(rows[ended.name], ended)
            results.write_state(rows, place)
    return rows


def _write(rows: dict[str, results.Row], place: Place) -> None:
    from pipeline.sweep.page import write_page

    results.write_state(rows, place)
    results.write_tables(rows, place)
    remove(place.folder / "compare")
    with suppress(OSError):  # what is in it failed
        (place.folder / "rejected").rmdir()
    write_page(rows, place)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv, verdict=True)


if __name__ == "__main__":
    leave(main)
