"""`python -m pipeline.export`: a checkpoint becomes the same portable model with the float model gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from export import checkpoint
from export.about import own_version
from export.models.load import load
from export.to_onnx import export_portable
from pipeline.calibrate.__main__ import main as calibrate
from pipeline.calibrate.state import KEPT
from pipeline.export import FILES, main
from tests.support import tiny
from tests.support.quick_build import build_unproven

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, checkpoint/ by round to nearest, and expected/: the export with the float model."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny.folder("pixart", folder / "model")
    settings = ("--set", "method=rtn", "--set", "weights.group_size=32")
    arguments = ["--engine", "pixart_w4a6", "-m", str(model), *settings, "-o", str(folder / "checkpoint")]
    assert calibrate(arguments) == 0
    (folder / "expected").mkdir()
    export_portable(load(str(model)), checkpoint.load(folder / "checkpoint"), folder / "expected" / "model.onnx")
    shutil.rmtree(folder / "model")
    return folder


def test_the_bytes_are_those_of_an_export_with_the_float_model(work_folder: Path, tmp_path: Path) -> None:
    assert main([str(work_folder / "checkpoint"), "-o", str(tmp_path / "out")]) == 0
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (work_folder / "expected" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main([str(work_folder / "checkpoint"), "-o", str(tmp_path / "out")]) == 2  # not without --force
    assert main([str(work_folder / "checkpoint"), "-o", str(tmp_path / "out"), "--force"]) == 0


def test_attention_is_quantized_where_it_is_asked_for(work_folder: Path, tmp_path: Path) -> None:
    source = str(work_folder / "checkpoint")
    assert main([source, "-o", str(tmp_path / "out"), "--attention", "INT8/INT8"]) == 0
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "QuantizedAttention" for node in nodes) == 2 * tiny.LAYERS
    for wrong in ("INT8", "INT8/UE2M2"):
        assert main([source, "-o", str(tmp_path / "other"), "--attention", wrong]) == 2
    assert not (tmp_path / "other").exists()


def test_without_functions(work_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint, and of a bundle, whose own recipe and licence the file then names."""
    assert main([str(work_folder / "checkpoint"), "-o", str(tmp_path / "out"), "--inline"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    inlined = onnx.load(tmp_path / "out" / "model.onnx")
    assert not inlined.functions and {node.domain for node in inlined.graph.node} == {""}
    assert about(inlined) == {
        "formats": "weights E2M1 exact_group; activations E2M3 per_token; attention float",
        "license": "unknown",
    }
    assert main([str(work_folder / "checkpoint"), "--web", str(tmp_path / "page"), "--inline"]) == 2
    assert "--inline is for -o alone" in capsys.readouterr().err


def test_a_bundle_s_files_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out = build_unproven(tmp_path / "bundle", "--target", "cpu"), tmp_path / "out"
    words = [str(bundle), "-o", str(out)]
    assert main(words) == 2 and "is a bundle, whose portable model is its model.onnx" in capsys.readouterr().err
    assert main([*words, "--inline", "--attention", "INT8/INT8"]) == 2
    assert main([*words, "--inline"]) == 0
    assert main([*words, "--inline"]) == 2 and "add --force to replace it" in capsys.readouterr().err
    whole = (*bundle.rglob("*.onnx"), out / "model.onnx")
    files = {path: onnx.load(path, load_external_data=False) for path in whole}
    assert {path.name for path in files} >= {"model.onnx", "condition.onnx", "timestep.onnx"}
    for path, model in files.items():
        assert (model.producer_name, model.producer_version) == ("ditc", own_version()), path
        assert about(model) == {
            "recipe": "pixart_w4a6",
            "formats": "weights E2M1 exact_group; activations E2M3 per_token; attention E2M3/E2M3",
            "license": "apache-2.0",
        }, path
    assert len({model.doc_string for model in files.values()}) == len(files)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in files)


def about(model: onnx.ModelProto) -> dict[str, str]:
    """Metadata of a file."""
    return {row.key: row.value for row in model.metadata_props}


def test_what_is_kept_leaves_the_quantized_weights_out(work_folder: Path) -> None:
    model = load(str(work_folder / "checkpoint" / KEPT), kept_only=True)
    assert all(bool(ref.module.weight.isnan().all()) for ref in model.linears())
    names = {name for name, tensor in model.module.state_dict().items() if bool(tensor.isnan().any())}
    assert {name.rpartition(".")[0] for name in names} == {ref.name for ref in model.linears()}


def test_other_folders_are_refused(work_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "holds no finished calibration with what is not quantized (kept/)" in capsys.readouterr().err
    assert main([str(work_folder / "checkpoint"), "-o", str(work_folder / "checkpoint"), "--force"]) == 2
    assert "is not an export and is not replaced" in capsys.readouterr().err
