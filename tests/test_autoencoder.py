"""Either half of an autoencoder goes the whole way: built, proven, called at any size, and refused by name."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from export.errors import ModelError, RecipeError
from export.models.families import scale_and_shift
from export.models.load import load as load_model
from pipeline import __main__ as cli
from pipeline import load
from tests.support.quick_build import measure_little
from tests.support.tiny_vae import vae_folder

pytestmark = pytest.mark.torch
GATES = {"coverage", "segments", "calls", "repeats", "finite"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vae_folder(tmp_path_factory.mktemp("pipeline"))


def built(folder: Path, recipe: str) -> Path:
    output = folder.parent / recipe
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        assert cli.main(["build", "--engine", recipe, "-m", str(folder), "--target", "cpu", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Path:
    return built(folder, "vae_decoder")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    return built(folder.parent, "vae_encoder")  # of the pipeline that it belongs to


def test_their_bundles_are_proven(decoder: Path, encoder: Path) -> None:
    for bundle in (decoder, encoder):
        report = json.loads((bundle / "report" / "parity.json").read_text())
        names = {gate["name"] for gate in report["gates"] if gate["passed"]}
        assert report["passed"] and names == {f"{target}/{name}" for target in ("cpu", "onnx") for name in GATES}
        manifest = load(bundle).manifest
        assert manifest["model"]["family"] == bundle.name and manifest["counts"]["quantized"] == 0
        other = "encoder" if bundle.name == "vae_decoder" else "decoder"
        assert set(manifest["model"]["tensors"]["ignored"].values()) == {
            f"of {other}, which the model does without",
            f"of {'quant_conv' if other == 'encoder' else 'post_quant_conv'}, which the model does without",
        }


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_they_equal_diffusers_at_any_size(decoder: Path, encoder: Path, folder: Path, target: str) -> None:
    module = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    engines = load(decoder).engine(target), load(encoder).engine(target)
    try:
        for count, height, width in ((1, 9, 5), (2, 8, 16), (3, 1, 1)):
            latents = np.random.default_rng(count).standard_normal((count, 4, height, width)).astype(np.float32)
            picture = engines[0].run({"latents": latents})["sample"]
            moments = engines[1].run({"sample": picture})["moments"]
            with torch.no_grad():
                expected = module.decode(torch.from_numpy(latents)).sample.numpy()
                expected_moments = module.encode(torch.from_numpy(picture)).latent_dist.parameters.numpy()
            assert picture.shape == (count, 3, 4 * height, 4 * width) and moments.shape == (count, 8, height, width)
            np.testing.assert_allclose(picture, expected, atol=2e-5 * np.abs(expected).max())
            np.testing.assert_allclose(moments, expected_moments, atol=2e-5 * np.abs(expected_moments).max())
    finally:
        for engine in engines:
            engine.close()


def test_it_is_verified_again_looked_into_and_measured(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_little(monkeypatch.setattr)
    for verb in ("verify", "inspect", "bench"):
        assert cli.main([verb, str(decoder)]) == 0, capsys.readouterr().out
    assert cli.main(["inspect", "--engine", "vae_decoder", "-m", str(decoder.parent)]) == 0


def test_it_draws_nothing_by_itself(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(decoder), "--prompt", "a", "-o", str(tmp_path / "a.png")]) == 2
    assert "is a picture decoder, which draws nothing" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="is a picture decoder, which draws nothing"):
        load(decoder).as_diffusers()


# --- what is refused ------------------------------------------------------------------------------------------------


def changed(folder: Path, parent: Path, **values: object) -> Path:
    """A copy of the folder with other values in its config.json."""
    copy = shutil.copytree(folder, parent / "vae")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny is not an autoencoder that is known here"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types is .*compiled with UpDecoderBlock2D"),
        ({"block_out_channels": [8, 16]}, "down_block_types is .*an autoencoder of 2 levels"),
        ({"block_out_channels": [8, 16, 2**14]}, "block_out_channels"),
        ({"latent_channels": 8}, "has shape .*config.json asks for"),
        ({"scaling_factor": 0}, "scaling_factor is 0; it should be greater"),
        ({"act_fn": "maxout"}, "AutoencoderKL refuses it"),
        ({"tiles": 4}, "AutoencoderKL does not know 'tiles': 4"),
    ],
)
def test_another_configuration_is_refused(folder: Path, tmp_path: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(str(changed(folder, tmp_path, **values)), half="decoder")


def test_a_scale_that_is_not_stated_is_diffusers_own() -> None:
    own = inspect.signature(AutoencoderKL.__init__).parameters
    assert scale_and_shift({}) == (own["scaling_factor"].default, own["shift_factor"].default or 0)


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = changed(folder, tmp_path)
    path = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    lost = "decoder.mid_block.attentions.0.to_q.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(ModelError, match=f"tensor {lost} is missing"):
        load_model(str(copy), half="decoder")
    load_model(str(copy), half="encoder")  # has no use for it
    save_file(tensors | {"decoder.extra.weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"tensor decoder\.extra\.weight: .*has no such tensor"):
        load_model(str(copy), half="decoder")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(str(copy), half="decoder")


def test_names_of_first_releases_are_understood(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = changed(folder, tmp_path)
    path = copy / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    models = [load_model(str(of), half="decoder") for of in (folder, copy)]
    for one, other in zip(*(model.module.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_recipe_says_which_half(folder: Path) -> None:
    with pytest.raises(ModelError, match="each half is built by itself; use --engine vae_decoder or --engine vae_enc"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="PixArtTransformer2DModel is not an autoencoder that is known here"):
        load_model("zoo:pixart_mini", half="decoder")


def test_gpu_targets_and_quantized_attention_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["build", "--engine", "vae_decoder", "-m", str(folder), "-o", str(tmp_path / "x")]
    assert cli.main([*flags, "--target", "cuda"]) == 3
    assert "target cuda builds no decoder of an autoencoder; --target cpu does" in capsys.readouterr().err
    assert cli.main([*flags, "--set", "attention.qk=INT8", "--set", "attention.pv=INT8"]) == 2
    assert "attention of an autoencoder's decoder stays in float" in capsys.readouterr().err
