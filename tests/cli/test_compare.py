"""`compare A B`: what it says of two bundles, on the terminal, in JSON and on a page, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.errors import ContractError
from pipeline.__main__ import main as ditc
from pipeline.bundle.bundle import Bundle
from pipeline.compare import compare_bundles
from pipeline.compare import main as compare
from pipeline.verify.beside import drawn, drawn_from_equal_noise
from pipeline.verify.beside_page import EQUAL
from pipeline.verify.pictures import png
from pipeline.verify.record import open_any
from pipeline.verify.report import Gate
from tests.support.bundles import make_reported
from tests.support.hostile import edit
from tests.verify.test_baseline import GATES, pipeline

ROOT = Path(__file__).parents[2]
GREY, LIGHTER = (png(np.full((3, 4, 4), value)) for value in (0.4, 0.6))
PICTURES = {"float-0.png": GREY, "cpu-0.png": GREY, "cpu-1.png": GREY, "cpu-difference-0.png": GREY}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Bundles of which the second has a worse gate, a failed one, another picture and another format."""
    worse = [replace(GATES[0], value=20.0), replace(GATES[1], value=2), *GATES[2:]]
    a = make_reported(tmp_path / "a", GATES, 10.0, PICTURES)
    b = make_reported(tmp_path / "b", worse, 10.0, PICTURES | {"cpu-0.png": LIGHTER, "onnx-0.png": GREY})

    def change(document: Any) -> None:
        document["layers"][0]["weight_format"] = "INT4"
        document["counts"]["formats"] = {"INT4 x E2M3": 1}
        document["recipe"]["weights"] = {"group_size": 128}

    edit(b / "manifest.json", change)
    return a, b


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = compare([str(word) for word in args])
    return code, capsys.readouterr().out


