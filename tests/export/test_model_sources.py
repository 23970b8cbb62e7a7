"""Which files a model is read from: variants, single files, revisions and links of the hub's cache; and what is not a
model says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.documents import sha256
from export.errors import EnvironmentLacksError, ModelError
from export.models.load import load
from export.models.weights import find_weights
from pipeline import recipe as recipes
from pipeline.__main__ import main
from tests.support import hub, tiny
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
BUILD = ["build", "--engine", "pixart_w4a6", "--target", "cpu", "--dry-run", "--json"]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, for tests that only read it."""
    return tiny.folder("pixart", tmp_path_factory.mktemp("models"))


@pytest.fixture
def copied(pixart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pixart, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; returns the folder of the repository someone/some-model in it."""
    for module in ("file_download", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--someone--some-model"


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What `build --dry-run` answers, with the recipe that it would build from."""
    assert main([*BUILD, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a `build` that ends with exit code 2 and no stack trace."""
    assert main([*BUILD, *arguments]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return str(json.loads(printed.out)["reason"])


# --- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bf16", "fp32", "ema", "non_ema", "my-own"])
def test_the_only_variant_is_read_and_any_is_read_by_name(copied, variant):
    expected = load(str(copied)).sha256
    (copied / WEIGHTS).rename(copied / f"{STEM}.{variant}.safetensors")
    assert load(str(copied)).sha256 == load(str(copied), variant=variant).sha256 == expected


def test_a_named_variant_is_another_model(copied, capsys):
    state = {key: value * 2 for key, value in load_file(copied / WEIGHTS).items()}
    save_file(state, copied / f"{STEM}.ema.safetensors")
    plain, ema = load(str(copied)), load(str(copied), variant="ema")
    assert plain.sha256 == sha256(copied / WEIGHTS) and ema.sha256 != plain.sha256
    path = "transformer_blocks.0.ff.net.2.weight"
    assert torch.equal(ema.module.state_dict()[path], 2 * plain.module.state_dict()[path])
    arguments = ["-m", str(copied), "--variant", "ema"]
    assert planned(arguments, capsys)["recipe"]["model_variant"] == "ema"
    assert main(["inspect", "--engine", "pixart_w4a6", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["sha256"] == ema.sha256


def test_variants_that_are_not_there_or_not_chosen(copied, capsys):
    arguments = ["-m", str(copied), "--variant"]
    assert "has no weights of the variant 'ema'; the variants there: only one without" in refused(
        [*arguments, "ema"], capsys
    )
    (copied / WEIGHTS).rename(copied / f"{STEM}.ema.safetensors")
    shutil.copyfile(copied / f"{STEM}.ema.safetensors", copied / f"{STEM}.fp16.safetensors")
    assert "the variants there: ema, fp16" in refused([*arguments, "../x"], capsys)
    assert "has the variants ema, fp16 and no plain file; choose one with --variant" in refused(arguments[:2], capsys)
    assert planned([*arguments, "fp16"], capsys)["quantized"] == 20


@pytest.mark.parametrize("index", [f"{STEM}.safetensors.index.bf16.json", f"{STEM}.bf16.safetensors.index.json"])
def test_shards_of_a_variant(tmp_path, index):
    folder = tiny.folder("dit", tmp_path, shard_size="100KB")
    plain = {key: tensor for _, key, tensor in find_weights(folder).tensors()}
    document = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    renamed = {name: name.replace(STEM, f"{STEM}.bf16") for name in set(document["weight_map"].values())}
    for old, new in renamed.items():
        (folder / old).rename(folder / new)
    weight_map = {key: renamed[name] for key, name in document["weight_map"].items()}
    (folder / index).write_text(json.dumps(document | {"weight_map": weight_map}))
    (folder / f"{WEIGHTS}.index.json").unlink()
    for variant in ("", "bf16"):
        read = {key: tensor for _, key, tensor in find_weights(folder, variant).tensors()}
        assert read.keys() == plain.keys() and all(torch.equal(read[key], plain[key]) for key in read)


# --- single files --------------------------------------------------------------------------------------------------


def test_a_single_file_with_its_configuration_beside_it_or_named(copied, tmp_path, capsys):
    beside = copied / "Model.safetensors"
    (copied / WEIGHTS).rename(beside)
    assert planned(["-m", str(beside)], capsys)["recipe"]["model"] == str(beside)
    alone = tmp_path / "Alone.safetensors"
    shutil.copyfile(beside, alone)
    message = refused(["-m", str(alone)], capsys)
    assert (
        "has no config.json" in message and "for a weights file also --config with the model's config.json" in message
    )
    configs = [str(copied / "config.json"), str(copied), "zoo:pixart_mini"]
    for config in configs[:2]:
        plan = planned(["-m", str(alone), "--config", config], capsys)
        assert (plan["recipe"]["model"], plan["recipe"]["model_config"]) == (str(alone), config)
        assert plan["tensors"] == {"used": len(load_file(alone)), "ignored": {}}
    assert "config.json and the weights must belong together" in refused(
        ["-m", str(alone), "--config", configs[2]], capsys
    )
    assert "--config takes a config.json, the folder of one" in refused(
        ["-m", str(alone), "--config", str(tmp_path)], capsys
    )
    assert "is one file, and --variant ema chooses between files" in refused(
        ["-m", str(beside), "--variant", "ema"], capsys
    )


@pytest.mark.parametrize("verb", ["build", "calibrate", "verify", "bench", "inspect"])
def test_every_verb_that_takes_a_model_takes_what_says_more_about_it(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert {"--model", "--variant", "--config"} <= set(capsys.readouterr().out.replace(",", " ").split())


def test_another_model_does_not_take_the_recipes_variant_and_configuration():
    own = recipes.Recipe("e", "zoo:dit_mini", model_variant="ema", model_config="zoo:dit_mini")
    assert recipes.with_model(own, None, None, None) == own
    other = recipes.with_model(own, "some/model", None, None)
    assert (other.model, other.model_variant, other.model_config) == ("some/model", "", "")
    assert recipes.with_model(own, None, "fp16", "zoo:pixart_mini").model_variant == "fp16"


# --- the hub's cache -----------------------------------------------------------------------------------------------


def test_links_of_the_hubs_cache(pixart, tmp_path, capsys):
    repository = tmp_path / "models--someone--some-model"
    folder = hub.snapshot(pixart, repository, "transformer")
    assert (folder / WEIGHTS).is_symlink()
    assert load(str(folder.parent)).sha256 == sha256(pixart / WEIGHTS)
    # A single file keeps its name, which its blob has not.
    plan = planned(["-m", str(folder / WEIGHTS)], capsys)
    assert plan["recipe"]["model"] == str(folder / WEIGHTS)


def test_a_revision_is_named_after_the_hub_id(pixart, copied, cache):
    hub.snapshot(pixart, cache, "transformer")
    state = {key: value * 2 for key, value in load_file(copied / WEIGHTS).items()}
    save_file(state, copied / WEIGHTS)
    other = "f" * 40
    hub.snapshot(copied, cache, "transformer", other, "refs/pr/3")
    assert load("someone/some-model").revision == load(f"someone/some-model@{hub.COMMIT}").revision == hub.COMMIT
    for name in ("refs/pr/3", other):
        model = load(f"someone/some-model@{name}")
        assert (model.revision, model.sha256) == (other, sha256(copied / WEIGHTS))
    with pytest.raises(
        EnvironmentLacksError, match=r'run: hf download someone/some-model --include "transformer/\*" --r'
    ):
        load("someone/some-model@v2")


def test_a_text_encoder_is_named_behind_the_hub_id(tmp_path, cache):
    hub.snapshot(t5_folder(tmp_path), cache, "text_encoder")
    for name in ("someone/some-model/text_encoder", f"someone/some-model/text_encoder@{hub.COMMIT}"):
        model = load(name)
        assert (model.family.name, model.revision, model.folder.name) == ("t5", hub.COMMIT, "text_encoder")
    with pytest.raises(EnvironmentLacksError, match=r"has no text_encoder_2; run: .*--include \"text_encoder_2/\*\""):
        load("someone/some-model/text_encoder_2")


# --- what is no model ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_no_hub_id():
    with pytest.raises(ModelError, match=r"'some/model\.safetensors' is not a file here; check the path"):
        load("some/model.safetensors")


@pytest.mark.parametrize("name", ["owner/..", "owner/.name", "owner/a--b", "owner/" + "x" * 200])
def test_names_that_no_repository_can_have(name):
    with pytest.raises((ModelError, EnvironmentLacksError), match=r"is not a hub id|is not in the local cache"):
        load(name)


FILES = {
    "model.gguf": "is GGUF; it holds weights that are quantized already; give the float model",
    "DiT-XL-2-256x256.pt": "is a pickle, which can run code when read; load it where you trust it and save it again",
    "PixArt-XL-2-1024-MS.pth": "safetensors.torch.save_file(state_dict, path)",
    "model.bin": "is a pickle",
    "model.ckpt": "is a pickle",
    "model.onnx": "is not a .safetensors file; give a diffusers folder or a .safetensors file",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_say_what_to_do(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"GGUF")
    message = refused(["-m", str(tmp_path / name)], capsys)
    assert str(tmp_path / name) in message and FILES[name] in message


def test_an_adapter_beside_a_model_is_told(copied, caplog):
    (copied / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "pytorch_lora_weights.safetensors is an adapter and is not part of this model" in load(str(copied)).notes[0]
    assert "merge the adapter" in caplog.text


def test_configurations_that_are_none(copied, capsys):
    assert "--config 'no.json': --config takes a config.json, the folder" in refused(
        ["-m", str(copied), "--config", "no.json"], capsys
    )


def adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_lora_weights.safetensors")
    (folder / "config.json").unlink()


def peft_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.Q4_0.gguf")


FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (
        adapter,
        "pytorch_lora_weights.safetensors is an adapter, not a model; give the folder of its base model, and",
    ),
    (
        peft_adapter,
        "adapter_config.json is an adapter, not a model; give the folder of its base model, and",
    ),
    (gguf, "model.Q4_0.gguf is GGUF; it holds weights that are quantized already; give the float model"),
]


@pytest.mark.parametrize(("change", "words"), FOLDERS)
def test_folders_of_other_kinds_say_what_to_do(copied, change, words, capsys):
    change(copied)
    assert words in refused(["-m", str(copied)], capsys)
