"""Samplers: from noise to a picture by repeated calls of a denoiser. NumPy only, so that generating needs no torch.

These are what bundled models draw with, and what calibration and gates sample with. Their tables are float64, so they
differ from the schedulers of diffusers (folder schedulers/) in the last bits, which stored results depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.errors import ContractError, RecipeError
from pipeline.backends.base import Arrays

FloatArray = NDArray[np.float32]
# Noise schedule of the eps-predicting models (DiT, PixArt, Hunyuan were trained with 1000 steps; betas are linear).
TRAIN_STEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 2e-2


class Steps(Protocol):
    """The steps of one drawing. timesteps: [n_steps] float32, the model's input."""

    @property
    def timesteps(self) -> FloatArray: ...

    def scaled(self, x: FloatArray, i: int) -> FloatArray:
        """What the model is given for `x` at step `i`."""

    def step(self, x: FloatArray, prediction: FloatArray, i: int) -> tuple[FloatArray, FloatArray]:
        """`x` after step `i`, and the data that the model takes `x` to have been made of. All of one shape."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these samples alone."""


@dataclass(frozen=True)
class Sampler:
    """Steps without a memory. advance(x, prediction, i) is step i, estimate(x, prediction, i) the data that the model
    takes x to have been made of at the beginning of it, and noised(data, noise, i) is data as it would be then."""

    name: str
    timesteps: FloatArray
    advance: Callable[[FloatArray, FloatArray, int], FloatArray]
    estimate: Callable[[FloatArray, FloatArray, int], FloatArray]
    noised: Callable[[FloatArray, FloatArray, int], FloatArray]

    @property
    def n_steps(self) -> int:
        return len(self.timesteps)

    def scaled(self, x: FloatArray, i: int) -> FloatArray:
        """These models are given `x` as it is."""
        return x

    def step(self, x: FloatArray, prediction: FloatArray, i: int) -> tuple[FloatArray, FloatArray]:
        """As of Steps."""
        return self.advance(x, prediction, i), self.estimate(x, prediction, i)

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing is remembered of any sample."""


def flow_euler(n_steps: int, timestep_scale: float) -> Sampler:
    """Euler steps of a rectified flow: x_t = (1 - t) * data + t * noise, the model predicts noise - data."""
    times = np.linspace(1.0, 0.0, n_steps + 1)

    def advance(x: FloatArray, velocity: FloatArray, i: int) -> FloatArray:
        return x + np.float32(times[i + 1] - times[i]) * velocity

    def estimate(x: FloatArray, velocity: FloatArray, i: int) -> FloatArray:
        return x - np.float32(times[i]) * velocity

    def noised(data: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        return np.float32(1 - times[i]) * data + np.float32(times[i]) * noise

    return Sampler("flow_euler", (times[:-1] * timestep_scale).astype(np.float32), advance, estimate, noised)


def flow_euler_rising(n_steps: int, timestep_scale: float) -> Sampler:
    """The same steps of a model that counts time from noise to data, and predicts data - noise."""
    falling = flow_euler(n_steps, 1.0)
    times = np.linspace(0.0, 1.0, n_steps + 1)[:-1]

    def advance(x: FloatArray, velocity: FloatArray, i: int) -> FloatArray:
        return falling.advance(x, -velocity, i)

    def estimate(x: FloatArray, velocity: FloatArray, i: int) -> FloatArray:
        return falling.estimate(x, -velocity, i)

    timesteps = (times * timestep_scale).astype(np.float32)
    return Sampler("flow_euler_rising", timesteps, advance, estimate, falling.noised)


def ddim(n_steps: int, timestep_scale: float) -> Sampler:
    """DDIM (arXiv 2010.02502, eta 0) on linear betas, timesteps spaced as diffusers' "leading"; predicts the noise."""
    if n_steps > TRAIN_STEPS:
        raise RecipeError(f"n_steps {n_steps}: ddim has {TRAIN_STEPS} training steps; use at most that many")
    kept = np.cumprod(1.0 - np.linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS))
    stride = TRAIN_STEPS // n_steps
    times = np.arange(n_steps)[::-1] * stride

    def estimate(x: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        now = kept[times[i]]
        signal, rest = np.float32(np.sqrt(now)), np.float32(np.sqrt(1 - now))
        data: FloatArray = np.divide(x - rest * noise, signal)
        return data

    def advance(x: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        then = kept[times[i] - stride] if times[i] >= stride else 1.0
        return np.float32(np.sqrt(then)) * estimate(x, noise, i) + np.float32(np.sqrt(1 - then)) * noise

    def noised(data: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        now = kept[times[i]]
        return np.float32(np.sqrt(now)) * data + np.float32(np.sqrt(1 - now)) * noise

    return Sampler("ddim", (times * (timestep_scale / TRAIN_STEPS)).astype(np.float32), advance, estimate, noised)


SAMPLERS: dict[str, Callable[[int, float], Sampler]] = {
    "flow_euler": flow_euler, "flow_euler_rising": flow_euler_rising, "ddim": ddim,
}  # fmt: skip


def make_sampler(name: str, n_steps: int, timestep_scale: float = 1000.0) -> Sampler:
    """The sampler called `name`; the model's timestep input runs from about `timestep_scale` down to 0, or
    up to it."""
    if name not in SAMPLERS:
        raise RecipeError(f"sampler {name!r} is unknown; use one of {', '.join(SAMPLERS)}")
    if n_steps < 1:
        raise RecipeError(f"n_steps {n_steps} must be at least 1")
    return SAMPLERS[name](n_steps, timestep_scale)


@dataclass
class Trajectory:
    """A batch of B samples on its way from noise to data; each `step` is one call of the denoiser `run`.

    conditioning: model inputs with the prompt and without it (as `conditioning.encode` gives them). Unless
    `guidance_scale` is 1 both halves run as one batch of 2 B, prompts first (classifier-free guidance,
    arXiv 2207.12598). A model that predicts more channels than C (a learned sigma) has them dropped.
    latents: [B, C, H, W] float32, at first noise. shared: inputs without a batch axis, given once.
    on_step(i, inputs, outputs) sees every call of `run`. first: the step to begin with, above 0 for image-to-image.
    """

    run: Callable[[Arrays], Arrays]
    conditioning: tuple[Arrays, Arrays]
    latents: FloatArray
    sampler: Steps
    guidance_scale: float
    shared: frozenset[str] = frozenset()
    on_step: Callable[[int, Arrays, Arrays], None] | None = None
    first: int = 0
    # The step that comes next, and what the last one took the data to be, as `latents`.
    index: int = field(init=False)
    estimate: FloatArray | None = None
    constant: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.index = self.first
        self._stack()

    def _stack(self) -> None:
        self.constant = _stacked(*self.conditioning, self.shared) if self.guided else self.conditioning[0]

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def steps_left(self) -> int:
        return len(self.sampler.timesteps) - self.index

    def step(self) -> None:
        """One call of the denoiser, and one step of the sampler. Raises ContractError for what is no prediction."""
        i, x = self.index, self.latents
        scaled = self.sampler.scaled(x, i)
        batch = np.concatenate([scaled, scaled]) if self.guided else scaled
        times = np.full(len(batch), self.sampler.timesteps[i], np.float32)
        inputs = {"hidden_states": batch, "timestep": times, **self.constant}
        outputs = self.run(inputs)
        if self.on_step is not None:
            self.on_step(i, inputs, outputs)
        prediction = _prediction(outputs, batch).astype(np.float32)
        if self.guided:
            prompted, plain = np.split(prediction, 2)
            prediction = plain + np.float32(self.guidance_scale) * (prompted - plain)
        self.latents, self.estimate = self.sampler.step(x, prediction, i)
        self.index = i + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these samples alone."""
        prompted, plain = (take_samples(part, rows, self.shared) for part in self.conditioning)
        self.conditioning, self.latents = (prompted, plain), self.latents[list(rows)]
        self.estimate = None if self.estimate is None else self.estimate[list(rows)]
        self.sampler.keep(rows)
        self._stack()


def sample(
    run: Callable[[Arrays], Arrays],
    conditioning: tuple[Arrays, Arrays],
    noise: FloatArray,
    sampler: Sampler,
    guidance_scale: float,
    on_step: Callable[[int, Arrays, Arrays], None] | None = None,
    shared: frozenset[str] = frozenset(),
) -> FloatArray:
    """Denoise `noise` [B, C, H, W] to the end of a `Trajectory` and return the result, float32 of that shape."""
    start = np.asarray(noise, np.float32)
    trajectory = Trajectory(run, conditioning, start, sampler, guidance_scale, shared, on_step)
    while trajectory.steps_left:
        trajectory.step()
    return trajectory.latents


def _prediction(outputs: Arrays, batch: NDArray[np.float32]) -> NDArray[np.floating]:
    """[B, C, H, W] as `batch`, of a model's output. Raises ContractError for one that is no prediction for it."""
    sample = outputs.get("sample")
    if sample is None:
        outputs_text = ", ".join(outputs) or "nothing"
        raise ContractError(f"the engine gives {outputs_text} instead of `sample`; build it again")
    few = sample.ndim != batch.ndim or sample.shape[1] < batch.shape[1]
    if few or sample.dtype.kind != "f" or (len(sample), *sample.shape[2:]) != (len(batch), *batch.shape[2:]):
        gives = f"`sample` of {sample.dtype} {sample.shape} for latents of {batch.shape}"
        raise ContractError(
            f"the engine gives {gives}; it must be floats of that shape or of more channels, build it again"
        )
    return sample[:, : batch.shape[1]]


def _stacked(prompted: Arrays, plain: Arrays, shared: frozenset[str]) -> Arrays:
    """Both conditionings as one batch."""
    return {name: value if name in shared else np.concatenate([value, plain[name]]) for name, value in prompted.items()}


def take_samples(inputs: Arrays, rows: slice | Sequence[int] | NDArray[np.integer], shared: frozenset[str]) -> Arrays:
    """Some samples of a batch of model inputs; those of `shared` have no batch axis and stay whole."""
    return {name: value if name in shared else value[rows] for name, value in inputs.items()}
