"""Latent consistency models (arXiv 2310.04378): each step predicts the whole picture, and all but the last noise it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions
from pipeline.generate.schedulers.ddim import noised, refuse_times
from pipeline.generate.schedulers.predictions import ClipConfig, Kind, to_data
from pipeline.generate.schedulers.tables import BetaConfig, Schedule, Spacing, cumulated, refuse_steps

# Standard deviation of the data that the boundary condition is made for.
SIGMA_DATA_SQUARE = np.float32(0.5**2)


@dataclass(frozen=True, kw_only=True)
class LcmConfig(BetaConfig, ClipConfig):
    """LCMScheduler of diffusers. original_inference_steps: timesteps that the model was distilled on."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Schedule = "scaled_linear"
    # Of these three diffusers makes no use either: timesteps are of the distillation, the last one of them.
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    prediction_type: Kind = "epsilon"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            most = self.num_train_timesteps
            return f"original_inference_steps {self.original_inference_steps} must be 1 to {most}"
        return super().problem() or self.limits_problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return Lcm(self, options)


class Lcm(Scheduler):
    """Steps of a latent consistency model, stochastic but for the last. Strength spreads all steps over the lower
    timesteps, rather than leaving the first out."""

    def __init__(self, config: LcmConfig, options: SchedulerOptions) -> None:
        options.refuse("LCM", "eta", "mu", "sigmas")
        self.config = config
        self.alphas_cumprod = cumulated(config.betas(), config.rescale_betas_zero_snr)
        refuse_steps(options.n_steps, config.num_train_timesteps)
        n_distilled = int(config.original_inference_steps * options.strength)
        if options.n_steps > n_distilled:
            raise RecipeError(
                f"n_steps {options.n_steps}: the model was distilled on {config.original_inference_steps} timesteps, "
                f"of which strength {options.strength} leaves {n_distilled}; use at most so many steps"
            )
        stride = config.num_train_timesteps // config.original_inference_steps
        distilled = np.arange(n_distilled, 0, -1) * stride - 1
        self.times = distilled[np.floor(np.linspace(0, n_distilled, options.n_steps, endpoint=False)).astype(np.int64)]
        refuse_times(self.times, self.alphas_cumprod, config.prediction_type)
        super().__init__(self.times)

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """The paper's consistency function, equation 9, and noise for the next timestep."""
        kept = self.alphas_cumprod[self.times[i]]
        alpha, sigma = float32.root(kept), float32.root(np.float32(1) - kept)
        data = self.config.limited(to_data(self.config.prediction_type, prediction, x, alpha, sigma))
        scaled = np.float32(self.times[i]) * np.float32(self.config.timestep_scaling)
        norm = scaled * scaled + SIGMA_DATA_SQUARE
        self.data = denoised = np.asarray(scaled / float32.root(norm) * data + SIGMA_DATA_SQUARE / norm * x)
        if i == len(self.times) - 1:
            return denoised
        return noised(denoised, noise(x.shape), self.alphas_cumprod[self.times[i + 1]])

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """sqrt(a) picture + sqrt(1 - a) noise."""
        return noised(picture, noise, self.alphas_cumprod[self.times[i]])
