"""What schedulers compute before the first step: noise schedules, timesteps, sigmas. As diffusers does, in its dtypes.

T: training steps. alphas_cumprod: [T] float32, the share of data in the variance of the noisy picture, x = sqrt(a) data
+ sqrt(1 - a) noise. sigma = sqrt((1 - a) / a): noise over data. Timesteps are indices of training steps, 0 to T - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.errors import RecipeError
from pipeline.generate.schedulers import float32

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["linspace", "leading", "trailing"]
# More training steps than any model has; the tables of so many take some megabytes.
MOST_TRAIN_STEPS = 100_000
# What stands for a last alphas_cumprod of zero, so that its sigma is finite: the smallest positive float16.
ZERO_SNR = np.float32(2**-24)


# --- noise schedules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BetaConfig:
    """The keys that all schedulers with betas have: variances of the noise that each of T training steps adds."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Schedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0

    def problem(self) -> str | None:
        """What is wrong with the values, in words; None where nothing is."""
        if not 2 <= self.num_train_timesteps <= MOST_TRAIN_STEPS:
            return f"num_train_timesteps {self.num_train_timesteps} must be 2 to {MOST_TRAIN_STEPS}"
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            return f"trained_betas has {len(self.trained_betas)} values for {self.num_train_timesteps} training steps"
        values = self.trained_betas or (self.beta_start, self.beta_end)
        if wrong := [beta for beta in values if not 0 < beta < 1]:
            return f"beta {wrong[0]} must lie between 0 and 1"
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            return f"steps_offset {self.steps_offset} must be 0 to {self.num_train_timesteps - 1}"
        return None

    def betas(self) -> FloatArray:
        """[T] float32."""
        n = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return linspace(self.beta_start, self.beta_end, n)
        if self.beta_schedule == "scaled_linear":
            return np.square(linspace(self.beta_start**0.5, self.beta_end**0.5, n))
        kept = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return np.array([min(1 - kept[i + 1] / kept[i], 0.999) for i in range(n)], np.float32)


def linspace(start: float, stop: float, n: int) -> FloatArray:
    """`n` float32 numbers as torch.linspace gives them: the step rounded to float32, the second half from the end."""
    if n == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(n - 1))
    i = np.arange(n)
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).astype(np.float32)


def cumulated(betas: FloatArray, zero_snr: bool = False) -> FloatArray:
    """alphas_cumprod [T] of betas [T]. zero_snr: betas are changed so that nothing of the data is left at the end
    (arXiv 2305.08891, algorithm 1)."""
    product = _product(np.float32(1) - betas)
    if not zero_snr:
        return product
    roots = float32.root(product)
    first, last = roots[0], roots[-1]
    kept = np.square((roots - last) * (first / (first - last)))
    # Back to betas and forth, which rounds twice more: so does diffusers.
    alphas = np.concatenate([kept[:1], kept[1:] / kept[:-1]])
    return _product(np.float32(1) - (np.float32(1) - alphas))


def _product(alphas: FloatArray) -> FloatArray:
    """Cumulative product in float64, rounded at each place."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def never_zero(alphas_cumprod: FloatArray, zero_snr: bool) -> FloatArray:
    """With zero_snr the last value is tiny instead of 0: for solvers that divide by its root."""
    return np.append(alphas_cumprod[:-1], ZERO_SNR) if zero_snr else alphas_cumprod


def sigmas_of(alphas_cumprod: FloatArray) -> FloatArray:
    """sqrt((1 - a) / a), float32, of the same shape; infinite where a is 0, which schedulers refuse."""
    with np.errstate(divide="ignore", over="ignore"):
        return float32.root((np.float32(1) - alphas_cumprod) / alphas_cumprod)


# --- timesteps -----------------------------------------------------------------------------------------------------


def refuse_steps(n_steps: int, train_steps: int) -> None:
    """Raise RecipeError for a number of steps that the model's training does not have."""
    if not 1 <= n_steps <= train_steps:
        raise RecipeError(f"n_steps {n_steps} must be 1 to {train_steps}, the training steps of this scheduler")


