"""What is read of a pipeline's folder without opening it: its parts, their variants, sizes and identity."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.errors import ModelError, RecipeError, ResourceError
from pipeline import machine
from pipeline.generate import pipeline_folder
from pipeline.generate.example_prompts import PROMPTS_FILE
from pipeline.generate.pipeline_folder import (
    example_prompts,
    float32_bytes,
    identity,
    listed_parts,
    pipeline_arguments,
    pipeline_root,
    refuse_too_large,
    shared_variant,
)
from pipeline.recipe import Sampling

PARTS = ("transformer", "text_encoder", "vae", "scheduler")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pipeline of four parts, two of them with 24 and 6 weights in float16; the safety checker is left out."""
    index = {"_class_name": "MadeUp", **{part: ["library", "Class"] for part in PARTS}, "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part in PARTS:
        (tmp_path / part).mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    weights(tmp_path / "transformer/diffusion_pytorch_model.safetensors", 100)
    weights(tmp_path / "text_encoder/model.safetensors", 24)
    weights(tmp_path / "vae/diffusion_pytorch_model.safetensors", 6)
    return tmp_path


def weights(path: Path, count: int) -> None:
    save_file({"w": np.ones(count, np.float16)}, path)


def model_in(folder: Path) -> Any:
    return SimpleNamespace(folder=folder)


def test_a_pipeline_is_one_whose_parts_are_all_there(root: Path) -> None:
    assert listed_parts(root / "model_index.json") == list(PARTS)
    assert pipeline_root(model_in(root / "transformer")) == root
    (root / "vae").rename(root / "elsewhere")
    assert pipeline_root(model_in(root / "transformer")) is None


def test_a_part_outside_of_the_folder_is_refused(root: Path) -> None:
    (root / "model_index.json").write_text('{"../vae": ["library", "Class"]}')
    with pytest.raises(ModelError, match=r"model_index\.json.*\.\./vae"):
        listed_parts(root / "model_index.json")


def test_variants_are_those_that_all_parts_without_plain_weights_share(root: Path) -> None:
    assert shared_variant(root) is None and float32_bytes(root) == 4 * (24 + 6)
    (root / "vae/diffusion_pytorch_model.safetensors").unlink()
    weights(root / "vae/diffusion_pytorch_model.fp16.safetensors", 7)
    weights(root / "text_encoder/model.fp16.safetensors", 24)
    assert shared_variant(root) == "fp16" and float32_bytes(root) == 4 * (24 + 7), "plain weights where there are some"
    (root / "text_encoder/model.safetensors").unlink()
    (root / "text_encoder/model.fp16.safetensors").rename(root / "text_encoder/model.bf16-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"share one variant \(text_encoder: bf16; vae: fp16\)"):
        shared_variant(root)


def test_identity_follows_the_parts_and_the_prompts_and_nothing_beside_them(root: Path) -> None:
    seen = {identity(root)}
    (root / "README.md").write_text("a card")
    (root / "safety_checker").mkdir()
    (root / "safety_checker/config.json").write_text("{}")
    assert identity(root) in seen, "no part of it"
    (root / "scheduler/scheduler_config.json").write_text("[]")
    seen.add(identity(root))
    (root / PROMPTS_FILE).write_text("a ring\n")
    seen.add(identity(root))
    path = root / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(seen | {identity(root)}) == 4


def test_identity_tells_large_weights_by_their_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "vae/diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(pipeline_folder, "HASHED_BYTES", path.stat().st_size - 1)
    first = identity(root)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert identity(root) == first
    weights(path, 7)
    assert identity(root) != first


def test_parts_larger_than_the_memory_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, refused in ((119, True), (120, False)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: machine.FreeMemory(free))
        if refused:
            with pytest.raises(ResourceError, match="text encoder and other parts take"):
                refuse_too_large(root)
        else:
            refuse_too_large(root)


def reading(fill: str) -> Any:
    """A model with one input of this kind."""
    return SimpleNamespace(inputs=[SimpleNamespace(fill=fill)])


def test_prompts_are_captions_or_numbers_of_classes(root: Path) -> None:
    texts, labels = (reading(fill) for fill in ("normal", "class:10"))
    captions, classes = example_prompts(texts, root, 5, seed=3), example_prompts(labels, root, 5, seed=3)
    assert len(set(captions)) == 5 and all(" " in caption for caption in captions)
    assert {int(name) for name in classes} <= set(range(10))
    assert captions == example_prompts(texts, root, 5, seed=3) != example_prompts(texts, root, 5, seed=4)
    (root / PROMPTS_FILE).write_text("a ring\na cat\n")
    assert set(example_prompts(texts, root, 5, seed=3)) == {"a ring", "a cat"}, "those of the pipeline's file"


def test_prompts_become_arguments_of_their_pipeline() -> None:
    class Binning:
        def __call__(self, prompt: list[str], use_resolution_binning: bool = True) -> None: ...

    class Plain:
        def __call__(self, prompt: list[str], height: int = 64) -> None: ...

    size = Sampling(height=64)
    binning: Any = Binning()
    plain: Any = Plain()
    classes: Any = SimpleNamespace(labels={"goldfish": 1})
    assert pipeline_arguments(binning, size, ["a ring"]) == {
        "prompt": ["a ring"], "use_resolution_binning": False, "height": 64
    }  # fmt: skip
    assert pipeline_arguments(plain, size, ["a ring"]) == {"prompt": ["a ring"], "height": 64}
    assert pipeline_arguments(classes, size, ["7", "goldfish"]) == {"class_labels": [7, 1]}
    with pytest.raises(RecipeError, match="prompt 'shark' is not a class; use a number or a name such as goldfish"):
        pipeline_arguments(classes, size, ["shark"])


def test_two_calls_of_a_step_are_kept_as_one() -> None:
    class Echo:
        def run(self, inputs: Any) -> Any:
            return inputs

        def close(self) -> None: ...

    kept: dict[int, Any] = {}
    recorder = pipeline_folder._Recorder(Echo(), kept.__setitem__, frozenset({"table"}))
    for time in (9.0, 9.0, 4.0):  # with the prompt, without it; the next step has one call
        recorder.run({"timestep": np.full(2, time), "latents": np.full((2, 3), time), "table": np.ones(4)})
    assert {step: len(call["latents"]) for step, call in kept.items()} == {0: 4, 1: 2}
    assert all(len(call["table"]) == 4 for call in kept.values()) and kept[1]["timestep"].tolist() == [4.0, 4.0]


def test_errors_while_drawing_name_the_folder(root: Path) -> None:
    words = rf"{root}: its pipeline cannot draw with these settings \(ValueError: odd steps\)"
    with pytest.raises(ModelError, match=words), pipeline_folder.drawing(root):
        raise ValueError("odd steps")
    with pytest.raises(MemoryError), pipeline_folder.drawing(root):
        raise MemoryError
