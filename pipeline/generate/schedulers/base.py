"""What a scheduler is: the steps of one drawing, from noise to a picture, in NumPy.

    scheduler = read_scheduler_config(folder / "scheduler_config.json").scheduler(SchedulerOptions(n_steps=20))
    x = scheduler.start(noise(shape))
    for i in scheduler.steps:
        prediction = denoise(scheduler.scale_model_input(x, i), scheduler.timesteps[i])
        x = scheduler.step(prediction, x, i, noise)

x: [B, C, ...] float32. Configurations are frozen and may be shared. A scheduler belongs to one drawing: solvers of
several steps remember predictions, in `history`. Steps are numbered, not found by their timestep, as diffusers does
where a pipeline has not called `set_begin_index`: of two equal timesteps it then starts at the second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.errors import ContractError, RecipeError

FloatArray = NDArray[np.float32]
# Standard normal float32 numbers of a shape, new ones at each call.
Noise = Callable[[tuple[int, ...]], FloatArray]


@dataclass(frozen=True)
class SchedulerOptions:
    """How a drawing goes through a scheduler's steps.

    strength: of image-to-image, the share of steps that is done; 1 for all. eta: noise of DDIM, 0 (none) to 1 (as much
    as DDPM). mu, sigmas: of flow matching, what the pipeline makes of the picture's size: the exponent of the shift,
    and sigmas [n_steps] to begin with. What a scheduler has no use for is refused, unless it has its neutral value.
    """

    n_steps: int
    strength: float = 1.0
    eta: float = 0.0
    mu: float | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise RecipeError(f"n_steps {self.n_steps} must be at least 1")
        if not 0 < self.strength <= 1:
            raise RecipeError(f"strength {self.strength} must be above 0 and at most 1")
        if not 0 <= self.eta <= 1:
            raise RecipeError(f"eta {self.eta} must be 0 to 1")

    def refuse_sigmas(self) -> None:
        """Raise RecipeError if there is not one for each step."""
        if self.sigmas is not None and len(self.sigmas) != self.n_steps:
            raise RecipeError(f"{len(self.sigmas)} sigmas for {self.n_steps} steps; give one for each")

    def refuse(self, scheduler: str, *names: str) -> None:
        """Raise RecipeError for an option of these that is not neutral: `scheduler` has no use for it."""
        neutral = SchedulerOptions(1)
        for name in names:
            if getattr(self, name) != getattr(neutral, name):
                raise RecipeError(f"{name} {getattr(self, name)}: {scheduler} takes no {name}; leave it out")


class Scheduler(ABC):
    """The steps of one drawing.

    timesteps: [n] float32, what the model is called with. first: the step that a drawing begins with, above 0 for
    image-to-image. init_noise_sigma: what noise is multiplied with to begin a drawing without a picture. data: what the
    model took the picture to become at the last step, [B, C, ...] float32; None before the first.
    """

    def __init__(self, timesteps: ArrayLike, first: int = 0, init_noise_sigma: float = 1.0) -> None:
        self.timesteps: FloatArray = np.asarray(timesteps, np.float32)
        self.first = first
        self.init_noise_sigma = np.float32(init_noise_sigma)
        self.data: FloatArray | None = None
        self._next = first

    @property
    def steps(self) -> range:
        """The numbers of the steps, in order."""
        return range(self.first, len(self.timesteps))

    def start(self, noise: FloatArray, picture: FloatArray | None = None) -> FloatArray:
        """What the first step gets: noise, or a picture (or its latents) with as much noise as the first step takes
        off. Both [B, C, ...] float32."""
        if picture is None:
            return np.asarray(noise * self.init_noise_sigma)
        return self.add_noise(picture, noise, self.first)

    def scale_model_input(self, x: FloatArray, i: int) -> FloatArray:
        """What the model is given for `x` at step `i`."""
        return x

    def step(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """`x` after step `i`.

        prediction: [B, C, ...] float32, or of 2 C channels where the model predicts a variance too. noise: called by
        stochastic solvers, at most once a step. Raises ContractError for a prediction of another shape.
        """
        assert i == self._next and i in self.steps, f"step {i} where {self._next} of {self.steps} is due"
        self._next = i + 1
        channels = prediction.shape[1] if prediction.ndim > 1 else 0
        fits = prediction.shape == (len(x), channels, *x.shape[2:]) and channels in self.channels(x.shape[1])
        if not fits:
            raise ContractError(
                f"the model predicts {prediction.shape} for {x.shape}; this scheduler takes as many channels as there "
                "are, or twice as many if its variance_type is learned"
            )
        return self.advance(np.asarray(prediction, np.float32), np.asarray(x, np.float32), i, noise)

    def channels(self, own: int) -> tuple[int, ...]:
        """How many channels a prediction may have for a picture with `own`."""
        return (own,)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures of the batch alone."""
        self.data = rows_of(self.data, rows)

    @abstractmethod
    def advance(self, prediction: FloatArray, x: FloatArray, i: int, noise: Noise) -> FloatArray:
        """As `step`, which has checked the order of steps and the shapes. Sets `data`."""

    @abstractmethod
    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """A picture as it would be before step `i`: with this noise. All [B, C, ...] float32."""


def first_step(n_steps: int, strength: float) -> int:
    """The step that image-to-image begins with, so that int(n_steps * strength) are done. Raises RecipeError if that is
    none.

    >>> first_step(20, 1.0), first_step(20, 0.75), first_step(10, 0.75)
    (0, 5, 3)
    """
    return left_out(n_steps, n_steps - min(int(n_steps * strength), n_steps), strength)


def left_out(n_steps: int, first: int, strength: float) -> int:
    """`first`, if a step is left to do. Raises RecipeError otherwise."""
    if first >= n_steps:
        raise RecipeError(f"strength {strength} of {n_steps} steps leaves no step to do; raise either")
    return first


def rows_of(batch: FloatArray | None, rows: Sequence[int]) -> FloatArray | None:
    """Some pictures of a batch, if there is one."""
    return None if batch is None else batch[list(rows)]


class SeededNoise:
    """Noise for a batch of pictures, each from a generator of its own, so that a picture does not depend on its batch.

    >>> noise = SeededNoise([3, 4])
    >>> bool((noise((2, 1, 4))[1] == SeededNoise([4])((1, 1, 4))[0]).all())
    True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> FloatArray:
        """Standard normal numbers. Raises RecipeError for another number of pictures."""
        if shape[0] != len(self.generators):
            raise RecipeError(f"{len(self.generators)} seeds for a batch of {shape[0]}; give each picture one")
        return np.stack([generator.standard_normal(shape[1:]) for generator in self.generators]).astype(np.float32)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these pictures alone."""
        self.generators = [self.generators[row] for row in rows]
