"""A cheap score of candidate group sizes: how far the denoiser's output is from the float one's.

It is the mean over calibration calls (spread over timesteps) of the output's SQNR in dB, negated. A score by pictures
is in benchmarks/quality/search_groups.py. Few inputs are easily overfitted: on dit_mini at W4A8 (GPTQ, exact groups,
144 candidates on 40 inputs) the sizes that were found had 40.4 dB on other pictures, uniform groups of 64 40.5 dB in
as many bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.models.torch_modules import first_output
from pipeline.backends.base import Arrays
from pipeline.backends.side_by_side import single_threaded_torch
from pipeline.calibrate.blocks import tensors
from pipeline.calibrate.data import CalibrationData, Call
from pipeline.calibrate.groups.candidates import CandidateModels, Candidates, scored_keys
from pipeline.calibrate.groups.search import Individual
from pipeline.distance import sqnr_db
from pipeline.generate.sampling import take_samples


@dataclass(frozen=True)
class ProxyScore:
    """Makes the score: called once in every process. calls: model inputs."""

    candidates: Candidates
    calls: tuple[Arrays, ...] = field(repr=False)

    @classmethod
    def of(cls, candidates: Candidates, data: CalibrationData, samples: int) -> ProxyScore:
        """On about `samples` samples, the same number of each calibration call."""
        each = max(1, samples // len(data.calls))
        shared = candidates.load().shared
        return cls(candidates, tuple(_evenly(call, each, shared) for call in data.calls))

    @property
    def origin(self) -> dict[str, object]:
        """What scores depend on beside model and data, which the folder of a calibration belongs to."""
        candidates = self.candidates
        rounding = "nearest" if candidates.layers is None else "stored"
        keys = scored_keys(candidates.recipe)
        return {"score": "proxy", "layers": rounding, "activations": candidates.activations, **keys}

    def __call__(self) -> _Proxy:
        return _Proxy(self)


def _evenly(call: Call, count: int, shared: frozenset[str]) -> Arrays:
    """`count` samples of a call, evenly spread over its batch."""
    rows = np.linspace(0, call.samples - 1, min(count, call.samples)).round().astype(int)
    return take_samples(call.inputs, rows, shared)


class _Proxy:
    """The score itself: minus the mean SQNR in dB of the candidate's outputs."""

    def __init__(self, score: ProxyScore) -> None:
        self.calls = list(map(tensors, score.calls))
        self.models = CandidateModels(score.candidates)
        # Beyond those of a denoiser's input is a learned sigma, which is not used.
        self.channels = self.models.model.config["in_channels"] if self.models.model.family.steps else None
        self.exact = self._outputs(self.models.float_module())

    def __call__(self, individual: Individual) -> float:
        outputs = self._outputs(self.models.module(individual))
        return -float(np.mean([sqnr_db(exact, other) for exact, other in zip(self.exact, outputs, strict=True)]))

    def _outputs(self, module: nn.Module) -> list[NDArray[np.float32]]:
        # sums of float32 depend on how many threads share them, and scores must not
        with torch.inference_mode(), single_threaded_torch():
            return [first_output(module(**call))[:, : self.channels].numpy() for call in self.calls]
