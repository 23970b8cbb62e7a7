"""Tiles give what diffusers' own tiled functions give, and a picture that is no larger than a tile goes whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.backends.base import Arrays
from pipeline.generate.tiles import Tiles, blended
from tests.support.tiny_vae import VAE, vae

Array = NDArray[np.float32]


def enlarging(inputs: Arrays) -> Arrays:
    """A decoder that repeats each cell four times on each side, and shows in a second channel where it is cut."""
    picture = np.repeat(np.repeat(inputs["latents"][:, :1], 4, 2), 4, 3)
    return {"sample": np.concatenate([picture, np.full_like(picture, picture.shape[2])], 1)}


def test_tiles_of_a_decoder_without_borders_make_the_whole() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 3, 21, 9)).astype(np.float32)
    picture = Tiles(8, 32).decode(enlarging, latents)
    whole = enlarging({"latents": latents})["sample"]
    assert picture.shape == whole.shape and picture.dtype == np.float32
    np.testing.assert_allclose(picture[:, 0], whole[:, 0], atol=1e-6)
    assert set(picture[0, 1, :, 0]) > {32.0}  # the last tile is shorter, and blended


def test_a_picture_of_one_tile_goes_whole_sample_by_sample() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(inputs: Arrays) -> Arrays:
        shapes.append(inputs["latents"].shape)
        return enlarging(inputs)

    Tiles.of_pixels({"block_out_channels": [8, 16, 16]}, 32).decode(run, np.zeros((2, 4, 8, 5), np.float32))
    assert shapes == [(1, 4, 8, 5)] * 2
    assert Tiles.of_pixels({"block_out_channels": [1, 2, 3, 4]}) == Tiles(64, 512)


def test_two_tiles_without_an_overlap_are_not_mixed() -> None:
    tile = np.ones((1, 1, 4, 4), np.float32)
    assert blended(tile * 2, tile, 0, 2) is tile
    assert blended(tile * 3, tile, 2, 3)[0, 0, 0].tolist() == [3, 2, 1, 1]


@pytest.mark.torch
@pytest.mark.parametrize("size", [(40, 40), (33, 21), (8, 60)])
def test_they_equal_those_of_diffusers(size: tuple[int, int]) -> None:
    import torch

    module, tiles = vae(), Tiles(VAE["sample_size"] // 4, VAE["sample_size"])
    latents = np.random.default_rng(1).standard_normal((2, 4, *size)).astype(np.float32)

    def of(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arrays], Arrays]:
        def run(inputs: Arrays) -> Arrays:
            with torch.no_grad():
                return {"result": function(torch.from_numpy(inputs[name])).numpy()}

        return run

    picture = tiles.decode(of("latents", lambda x: module.decode(x).sample), latents)
    moments = tiles.encode(of("sample", lambda x: module.encode(x).latent_dist.parameters), picture)
    with torch.no_grad():
        theirs = module.tiled_decode(torch.from_numpy(latents)).sample.numpy()
        their_moments = module._tiled_encode(torch.from_numpy(picture)).numpy()
    assert picture.shape == (2, 3, 4 * size[0], 4 * size[1])
    np.testing.assert_allclose(picture, theirs, atol=1e-5)
    np.testing.assert_allclose(moments, their_moments, atol=1e-5)
