"""The whole way once, as short as it can be: a model of one block is built, proven, drawn with and looked into.

It is what reaches the modules that nothing reaches without a model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import __main__ as cli
from pipeline import load
from tests.support import quick_build, tiny

GENERATION = {
    "sampler": "flow_euler",
    "timestep_scale": 1000,
    "n_steps": 1,
    "guidance_scale": 2.0,
    "output": "pixels",
    "conditioning": {"kind": "classes", "names": list("0123456789"), "null_class": 10},
}
SETTINGS = ("method=rtn", "weights.group_size=32", "sampling.n_steps=1", "calibrate.size=2", "calibrate.timesteps=1")


@pytest.mark.torch
@pytest.mark.fast
def test_from_a_model_to_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        tiny.MODELS,
        "model",
        ("DiTTransformer2DModel", tiny.DIT | {"in_channels": 1, "out_channels": 1, "num_layers": 1}),
    )
    quick_build.measure_little(monkeypatch.setattr)
    model, bundle = tiny.folder("model", tmp_path), str(tmp_path / "engine")
    (model / "generation.json").write_text(json.dumps(GENERATION))
    settings = [flag for setting in SETTINGS for flag in ("--set", setting)]
    flags = ["--engine", "pixart_w4a6", "-m", str(model), *settings]
    assert cli.main(["build", *flags, "--target", "cpu", "-o", bundle]) == 0, capsys.readouterr().out
    assert cli.main(["inspect", bundle]) == 0
    assert cli.main(["generate", bundle, "--prompt", "3", "-o", str(tmp_path / "out.png"), "--n-steps", "1"]) == 0
    assert (tmp_path / "out.png").stat().st_size > 0
    drop_in, labels = load(bundle).as_diffusers(), torch.tensor([3, 10])
    sample = drop_in(torch.zeros(2, 1, 8, 8), timestep=torch.tensor([500, 500]), class_labels=labels).sample
    assert sample.shape == (2, 1, 8, 8) and sample.isfinite().all() and drop_in.config.in_channels == 1


@pytest.mark.parametrize("verb", ["verify", "bench", "inspect", "export", "generate"])
def test_verbs_name_what_is_not_there(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"export": ["-o", str(tmp_path / "o")], "generate": ["--prompt", "3", "-o", str(tmp_path / "o.png")]}
    assert cli.main([verb, str(tmp_path / "nothing"), *more.get(verb, [])]) == 2
    shown = capsys.readouterr()
    assert "nothing" in shown.out + shown.err and "Traceback" not in shown.err


def test_the_list_names_recipes_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "pixart_w4a6" in shown and "cuda" in shown
