"""lowering.json: what is written is read again, and absent names are as files of earlier releases have them."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.backends import lowering_file
from pipeline.backends.base import LoweredGraph
from pipeline.passes.probes import Choice, ProbeRow

STATIC = ProbeRow("a", "p", "x", ("codes",), (1.0,), 1.0, 0.0, None, "sums", 1.0, None, True, "y")
MERGED = ProbeRow(
    "b", "p", "x", ("high", "low"), (16.0, 1.0), 1.0, 64.0, "scale", "sums", 1.0, "unit", False, "y",
    low_rank="branch", gemm_groups=2, gemm_columns=(64, 128), codes_format="E2M3", operands=("x_q", "w_q"),
)  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    lowered = LoweredGraph(
        tmp_path / "model.onnx", (STATIC, MERGED), (Choice("a", "p", "why"), Choice("b", "p", "why"))
    )
    path = tmp_path / lowering_file.NAME
    lowering_file.write(lowered, path)
    assert lowering_file.read(path) == lowered


def test_an_absent_name_is_written_empty_and_what_few_layers_have_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / lowering_file.NAME
    lowering_file.write(LoweredGraph(tmp_path / "model.onnx", (STATIC,), ()), path)
    (row,) = json.loads(path.read_text(encoding="utf-8"))["probes"]
    assert row["act_scale"] == row["gemm_scale"] == ""
    assert not {"low_rank", "gemm_groups", "gemm_columns", "codes_format", "operands"} & set(row)
