"""The report's files: JSON that comes back, a table, plots, pictures, and a page that needs nothing from outside."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.verify.gates import layer_gates, notes_on_layers
from pipeline.verify.page import MEASURED_SLOT, Page, measured_section, render
from pipeline.verify.pictures import Column, amplification, gallery, png
from pipeline.verify.plots import Axis, Plot, Series
from pipeline.verify.report import AttentionResult, Gate, LayerResult, Report, StepResult, write_layers_csv
from tests.support.report_file import read_report


def layer(name: str = "blocks.0.to_q", **changes: Any) -> LayerResult:
    fields: dict[str, Any] = dict(
        target="cpu",
        name=name,
        kind="attn.qkv",
        path="u8 x s8",
        weight_format="E2M1",
        activation_format="E2M3",
        granularity="exact_group",
        group_size=64,
        gemm_max_abs_diff=0.0,
        codes_equal_share=0.9999999,
        codes_limit_share=0.999999,
        codes_inadmissible=0,
        scale_error=0.5,
        output_error=0.4,
        nonfinite=0,
        input_sqnr_db=50.0,
        input_limit_db=48.0,
        weight_sqnr_db=20.0,
        size_bytes=1234,
    )
    return LayerResult(**fields | changes)


def attention(name: str = "blocks.0.attn1", **changes: Any) -> AttentionResult:
    fields: dict[str, Any] = dict(
        target="cpu",
        name=name,
        path="fpq",
        qk_format="INT8",
        pv_format="E2M3",
        output_error=0.5,
        nonfinite=0,
        rows=1024,
        rows_of=4096,
        ambiguous_share=0.001,
        call="step 1",
        diagnosis=None,
    )
    return AttentionResult(**fields | changes)


def report(value: float = 0.0) -> Report:
    gates = [Gate("cpu/gemm_exact", value, 0, "", "exact sums"), Gate("quant_sqnr_db", math.inf, 10, "dB", "b", False)]
    steps = [StepResult("cpu", i, 50.0 + i, 48.0, 30.0) for i in range(3)]
    return Report(gates, [layer(), layer("blocks.1.to_q", gemm_max_abs_diff=math.nan)], steps, notes=["rtx: not run"])


def page(contents: Report, title: str = "pixart_w4a6", columns: Sequence[Column] = ()) -> str:
    shape = (2, 3, 8, 8)
    pictures = {"reference": np.zeros(shape), "float": np.full(shape, 0.1)}
    columns = columns or gallery(pictures, {"cpu": np.full(shape, 0.001)}, pixels=True)
    facts = {"Model": {"source": "zoo:<mini>"}}
    return render(
        Page(title, "a description", contents, facts, "name = 'r'", ("a red ring", "a blue ring"), columns, "note")
    )


@pytest.mark.parametrize(
    ("value", "at_most", "passed"),
    [(0, True, True), (1e-9, True, False), (math.nan, True, False), (math.nan, False, False), (math.inf, False, True)],
)
def test_gate_sides_and_nan(value: float, at_most: bool, passed: bool) -> None:
    assert Gate("g", value, 0, "", "", at_most).passed is passed


def test_a_report_without_gates_does_not_pass() -> None:
    assert not Report().passed


def test_exact_sums_are_a_gate_only_where_some_layer_has_one() -> None:
    """nan marks a layer without: none of them, some, and a target without any layer."""
    some, none = [layer("a"), layer("b", gemm_max_abs_diff=math.nan)], [layer("b", gemm_max_abs_diff=math.nan)]
    gates = {gate.name: gate for gate in layer_gates("cpu", some, 0)}
    assert gates["cpu/gemm_exact"].passed and "; 1 of 2 layers: a GEMM with real scales" in gates["cpu/gemm_exact"].why
    assert notes_on_layers("cpu", some) == []
    assert "cpu/gemm_exact" not in {gate.name for gate in layer_gates("cpu", none, 0)}
    (note,) = notes_on_layers("cpu", none)
    assert note.startswith("cpu: gemm_exact compares 0 of 1 layers and is no gate here")
    assert [gate.name for gate in layer_gates("cpu", [], 0) if gate.passed] == ["cpu/finite"]


def test_json_comes_back_and_has_no_numbers_that_json_lacks() -> None:
    text = report().to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = read_report(text)
    assert again.gates == report().gates and again.steps == report().steps and again.notes == ["rtx: not run"]
    assert math.isnan(again.layers[1].gemm_max_abs_diff) and again.layers[0] == report().layers[0]


def test_json_has_the_fields_that_scripts_read() -> None:
    document = json.loads(report(1.0).to_json())
    assert document["schema_version"] == 1 and document["passed"] is False
    assert {"name", "value", "limit", "unit", "passed", "why"} <= set(document["gates"][0])
    assert document["gates"][0]["passed"] is False


def test_a_limit_that_is_not_a_number_says_so() -> None:
    with pytest.raises(ValueError, match="gate cpu/calls: the limit is not a number, a bug of verification"):
        Gate("cpu/calls", 1.0, math.nan, "dB", "why")


def test_a_failed_report_is_one_sentence_with_values_limits_and_a_cause() -> None:
    assert report(1.0).sentence() == "parity gate failed: cpu/gemm_exact = 1, limit 0; cpu/gemm_exact: exact sums"
    gates = [Gate("a", 1.5, 1, "x bound", "because"), Gate("b", math.nan, 3, "dB", "so", at_most=False)]
    text = "parity gate failed: a = 1.5 x bound, limit 1; b = nan dB, limit 3; a: because"
    assert Report(gates).sentence() == text
    assert Report().sentence() == "no parity gate was run" and report().sentence() == "no parity gate failed"


def test_csv_has_one_line_per_layer(tmp_path: Path) -> None:
    write_layers_csv(report(), tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["blocks.0.to_q", "blocks.1.to_q"]
    assert rows[0]["size_bytes"] == "1234"


# --- plots and pictures ---------------------------------------------------------------------------------------------


def plot(*values: float) -> Plot:
    labels = [f"p{i}" for i in range(len(values))]
    return Plot([Series("s", "line1", values)], labels, labels, "x", "y")


@pytest.mark.parametrize(("low", "high"), [(18.1, 54.7), (0.0, 0.0), (-3.2, 134.0), (99.0, 99.5)])
def test_axis_holds_all_values(low: float, high: float) -> None:
    drawn = plot(low, high)
    assert drawn.axis == Axis.around(low, high)
    assert drawn.axis.low <= low and high <= drawn.axis.high and drawn.axis.low < drawn.axis.high
    assert (drawn.y(drawn.axis.low), drawn.y(drawn.axis.high)) == (drawn.bottom, drawn.top)


def test_a_gap_breaks_the_line() -> None:
    drawn = plot(1.0, math.nan, 2.0, 3.0)
    (row,) = drawn.series
    assert re.sub(r"[\d. ]", "", drawn.path(row)) == "MML"
    assert [text for _, _, text in drawn.dots(row)] == ["p0: s 1.0", "p2: s 2.0", "p3: s 3.0"]


def test_many_positions_have_few_ticks() -> None:
    texts = [text for _, text in plot(*range(100)).ticks()]
    assert len(texts) == 20 and texts[:2] == ["p0", "p5"]


def test_nothing_finite_is_said_in_words() -> None:
    steps = [StepResult("cpu", 0, math.nan, math.inf, math.inf)]
    assert "nothing to plot" in page(Report(steps=steps)) and "nothing to plot" not in page(report())


@pytest.mark.parametrize(("error", "gain"), [(0.9, 1), (0.04, 20), (1e-9, 100_000), (0.0, 1)])
def test_amplification_stays_in_range(error: float, gain: int) -> None:
    assert amplification(np.array([error, -error / 2]), span=2.0) == gain


def test_png_of_one_three_and_four_channels() -> None:
    for channels in (1, 3, 4):
        image = np.zeros((channels, 5, 7))
        image[0] = 1.0
        decoded = np.asarray(Image.open(io.BytesIO(png(image))))
        assert decoded.shape == (5, 7, 3)
        assert decoded[0, 0].tolist() == ([255, 255, 255] if channels == 1 else [255, 0, 0])


def test_gallery_states_its_amplification_and_survives_nan() -> None:
    pictures = {"reference": np.zeros((1, 4, 8, 8)), "float": np.full((1, 4, 8, 8), 0.1)}
    engine = np.full((1, 4, 8, 8), np.nan)
    columns = gallery(pictures, {"cpu": engine}, pixels=False)
    assert [column.stem for column in columns] == ["float", "reference", "cpu", "quantization", "cpu-difference"]
    assert re.search(r"x[\d,]+ around grey", columns[3].heading)
    assert [len(column.pngs) for column in columns] == [1] * 5 and columns[2].file_name(0) == "cpu-0.png"


def test_an_engine_may_have_drawn_fewer_pictures_or_none() -> None:
    pictures = {"reference": np.zeros((2, 3, 8, 8)), "float": np.full((2, 3, 8, 8), 0.1)}
    columns = gallery(pictures, {"onnx": np.zeros((1, 3, 8, 8)), "large": np.zeros((0, 3, 8, 8))}, pixels=True)
    assert {column.stem: len(column.pngs) for column in columns} == {
        "float": 2,
        "reference": 2,
        "onnx": 1,
        "quantization": 2,
        "onnx-difference": 1,
    }
    html = page(report(), columns=columns)
    assert html.count("<td></td>") == 2 and html.count("<img") == 2 * 3 + 2


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_needs_nothing_from_outside() -> None:
    html = page(report())
    assert "http" not in html.replace("http-equiv", "") and "<link" not in html and "<script" not in html
    assert set(re.findall(r"src='([^:']*):", html)) == {"data"}


def test_page_fits_a_phone_and_links_its_files() -> None:
    html = page(report())
    assert "<meta name='viewport' content='width=device-width, initial-scale=1'>" in html
    outside = re.sub(r"<div class='scroll[^']*'>.*?</div>", "", html, flags=re.DOTALL)
    assert "<table" not in outside and "<svg" not in outside, "whatever is wide scrolls in a box of its own"
    assert {"parity.json", "layers.csv", "images/cpu-0.png"} <= set(re.findall(r"href='([^']*)'", html))


BENCH = {
    "engine": "pixart_w4a6",
    "batch_size": 1,
    "threads": 2,
    "image": {"n_steps": 20, "guidance_scale": 2.0},
    "machine": {"cpu": "a <fast> one"},
    "contestants": {
        name: {
            "call_ms": {"median": call, "p10": call, "p90": call * 2},
            "image_ms": {"median": 40 * call},
            "weights_bytes": 6_848_512,
            "peak_rss_bytes": peak,
        }
        for name, call, peak in (("cpu", 6.9166, 91_422_720), ("torch_fp32", 15.456, None))
    },
    "ratios": {"cpu": {"torch_fp32": 2.2346}},
}


def test_what_was_measured_stands_in_its_place() -> None:
    assert page(report()).count(MEASURED_SLOT) == 1
    section = measured_section(BENCH)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", section)]
    assert rows == [
        ["cpu", "6.92", "6.92-13.8", "277", "6.8", "91", "-"],
        ["torch_fp32", "15.5", "15.5-30.9", "618", "6.8", "-", "2.23 x"],
    ]
    assert (
        "a &lt;fast&gt; one" in section and "href='../bench.json'" in section and "steps, guidance 2, drawn" in section
    )


def test_page_shows_verdict_gates_notes_and_layers() -> None:
    html = page(report())
    for text in (
        "PASSED",
        "cpu/gemm_exact",
        "exact sums",
        "rtx: not run",
        "blocks.1.to_q",
        "a red ring",
        "E2M1 exact_group 64",
    ):
        assert text in html
    failed = page(report(2.0))
    assert "FAILED" in failed and "Failed: cpu/gemm_exact" in failed


def test_page_shows_attentions_where_they_are_quantized() -> None:
    contents = report()
    assert "8-bit attention" not in page(contents)
    contents.attentions += [attention(), attention("blocks.1.attn1", output_error=7.0, diagnosis="in all heads: it is")]
    html = page(contents)
    for text in ("INT8/E2M3", "1,024 of 4,096", "within its bound", "in all heads: it is"):
        assert text in html
    assert json.loads(contents.to_json())["attentions"][1]["output_error"] == 7.0


def test_page_escapes_what_others_wrote() -> None:
    html = page(report(), title="<b>x</b>")
    assert "<b>x</b>" not in html and "zoo:&lt;mini&gt;" in html


def test_page_of_a_report_without_layers_is_still_a_page() -> None:
    assert "FAILED" in page(Report([Gate("cpu/coverage", 0, 40, "linears", "w", False)]))


def test_shares_close_to_one_keep_their_digits() -> None:
    html = page(Report([Gate("cpu/codes_equal", 0.99999981, 0.99999782, "share", "w", False)]))
    assert "0.99999981" in html and "99.999981 %" in html