def test_for_people_it_says_what_differs(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = answer(capsys, *pair)
    assert code == 0
    for line in (r"INT4 x E2M3 +- +1", r"weights\.group_size +64 +128", r"gates/quant_sqnr_db +29\.5 +20 +worse"):
        assert re.search(line, text), line
    assert "Layers of other formats or sizes: 1." in text and "B is worse than the baseline" in text
    code, text = answer(capsys, pair[0], pair[0])
    assert code == 0 and text.startswith("Both say the same of themselves.") and " worse\n" not in text


def test_the_answer_in_json(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = answer(capsys, *pair, "--json")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0 and document["event"] == "compare" and document["worse"] == 2
    assert document["failed_gates"] == {"a": [], "b": ["gates/cpu/gemm_exact"]}
    [part] = document["components"]
    assert part["layers"] == [
        {
            "name": "blocks.0.attn1.to_q",
            "a": "E2M1 exact_group 32 x E2M3, 296 bytes",
            "b": "INT4 exact_group 32 x E2M3, 296 bytes",
        }
    ]
    rows = {row["name"]: row for row in document["numbers"]}
    assert rows["gates/cpu/gemm_exact"]["worse_by"] == "inf" and rows["bytes/cpu"]["verdict"] == "as good"


def test_check_makes_it_a_gate(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, *pair, "--check")[0] == 6
    assert answer(capsys, pair[0], pair[0], "--check")[0] == 0
    tolerances = tmp_path / "t.toml"
    tolerances.write_text('schema_version = 1\n[[tolerance]]\nof = "gates/quant*"\nabsolute = 20.0\nwhy = "w"\n')
    b = make_reported(tmp_path / "c", [replace(GATES[0], value=20.0), *GATES[1:]], 10.0)
    assert answer(capsys, pair[0], b, "--check")[0] == 6
    assert answer(capsys, pair[0], b, "--check", "--tolerances", tolerances)[0] == 0


def test_the_page_shows_both_side_by_side(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sub/page.html"
    assert ditc(["compare", *map(str, pair), "-o", str(out)]) == 0
    html = out.read_text()
    for text in (
        "B IS WORSE",
        "INT4 x E2M3",
        "weights.group_size",
        "cpu/gemm_exact",
        "FAILED",
        "Layers that differ: 1",
        f"{EQUAL} B - A is amplified",
    ):
        assert text in html, text
    assert "http" not in html and "src='report" not in html, "nothing comes from elsewhere"
    heads = re.findall(r"<th colspan='3'>(\w+)</th>", html)
    assert heads == ["float", "cpu", "onnx"], "differences of a report are none of its pictures"
    pictures = html[html.index("class='pictures'") :]
    rows = re.findall(r"<tr><th>\d</th>.*?</tr>", pictures, re.DOTALL)
    assert [row.count("<td>") for row in rows] == [9, 9] and "x2, at most 51 of 255" in rows[0]
    assert rows[1].count("<td></td>") == 6 and "equal" in rows[1]


def test_pictures_and_their_difference(pair: tuple[Path, Path]) -> None:
    every = {(row.column, row.row): row for row in drawn(*(open_any(path) for path in pair))}  # type: ignore[arg-type]
    assert every.keys() == {("float", 0), ("cpu", 0), ("cpu", 1), ("onnx", 0)}
    changed, equal, lacking = every["cpu", 0], every["cpu", 1], every["onnx", 0]
    assert (changed.gain, changed.largest, equal.largest) == (2, 51, 0)
    assert changed.difference is not None
    with Image.open(io.BytesIO(changed.difference)) as image:
        assert image.getpixel((0, 0)) == (229, 229, 229)  # 127 and twice 51
    assert lacking.a is None and lacking.b is not None and lacking.difference is None


def test_whether_pictures_need_be_alike(pair: tuple[Path, Path]) -> None:
    a, b = (open_any(path) for path in pair)
    assert isinstance(a, Bundle) and isinstance(b, Bundle) and drawn_from_equal_noise(a, b)
    edit(pair[1] / "manifest.json", lambda document: document["recipe"].update(sampling={"seed": 7}))
    other = open_any(pair[1])
    assert isinstance(other, Bundle) and not drawn_from_equal_noise(a, other)


def test_a_picture_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    a = make_reported(tmp_path / "a", GATES, pictures={"cpu-0.png": b"no picture"})
    with pytest.raises(ContractError, match=r"a/report/images/cpu-0\.png is no picture that can be read"):
        drawn(*[open_any(a)] * 2)  # type: ignore[arg-type]


def test_whole_pipelines_are_compared_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pipeline(tmp_path / "a"), pipeline(tmp_path / "b", gate=1)
    code, text = answer(capsys, a, b, "--check", "--json", "-o", tmp_path / "page.html")
    document = json.loads(text.splitlines()[0])
    assert code == 6 and [part["component"] for part in document["components"]] == ["transformer", "text_encoder"]
    assert "Formats of text_encoder" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, one = pipeline(tmp_path / "whole"), make_reported(tmp_path / "one", [Gate("cpu/finite", 0, 0, "", "")])
    cases = {
        (whole, one): "is a pipeline and",
        (one, whole): "a bundle of one model; give a component of it",
        (one, tmp_path / "none"): "is not a folder",
        (one, one, "--tolerances", tmp_path / "none.toml"): "is missing",
        (one, one, "-o", one / "page.html"): "is in the bundle",
    }
    for args, words in cases.items():
        assert compare([str(word) for word in args]) == 2
        log = capsys.readouterr().err
        assert words in log and "Traceback" not in log and len(log.strip().splitlines()) == 1, log


def test_it_is_for_python_too(pair: tuple[Path, Path]) -> None:
    found = compare_bundles(*pair)
    assert [row.name for row in found.comparison.worse] == ["gates/quant_sqnr_db", "gates/cpu/gemm_exact"]


@pytest.mark.process
def test_it_needs_no_compiler_but_for_the_page(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def without(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.support.absent", "compare", *map(str, (*pair, *args))]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    done = without("--json")
    assert done.returncode == 0 and json.loads(done.stdout)["worse"] == 2, done.stderr
    done = without("-o", tmp_path / "page.html")
    assert (
        done.returncode == 3 and "writing a page needs jinja2; install with: pip install 'ditc[build]'" in done.stderr
    )
