"""Euler's method (arXiv 2206.00364, algorithm 1 without churn), and with noise after each step: Euler ancestral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, SchedulerOptions, first_step
from pipeline.generate.schedulers.predictions import Kind, sigma_to_data
from pipeline.generate.schedulers.sigmas import SigmaScheduler
from pipeline.generate.schedulers.tables import (
    BetaConfig,
    SigmaConfig,
    cumulated,
    linspace,
    never_zero,
    sigmas_of,
    spaced,
    times_of,
)


@dataclass(frozen=True, kw_only=True)
class EulerConfig(SigmaConfig):
    """EulerDiscreteScheduler of diffusers."""

    prediction_type: Literal["epsilon", "sample", "original_sample", "v_prediction"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        for name, sigma in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            if sigma is not None and not 0 < sigma < np.inf:
                return f"{name} {sigma} must be above 0"
        return super().problem()

    def scheduler(self, options: SchedulerOptions) -> Euler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return Euler(self, options)


class Euler(SigmaScheduler):
    """Steps of Euler's method, deterministic."""

    def __init__(self, config: EulerConfig, options: SchedulerOptions) -> None:
        options.refuse("Euler", "eta", "mu", "sigmas")
        kind = config.prediction_type
        self.kind: Kind = "sample" if kind == "original_sample" else kind
        timesteps, sigmas = _schedule(config, options.n_steps)
        super().__init__(timesteps, sigmas, first_step(options.n_steps, options.strength), config.timestep_spacing)

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Along the derivative, to the next sigma."""
        sigma = self.sigmas[i]
        self.data = data = sigma_to_data(self.kind, prediction, x, sigma)
        derivative = (x - data) / sigma
        return np.asarray(x + derivative * (self.sigmas[i + 1] - sigma))


def _schedule(config: EulerConfig, n_steps: int) -> tuple[FloatArray, FloatArray]:
    """Timesteps [n] and sigmas [n + 1], both float32."""
    kept = never_zero(cumulated(config.betas(), config.rescale_betas_zero_snr), config.rescale_betas_zero_snr)
    trained = sigmas_of(kept)
    timesteps = spaced(config, n_steps, whole=False).astype(np.float32)
    if config.interpolation_type == "linear":
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    else:  # one more than timesteps, so that the drawing ends at the lowest of them
        ends = np.log(trained[[-1, 0]])
        sigmas = float32.exp(linspace(float(ends[0]), float(ends[1]), n_steps + 1)).astype(np.float64)
    least = float(sigmas[-1]) if config.sigma_min is None else config.sigma_min
    most = float(sigmas[0]) if config.sigma_max is None else config.sigma_max
    respaced = config.respaced(least, most, n_steps)
    if respaced is not None:
        sigmas, timesteps = respaced, times_of(respaced, np.log(trained)).astype(np.float32)
    last = trained[0] if config.final_sigmas_type == "sigma_min" else np.float32(0)
    ended = np.append(sigmas, last).astype(np.float32)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        timesteps = np.float32(0.25) * float32.log(ended[:-1])
    return timesteps, ended


@dataclass(frozen=True, kw_only=True)
class EulerAncestralConfig(BetaConfig):
    """EulerAncestralDiscreteScheduler of diffusers."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False

    def scheduler(self, options: SchedulerOptions) -> EulerAncestral:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return EulerAncestral(self, options)


class EulerAncestral(SigmaScheduler):
    """Steps of Euler's method below the next sigma, and noise up to it: stochastic."""

    def __init__(self, config: EulerAncestralConfig, options: SchedulerOptions) -> None:
        options.refuse("Euler ancestral", "eta", "mu", "sigmas")
        self.kind = config.prediction_type
        kept = never_zero(cumulated(config.betas(), config.rescale_betas_zero_snr), config.rescale_betas_zero_snr)
        timesteps = spaced(config, options.n_steps, whole=False).astype(np.float32)
        sigmas = np.append(np.interp(timesteps, np.arange(len(kept)), sigmas_of(kept)), 0.0).astype(np.float32)
        super().__init__(timesteps, sigmas, first_step(options.n_steps, options.strength), config.timestep_spacing)
        for i in self.steps:
            if sigmas[i + 1] > sigmas[i]:
                raise RecipeError(
                    f"n_steps {options.n_steps}: sigma rises from {sigmas[i]:g} to {sigmas[i + 1]:g} at step {i}, and "
                    "Euler ancestral draws with sigmas that fall: rescale_betas_zero_snr puts "
                    f"{sigmas_of(kept)[-1]:g} at the last timestep; use fewer steps, or another scheduler"
                )

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Along the derivative, to `down`; the last step as well draws noise, and takes none of it."""
        sigma, after = self.sigmas[i], self.sigmas[i + 1]
        up = float32.root(after * after * (sigma * sigma - after * after) / (sigma * sigma))
        # Where sigma is many times larger, `up` may be rounded above `after`, and diffusers then draws NaN.
        down = float32.root(np.maximum(after * after - up * up, np.float32(0)))
        self.data = data = sigma_to_data(self.kind, prediction, x, sigma)
        derivative = (x - data) / sigma
        return np.asarray(x + derivative * (down - sigma) + noise(x.shape) * up)
