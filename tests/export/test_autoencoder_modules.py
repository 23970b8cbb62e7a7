"""Parts of an autoencoder in their exportable form give what diffusers' own give, and other parts are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.errors import ModelError
from export.models.autoencoder_modules import SpatialAttention, decode, encode, exportable_half
from export.models.families import FAMILIES
from tests.support.tiny_vae import VAE, vae

pytestmark = pytest.mark.torch
HALVES = {"decoder": (decode, 4), "encoder": (encode, 3)}


def whole(module: Any, half: str, x: Tensor) -> Tensor:
    """What diffusers computes."""
    result: Tensor = module.decode(x).sample if half == "decoder" else module.encode(x).latent_dist.parameters
    return result


@pytest.mark.fast
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("convolutions", [True, False])
def test_a_half_is_that_of_diffusers(half: str, convolutions: bool) -> None:
    kept = dict(use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    call, channels = HALVES[half]
    x = torch.randn(2, channels, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = whole(vae(**kept).double(), half, x)
    family = FAMILIES[f"vae_{half}"]
    module = exportable_half(vae(**kept).double(), family.absent)
    assert torch.equal(call(module, x), family.call(module, {family.streamed: x}))
    torch.testing.assert_close(call(module, x), expected, rtol=1e-12, atol=1e-12)
    assert all(getattr(module, name) is None for name in family.absent)


def test_names_of_weights_stay() -> None:
    before = set(vae().state_dict())
    parts = [set(exportable_half(vae(), FAMILIES[f"vae_{half}"].absent).state_dict()) for half in HALVES]
    assert parts[0] | parts[1] == before and not parts[0] & parts[1]


def test_a_middle_without_attention_has_none() -> None:
    module = exportable_half(vae(mid_block_add_attention=False), FAMILIES["vae_decoder"].absent)
    assert not any(isinstance(part, SpatialAttention) for part in module.modules())
    assert decode(module, torch.zeros(1, 4, 2, 2)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("path", "name", "value", "words"),
    [
        ("decoder.up_blocks.0.upsamplers.0", "use_conv", False, "an upsampling other than"),
        ("decoder.up_blocks.0.resnets.0", "output_scale_factor", 2.0, "a residual block with"),
        ("decoder.mid_block.resnets.0", "time_emb_proj", nn.Identity(), "a residual block with"),
        ("decoder.mid_block.attentions.0", "rescale_output_factor", 2.0, "an attention with a factor"),
        ("decoder.mid_block.attentions.0", "residual_connection", False, "an attention with a factor"),
    ],
)
def test_another_form_of_a_part_is_refused(path: str, name: str, value: object, words: str) -> None:
    module = vae()
    setattr(module.get_submodule(path), name, value)
    with pytest.raises(ModelError, match=words):
        exportable_half(module, FAMILIES["vae_decoder"].absent)


def test_levels_are_those_of_the_configuration() -> None:
    from export.models.families import pixels_per_latent

    assert pixels_per_latent(VAE) == 4 and pixels_per_latent({"block_out_channels": (128, 256, 512, 512)}) == 8
