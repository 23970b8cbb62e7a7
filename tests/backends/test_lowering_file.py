"""lowering.json and the record of a stage: what is written is read again, absent names as in earlier releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.errors import ContractError
from pipeline.backends import lowering_file
from pipeline.backends.base import BuildResult, LoweredGraph
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


def test_the_record_of_a_stage_comes_back_as_it_was(tmp_path: Path) -> None:
    lowered = LoweredGraph(tmp_path / "target-toy" / "model.onnx", (STATIC,), (Choice("a", "p", "why"),))
    result = BuildResult(("toy/model.onnx",), lowered, {"requires": ["wings"]})
    lowering_file.write_record(result, tmp_path, "toy")
    assert {path.name for path in tmp_path.iterdir()} == set(lowering_file.record_names("toy"))
    assert lowering_file.read_record(tmp_path, "toy") == result


def test_a_record_with_a_file_outside_of_the_work_folder_is_refused(tmp_path: Path) -> None:
    result = BuildResult(("../toy/model.onnx",), LoweredGraph(tmp_path / "model.onnx", (), ()))
    lowering_file.write_record(result, tmp_path, "toy")
    with pytest.raises(ContractError, match=r"\.\./toy/model\.onnx"):
        lowering_file.read_record(tmp_path, "toy")