def spaced(
    config: BetaConfig, n_steps: int, whole: bool = True, spare: bool = False, end: int | None = None
) -> DoubleArray:
    """Timesteps [n_steps] from high to low, spaced by config.timestep_spacing (arXiv 2305.08891, table 2).

    whole: "linspace" is rounded to integers. spare: one more is spaced, and the lowest left out. end: timesteps lie
    below it; None: T. Raises RecipeError for n_steps outside 1 to T, or too many to be spaced so.
    """
    train_steps, spacing = config.num_train_timesteps, config.timestep_spacing
    end = train_steps if end is None else end
    refuse_steps(n_steps, train_steps)
    points = n_steps + spare
    if spacing == "trailing":
        # For one number of steps in sixteen the last stride ends a rounding error above 0, and diffusers has one more
        # timestep there, -1, which no model knows. It is left out here.
        times: DoubleArray = np.round(np.arange(end, 0, -train_steps / n_steps)) - 1
        return times[times >= 0]
    if spacing == "linspace":
        times = np.linspace(0, end - 1, points)
        times = times.round() if whole else times
    else:
        if not (stride := end // points):
            raise RecipeError(
                f"n_steps {n_steps}: timestep_spacing 'leading' spaces at most {end - spare} of {end} training steps; "
                "use fewer steps"
            )
        times = np.arange(points, dtype=np.float64) * stride + config.steps_offset
    return times[::-1][:n_steps].copy()


# --- sigmas --------------------------------------------------------------------------------------------------------


def karras(sigma_min: float, sigma_max: float, n_steps: int, rho: float = 7.0) -> DoubleArray:
    """[n_steps] from sigma_max to sigma_min, even in sigma ** (1 / rho) (arXiv 2206.00364, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, n_steps) * (low - high)) ** rho)


def exponential(sigma_min: float, sigma_max: float, n_steps: int) -> DoubleArray:
    """[n_steps] from sigma_max to sigma_min, even in log sigma."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n_steps))


def beta(sigma_min: float, sigma_max: float, n_steps: int) -> DoubleArray:
    """[n_steps] from sigma_max to sigma_min at quantiles of a beta distribution of 0.6, 0.6 (arXiv 2407.12173)."""
    return sigma_min + beta_quantile(1 - np.linspace(0, 1, n_steps), 0.6) * (sigma_max - sigma_min)


def beta_quantile(p: DoubleArray, a: float) -> DoubleArray:
    """Quantiles x [n] of a symmetric beta distribution, shape parameters a and a, at probabilities p [n].

    >>> beta_quantile(np.array([0.0, 0.1, 0.5, 1.0]), 0.6).round(6).tolist()
    [0.0, 0.039584, 0.5, 1.0]
    """
    lower = np.minimum(p, 1 - p)
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(80):  # halves an interval of 0.5 down to float64's rounding; quantiles near 0 go on, to 4e-25
        middle = (low + high) / 2
        below = _beta_share(middle, a) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = np.where(lower == 0, 0.0, (low + high) / 2)
    return np.where(p <= 0.5, quantile, 1 - quantile)


def _beta_share(x: DoubleArray, a: float) -> DoubleArray:
    """The regularized incomplete beta function of a and a at x in [0, 0.5], by its power series (DLMF 8.17.7)."""
    term, total = np.ones_like(x), np.ones_like(x)
    for n in range(60):  # each term is at most half of the one before
        term = term * x * (2 * a + n) / (a + 1 + n)
        total = total + term
    scale = math.gamma(2 * a) / (math.gamma(a) ** 2 * a)
    return np.asarray(scale * x**a * (1 - x) ** a * total)


@dataclass(frozen=True, kw_only=True)
class SigmaConfig(BetaConfig):
    """The keys of schedulers that can space sigmas instead of timesteps. One of the three at most."""

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    def problem(self) -> str | None:
        """As of BetaConfig; and two ways to space sigmas."""
        return super().problem() or several_spacings(
            self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas
        )

    def respaced(self, sigma_min: float, sigma_max: float, n_steps: int) -> DoubleArray | None:
        """Sigmas [n_steps] between these two; None where it is the timesteps that are spaced."""
        return respaced(
            (self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas), sigma_min, sigma_max, n_steps
        )


def several_spacings(karras: bool | None, exponential: bool | None, beta: bool | None) -> str | None:
    """A sentence if more than one of them is true."""
    if bool(karras) + bool(exponential) + bool(beta) > 1:
        return "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true"
    return None


def respaced(
    chosen: tuple[bool | None, bool | None, bool | None], sigma_min: float, sigma_max: float, n_steps: int
) -> DoubleArray | None:
    """Sigmas [n_steps] from high to low by the first of Karras, exponential and beta that is chosen, or None."""
    spacings = (spacing for spacing, wanted in zip((karras, exponential, beta), chosen, strict=True) if wanted)
    return next((spacing(sigma_min, sigma_max, n_steps) for spacing in spacings), None)


def times_of(sigmas: DoubleArray, log_sigmas: FloatArray) -> DoubleArray:
    """Timesteps [n] of sigmas [n], between training steps by log sigma: each behind the last step whose sigma is not
    above its own. log_sigmas: [T] of all training steps; the last ones may fall where the last is `ZERO_SNR`'s."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    least_from_here = np.minimum.accumulate(log_sigmas[::-1])[::-1]  # sorted, and the same where log_sigmas is
    low = (np.searchsorted(least_from_here, wanted, side="right") - 1).clip(0, len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    share = np.clip((below - wanted) / (below - above), 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1))
