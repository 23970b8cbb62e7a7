"""UniPC (arXiv 2302.04867), multistep: a predictor, and a corrector that mends the last step by the next prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Noise, Scheduler, SchedulerOptions, first_step, rows_of
from pipeline.generate.schedulers.dpmsolver import signal
from pipeline.generate.schedulers.predictions import FlowKind, ThresholdConfig, thresholded, to_data, to_noise
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
# Off 1, where nothing of the picture is left, as much as diffusers takes off the first sigma of a flow.
OFF_ONE = 1e-6

# Keys of ways to space sigmas.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True, kw_only=True)
class UniPcConfig(SigmaConfig, ThresholdConfig):
    """UniPCMultistepScheduler of diffusers, without another scheduler as its predictor."""

    solver_order: Literal[1, 2, 3] = 2
    prediction_type: FlowKind = "epsilon"
    predict_x0: bool = True
    # Those of DPM-Solver stand for "bh2", as in diffusers: its files are drawn with by UniPC, too.
    solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    use_flow_sigmas: bool | None = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not 0 < self.flow_shift < np.inf:
            return f"flow_shift {self.flow_shift} must be above 0"
        for name, sigma in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            if sigma is not None and not 0 < sigma < np.inf:
                return f"{name} {sigma} must be above 0"
        if not self.predict_x0 and (self.prediction_type == "flow_prediction" or self.thresholding):
            return "predict_x0 false goes with neither prediction_type 'flow_prediction' nor thresholding"
        if self.shift_terminal is not None and not (self.use_flow_sigmas and 0 < self.shift_terminal < 1):
            return f"shift_terminal {self.shift_terminal} must be between 0 and 1, with use_flow_sigmas"
        return super().problem() or self.limits_problem()

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """Of one drawing. Raises RecipeError for options that it cannot take."""
        return UniPc(self, options)


class Update(NamedTuple):
    """Coefficients of a predictor or corrector: x' = x x + model m0 - scale sum of weights[k] (m[k] - m0) / ratios[k].

    m0: the newest prediction; m[k]: earlier ones, the newest first, and for the corrector at last the next one. All
    float32, weights and ratios of equal length.
    """

    x: np.float32
    model: np.float32
    scale: np.float32
    ratios: FloatArray
    weights: FloatArray

    @property
    def is_finite(self) -> bool:
        """Are its results numbers? An infinite ratio, of a step that stays at its sigma, leaves its prediction out."""
        numbers = np.array([self.x, self.model, self.scale, *self.weights])
        return bool(np.isfinite(numbers).all() and not np.isnan(self.ratios).any() and self.ratios.all())


class UniPc(Scheduler):
    """Steps of UniPC. history: predictions of the data (or noise), newest last, at most as many as the order; before:
    what the last step began with, corrected, or None before the first."""

    def __init__(self, config: UniPcConfig, options: SchedulerOptions) -> None:
        options.refuse("UniPC", "eta")
        if (options.mu is not None) != (config.use_dynamic_shifting and bool(config.use_flow_sigmas)):
            wanted, remedy = ("needs", "give one") if options.mu is None else ("has no use for", "leave it out")
            raise RecipeError(
                f"mu {options.mu}: this scheduler {wanted} one, by its use_dynamic_shifting; {remedy}, "
                "or change that key"
            )
        if options.sigmas is not None and not config.use_flow_sigmas:
            raise RecipeError("sigmas: this scheduler has use_flow_sigmas off; leave them out")
        options.refuse_sigmas()
        self.config, self.flow = config, bool(config.use_flow_sigmas)
        timesteps, self.sigmas = _schedule(config, options)
        super().__init__(timesteps, first_step(options.n_steps, options.strength))
        self.history: list[FloatArray] = []
        self.before: FloatArray | None = None
        with np.errstate(all="ignore"):
            self.predictors = {i: self._update(i, self._order(i), corrects=False) for i in self.steps}
            self.correctors = {
                i: self._update(i - 1, self._order(i - 1), corrects=True)
                for i in self.steps[1:]
                if i - 1 not in config.disable_corrector
            }
        corrected = [(i - 1, update) for i, update in self.correctors.items()]
        for i, update in [*self.predictors.items(), *corrected]:
            if not update.is_finite:
                why = _why_not_finite(config, self.sigmas, i, self._order(i))
                raise RecipeError(f"n_steps {options.n_steps}: step {i} has no finite coefficients, as {why}")

    def _order(self, i: int) -> int:
        """Of step `i`: as many predictions as there are, and fewer at the end."""
        left = len(self.timesteps) - i if self.config.lower_order_final else self.config.solver_order
        return min(i - self.first + 1, self.config.solver_order, left)

    def _update(self, i: int, order: int, corrects: bool) -> Update:
        """From sigma i to the next, in float32 as diffusers computes it: equations 8 and 9 of the paper, B(h) form."""
        after, now, *past = (signal(self.sigmas[k], self.flow) for k in range(i + 1, i - order, -1))
        h = after.lam - now.lam
        signed = -h if self.config.predict_x0 else h
        growth = float32.expm1(signed)
        scale = signed if self.config.solver_type == "bh1" else growth
        ratios = np.array([(level.lam - now.lam) / h for level in past] + [ONE], np.float32)
        rows, sides, factorial, phi = [], [], 1, growth / signed - ONE
        for k in range(order):
            rows.append(ratios**k)
            sides.append(phi * np.float32(factorial) / scale)
            factorial *= k + 2
            phi = phi / signed - np.float32(1 / factorial)
        points = order if corrects else order - 1
        used = ratios[:points]
        if points <= 1:
            weights = np.full(points, HALF)
        elif not np.isfinite(used).all() or len(set(used.tolist())) < points:
            weights = np.full(points, np.float32(np.nan))
        else:
            weights = np.linalg.solve(np.stack(rows)[:points, :points], np.array(sides[:points], np.float32))
        level, ratio = (
            (after.alpha, after.sigma / now.sigma) if self.config.predict_x0 else (after.sigma, after.alpha / now.alpha)
        )
        return Update(ratio, -(level * growth), level * scale, used, weights)

    def _stepped(self, update: Update, x: FloatArray, models: list[FloatArray]) -> FloatArray:
        """models: the newest prediction, then those of update.ratios."""
        newest, *others = models
        known = update.x * x + update.model * newest
        if not others:
            return np.asarray(known)
        slopes = [
            weight * ((model - newest) / ratio)
            for weight, ratio, model in zip(update.weights, update.ratios, others, strict=True)
        ]
        return np.asarray(known - update.scale * sum(slopes[1:], slopes[0]))

    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """Algorithms 1 and 2 of the paper: the last step again with what the model says of its end, then the next."""
        config = self.config
        alpha, sigma, _ = signal(self.sigmas[i], self.flow)
        if config.prediction_type == "flow_prediction":
            model = to_data(config.prediction_type, prediction, x, alpha, self.sigmas[i])
        elif config.predict_x0:
            model = to_data(config.prediction_type, prediction, x, alpha, sigma)
        else:
            model = to_noise(config.prediction_type, prediction, x, alpha, sigma)
        if config.thresholding:
            model = thresholded(model, config.dynamic_thresholding_ratio, config.sample_max_value)
        self.data = model if config.predict_x0 else to_data("epsilon", model, x, alpha, sigma)
        if i in self.correctors and self.before is not None:
            earlier = self.history[::-1][: self._order(i - 1)]
            x = self._stepped(self.correctors[i], self.before, [*earlier, model])
        self.before, self.history = x, [*self.history, model][-config.solver_order :]
        return self._stepped(self.predictors[i], x, self.history[::-1][: self._order(i)])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures of the batch alone."""
        super().keep(rows)
        self.history = [model[list(rows)] for model in self.history]
        self.before = rows_of(self.before, rows)

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """alpha picture + sigma noise."""
        alpha, sigma, _ = signal(self.sigmas[i], self.flow)
        return np.asarray(alpha * picture + sigma * noise)


