"""The page of a whole pipeline: its own gates, its components with the way to their pages, what it was made from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from export.errors import ContractError
from pipeline.bundle.pipeline_bundle import PipelineBundle, load_pipeline
from pipeline.verify.pipeline_page import write_pipeline_page
from pipeline.verify.report import Gate, Report
from tests.bundle.test_pipeline_bundle import COMPONENTS, write

GATES = [Gate("tokenizer/ids_differing", 0, 0, "", "whole numbers"), Gate("calls_ulps", 3, 64, "ulp", "roundings")]


@pytest.fixture
def whole(tmp_path: Path) -> PipelineBundle:
    return load_pipeline(write(tmp_path / "bundle"))


def reports(folder: Path, failing: str = "") -> dict[str, Path]:
    """Of each component, where a build puts it."""
    folders = {name: folder / name / "report" for name in COMPONENTS}
    for name, path in folders.items():
        gates = [Gate("cpu/gemm_exact", float(name == failing), 0, "", "exact"), Gate("cpu/finite", 0, 0, "", "all")]
        path.mkdir()
        (path / "parity.json").write_text(Report(gates).to_json())
    return folders


def page(whole: PipelineBundle, folders: dict[str, Path], report: Report, out_dir: Path) -> str:
    write_pipeline_page(report, whole, folders, out_dir)
    return (out_dir / "index.html").read_text()


def test_it_shows_gates_and_leads_to_components(whole: PipelineBundle) -> None:
    out_dir = whole.path / "report"
    html = page(whole, reports(whole.path), Report(list(GATES)), out_dir)
    for text in ("PASSED", "PixArtAlphaPipeline", "tokenizer/ids_differing", "calls_ulps", "roundings", "E2M1 x E2M3"):
        assert text in html
    assert html.count("2 of 2") == 3 and "4 of 4" in html, "gates of each component and of the pipeline, and of all"
    links = re.findall(r"href='([^']*)'", html)
    assert links == ["parity.json", *(f"../{name}/report/index.html" for name in COMPONENTS)]
    assert all((out_dir / link).parent.is_dir() for link in links)
    assert "http" not in html.replace("http-equiv", ""), "nothing comes from elsewhere"
    assert [row["name"] for row in json.loads((out_dir / "parity.json").read_text())["gates"]] == [
        gate.name for gate in GATES
    ]


def test_it_says_what_failed(whole: PipelineBundle, tmp_path: Path) -> None:
    folders = reports(whole.path, failing="text_encoder")
    html = page(whole, folders, Report(list(GATES)), tmp_path / "out")
    assert "FAILED" in html and "Failed: text_encoder" in html and "1 of 2" in html and "3 of 4" in html
    html = page(whole, folders, Report([Gate("calls_ulps", 99, 64, "ulp", "roundings")]), tmp_path / "out")
    assert "Failed: calls_ulps, text_encoder" in html


def test_it_names_what_was_left_out_and_escapes_it(whole: PipelineBundle, tmp_path: Path) -> None:
    changed = {**whole.manifest, "left_out": {"safety_checker": "<b>no</b> part of drawing"}}
    changed["index"] = {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": ["x", "Y"]}
    html = page(replace(whole, manifest=changed), reports(whole.path), Report(list(GATES)), tmp_path / "out")  # type: ignore[arg-type]
    assert "&lt;b&gt;no&lt;/b&gt; part" in html and "DDIMScheduler" in html and html.count("safety_checker") == 1


def test_a_component_without_a_report_is_refused(whole: PipelineBundle, tmp_path: Path) -> None:
    folders = reports(whole.path)
    (folders["transformer"] / "parity.json").unlink()
    with pytest.raises(ContractError, match=r"transformer/report/parity\.json is missing"):
        write_pipeline_page(Report(list(GATES)), whole, folders, tmp_path / "out")
