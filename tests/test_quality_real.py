"""Published metrics for real pipelines, as far as they go without the metrics' own weights: tiny pipelines, small
modules in the place of Inception, and a scorer package made here."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality, quality_metrics, quality_real, quality_real_metrics
from benchmarks.quality_real_metrics import METRICS, Metric
from export.errors import EnvironmentLacksError, RecipeError
from tests import tiny
from tests.test_diffusers_adapter import make_pixart_pipeline

PACKAGE = {
    "ImageReward": "class _M:\n    def score(self, prompt, paths):\n        return len(prompt)\n"
    "def load(name):\n    print('noise')\n    return _M()\n",
    "hpsv2": "def score(path, prompt, hps_version):\n    return [len(prompt) / 2]\n",
}


@pytest.fixture
def root(tmp_path):
    from export.models import load

    folder = tmp_path / "pixart_real"
    make_pixart_pipeline(load(str(tiny.folder("pixart", tmp_path, half=False))).module).save_pretrained(folder)
    return folder


def arguments(root, **changes):
    found = {
        "model": str(root),
        "prompts": root.parent / "prompts.txt",
        "count": 2,
        "rows": ["rtn-fp-channel-w4a8"],
        "metric": ["fid"],
        "set": ["sampling.n_steps=2"],
        "seed": 0,
        "redo": False,
        "work_dir": root.parent / "work",
        "output_dir": root.parent / "results",
        "real_pictures": None,
        "scorer_python": None,
    }
    (root.parent / "prompts.txt").write_text("a red circle\n\na circle\n")
    return argparse.Namespace(**found | changes)


def test_everything_missing_is_named_before_work(root):
    metrics = ["fid", "clip", "image_reward", "hpsv2"]
    with pytest.raises(EnvironmentLacksError) as caught:
        quality_real.run_real(arguments(root, metric=metrics))
    for words in ("fid needs the Inception weights", "--real-pictures with 2 pictures or more, found 0"):
        assert words in str(caught.value)
    for words in ("clip needs openai/clip-vit-base-patch16", "hpsv2 needs --scorer-python"):
        assert words in str(caught.value)
    assert not (root.parent / "work").exists()


def test_a_pipeline_without_its_text_encoder_is_refused(root):
    (root / "text_encoder").rename(root / "elsewhere")
    with pytest.raises(EnvironmentLacksError, match="text_encoder of the pipeline"):
        quality_real.refuse_missing(root, arguments(root, metric=[]))


def test_too_few_prompts_and_unknown_rows_are_refused(root):
    with pytest.raises(RecipeError, match="2 prompts; give --count"):
        quality_real.run_real(arguments(root, count=3))
    from export.models import load

    with pytest.raises(RecipeError, match="no such row"):
        quality_real.real_rows(load(str(root)), arguments(root, rows=["nothing"]))


def test_a_row_of_a_real_pipeline_is_drawn_scored_and_kept(root, monkeypatch):
    seen = []
    brightness = Metric(lambda _: [], lambda pictures, *_: seen.append(len(pictures)) or float(pictures.mean()))
    monkeypatch.setitem(METRICS, "fid", brightness)
    monkeypatch.setattr(quality_metrics, "WINDOW", 7)  # the tiny pipeline's pictures have 8 x 8 pixels
    assert quality_real.run_real(arguments(root)) == 0
    rows = json.loads((root.parent / "results" / "quality_real_pixart_real.json").read_text())["rows"]
    found = rows["rtn-fp-channel-w4a8"]
    assert list(rows) == ["float", "rtn-fp-channel-w4a8"] and seen == [2, 2]
    assert found["weight_bytes"] > 0 and 10 < found["psnr_db"]["value"] < 80 and 0 < found["fid"] < 255
    pictures = list((root.parent / "work").rglob("0001.png"))
    assert len(pictures) == 2
    monkeypatch.setattr(quality_real, "draw", None)  # pictures and rows are there: nothing is drawn again
    assert quality_real.run_real(arguments(root)) == 0


@pytest.mark.parametrize(("name", "expected"), [("image_reward", 4.0), ("hpsv2", 2.0)])
def test_reward_models_run_in_a_python_of_their_own(name, expected, tmp_path, monkeypatch):
    for package, source in PACKAGE.items():
        (tmp_path / f"{package}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "prompts.json").write_text(json.dumps(["ab", "abcdef"]))
    given = argparse.Namespace(scorer_python=Path(sys.executable))
    assert METRICS[name].problems(given) == []
    assert METRICS[name].score(np.zeros((2, 8, 8, 3), np.uint8), ["ab", "abcdef"], tmp_path, given) == expected


def test_a_scorer_that_fails_says_which_and_why(tmp_path, monkeypatch):
    (tmp_path / "prompts.json").write_text("[]")
    (tmp_path / "hpsv2.py").write_text("raise ImportError('protobuf is too new')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EnvironmentLacksError, match=r"hpsv2: .* failed .*protobuf is too new"):
        METRICS["hpsv2"].score(np.zeros((0, 8, 8, 3)), [], tmp_path, argparse.Namespace(scorer_python=sys.executable))


def test_fid_is_that_of_torchmetrics_in_the_features_given(tmp_path, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is in the extra `quality`")
    import torch
    from PIL import Image

    from benchmarks.quality_metrics import frechet, gaussian

    class Corner(torch.nn.Module):
        num_features = 4

        def forward(self, x):
            return x.double().flatten(1)[:, :4]

    plain = fid.FrechetInceptionDistance
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda: plain(Corner(), input_img_size=(3, 8, 8)).double())
    pictures, real = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 8, 3), dtype=np.uint8)
    for index, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / f"{index:03d}.png")
    found = quality_real_metrics.fid(pictures, [], tmp_path, argparse.Namespace(real_pictures=tmp_path))
    sets = [gaussian(part.transpose(0, 3, 1, 2).reshape(12, -1)[:, :4].astype(float)) for part in (pictures, real)]
    assert found == pytest.approx(frechet(*sets), rel=1e-4)  # torchmetrics sums moments in float64, covariance n - 1


def test_the_command_answers_with_the_exit_code_of_what_is_missing(root, monkeypatch):
    arguments(root)
    words = ["--model", str(root), "--prompts", str(root.parent / "prompts.txt"), "--rows", "rtn-*", "--count", "2"]
    monkeypatch.setattr("sys.argv", ["quality", *words, "--metric", "fid"])
    assert quality.main() == EnvironmentLacksError.exit_code
