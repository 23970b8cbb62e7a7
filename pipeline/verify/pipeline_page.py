"""report/index.html of a whole pipeline: its own gates, and its components with the way to their pages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.documents import Rules, read_json
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.card import Parity
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.verify.page import TEMPLATES, Facts
from pipeline.verify.report import SCHEMA_VERSION, Report

PAGE, NUMBERS = "index.html", "parity.json"


@dataclass(frozen=True)
class Row:
    """A component. page: its report's, seen from the pipeline's. seconds, peak_memory_bytes: of its build."""

    name: str
    page: str
    recipe: str
    noun: str
    formats: str
    targets: str
    passed: bool
    gates_passed: int
    gates: int
    size_bytes: int
    seconds: float
    peak_memory_bytes: int


def write_pipeline_page(report: Report, bundle: PipelineBundle, reports: Mapping[str, Path], out_dir: Path) -> None:
    """Write parity.json and index.html into `out_dir`, which is made.

    report: of the pipeline's own gates. reports: the folder of each component's report, by its name. Raises
    ContractError where there is none.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / NUMBERS).write_text(report.to_json(), encoding="utf-8")
    rows = [_row(name, bundle.components[name], folder, out_dir) for name, folder in reports.items()]
    own, theirs = report.gates, sum(row.gates for row in rows)
    page = TEMPLATES.get_template("page_pipeline.html").render(
        title=bundle.name,
        class_name=bundle.class_name,
        passed=report.passed and all(row.passed for row in rows),
        failed=[*(gate.name for gate in report.failures()), *(row.name for row in rows if not row.passed)],
        gates=own,
        rows=rows,
        cards=[
            (f"{len(rows)}", "components"),
            (f"{sum(row.size_bytes for row in rows) / 1e6:.0f} MB", "on disk"),
            (f"{sum(gate.passed for gate in own)} of {len(own)}", "gates of the pipeline passed"),
            (f"{sum(row.gates_passed for row in rows)} of {theirs}", "gates of the components passed"),
        ],
        facts=_facts(bundle),
    )
    (out_dir / PAGE).write_text(page, encoding="utf-8")


def _row(name: str, bundle: Bundle, folder: Path, out_dir: Path) -> Row:
    parity = read_json(folder / NUMBERS, Parity, Rules(version=SCHEMA_VERSION))
    stages = bundle.manifest["stages"]
    return Row(
        name=name,
        page=Path(os.path.relpath(folder / PAGE, out_dir)).as_posix(),
        recipe=bundle.name,
        noun=bundle.noun,
        formats=", ".join(bundle.manifest["counts"]["formats"]) or "not quantized",
        targets=", ".join(bundle.targets),
        passed=parity["passed"],
        gates_passed=sum(row["passed"] for row in parity["gates"]),
        gates=len(parity["gates"]),
        size_bytes=bundle.manifest["bytes"]["all_files"],
        seconds=sum(row.seconds for row in stages),
        peak_memory_bytes=max((row.peak_memory_bytes for row in stages), default=0),
    )


def _facts(bundle: PipelineBundle) -> dict[str, Facts]:
    """What the components were taken out of, and with what."""
    manifest = bundle.manifest
    height, width = bundle.height_and_width()
    index = {name: value for name, value in manifest["index"].items() if isinstance(value, list)}
    parts = {name: str(value[-1]) for name, value in index.items() if name not in manifest["left_out"] and value[-1]}
    size = {} if height is None or width is None else {"pictures": f"{width} x {height} pixels"}
    return {
        "Pipeline": {"source": manifest["source"]["path"], "revision": manifest["source"]["revision"] or "local files"}
        | size,
        "Its parts in diffusers": parts,
        "Left out": manifest["left_out"] or {"nothing": ""},
        "Machine": {
            "processor": str(manifest["machine"].get("cpu", "")),
            "cores": str(manifest["machine"].get("cpus", "")),
        },
        "Versions": manifest["tools"],
    }
