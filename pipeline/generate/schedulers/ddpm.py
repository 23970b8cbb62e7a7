"""DDPM (arXiv 2006.11239): each step takes noise off and puts some new noise on, of a fixed or predicted variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, first_step
from pipeline.generate.schedulers.ddim import noised, refuse_times
from pipeline.generate.schedulers.predictions import ClipConfig, Kind, to_data
from pipeline.generate.schedulers.tables import BetaConfig, Spacing, cumulated, spaced

ONE = np.float32(1)
LEAST_VARIANCE = np.float32(1e-20)
# diffusers has "fixed_large_log" too, and takes the root of a logarithm there, which is not a number.
Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]


@dataclass(frozen=True, kw_only=True)
class DdpmConfig(BetaConfig, ClipConfig):
    """DDPMScheduler of diffusers."""

    timestep_spacing: Spacing = "leading"
    prediction_type: Kind = "epsilon"
    variance_type: Variance = "fixed_small"
    rescale_betas_zero_snr: bool = False

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        return super().problem() or self.limits_problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return Ddpm(self, options)


class Ddpm(Scheduler):
    """Steps of DDPM. With a learned variance the model predicts 2 C channels: the prediction, and of the variance
    itself, or where its logarithm lies between its bounds (arXiv 2102.09672, equation 15), -1 to 1."""

    def __init__(self, config: DdpmConfig, options: SchedulerOptions) -> None:
        options.refuse("DDPM", "eta", "mu", "sigmas")
        self.config = config
        self.alphas_cumprod = cumulated(config.betas(), config.rescale_betas_zero_snr)
        self.times = spaced(config, options.n_steps).astype(np.int64)
        refuse_times(self.times, self.alphas_cumprod, config.prediction_type)
        super().__init__(self.times, first_step(options.n_steps, options.strength))

    def channels(self, own: int) -> tuple[int, ...]:
        """Twice as many with a learned variance."""
        return (2 * own,) if self.config.variance_type.startswith("learned") else (own,)

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Equation 7 of the paper, and noise unless this is timestep 0."""
        now_kept = self.alphas_cumprod[self.times[i]]
        then_kept = self.alphas_cumprod[self.times[i + 1]] if i + 1 < len(self.times) else ONE
        alpha, sigma = float32.root(now_kept), float32.root(ONE - now_kept)
        prediction, spread = prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]
        self.data = data = self.config.limited(to_data(self.config.prediction_type, prediction, x, alpha, sigma))
        step_kept = now_kept / then_kept
        step_beta = ONE - step_kept
        data_share = float32.root(then_kept) * step_beta / (ONE - now_kept)
        x_share = float32.root(step_kept) * (ONE - then_kept) / (ONE - now_kept)
        mean = data_share * data + x_share * x
        if self.times[i] == 0:
            return np.asarray(mean)
        least = max((ONE - then_kept) / (ONE - now_kept) * step_beta, LEAST_VARIANCE)
        return np.asarray(mean + self._deviation(least, step_beta, spread) * noise(x.shape))

    def _deviation(self, least: np.float32, most: np.float32, spread: FloatArray) -> FloatArray | np.float32:
        """Standard deviation of the new noise. least, most: bounds of the variance; spread: what the model says."""
        kind = self.config.variance_type
        if kind == "learned":
            return float32.root(spread)
        if kind == "learned_range":
            share = (spread + ONE) / np.float32(2)
            return float32.exp(np.float32(0.5) * (share * float32.log(most) + (ONE - share) * float32.log(least)))
        if kind == "fixed_small_log":
            return float32.exp(np.float32(0.5) * float32.log(least))
        return float32.root(most if kind == "fixed_large" else least)

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """sqrt(a) picture + sqrt(1 - a) noise."""
        return noised(picture, noise, self.alphas_cumprod[self.times[i]])
