"""The model repository: its configuration against the schema, its script with a stand-in of the server's module.

Nothing here has run in a Triton server.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from export.errors import ContractError
from pipeline.bundle import memory
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.export import main
from pipeline.files import tree
from pipeline.generate.pixel_model import PixelModel
from pipeline.text_to_image import Pipeline
from pipeline.triton_server import repository
from tests.bundle.test_pipeline_bundle import write
from tests.generate.test_generate import GENERATION, make_bundle
from tests.support import bundles
from tests.support.hostile import reseal, sentence
from tests.support.model_config import model_config
from tests.support.numpy_pipeline import CELL, SIDE, Log, make_source


@dataclass
class Tensor:
    """As the server's."""

    label: str
    values: Any

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class TritonError:
    """As the server's."""

    text: str

    def message(self) -> str:
        return self.text


@dataclass
class InferenceResponse:
    """As the server's."""

    output_tensors: list[Tensor]
    error: TritonError | None = None


def request(**tensors: Any) -> dict[str, Tensor]:
    """Inputs by their names."""
    return {name: Tensor(name, np.asarray(values)) for name, values in tensors.items()}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the model's script, with a stand-in of what the server gives it."""
    stand_in: Any = ModuleType("triton_python_backend_utils")
    stand_in.Tensor, stand_in.TritonError, stand_in.InferenceResponse = Tensor, TritonError, InferenceResponse
    stand_in.get_input_tensor_by_name = lambda asked, name: asked.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    yield importlib.import_module("pipeline.triton_server.model")
    sys.modules.pop("pipeline.triton_server.model")


