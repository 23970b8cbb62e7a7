"""What is measured of a row of the quality tables, by jobs in whichever process.

WORK, the folder of a model, on a file system that all machines see at the same path:

    float-KEY.npy       the float model's pictures
    calibrated/KEY/     layers by everything that they depend on
    engines/NAME/       a row's engine, while it draws
    logs/NAME.log       what the row's job said
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import drawing, metrics
from benchmarks.quality.drawing import Subject, Trajectory
from benchmarks.quality.engines import calibrated, calibration_key, drawer, refuse_missing_gpu
from benchmarks.quality.judging import features_of, read
from benchmarks.quality.metrics import Array
from benchmarks.quality.painters import Pictures
from benchmarks.quality.results import stamp
from benchmarks.quality.rows import Row
from benchmarks.quality.sensitivity import sensitivity
from benchmarks.record import Json
from export.errors import ContractError
from pipeline.jobs.jobs import Job
from pipeline.jobs.once import Once
from pipeline.recipe import Recipe

CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Base:
    """What the rows of one subject are compared with: the float model's pictures, features and steps, and real data."""

    subject: Subject
    pictures: Pictures
    features: Array
    real: Array
    trajectory: Trajectory


def make_base(name: str, count: int, seed: int, work: Path) -> Base:
    """Of the bundled model `name` with `count` pictures."""
    subject = drawing.make_subject(name, count, seed)
    pictures = drawing.float_pictures(subject, work)
    features = features_of(subject.judging, torch.from_numpy(pictures))
    real = features_of(subject.judging, subject.judging.real())
    return Base(subject, pictures, features, real, drawing.float_trajectory(subject))


def judge_pictures(base: Base, pictures: Pictures) -> Json:
    """The measures that any set of pictures has. Raises ContractError for NaN or Inf."""
    if not np.isfinite(pictures).all():
        broken = int((~np.isfinite(pictures)).any(axis=(1, 2, 3)).sum())
        raise ContractError(f"{broken} of {len(pictures)} pictures hold NaN or Inf")
    seen = read(base.subject.judging, torch.from_numpy(pictures), base.subject.labels)
    return {
        "frechet_to_real": asdict(metrics.frechet_estimate(seen.features, base.real)),
        "frechet_increase": asdict(metrics.frechet_increase(seen.features, base.features, base.real)),
        "frechet_to_float": asdict(metrics.frechet_between(seen.features, base.features)),
        "accuracy": asdict(metrics.share_estimate(seen.all_right.numpy())),
        "accuracy_by_slot": seen.by_slot,
    }


def calibrate_row(shared: Once[Base], row: Row, recipe: Recipe, work: Path, redo: bool) -> None:
    """Finish the layers of a row and of all that share them. redo: anew."""
    calibrated(shared().subject, row, recipe, work / CALIBRATED, redo)


def measured_row(shared: Once[Base], row: Row, recipe: Recipe, work: Path, target: str) -> Json:
    """Draw and judge one row, whose layers are there."""
    refuse_missing_gpu(target)
    base = shared()
    subject = base.subject
    layers, minutes = calibrated(subject, row, recipe, work / CALIBRATED)
    started = time.monotonic()
    with drawer(subject, layers, recipe, base.trajectory, work / "engines" / row.name, target) as engine:
        pictures = drawing.draw(subject, engine.run, f"{subject.name} {row.name}")
        steps_db = base.trajectory.errors_db(engine.run)
    draw_minutes = (time.monotonic() - started) / 60
    measures = judge_pictures(base, pictures)
    return {
        **measures,
        "psnr_db": asdict(metrics.median_estimate(metrics.psnr_db(pictures, base.pictures))),
        "ssim": asdict(metrics.median_estimate(metrics.ssim(pictures, base.pictures))),
        "step_sqnr_db": steps_db,
        "weight_bytes": sum(layer.size_bytes for layer in layers),
        "weights": sum(layer.in_features * layer.out_features for layer in layers),
        # How many layers have which granularity and group size.
        "group_sizes": Counter(f"{layer.granularity} {layer.group_size or ''}".strip() for layer in layers),
        "calibration_minutes": minutes,
        "drawing_minutes": draw_minutes,
        "drawn_by": engine.name,
        "proof": engine.proof,
        **stamp(),
    }


def measured_sensitivity(shared: Once[Base]) -> list[Json]:
    """Records of which layers cost most."""
    return sensitivity(shared().subject, shared().trajectory)


def row_jobs(
    rows: Sequence[tuple[Row, Recipe]], shared: Once[Base], sha256: str, work: Path, target: str, redo: bool
) -> list[Job]:
    """For each row: its calibration, once for all that share it, then itself. sha256: of the model."""
    jobs: list[Job] = []
    calibrations: dict[str, str] = {}  # key -> name of the job
    for row, recipe in rows:
        key, log = calibration_key(recipe, sha256, row), work / "logs" / f"{row.name}.log"
        if key not in calibrations:
            calibrations[key] = f"calibration of {row.name}"
            jobs.append(Job(calibrations[key], partial(calibrate_row, shared, row, recipe, work, redo), log=log))
        work_of_row = partial(measured_row, shared, row, recipe, work, target)
        jobs.append(Job(row.name, work_of_row, calibrations[key], log))
    return jobs
