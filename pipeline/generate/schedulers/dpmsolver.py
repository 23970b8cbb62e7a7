"""DPM-Solver++ (arXiv 2211.01095), multistep, of orders 1 to 3, and its stochastic form.

Between two sigmas the picture's equation is solved exactly but for the data that the model predicts, which is taken for
a polynomial in lambda = log(alpha / sigma) through the last predictions. Every step's coefficients are known before the
first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, first_step
from pipeline.generate.schedulers.predictions import FlowKind, ThresholdConfig, thresholded, to_data
from pipeline.generate.schedulers.tables import (
    DoubleArray,
    SigmaConfig,
    cumulated,
    never_zero,
    sigmas_of,
    spaced,
    times_of,
)

ONE, HALF = np.float32(1), np.float32(0.5)
# Of fewer steps the last ones are of lower order, where lower_order_final says so.
FEW_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class DpmSolverConfig(SigmaConfig, ThresholdConfig):
    """DPMSolverMultistepScheduler of diffusers; not the two algorithms that predict noise, which it gives up."""

    solver_order: Literal[1, 2, 3] = 2
    prediction_type: FlowKind = "epsilon"
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -np.inf
    variance_type: Literal["learned", "learned_range"] | None = None
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not 0 < self.flow_shift < np.inf:
            return f"flow_shift {self.flow_shift} must be above 0"
        if np.isnan(self.lambda_min_clipped) or self.lambda_min_clipped > 0:
            return f"lambda_min_clipped {self.lambda_min_clipped} must be at most 0"
        return super().problem() or self.limits_problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return DpmSolver(self, options)


class Signal(NamedTuple):
    """What a noise level stands for, float32 each: x = alpha data + sigma noise, lam = log(alpha / sigma)."""

    alpha: np.float32
    sigma: np.float32
    lam: np.float32


def signal(sigma: np.float32, flow: bool) -> Signal:
    """Of sigma = noise over data; or with `flow` of x = (1 - sigma) data + sigma noise."""
    alpha = ONE - sigma if flow else ONE / float32.root(sigma * sigma + ONE)
    sigma = sigma if flow else sigma * alpha
    return Signal(alpha, sigma, float32.log(alpha) - float32.log(sigma))


class Update(NamedTuple):
    """Coefficients of one step, float32 each: x' = x x + data D0 + slope D1 + bend D2 + noise z.

    D0 is the newest prediction of the data. nearer, farther: what differences of predictions are multiplied with for
    divided differences; mix, over: how D1 and D2 are made of these.
    """

    order: int
    x: np.float32
    data: np.float32
    slope: np.float32 = np.float32(0)
    bend: np.float32 = np.float32(0)
    noise: np.float32 = np.float32(0)
    nearer: np.float32 = np.float32(0)
    farther: np.float32 = np.float32(0)
    mix: np.float32 = np.float32(0)
    over: np.float32 = np.float32(0)


class DpmSolver(Scheduler):
    """Steps of DPM-Solver++. history: predictions of the data, the newest last, at most as many as the order."""

    def __init__(self, config: DpmSolverConfig, options: SchedulerOptions) -> None:
        options.refuse("DPM-Solver++", "eta", "sigmas")
        if options.mu is not None and not config.use_dynamic_shifting:
            raise RecipeError(f"mu {options.mu}: this scheduler has use_dynamic_shifting off; leave it out")
        self.config, self.flow = config, bool(config.use_flow_sigmas)
        self.stochastic = config.algorithm_type == "sde-dpmsolver++"
        timesteps, self.sigmas = _schedule(config, options)
        n_steps = len(timesteps)
        super().__init__(timesteps, first_step(n_steps, options.strength))
        self.history: list[FloatArray] = []
        with np.errstate(all="ignore"):
            self.updates = {i: self._update(i, self._order(i)) for i in self.steps}
        for i, update in self.updates.items():
            if not all(np.isfinite(value) for value in update):
                # A step that ends at sigma 0 is of first order, which has coefficients from wherever it begins.
                ends_above_zero = i == n_steps - 1 and self.sigmas[-1] > 0
                remedy = "final_sigmas_type 'zero'" if ends_above_zero else "fewer steps, or another scheduler"
                raise RecipeError(
                    f"n_steps {n_steps}: step {i} has no finite coefficients, from sigma {self.sigmas[i]:g} to "
                    f"{self.sigmas[i + 1]:g}; use {remedy}"
                )

    def _order(self, i: int) -> int:
        """Of step `i`: as many predictions as there are, and fewer at the end."""
        config, n_steps = self.config, len(self.timesteps)
        order = min(i - self.first + 1, config.solver_order)
        lower = config.lower_order_final and n_steps < FEW_STEPS
        if i == n_steps - 1 and (lower or config.euler_at_final or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if lower and i == n_steps - 2 else order

    def _update(self, i: int, order: int) -> Update:
        """Coefficients of step `i`, computed in float32 as diffusers does."""
        after, now, *past = (signal(self.sigmas[k], self.flow) for k in range(i + 1, i - order, -1))
        h = after.lam - now.lam
        if self.stochastic:
            left = ONE - float32.exp(np.float32(-2) * h)
            update = Update(
                order,
                x=after.sigma / now.sigma * float32.exp(-h),
                data=after.alpha * left,
                slope=HALF * (after.alpha * left),
                noise=after.sigma * float32.root(left),
            )
            heun = after.alpha * (left / (np.float32(-2) * h) + ONE)
        else:
            gone = float32.exp(-h) - ONE
            update = Update(
                order,
                x=after.sigma / now.sigma,
                data=-(after.alpha * gone),
                slope=-(HALF * (after.alpha * gone)),
            )
            heun = after.alpha * (gone / h + ONE)
        if order == 1:
            return update._replace(slope=np.float32(0))
        r0 = (now.lam - past[0].lam) / h
        update = update._replace(nearer=ONE / r0)
        if order == 2:
            return update if self.config.solver_type == "midpoint" else update._replace(slope=heun)
        r1 = (past[0].lam - past[1].lam) / h
        if self.stochastic:
            double = np.float32(2) * h
            bend = after.alpha * ((left - double) / (double * double) - HALF)
        else:
            bend = -(after.alpha * ((gone + h) / (h * h) - HALF))
        return update._replace(slope=heun, bend=bend, farther=ONE / r1, mix=r0 / (r0 + r1), over=ONE / (r0 + r1))

    def channels(self, own: int) -> tuple[int, ...]:
        """Twice as many, of which the second half is not looked at, where the model learned a variance."""
        return (own, 2 * own) if self.config.variance_type else (own,)

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Algorithm 2 of the paper and its kin: the data predicted, and a step through the last predictions."""
        config, update = self.config, self.updates[i]
        alpha, sigma, _ = signal(self.sigmas[i], self.flow)
        of_flow = config.prediction_type == "flow_prediction"
        level = self.sigmas[i] if of_flow else sigma
        data = to_data(config.prediction_type, prediction[:, : x.shape[1]], x, alpha, level)
        if config.thresholding:
            data = thresholded(data, config.dynamic_thresholding_ratio, config.sample_max_value)
        self.data = data
        self.history = [*self.history, data][-config.solver_order :]
        stepped = update.x * x + update.data * data
        if update.order == 2:
            stepped = stepped + update.slope * (update.nearer * (data - self.history[-2]))
        if update.order == 3:
            nearer = update.nearer * (data - self.history[-2])
            farther = update.farther * (self.history[-2] - self.history[-3])
            stepped = stepped + update.slope * (nearer + update.mix * (nearer - farther))
            stepped = stepped + update.bend * (update.over * (nearer - farther))
        return np.asarray(stepped + update.noise * noise(x.shape) if self.stochastic else stepped)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures of the batch alone."""
        super().keep(rows)
        self.history = [data[list(rows)] for data in self.history]

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """alpha picture + sigma noise."""
        alpha, sigma, _ = signal(self.sigmas[i], self.flow)
        return np.asarray(alpha * picture + sigma * noise)


def _schedule(config: DpmSolverConfig, options: SchedulerOptions) -> tuple[DoubleArray, FloatArray]:
    """Timesteps [n], integers, and sigmas [n + 1] float32."""
    kept = never_zero(cumulated(config.betas(), config.rescale_betas_zero_snr), config.rescale_betas_zero_snr)
    trained = sigmas_of(kept)
    log_sigmas = np.log(trained)
    lambdas = float32.log(float32.root(kept)) - float32.log(float32.root(ONE - kept))
    clipped = int(np.searchsorted(lambdas[::-1], np.float32(config.lambda_min_clipped)))
    n_steps, train_steps = options.n_steps, config.num_train_timesteps
    timesteps = spaced(config, n_steps, spare=True, end=train_steps - clipped)
    # Sigmas lie between training steps. diffusers cuts their timesteps to integers; those of Karras and Lu it rounds
    # before, unless betas are of the cosine schedule.
    rounded = config.beta_schedule != "squaredcos_cap_v2"
    respaced = config.respaced(float(trained[0]), float(trained[-1]), n_steps)
    if respaced is not None and (config.use_karras_sigmas or not config.use_lu_lambdas):
        sigmas, timesteps = respaced, times_of(respaced, log_sigmas)
        timesteps = timesteps.round() if config.use_karras_sigmas and rounded else timesteps
    elif config.use_lu_lambdas:
        low, high = float(log_sigmas[0]), float(log_sigmas[-1])
        sigmas = np.exp(high + np.linspace(0, 1, n_steps) * (low - high))
        timesteps = times_of(sigmas, log_sigmas)
        timesteps = timesteps.round() if rounded else timesteps
    elif config.use_flow_sigmas:
        shift = config.flow_shift if options.mu is None else float(np.exp(options.mu))
        even = 1.0 - np.linspace(1, 1 / train_steps, n_steps + 1)
        sigmas = (shift * even / (1 + (shift - 1) * even))[::-1][:-1]
        timesteps = sigmas * train_steps
    else:
        sigmas = np.interp(timesteps, np.arange(train_steps), trained)
    last = trained[0] if config.final_sigmas_type == "sigma_min" else np.float32(0)
    return np.trunc(timesteps), np.append(sigmas, last).astype(np.float32)
