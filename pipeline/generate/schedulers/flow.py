"""Euler's method for flow matching (arXiv 2210.02747, 2209.03003): x = (1 - sigma) data + sigma noise, and the model
predicts noise - data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, left_out
from pipeline.generate.schedulers.tables import MOST_TRAIN_STEPS, DoubleArray, refuse_steps, respaced, several_spacings

ONE = np.float32(1)


@dataclass(frozen=True, kw_only=True)
class FlowEulerConfig:
    """FlowMatchEulerDiscreteScheduler of diffusers.

    shift: of sigmas towards noise, as a picture of many pixels needs it (arXiv 2403.03206, equation 23). With
    use_dynamic_shifting the pipeline computes it from the picture's size, see `exponent`.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not 2 <= self.num_train_timesteps <= MOST_TRAIN_STEPS:
            return f"num_train_timesteps {self.num_train_timesteps} must be 2 to {MOST_TRAIN_STEPS}"
        if not 0 < self.shift < math.inf:
            return f"shift {self.shift} must be above 0"
        if self.shift_terminal is not None and not 0 <= self.shift_terminal < 1:
            return f"shift_terminal {self.shift_terminal} must be at least 0 and below 1"
        if self.max_image_seq_len <= self.base_image_seq_len:
            return f"max_image_seq_len {self.max_image_seq_len} must be above base_image_seq_len"
        return several_spacings(self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)

    def exponent(self, image_tokens: int) -> float:
        """mu for a picture of so many tokens, between base_shift and max_shift and on: what the pipelines of diffusers
        call their schedulers with. Raises RecipeError without these two keys."""
        if self.base_shift is None or self.max_shift is None:
            raise RecipeError("this scheduler has no base_shift and max_shift to compute mu from; give mu")
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return FlowEuler(self, options)


class FlowEuler(Scheduler):
    """Steps of Euler's method; with stochastic_sampling each step predicts the whole picture and noises it again.

    sigmas: [n + 1] float32.
    """

    def __init__(self, config: FlowEulerConfig, options: SchedulerOptions) -> None:
        options.refuse("flow matching", "eta")
        self.stochastic = config.stochastic_sampling
        if (options.mu is not None) != config.use_dynamic_shifting:
            wanted, remedy = ("needs", "give one") if options.mu is None else ("has no use for", "leave it out")
            raise RecipeError(
                f"mu {options.mu}: this scheduler {wanted} one, by its use_dynamic_shifting; {remedy}, "
                "or change that key"
            )
        options.refuse_sigmas()
        refuse_steps(options.n_steps, MOST_TRAIN_STEPS)
        with np.errstate(all="ignore"):
            sigmas = _sigmas(config, options)
        if not np.isfinite(sigmas).all():
            raise RecipeError(
                f"n_steps {options.n_steps}: this scheduler's sigmas are not finite; with shift_terminal use 2 "
                "steps or more, and give sigmas above 0 and at most 1"
            )
        timesteps = sigmas * np.float32(config.num_train_timesteps)
        if config.invert_sigmas:
            sigmas = ONE - sigmas
            timesteps = sigmas * np.float32(config.num_train_timesteps)
        self.sigmas = np.append(sigmas, np.float32(config.invert_sigmas))
        # As the pipelines of flow matching round strength: up, where others round down.
        first = left_out(options.n_steps, int(options.n_steps - options.n_steps * options.strength), options.strength)
        super().__init__(timesteps, first)

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """To the next sigma along the predicted velocity."""
        now, after = self.sigmas[i], self.sigmas[i + 1]
        self.data = data = np.asarray(x - now * prediction)
        if self.stochastic:
            return np.asarray((ONE - after) * data + after * noise(x.shape))
        return np.asarray(x + (after - now) * prediction)

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """sigma noise + (1 - sigma) picture."""
        return np.asarray(self.sigmas[i] * noise + (ONE - self.sigmas[i]) * picture)


def _sigmas(config: FlowEulerConfig, options: SchedulerOptions) -> FloatArray:
    """[n] from high to low, float32."""
    train_steps, shift = config.num_train_timesteps, config.shift
    sigmas: FloatArray | DoubleArray
    if options.sigmas is not None:
        sigmas = np.array(options.sigmas, np.float32)
    else:
        # The ends are those of training, which were shifted already; without dynamic shifting they are so twice.
        ends = np.array([train_steps, 1], np.float32) / np.float32(train_steps)
        if not config.use_dynamic_shifting:
            ends = np.float32(shift) * ends / (ONE + np.float32(shift - 1) * ends)
        sigmas = np.linspace(float(ends[0]) * train_steps, float(ends[1]) * train_steps, options.n_steps) / train_steps
    if options.mu is not None:
        factor = math.exp(options.mu) if config.time_shift_type == "exponential" else options.mu
        sigmas = factor / (factor + (1 / sigmas - 1) ** 1.0)
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if config.shift_terminal:
        left = 1 - sigmas
        sigmas = 1 - left / (left[-1] / (1 - config.shift_terminal))
    chosen = (config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)
    if any(chosen):
        spaced = respaced(chosen, float(sigmas[-1]), float(sigmas[0]), options.n_steps)
        sigmas = sigmas if spaced is None else spaced
    return np.asarray(sigmas, np.float32)
