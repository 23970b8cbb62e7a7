"""The study of quantized attention: what it draws is what it says, and its page says what its file holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import record
from benchmarks.quality import attention_study as study
from benchmarks.quality.attention_study import Case
from benchmarks.quality.attention_table import study_text
from export.models.load import sample_inputs

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("shape", study.SHAPES)
def test_drawn_numbers_have_the_statistics_that_are_said(shape: str, planted: bool) -> None:
    q, k, v = study.operands(Case(512, shape, planted), 0)
    centred = k - k.mean(dim=-2, keepdim=True)
    score = q @ centred.mT * study.CHANNELS**-0.5
    assert float(score.std(dim=-1).mean()) == pytest.approx(study.SHAPES[shape])
    for x, name in ((k, "k"), (v, "v")):
        spread = x.std(dim=-2)  # of each channel
        outliers = spread > 0.5 * study.OUTLIERS[name]
        assert outliers.sum(dim=-1).flatten().tolist() == [study.OUTLIER_CHANNELS * planted] * study.HEADS
        means = (x.mean(dim=-2) / spread).square().mean().sqrt()
        assert float(means) == pytest.approx(study.MEANS[name], rel=0.25)


def test_keys_in_use_are_all_of_equal_ones_and_one_of_a_single_peak() -> None:
    q, k = torch.zeros(1, 1, 2, study.CHANNELS).double(), torch.zeros(1, 1, 7, study.CHANNELS).double()
    assert study.effective_keys(q, k) == pytest.approx(7)
    q[..., 0], k[..., 3, 0] = 1e3, 1e3
    assert study.effective_keys(q, k) == pytest.approx(1)


def test_more_bits_and_no_mean_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "KEYS", (64,))
    rows = list(study.drawn_rows())
    assert len(rows) == len(study.SHAPES) * 2 * len(study.FORMATS) * 2
    at = {(row["shape"], row["planted"], row["formats"], row["centre"]): row["sqnr_db"] for row in rows}
    for shape, planted, name, centre in at:
        assert at[shape, planted, name, True] >= at[shape, planted, name, False] or not centre
        assert at[shape, planted, "INT8/INT8", centre] >= at[shape, planted, name, centre]


def test_each_arm_is_drawn_by_what_it_says() -> None:
    arms = list(study.arms())
    assert len(arms) == len(set(arms)) == 2 * (1 + 2 * len(study.DRAWN))
    assert [formats for _, formats, _ in arms[:3]] == [None, study.DRAWN[0], study.DRAWN[0]]
    subject = study.drawing.make_subject(study.MODEL, 1, 0)
    inputs = sample_inputs(subject.model, 1, 0, tokens=5)
    outputs = [study.engine(subject, (), *arm).run(inputs)["sample"] for _, *arm in arms[:3]]
    assert all(np.isfinite(output).all() for output in outputs)
    assert not any(np.array_equal(*pair) for pair in itertools.combinations(outputs, 2))


def picture(linears: str, formats: str | None, centre: bool, value: float | None) -> record.Json:
    psnr = None if value is None else {"value": value, "low": value - 1, "high": value + 1}
    steps = None if value is None else [value, value + 2]
    return {"linears": linears, "formats": formats, "centre": centre, "psnr_db": psnr, "step_sqnr_db": steps}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def test_the_page_says_what_the_file_holds(results: Path) -> None:
    case = {"keys": 64, "shape": "peaked", "planted": True, "effective_keys": 5.4, "formats": "INT8/INT8"}
    drawn = [case | {"centre": centre, "sqnr_db": value} for centre, value in ((True, 31.04), (False, 12.0))]
    pictures = [
        picture("float", None, True, None),
        picture("float", "INT8/INT8", True, 60.0),
        picture("float", "INT8/INT8", False, 40.0),
        picture("W4A6", None, True, 38.0),
        picture("W4A6", "INT8/INT8", True, 38.5),
        picture("W4A6", "INT6/INT6", True, 30.0),
    ]
    facts = {"count": 3, "seed": 0, "model": "pixart_mini", "recipe": "r", "settings": ["method=rtn"]}
    document = {"drawn": drawn, "pictures": pictures, **facts, "machine": {"cpu": "X"}, "commit": "abc"}
    (results / "attention_study.json").write_text(json.dumps(document))
    text = study_text()
    assert "| 64 | peaked | planted | 5 | 31.0 (12.0) |" in text
    assert "| float | float | - | - |" in text
    assert "| float | INT8/INT8 | 60.0 [59.0 to 61.0] (40.0) | 61.0 (41.0) |" in text
    assert "- W4A6: INT8/INT8 +0.5 dB PSNR to attention in floats (within chance)" in text
    assert "- W4A6: INT6/INT6 -8.0 dB PSNR to attention in floats (beyond chance)" in text
    assert "3 pictures by the float32 reference" in text and "of 2 steps" in text


def test_nothing_measured_is_no_section(results: Path) -> None:
    assert not list(results.iterdir()) and study_text() == ""