@pytest.fixture
def model(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model with an engine of NumPy, that draws flat pictures as bright as their digit."""
    places: list[tuple[Path, int | None]] = []

    def opened(path: Path, threads: int | None, keep_loaded: bool | None) -> Pipeline:
        assert keep_loaded is None, "by the memory that is free, as a server does"
        places.append((path, threads))
        bundle = make_bundle(tmp_path)
        return Pipeline(PixelModel(bundle), bundle)

    monkeypatch.setattr(script.Pipeline, "load", opened)
    served = script.TritonPythonModel()
    parameters = {"parameters": {"threads": {"string_value": "2"}}}
    served.initialize({"model_config": json.dumps(parameters), "model_repository": "/models/digits"})
    assert places == [(Path("/models/digits/bundle"), 2)]
    yield served
    served.finalize()
    assert served.pipeline.model.engine.closed


def level(digit: int) -> int:
    return round(digit / 4.5 * 127.5)


def test_pictures_of_prompts(model: Any) -> None:
    asked = request(PROMPT=np.array([b"0", b"9"], object), SEED=[3], STEPS=np.array([2], np.int32), GUIDANCE=[1.0])
    [response] = model.execute([asked])
    images, warnings = response.output_tensors
    assert response.error is None and (images.label, warnings.label) == ("IMAGES", "WARNINGS")
    assert warnings.values.tolist() == []
    assert images.values.shape == (2, 8, 8, 1) and images.values.dtype == np.uint8
    assert np.abs(images.values[0].astype(int) - level(0)).max() <= 1
    assert np.abs(images.values[1].astype(int) - level(9)).max() <= 1
    assert len(model.pipeline.model.engine.calls) == 4  # two steps for each


def test_what_is_not_given_is_the_model_s_own(model: Any) -> None:
    [response] = model.execute([request(PROMPT=np.array([b"5"], object), NEGATIVE_PROMPT=np.array([b"1"], object))])
    assert response.error is None
    calls = model.pipeline.model.engine.calls
    assert len(calls) == GENERATION["n_steps"] and calls[0]["class_labels"].tolist() == [5, 1]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"PROMPT": np.array([b"horse"], object)}, "prompt 'horse' is not a class"),
        ({"PROMPT": np.array([], object)}, "0 prompts in one request; give 1 to 64"),
        ({"PROMPT": np.array([b"\xff"], object)}, "PROMPT is not text in UTF-8"),
        ({"PROMPT": np.array([b"1"], object), "SEED": [1, 2]}, "SEED has 2 numbers; give one"),
        ({"PROMPT": np.array([b"1"], object), "STEPS": [0]}, "number of denoising steps 0; it must be"),
        ({}, "0 prompts in one request"),
        (
            {"PROMPT": np.array([b"1"] * 3, object), "NEGATIVE_PROMPT": np.array([b"1", b"2"], object)},
            "2 negative prompts for 3 prompts; give one, or one for each",
        ),
    ],
)
def test_a_wrong_request_gets_a_sentence_and_the_next_its_picture(
    tensors: dict[str, Any], words: str, model: Any
) -> None:
    wrong, right = model.execute([request(**tensors), request(PROMPT=np.array([b"1"], object))])
    assert words in wrong.error.message() and not wrong.output_tensors
    assert right.error is None


def test_a_bug_of_one_request_is_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "pipeline", None)
    [response] = model.execute([request(PROMPT=np.array([b"1"], object))])
    assert response.error.message() == "internal error, TypeError; see the server's log"
    monkeypatch.undo()


def test_the_configuration_is_of_the_schema() -> None:
    text = repository.text_format(repository.config('a "b"', 3, 32, 48, threads=2))
    parsed = text_format.Parse(text, model_config())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ('a "b"', "python", 0)
    assert [(row.name, list(row.dims), row.optional) for row in parsed.input] == [
        ("PROMPT", [-1], False),
        ("NEGATIVE_PROMPT", [-1], True),
        ("SEED", [1], True),
        ("STEPS", [1], True),
        ("GUIDANCE", [1], True),
    ]
    kinds = type(parsed.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [kinds[row.data_type].name for row in parsed.input] == [kind for _, kind, _, _ in repository.INPUTS]
    assert list(parsed.output[0].dims) == [-1, 32, 48, 3] and len(parsed.instance_group) == 1


def test_the_schema_refuses_what_it_does_not_have() -> None:
    for wrong in ('nam: "a"', "max_batch_size: 1.5", "input { data_type: TYPE_PICTURE }"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config())


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    """A true bundle folder of a model of pixels."""
    folder = bundles.make_bundle(tmp_path / "small")
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    reseal(folder)
    return folder


def test_the_command_writes_a_repository(pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models"
    assert main([str(pixels), "--triton", str(out)]) == 0
    assert "checked, not run in a server" in capsys.readouterr().out
    assert tree(out) == sorted(["small/1/model.py", "small/config.pbtxt", *(f"small/bundle/{f}" for f in tree(pixels))])
    text = (out / "small/config.pbtxt").read_text()
    assert "not run in one" in text.splitlines()[0]
    assert list(text_format.Parse(text, model_config()).output[0].dims) == [-1, 32, 32, 4]
    assert all((out / "small/bundle" / name).read_bytes() == (pixels / name).read_bytes() for name in tree(pixels))
    assert (out / "small/1/model.py").read_bytes() == Path(repository.__file__).with_name("model.py").read_bytes()
    assert main([str(pixels), "--triton", str(out)]) == 2
    assert "exists; add --force to replace it, or choose another --triton" in capsys.readouterr().err
    assert main([str(pixels), "--triton", str(out), "--force", "--threads", "3"]) == 0
    assert text_format.Parse((out / "small/config.pbtxt").read_text(), model_config()).parameters


def test_a_whole_pipeline_is_written_and_drawn_with(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write(tmp_path / "pixart")
    monkeypatch.setattr(PipelineBundle, "source", lambda *_: nullcontext(make_source(tmp_path / "parts", Log())))
    assert main([str(whole), "--triton", str(tmp_path / "models")]) == 0
    [place] = (tmp_path / "models").iterdir()
    assert tree(place / "bundle") == tree(whole)
    assert all((place / "bundle" / name).read_bytes() == (whole / name).read_bytes() for name in tree(whole))
    stated = text_format.Parse((place / "config.pbtxt").read_text(), model_config())
    assert list(stated.output[0].dims) == [-1, SIDE * CELL, SIDE * CELL, 3]
    monkeypatch.setattr(memory, "refuse_too_large", lambda *_: None)  # its components are no true ones
    served = script.TritonPythonModel()
    served.initialize({"model_config": "{}", "model_repository": str(place)})
    words = b"a red ring " * 200
    [response] = served.execute([request(PROMPT=np.array([words, b"a cat"], object), STEPS=[2])])
    images, warnings = response.output_tensors
    drawn = served.pipeline([words.decode(), "a cat"], seed=0, num_inference_steps=2).images
    own = served.pipeline("a cat", seed=1, num_inference_steps=2).images  # the second picture has the next seed
    np.testing.assert_array_equal(images.values, np.stack([np.asarray(drawn[0]), np.asarray(own[0])]))
    [warning] = warnings.values.tolist()
    assert b"tokens" in warning
    served.finalize()


def test_what_it_does_not_take(pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "models")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/photo.png").touch()
    assert main([str(pixels), "--triton", out, "--force"]) == 2
    assert "is not an export and is not replaced; choose another --triton" in sentence(capsys.readouterr().err)
    for flags in (["--height", "64"], ["--attention", "INT8/INT8"], ["--onnxruntime-web", "a"]):
        assert main([str(pixels), "--triton", str(tmp_path / "new"), *flags]) == 2
    assert main([str(pixels), "-o", str(tmp_path / "new"), "--threads", "2"]) == 2
    capsys.readouterr()
    (pixels / "generation.json").unlink()
    reseal(pixels)
    assert main([str(pixels), "--triton", str(tmp_path / "new")]) == 2
    assert "draws no pixels by itself" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_a_changed_bundle_is_not_copied(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import load

    bundle = load(pixels)
    (pixels / "cpu/model.onnx").write_bytes(b"Lowered")
    with pytest.raises(ContractError, match="differs from the manifest"):
        repository.write(bundle, tmp_path / "out")
