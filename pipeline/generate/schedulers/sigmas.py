"""What the Euler and Heun solvers share: x = data + sigma noise, so that the noise level is sigma itself."""

from __future__ import annotations

import numpy as np

from export.errors import RecipeError
from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Scheduler
from pipeline.generate.schedulers.tables import Spacing

ONE = np.float32(1)


class SigmaScheduler(Scheduler):
    """sigmas: [n + 1] float32, one for each step and one that the last step ends at."""

    def __init__(self, timesteps: FloatArray, sigmas: FloatArray, first: int, spacing: Spacing) -> None:
        """Raises RecipeError for sigmas that are not finite."""
        self.sigmas = np.asarray(sigmas, np.float32)
        if not np.isfinite(self.sigmas).all():
            raise RecipeError(
                f"this scheduler's sigmas are not finite ({self.sigmas[0]:g} at the first step), as its betas leave "
                "nothing of the picture; use smaller betas"
            )
        most = self.sigmas.max()
        # "leading" begins below the last training step, where what is left of the picture has to be made up for.
        super().__init__(timesteps, first, float32.root(most * most + ONE) if spacing == "leading" else most)

    def scale_model_input(self, x: FloatArray, i: int) -> FloatArray:
        """`x` with the variance that the model was trained on."""
        return np.asarray(x / float32.root(self.sigmas[i] * self.sigmas[i] + ONE))

    def add_noise(self, picture: FloatArray, noise: FloatArray, i: int) -> FloatArray:
        """picture + sigma noise."""
        return np.asarray(picture + noise * self.sigmas[i])
