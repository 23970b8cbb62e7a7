"""What the jobs of a sweep do, in whichever process: look at a build, calibrate for it, build it.

The folder of a sweep, on a file system that all machines see at the same path:

    sweep.json              how each job ended; written anew with each, so that it is true after an interruption
    bundles/NAME/           whole bundles; NAME.partial/ is one that was interrupted, which --resume goes on with
    calibrations/SHA256/    finished layers by everything that they depend on, which builds share
    rejected/NAME/          engines that failed a gate, with their reports
    logs/NAME.log           what the job said
    table.csv, table.md, index.html, compare/NAME.html
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from export.errors import ContractError, UserError
from pipeline import machine
from pipeline.calibrate import calibrate, origin
from pipeline.compile_pipeline import is_same
from pipeline.compiler import PARTIAL, BuildRequest, Prepared, compile_prepared, prepare
from pipeline.files import HeldError, is_bundle, locked, remove, sha256_json
from pipeline.jobs.jobs import Job
from pipeline.signals import HEARD_WITHIN_S
from pipeline.sweep.plan import Build

logger = logging.getLogger(__name__)
STATE = "sweep.json"
# All but that; see above.
WRITTEN = ("bundles", "calibrations", "rejected", "logs", "compare", "table.csv", "table.md", "index.html")


@dataclass(frozen=True)
class Checked:
    """What is known of a build before any work. calibration: the SHA-256 of everything that its layers depend on, ""
    where nothing is quantized; done: whether the bundle is there that it would make."""

    calibration: str
    done: bool


@dataclass(frozen=True)
class Place:
    """Where a sweep writes."""

    folder: Path
    calibrations: Path

    def bundle(self, name: str) -> Path:
        return self.folder / "bundles" / name

    def rejected(self, name: str) -> Path:
        return self.folder / "rejected" / name

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def request(build: Build, place: Place) -> BuildRequest:
    """Of a build: it goes on with its own interrupted one, and replaces what other settings left there."""
    return BuildRequest(
        build.recipe,
        build.targets,
        place.bundle(build.name),
        resume=True,
        force=True,
        rejected=place.rejected(build.name),
    )


def check(build: Build, place: Place) -> Checked:
    """Refuse what can be refused before work starts; writes nothing. Raises UserError subclasses."""
    wanted = request(build, place)
    prepared = prepare(wanted)
    return Checked(_calibration(prepared), is_same(wanted.output, wanted, prepared))


def _calibration(prepared: Prepared) -> str:
    if not prepared.model.family.quantizes:
        return ""
    names = [linear.name for linear in prepared.model.linears()]  # without those that the recipe keeps in float
    return sha256_json([origin(prepared.model, prepared.recipe), names, machine.code_version()])


def calibrate_for(build: Build, place: Place, calibration: str) -> None:
    """Finish the layers that a build needs, or take up where another try was stopped. Raises UserError subclasses."""
    prepared, folder = prepare(request(build, place)), place.calibrations / calibration
    try:
        _calibrate(prepared, folder)
    except ContractError as error:  # of a copy that was cut short, for example
        logger.warning("%s; the layers are made again", error)
        with suppress(HeldError, FileNotFoundError), locked(folder, "calibration"):
            remove(folder)
        _calibrate(prepared, folder)


def _calibrate(prepared: Prepared, folder: Path) -> None:
    """As `calibrate`; what another sweep is making is waited for, and then taken. Whatever else is raised, finished
    layers stay for the next try."""
    while True:
        try:
            calibrate(prepared.model, prepared.recipe, folder)
            return
        except HeldError as error:
            logger.info("%s; waiting for it", error)
            time.sleep(HEARD_WITHIN_S)


def remove_fragments(place: Place) -> None:
    """Remove what copying has left of bundles; a build leaves none. Raises HeldError where a sweep is at work."""
    if not place.folder.is_dir():
        return
    with locked(place.folder, "sweep"):
        for path in (place.folder / "bundles").glob("*"):
            if path.suffix != PARTIAL and not is_bundle(path):
                logger.warning("%s is a part of a bundle; it is built again", path)
                remove(path)


def build_engine(build: Build, place: Place, calibration: str) -> None:
    """Build a bundle from finished layers. Raises UserError subclasses; then none of another recipe stands there."""
    wanted = request(build, place)
    prepared = prepare(wanted)
    if is_same(wanted.output, wanted, prepared):  # a process that was lost had finished it
        return
    layers = place.calibrations / calibration if calibration else None
    try:
        compile_prepared(replace(wanted, checkpoint=layers), prepared)
    except UserError:
        remove(wanted.output)
        raise
    remove(place.rejected(build.name))  # of an earlier try


def check_jobs(builds: list[Build], place: Place) -> list[Job]:
    """One for each build."""
    return [Job(build.name, partial(check, build, place)) for build in builds]


def work_jobs(builds: list[Build], checked: dict[str, Checked], place: Place) -> list[Job]:
    """For each build that is not done: its calibration, once for all that share it, then itself."""
    jobs: dict[str, Job] = {}
    for build in builds:
        row = checked[build.name]
        if row.done:
            continue
        before = f"calibration {row.calibration[:12]}" if row.calibration else None
        if before and before not in jobs:
            work = partial(calibrate_for, build, place, row.calibration)
            jobs[before] = Job(before, work, log=place.log(f"calibration-{row.calibration[:12]}"), alone=True)
        work = partial(build_engine, build, place, row.calibration)
        jobs[build.name] = Job(build.name, work, before, place.log(build.name), alone=True)
    return list(jobs.values())
