"""Random models of true configuration: same arguments, same bytes; sharding, planted outliers, live signals."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.shapes import WORKLOADS
from benchmarks.zoo.make_xl import OUTLIER_SHARE, tensor, write

pytestmark = pytest.mark.torch


def small(name):
    return WORKLOADS[name].changed(num_layers=2, num_attention_heads=4)


def outputs(name, folder):
    """Output of a written model on random inputs."""
    import diffusers

    row = small(name)
    model = getattr(diffusers, row.class_name).from_pretrained(folder).float().eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {"hidden_states": torch.randn(1, 4, 32, 32, generator=generator), "timestep": torch.tensor([500.0])}
    if row.class_name == "PixArtTransformer2DModel":
        sizes = {"resolution": None, "aspect_ratio": None}
        inputs |= {"encoder_hidden_states": torch.randn(1, 7, 4096, generator=generator), "added_cond_kwargs": sizes}
    else:
        inputs |= {"class_labels": torch.tensor([3])}
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_signals_live_and_do_not_explode(name, tmp_path):
    write(small(name), tmp_path)
    signals = outputs(name, tmp_path)
    assert signals.shape == (1, 8, 32, 32)
    assert 1e-2 < signals.std().item() < 1e2


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_the_same_arguments_give_the_same_bytes(name, tmp_path):
    row = small(name)
    for folder in ("a", "b"):
        write(row, tmp_path / folder, seed=3, shard_bytes=4_000_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert any(file.endswith("index.json") for file in files)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_another_seed_gives_other_weights():
    assert not np.array_equal(tensor("a.weight", (8, 8), 2, seed=0), tensor("a.weight", (8, 8), 2, seed=1))


def test_the_index_names_every_tensor_in_its_shard(tmp_path):
    write(small("pixart"), tmp_path, shard_bytes=4_000_000)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        named = {name for name, where in index["weight_map"].items() if where == file}
        assert named == set(load_file(tmp_path / file))


def test_outlier_columns_are_planted_in_the_linears_of_blocks_only():
    rms = np.sqrt((tensor("transformer_blocks.0.ff.net.0.proj.weight", (1152, 288), 2, 0).astype(float) ** 2).mean(0))
    assert (rms > 4 * np.median(rms)).sum() == round(288 * OUTLIER_SHARE)
    outside = np.sqrt((tensor("caption_projection.linear_1.weight", (1152, 288), 2, 0).astype(float) ** 2).mean(0))
    assert not (outside > 1.5 * np.median(outside)).any()


def test_adaln_scales_have_outlier_channels_and_shifts_have_not():
    table = tensor("transformer_blocks.0.scale_shift_table", (6, 288), 2, 0).astype(float)
    assert [(row > 4).sum() for row in table] == [0, 3, 0, 0, 3, 0]


def test_true_configurations_have_their_published_size():
    from benchmarks.zoo.make_xl import shapes_of

    sizes = {name: sum(np.prod(shape) for shape in shapes_of(row)[0].values()) for name, row in WORKLOADS.items()}
    # DiT counts its embedders once in the paper (675 M); diffusers has one in each block.
    expected = {"pixart": 611e6, "pixart_sigma": 611e6, "hunyuan": 1517e6, "dit": 750e6}
    assert sizes == {name: pytest.approx(size, rel=2e-3) for name, size in expected.items()}


def test_the_gemms_of_pixart_are_its_quantized_linears():
    gemms = {gemm.name: gemm for gemm in WORKLOADS["pixart"].gemms()}
    assert (gemms["attn.qkv"].m, gemms["attn.qkv"].n, gemms["attn.qkv"].k) == (256, 3456, 1152)
    assert sum(gemm.n * gemm.k * gemm.count for gemm in gemms.values()) == 28 * (8 + 8) * 1152**2
