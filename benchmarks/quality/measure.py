"""What is measured of a row of the quality tables."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality import drawing, metrics
from benchmarks.quality.drawing import Pictures, Subject, Trajectory
from benchmarks.quality.engines import calibrated, drawer
from benchmarks.quality.metrics import Array
from benchmarks.quality.rows import Row
from benchmarks.record import Json
from export.errors import ContractError
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Base:
    """What the rows of one subject are compared with: the float model's pictures, features and steps, and real data."""

    pictures: Pictures
    features: Array
    real: Array
    trajectory: Trajectory


def judge_pictures(subject: Subject, base: Base, pictures: Pictures) -> Json:
    """The measures that any set of pictures has. Raises ContractError for NaN or Inf."""
    if not np.isfinite(pictures).all():
        broken = int((~np.isfinite(pictures)).any(axis=(1, 2, 3)).sum())
        raise ContractError(f"{broken} of {len(pictures)} pictures hold NaN or Inf")
    features, read = drawing.judged(subject.name, pictures)
    right = read == subject.labels  # [count, slots]
    return {
        "frechet_to_real": asdict(metrics.frechet_estimate(features, base.real)),
        "frechet_increase": asdict(metrics.frechet_increase(features, base.features, base.real)),
        "frechet_to_float": asdict(metrics.frechet_between(features, base.features)),
        "accuracy": asdict(metrics.share_estimate(right.all(1).numpy())),
        "accuracy_by_slot": right.double().mean(0).tolist(),
    }


def measured_row(
    subject: Subject, base: Base, row: Row, recipe: Recipe, work: Path, arguments: argparse.Namespace
) -> Json:
    """Calibrate, draw and judge one row."""
    layers, minutes = calibrated(subject, row, recipe, work / "calibrated", arguments.redo)
    started = time.monotonic()
    with drawer(subject, layers, recipe, base.trajectory, work / "engine", arguments.target) as engine:
        pictures = drawing.draw(subject, engine.run, f"{subject.name} {row.name}")
        steps_db = base.trajectory.errors_db(engine.run)
    draw_minutes = (time.monotonic() - started) / 60
    measures = judge_pictures(subject, base, pictures)
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
    }
