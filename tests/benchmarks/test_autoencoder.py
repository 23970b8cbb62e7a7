"""What the benchmark of autoencoders measures, of a bundle of random numbers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import autoencoder
from export.models.description import Description
from export.models.families import VAE_DECODER
from pipeline.backends.base import Arrays

CONFIG = {"block_out_channels": (1, 1, 1, 1), "latent_channels": 4, "in_channels": 3}


def test_a_picture_goes_whole_or_in_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shapes: list[tuple[int, ...]] = []

    def run(inputs: Arrays) -> Arrays:
        shapes.append(inputs["latents"].shape[2:])
        height, width = shapes[-1]
        return {"sample": np.zeros((1, 3, 8 * height, 8 * width), np.float32)}

    engine = SimpleNamespace(run=run, close=lambda: None)
    bundle = SimpleNamespace(name="vae_decoder", engine=lambda target: engine)
    monkeypatch.setattr(autoencoder, "load", lambda path, threads: bundle)
    monkeypatch.setattr(autoencoder, "description", lambda _: Description(VAE_DECODER, CONFIG, tmp_path, "x"))
    whole = autoencoder.measured(tmp_path, 1024, "whole", 1)
    assert shapes == [(128, 128)] and (whole.engine, whole.pixels, whole.way) == ("vae_decoder", 1024, "whole")
    shapes.clear()
    autoencoder.measured(tmp_path, 1024, "tiles", 1)
    assert len(shapes) == 9 and set(shapes) == {(64, 64), (64, 32), (32, 64), (32, 32)}
    assert whole.seconds >= 0 and whole.processor_s >= 0 and whole.peak_rss_bytes > 2**20
