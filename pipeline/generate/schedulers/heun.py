"""Heun's method (arXiv 2206.00364, algorithm 1 without churn): each step has the derivative of both its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, first_step
from pipeline.generate.schedulers.predictions import Kind, sigma_to_data
from pipeline.generate.schedulers.sigmas import SigmaScheduler
from pipeline.generate.schedulers.tables import SigmaConfig, cumulated, sigmas_of, spaced, times_of


@dataclass(frozen=True, kw_only=True)
class HeunConfig(SigmaConfig):
    """HeunDiscreteScheduler of diffusers."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Kind = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not self.clip_sample_range > 0:
            return f"clip_sample_range {self.clip_sample_range} must be above 0"
        return super().problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return Heun(self, options)


@dataclass(frozen=True)
class _Start:
    """Where the step that is half done began. x, derivative: [B, C, ...] float32."""

    x: FloatArray
    derivative: FloatArray


class Heun(SigmaScheduler):
    """Steps of Heun's method, deterministic: the model is called twice for each sigma but the last, 2 n - 1 times."""

    def __init__(self, config: HeunConfig, options: SchedulerOptions) -> None:
        options.refuse("Heun", "eta", "mu", "sigmas")
        self.config = config
        trained = sigmas_of(cumulated(config.betas()))
        timesteps = spaced(config, options.n_steps, whole=False).astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
        respaced = config.respaced(float(sigmas[-1]), float(sigmas[0]), options.n_steps)
        if respaced is not None:
            sigmas, timesteps = respaced, times_of(respaced, np.log(trained)).astype(np.float32)
        twice = np.repeat(np.append(sigmas, 0.0).astype(np.float32), 2)[1:-1]
        first = 2 * first_step(options.n_steps, options.strength)
        super().__init__(np.repeat(timesteps, 2)[1:], twice, first, config.timestep_spacing)
        self.start_of_step: _Start | None = None

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """To the next sigma along the derivative, or again from where the step began along the mean of both."""
        sigma = self.sigmas[i]
        data = sigma_to_data(self.config.prediction_type, prediction, x, sigma)
        if self.config.clip_sample:
            data = np.clip(data, -self.config.clip_sample_range, self.config.clip_sample_range)
        self.data = data
        derivative = np.asarray((x - data) / sigma)
        begun, self.start_of_step = self.start_of_step, None
        if begun is None:
            self.start_of_step = _Start(x, derivative)
            return np.asarray(x + derivative * (self.sigmas[i + 1] - sigma))
        return np.asarray(begun.x + (begun.derivative + derivative) / np.float32(2) * (sigma - self.sigmas[i - 1]))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures of the batch alone."""
        super().keep(rows)
        if self.start_of_step is not None:
            kept = list(rows)
            self.start_of_step = _Start(self.start_of_step.x[kept], self.start_of_step.derivative[kept])
