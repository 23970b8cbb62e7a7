"""DDIM (arXiv 2010.02502): from a picture to the one of a lower timestep by the predicted noise, or some new noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, first_step
from pipeline.generate.schedulers.predictions import ClipConfig, Kind, to_data, to_noise
from pipeline.generate.schedulers.tables import BetaConfig, Spacing, cumulated, spaced

ONE = np.float32(1)


@dataclass(frozen=True, kw_only=True)
class DdimConfig(BetaConfig, ClipConfig):
    """DDIMScheduler of diffusers."""

    timestep_spacing: Spacing = "leading"
    prediction_type: Kind = "epsilon"
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        return super().problem() or self.limits_problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return Ddim(self, options)


class Ddim(Scheduler):
    """Steps of DDIM. Stochastic with eta above 0."""

    def __init__(self, config: DdimConfig, options: SchedulerOptions) -> None:
        options.refuse("DDIM", "mu", "sigmas")
        self.config, self.eta = config, np.float32(options.eta)
        self.alphas_cumprod = cumulated(config.betas(), config.rescale_betas_zero_snr)
        self.times = spaced(config, options.n_steps).astype(np.int64)
        refuse_times(self.times, self.alphas_cumprod, config.prediction_type)
        self.stride = config.num_train_timesteps // options.n_steps
        super().__init__(self.times, first_step(options.n_steps, options.strength))

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Equations 12 and 16 of the paper."""
        then = self.times[i] - self.stride
        now_kept = self.alphas_cumprod[self.times[i]]
        last_kept = ONE if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        then_kept = self.alphas_cumprod[then] if then >= 0 else last_kept
        alpha, sigma = float32.root(now_kept), float32.root(ONE - now_kept)
        kind = self.config.prediction_type
        self.data = data = self.config.limited(to_data(kind, prediction, x, alpha, sigma))
        variance = (ONE - then_kept) / (ONE - now_kept) * (ONE - now_kept / then_kept)
        deviation = self.eta * float32.root(variance)
        direction = float32.root(ONE - then_kept - deviation * deviation)
        after = float32.root(then_kept) * data + direction * to_noise(kind, prediction, x, alpha, sigma)
        return after + deviation * noise(x.shape) if self.eta > 0 else after

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """sqrt(a) picture + sqrt(1 - a) noise."""
        return noised(picture, noise, self.alphas_cumprod[self.times[i]])


def noised(picture: FloatArray, noise: FloatArray, kept: np.float32) -> FloatArray:
    """A picture with noise of variance 1 - kept; all [B, C, ...] float32."""
    return np.asarray(float32.root(kept) * picture + float32.root(ONE - kept) * noise)


def refuse_times(times: np.ndarray, alphas_cumprod: FloatArray, kind: str) -> None:
    """Raise RecipeError for timesteps [n] that the tables [T] do not have, or that leave nothing to divide by."""
    if times[0] >= len(alphas_cumprod):
        raise RecipeError(
            f"n_steps {len(times)}: steps_offset puts the first timestep at {times[0]}, beyond the "
            f"{len(alphas_cumprod)} training steps; use fewer steps"
        )
    if kind == "epsilon" and alphas_cumprod[times[0]] == 0:
        raise RecipeError(
            f"rescale_betas_zero_snr leaves nothing of the picture at timestep {times[0]}, where predicted noise "
            "(prediction_type 'epsilon') does not say what it is; use timestep_spacing 'leading', or v_prediction"
        )
