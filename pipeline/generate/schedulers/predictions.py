"""What a model predicts, made into the picture or the noise that it stands for; and pictures kept within limits.

alpha, sigma: float32, x = alpha data + sigma noise. v = alpha noise - sigma data (arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.generate.schedulers import float32

FloatArray = NDArray[np.float32]
Kind = Literal["epsilon", "sample", "v_prediction"]
FlowKind = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


def to_data(kind: FlowKind, prediction: FloatArray, x: FloatArray, alpha: np.float32, sigma: np.float32) -> FloatArray:
    """The picture without noise, of the shape of `x`. Of flow_prediction: sigma must be that of the flow."""
    if kind == "epsilon":
        return np.asarray((x - sigma * prediction) / alpha)
    if kind == "v_prediction":
        return np.asarray(alpha * x - sigma * prediction)
    if kind == "flow_prediction":
        return np.asarray(x - sigma * prediction)
    return prediction


def to_noise(kind: Kind, prediction: FloatArray, x: FloatArray, alpha: np.float32, sigma: np.float32) -> FloatArray:
    """The noise in `x`, of its shape."""
    if kind == "sample":
        return np.asarray((x - alpha * prediction) / sigma)
    if kind == "v_prediction":
        return np.asarray(alpha * prediction + sigma * x)
    return prediction


def sigma_to_data(kind: Kind, prediction: FloatArray, x: FloatArray, sigma: np.float32) -> FloatArray:
    """The picture without noise where x = data + sigma noise, of the shape of `x`."""
    if kind == "epsilon":
        return np.asarray(x - sigma * prediction)
    if kind == "v_prediction":
        square = sigma * sigma + np.float32(1)
        return np.asarray(prediction * (-sigma / float32.root(square)) + x / square)
    return prediction


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Keys of dynamic thresholding (arXiv 2205.11487, section 2.3)."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def limits_problem(self) -> str | None:
        """What is wrong with the values, in words."""
        if not 0 <= self.dynamic_thresholding_ratio <= 1 or not self.sample_max_value >= 1:
            return (
                f"dynamic_thresholding_ratio {self.dynamic_thresholding_ratio} must be 0 to 1 and sample_max_value "
                f"{self.sample_max_value} at least 1"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class ClipConfig(ThresholdConfig):
    """Keys of schedulers that keep the predicted picture within limits."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def limits_problem(self) -> str | None:
        """As of ThresholdConfig; and a range that is none."""
        if not self.clip_sample_range > 0:
            return f"clip_sample_range {self.clip_sample_range} must be above 0"
        return super().limits_problem()

    def limited(self, data: FloatArray) -> FloatArray:
        """Thresholded, or clipped, or as it is."""
        if self.thresholding:
            return thresholded(data, self.dynamic_thresholding_ratio, self.sample_max_value)
        return np.clip(data, -self.clip_sample_range, self.clip_sample_range) if self.clip_sample else data


def thresholded(data: FloatArray, ratio: float, most: float) -> FloatArray:
    """Each picture of [B, C, ...] float32 clipped to that quantile of its magnitudes, between 1 and `most`, and divided
    by it. The quantile is interpolated in float32, as torch.quantile does."""
    magnitudes = np.sort(np.abs(data).reshape(len(data), -1), axis=1)
    rank = np.float32(ratio) * np.float32(magnitudes.shape[1] - 1)
    low = int(np.floor(rank))
    weight = np.float32(rank - np.float32(low))
    below, above = magnitudes[:, low], magnitudes[:, int(np.ceil(rank))]
    rise = above - below
    quantile = below + weight * rise if weight < 0.5 else above - rise * (np.float32(1) - weight)
    limit = np.clip(quantile, np.float32(1), np.float32(most)).reshape(-1, *[1] * (data.ndim - 1))
    return np.asarray(np.clip(data, -limit, limit) / limit)
