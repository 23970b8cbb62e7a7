"""Classes without a row go the whole way: built, proven, and drawn with in their pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export import to_onnx
from export.models import load as models
from export.models.recording import Drawing
from export.models.torch_modules import set_resolution
from pipeline import __main__ as cli
from pipeline import load
from tests.support import recorded_models
from tests.support.quick_build import measure_little

pytestmark = [pytest.mark.torch, pytest.mark.slow]
HEIGHT, WIDTH = recorded_models.SIZE


@pytest.fixture(
    scope="module",
    params=["sd35", "flux", "sana", "wan", "latte", "auraflow", "cogview4", "qwen", "zimage", "hunyuan_video", "flux2"],
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a model and of its bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    recorded_models.save(request.param, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        flags = ["--engine", "pixart_w4a8", "-m", str(folder / "model"), "--target", "cpu", "-o", str(folder / "e")]
        flags += ["--height", str(HEIGHT), "--width", str(WIDTH)]
        for setting in ("method=rtn", "sampling.n_steps=4", "weights.group_size=32"):
            flags += ["--set", setting]
        assert cli.main(["build", *flags]) == 0
    return folder / "model", folder / "e"


def test_every_linear_that_sees_tokens_is_in_the_engine(built: tuple[Path, Path]) -> None:
    model = models.load(str(built[0]))
    manifest = load(built[1]).manifest
    assert manifest["model"]["family"] == "recorded" and len(model.linears()) > 0
    assert {layer["name"] for layer in manifest["layers"]} == {ref.name for ref in model.linears()}


def test_its_pipeline_draws_with_the_engine_what_it_draws_with_the_float_model(built: tuple[Path, Path]) -> None:
    model, bundle = models.load(str(built[0])), load(built[1])
    recordings = model.family.recordings
    assert recordings is not None
    set_resolution(model.module, *model.cells(HEIGHT, WIDTH))
    drawing = Drawing(2, 7, HEIGHT, WIDTH, guidance_scale=2.0)
    expected, drawn = (
        recorded_models.draw(recordings.recorder, part, drawing) for part in (model.module, bundle.as_diffusers())
    )
    error = np.abs(drawn - expected).std() / expected.std()
    # The bundle's own measure of what quantization costs on its way, of other noise and prompts: 6 dB.
    gates = json.loads((built[1] / "report" / "parity.json").read_text())["gates"]
    stated = next(gate["value"] for gate in gates if gate["name"] == "quant_sqnr_db")
    assert 0 < error < 10 ** ((6 - stated) / 20)


def test_a_class_that_has_no_graph_is_refused_before_work_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("tokens were made a constant (10)")

    monkeypatch.setattr(to_onnx, "_traced", refuse)  # under which tests keep what was traced before
    recorded_models.save("qwen", tmp_path / "qwen")
    flags = ["--engine", "pixart_w4a8", "-m", str(tmp_path / "qwen"), "--target", "cpu", "-o", str(tmp_path / "e")]
    assert cli.main(["build", *flags, "--height", str(HEIGHT), "--width", str(WIDTH), "--set", "method=rtn"]) == 2
    answer = capsys.readouterr().out
    assert "QwenImageTransformer2DModel cannot be traced for any number of pictures and tokens" in answer
    assert "(tokens were made a constant (10)" in answer
    assert not list(tmp_path.glob("e*"))
