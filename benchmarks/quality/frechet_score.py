"""What a candidate of the group search costs, with its pictures as the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quality.drawing import draw, float_pictures, make_subject
from benchmarks.quality.judging import features_of
from benchmarks.quality.metrics import frechet, gaussian
from benchmarks.record import Json
from pipeline.backends.reference import ReferenceEngine
from pipeline.backends.side_by_side import single_threaded_torch
from pipeline.calibrate.groups.candidates import CandidateModels, Candidates
from pipeline.calibrate.groups.search import Individual


@dataclass(frozen=True)
class FrechetScore:
    """Makes the score, once in every process: `count` pictures of the bundled model `name`."""

    candidates: Candidates
    name: str
    count: int
    seed: int
    against: str
    folder: Path

    @property
    def origin(self) -> Json:
        """What the scores depend on beside the candidates."""
        return {"score": f"frechet from {self.against}", "count": self.count, "seed": self.seed}

    def __call__(self) -> Callable[[Individual], float]:
        subject = make_subject(self.name, self.count, self.seed)
        models = CandidateModels(replace(self.candidates, model=subject.model))
        judging = subject.judging
        others = judging.real() if self.against == "real" else torch.from_numpy(float_pictures(subject, self.folder))
        goal = gaussian(features_of(judging, others))

        def score(individual: Individual) -> float:
            engine = ReferenceEngine(models.module(individual), torch.float32)
            # sums of float32 depend on how many threads share them, and scores must not
            with single_threaded_torch():
                pictures = torch.from_numpy(draw(subject, engine.run, "candidate"))
                return frechet(gaussian(features_of(judging, pictures)), goal)

        return score