def _why_not_finite(config: UniPcConfig, sigmas: FloatArray, i: int, order: int) -> str:
    """Why step `i` is no finite one, and what to do about it."""
    now, after = sigmas[i], sigmas[i + 1]
    if config.use_flow_sigmas and sigmas.max() >= 1:
        spaced_by = next((key for key in SPACINGS if getattr(config, key)), "flow_shift")
        return (
            f"a flow's sigmas must be below 1 and they begin at {sigmas.max():g}; change {spaced_by}, or state a "
            "sigma_max below 1"
        )
    settings = {
        "solver_type 'bh2'": config.solver_type != "bh1",
        "lower_order_final": order == 1,
        "predict_x0": config.predict_x0,
    }
    if after == 0 and not all(settings.values()):
        return f"it ends at sigma 0; use {', '.join(key for key, fits in settings.items() if not fits)}"
    if now == after and order > 2:
        return f"it stays at sigma {now:g}; use lower_order_final, or a solver_order of at most 2"
    return f"it goes from sigma {now:g} to {after:g}; use another number of steps"


def _schedule(config: UniPcConfig, options: SchedulerOptions) -> tuple[DoubleArray, FloatArray]:
    """Timesteps [n], integers, and sigmas [n + 1] float32."""
    kept = never_zero(cumulated(config.betas(), config.rescale_betas_zero_snr), config.rescale_betas_zero_snr)
    trained, n_steps, train_steps = sigmas_of(kept), options.n_steps, config.num_train_timesteps
    timesteps = spaced(config, n_steps, spare=True)
    least = float(trained[0]) if config.sigma_min is None else config.sigma_min
    most = float(trained[-1]) if config.sigma_max is None else config.sigma_max
    respaced = config.respaced(least, most, n_steps)
    if respaced is not None and options.sigmas is not None:
        raise RecipeError("sigmas: this scheduler spaces its sigmas itself; leave them out")
    if respaced is not None:
        sigmas = respaced
        if config.use_karras_sigmas and config.use_flow_sigmas:
            sigmas = sigmas / (sigmas + 1)
            timesteps = sigmas * train_steps
        else:
            timesteps = times_of(sigmas, np.log(trained))
            timesteps = timesteps.round() if config.use_karras_sigmas else timesteps
    elif config.use_flow_sigmas:
        sigmas = _flow_sigmas(config, options)
        timesteps = sigmas * train_steps
    else:
        sigmas = np.interp(timesteps, np.arange(train_steps), trained)
    if config.final_sigmas_type == "zero":
        last = 0.0
    else:  # of sigmas that are spaced by themselves the last stands there twice
        last = float(sigmas[-1]) if respaced is not None or config.use_flow_sigmas else float(trained[0])
    return np.trunc(timesteps), np.append(sigmas, last).astype(np.float32)


def _flow_sigmas(config: UniPcConfig, options: SchedulerOptions) -> DoubleArray:
    """Sigmas [n] of x = (1 - sigma) data + sigma noise, shifted towards noise."""
    even = np.linspace(1, 1 / config.num_train_timesteps, options.n_steps + 1)[:-1]
    if options.sigmas is not None:
        even = np.array(options.sigmas, np.float64)
    if options.mu is not None:
        sigmas = math.exp(options.mu) / (math.exp(options.mu) + (1 / even - 1))
    else:
        sigmas = config.flow_shift * even / (1 + (config.flow_shift - 1) * even)
    if config.shift_terminal is not None:
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - config.shift_terminal))
    if abs(sigmas[0] - 1) < OFF_ONE:
        sigmas[0] -= OFF_ONE
    return np.asarray(sigmas)
