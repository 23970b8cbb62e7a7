"""Published metrics for real pipelines, as far as they go without the metrics' own weights: tiny pipelines, small
modules in the place of Inception, and a scorer package made here."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import metrics as quality_metrics
from benchmarks.quality import real as quality_real
from benchmarks.quality import real_metrics as quality_real_metrics
from benchmarks.quality.real_metrics import METRICS, Metric
from export.errors import EnvironmentLacksError, RecipeError
from tests.generate.test_diffusers_adapter import make_pixart_pipeline
from tests.support import tiny

pytestmark = pytest.mark.torch

PACKAGE = {
    "ImageReward": "class _M:\n    def score(self, prompt, paths):\n        return len(prompt)\n"
    "def load(name):\n    print('noise')\n    return _M()\n",
    "hpsv2": "def score(path, prompt, hps_version):\n    return [len(prompt) / 2]\n",
}


@pytest.fixture
def root(tmp_path):
    from export.models.load import load

    folder = tmp_path / "pixart_real"
    make_pixart_pipeline(load(str(tiny.folder("pixart", tmp_path, half=False))).module).save_pretrained(folder)
    return folder


def arguments(root, **changes):
    options = {
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
        "device": "cpu",
    }
    (root.parent / "prompts.txt").write_text("a red circle\n\na circle\n")
    return argparse.Namespace(**options | changes)


def test_everything_missing_is_named_before_work(root):
    metrics = ["fid", "clip", "image_reward", "hpsv2"]
    with pytest.raises(EnvironmentLacksError) as caught:
        quality_real.run_real(arguments(root, metric=metrics))
    for words in ("fid needs the Inception weights", "--real-pictures with 2 pictures or more, found 0"):
        assert words in str(caught.value)
    for words in ("of openai/clip-vit-base-patch16 in the hub's cache", "hpsv2 needs --scorer-python"):
        assert words in str(caught.value)
    assert not (root.parent / "work").exists()


def test_a_pipeline_without_its_text_encoder_is_refused(root):
    (root / "text_encoder").rename(root / "elsewhere")
    with pytest.raises(EnvironmentLacksError, match="text_encoder of the pipeline"):
        quality_real.refuse_missing(root, arguments(root, metric=[]))


def test_too_few_prompts_and_unknown_rows_are_refused(root):
    with pytest.raises(RecipeError, match="2 prompts; give --count"):
        quality_real.run_real(arguments(root, count=3))
    from export.models.load import load

    with pytest.raises(RecipeError, match="no such row"):
        quality_real.real_rows(load(str(root)), arguments(root, rows=["nothing"]))


@pytest.fixture
def scored(monkeypatch):
    """Metrics without weights: brightness for fid, contrast for clip. Returns what each was asked to score."""
    seen = []
    for name, measure in (("fid", np.mean), ("clip", np.std)):

        def score(pictures, *_, name=name, measure=measure):
            seen.append(name)
            return float(measure(pictures))

        monkeypatch.setitem(METRICS, name, Metric(lambda _: [], score))
    monkeypatch.setattr(quality_metrics, "WINDOW", 7)  # the tiny pipeline's pictures have 8 x 8 pixels
    return seen


def rows_of(root):
    return json.loads((root.parent / "results" / "quality_real_pixart_real.json").read_text())["rows"]


def test_a_row_of_a_real_pipeline_is_drawn_scored_and_kept(root, monkeypatch, scored):
    assert quality_real.run_real(arguments(root)) == 0
    rows = rows_of(root)
    row = rows["rtn-fp-channel-w4a8"]
    assert list(rows) == ["float", "rtn-fp-channel-w4a8"] and scored == ["fid", "fid"]
    assert row["weight_bytes"] > 0 and 10 < row["psnr_db"]["value"] < 80 and 0 < row["fid"] < 255
    assert row["drawn_by"] == rows["float"]["drawn_by"] == "reference, cpu"
    pictures = list((root.parent / "work").rglob("0001.png"))
    assert len(pictures) == 2
    monkeypatch.setattr(quality_real, "draw", None)  # pictures and rows are there: nothing is drawn or scored again
    assert quality_real.run_real(arguments(root)) == 0 and scored == ["fid", "fid"]
    assert quality_real.run_real(arguments(root, metric=["clip"])) == 0 and scored == ["fid", "fid", "clip", "clip"]
    again = rows_of(root)["rtn-fp-channel-w4a8"]
    assert again["clip"] > 0 and {name: again[name] for name in row} == row  # metrics are added
    with pytest.raises(RecipeError, match="has seed 0, not 1; give another --output-dir"):
        quality_real.run_real(arguments(root, seed=1))


def test_a_row_that_fails_is_recorded_and_stops_no_other(root, monkeypatch, scored):
    plain = quality_real.measured_row

    def fail(real, results, row, *rest):
        if "int" in row.name:
            raise ValueError("no luck")
        return plain(real, results, row, *rest)

    monkeypatch.setattr(quality_real, "measured_row", fail)
    both = ["rtn-int-channel-w4a8", "rtn-fp-channel-w4a8"]
    assert quality_real.run_real(arguments(root, rows=both)) == 1
    rows = rows_of(root)
    assert rows[both[0]]["status"] == "failed" and rows[both[0]]["reason"] == "internal error, ValueError: no luck"
    assert rows[both[1]]["status"] == "measured"


def test_float_draws_with_the_steps_of_its_own_family():
    from types import SimpleNamespace

    from pipeline import recipe as recipes

    options = argparse.Namespace(set=["sampling.guidance_scale=3"])
    for family, (_, name) in quality_real.FAMILY_ROWS.items():
        family_recipe = quality_real.family_recipe(SimpleNamespace(family=SimpleNamespace(name=family)), options)
        assert family_recipe.name == name and family_recipe.sampling.n_steps == recipes.load(name).sampling.n_steps
        assert family_recipe.sampling.guidance_scale == 3


def test_a_gpu_is_used_where_there_is_one_and_missed_by_name_where_there_is_none(root, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quality_real.chosen_device("auto") == "cpu"
    with pytest.raises(EnvironmentLacksError, match=r"--device cuda needs a GPU .*; take --device cpu"):
        quality_real.refuse_missing(root, arguments(root, metric=[], device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quality_real.chosen_device("auto") == "cuda" and quality_real.chosen_device("cpu") == "cpu"


def test_the_reference_computes_on_a_device_with_a_copy_of_the_module():
    import torch

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, sample):
            return sample * self.factor

    module, inputs = Half(), {"sample": np.arange(3, dtype=np.float32)}
    here, there = quality_real.PlacedEngine(module, "cpu"), quality_real.PlacedEngine(module, "cpu:0")
    assert here.module is module and there.module is not module  # a GPU must not take the model from calibration
    np.testing.assert_array_equal(here.run(inputs)["sample"], there.run(inputs)["sample"])


@pytest.mark.parametrize(("name", "expected"), [("image_reward", 4.0), ("hpsv2", 2.0)])
def test_reward_models_run_in_a_python_of_their_own(name, expected, tmp_path, monkeypatch):
    for package, source in PACKAGE.items():
        (tmp_path / f"{package}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "prompts.json").write_text(json.dumps(["ab", "abcdef"]))
    options = argparse.Namespace(scorer_python=Path(sys.executable))
    assert METRICS[name].problems(options) == []
    assert METRICS[name].score(np.zeros((2, 8, 8, 3), np.uint8), ["ab", "abcdef"], tmp_path, options) == expected


def test_a_scorer_that_fails_says_so_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "hpsv2.py").write_text("raise ImportError('protobuf is too new')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = argparse.Namespace(scorer_python=Path(sys.executable))
    (problem,) = METRICS["hpsv2"].problems(options)
    assert problem.startswith("a --scorer-python that can score (hpsv2:") and "protobuf is too new" in problem


def test_a_scorer_without_its_weights_is_found_out_and_does_not_download(tmp_path, monkeypatch):
    source = "import os\ndef load(name):\n    raise OSError('no weights, offline ' + os.environ['HF_HUB_OFFLINE'])\n"
    (tmp_path / "ImageReward.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (problem,) = METRICS["image_reward"].problems(argparse.Namespace(scorer_python=Path(sys.executable)))
    assert "no weights, offline 1" in problem


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (
            {"config.json"},
            "model.safetensors or pytorch_model.bin, preprocessor_config.json, tokenizer.json or vocab.json",
        ),
        ({"config.json", "pytorch_model.bin", "preprocessor_config.json", "vocab.json"}, ""),
    ],
)
def test_clip_needs_its_weights_and_not_its_configuration_alone(there, missing, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name: name if name in there else None)
    monkeypatch.setattr(quality_real_metrics, "_packages", lambda _: [])
    problems = METRICS["clip"].problems(argparse.Namespace())
    assert [problem.partition(" of ")[0] for problem in problems] == ([missing] if missing else [])


def test_fid_is_that_of_torchmetrics_in_the_features_given(tmp_path, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is in the extra `quality`")
    import torch
    from PIL import Image

    from benchmarks.quality.metrics import frechet, gaussian

    class Corner(torch.nn.Module):
        num_features = 4

        def forward(self, x):
            return x.double().flatten(1)[:, :4]

    plain = fid.FrechetInceptionDistance
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda: plain(Corner(), input_img_size=(3, 8, 8)).double())
    pictures, real = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 8, 3), dtype=np.uint8)
    for index, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / f"{index:03d}.png")
    score = quality_real_metrics.fid(pictures, [], tmp_path, argparse.Namespace(real_pictures=tmp_path, device="cpu"))
    sets = [gaussian(part.transpose(0, 3, 1, 2).reshape(12, -1)[:, :4].astype(float)) for part in (pictures, real)]
    assert score == pytest.approx(frechet(*sets), rel=1e-4)  # torchmetrics sums moments in float64, covariance n - 1


def test_the_command_answers_with_the_exit_code_of_what_is_missing(root, monkeypatch):
    arguments(root)
    words = ["--model", str(root), "--prompts", str(root.parent / "prompts.txt"), "--rows", "rtn-*", "--count", "2"]
    monkeypatch.setattr("sys.argv", ["quality", *words, "--metric", "fid"])
    assert quality.main() == EnvironmentLacksError.exit_code
