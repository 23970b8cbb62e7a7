"""`inspect`: per layer formats, scales, embedding, path, why and bytes; totals; for a bundle and for a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import inspect
from pipeline.bundle import manifest
from pipeline.command import Table, rendered
from tests.support import learned, tiny
from tests.support.bundles import make_bundle
from tests.support.portable import random_linear


def row(**changes: object) -> dict[str, object]:
    base = {"weight_format": "E2M1", "activation_format": "E2M3", "granularity": "per_channel"}
    return base | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "INT8 E4M3 FP16"),
        ({"granularity": "exact_group"}, "INT8 E4M3 FP16"),
        ({"granularity": "group"}, "-"),
        ({"activation_scaling": "token_group"}, "-"),
        ({"activation_scaling": "per_tensor"}, "INT8 E4M3 FP16"),
        ({"activation_format": "E3M2"}, "E4M3 FP16"),
        ({"activation_format": "E3M4"}, "FP16"),
        ({"weight_format": "INT6", "activation_format": "INT8"}, "INT8 FP16"),
    ],
)
def test_embedding_is_computed_from_both_formats(changes: dict[str, object], expected: str) -> None:
    assert inspect.embedding(row(**changes)) == expected


def test_a_bundle_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(make_bundle(tmp_path / "e")), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (layer,) = answer["layers"]
    assert layer["name"] == "blocks.0.attn1.to_q" and layer["size_bytes"] == 296
    assert layer["targets"] == {"cpu": {"path": "int8", "why": "E2M3 embeds in INT8"}}
    assert answer["counts"]["quantized"] == 1 and answer["kept"] == [{"name": "proj_out", "reason": "the last layer"}]


def test_a_bundle_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(make_bundle(tmp_path / "e"))]) == 0
    shown = capsys.readouterr().out
    assert "blocks.0.attn1.to_q  attn.qkv  8 x 64  E2M1 x E2M3   exact_group(32)  INT8 E4M3 FP16  int8" in shown
    assert "1 of 2 layers quantized, 1 kept" in shown and "E2M3 embeds in INT8" in shown and "the last layer" in shown


def test_what_methods_learned_is_shown_per_layer() -> None:
    plain = learned.mixed([random_linear(str(i), seed=i) for i in range(7)])
    rows = [{"name": layer.name, **manifest.input_facts(layer)} for layer in plain]
    assert [inspect.input_text(row) for row in rows] == [
        "per_tensor 0.4",
        "per_tensor 0.4571 from -0.2",
        "token_group(8)",
        "per_token, input_multiplier, input_offset",
        "per_token, 3 branches of rank 2",
        "per_token",
        "per_tensor 0.4571 from -0.2, input_multiplier, input_offset, 3 branches of rank 2",
    ]
    base = {"kind": "other", "shape": [16, 64], "group_size": 0, "embedding": "-", "targets": {}, "size_bytes": 1}
    layers = [row(**facts) | base for facts in rows]
    sizes = {"quantized_weights": 7, "same_weights_fp16": 7}
    document = {"engine": "e", "model": {"source": "s", "family": "f"}, "layers": layers, "kept": [], "bytes": sizes}
    document["attention"] = "INT8/E2M3"
    shown = rendered(inspect.tables(document))
    assert "; attention INT8/E2M3; " in shown
    assert "input" in shown and "per_tensor 0.4571 from -0.2, input_multiplier, input_offset" in shown


def test_layers_without_anything_special_have_no_column_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main([str(make_bundle(tmp_path / "e"))]) == 0
    assert "input" not in capsys.readouterr().out


@pytest.mark.torch
def test_a_recipe_on_a_model_says_what_calibration_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from export.models import load as models
    from pipeline import recipe
    from pipeline.calibrate import calibrate

    folder = tiny.folder("pixart", tmp_path)
    args = ["--engine", "pixart_w4a6", "-m", str(folder), "--set", "weights.group_size=32"]
    assert inspect.main([*args, "--json"]) == 0
    planned = {layer["name"]: layer["size_bytes"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    settings = recipe.with_settings(recipe.load("pixart_w4a6"), ["method=rtn", "weights.group_size=32"])
    layers = calibrate(models.load(str(folder)), settings, tmp_path / "calibrate")
    assert planned == {layer.name: layer.size_bytes for layer in layers}


@pytest.mark.parametrize("args", [[], ["folder", "--engine", "pixart_w4a6"]])
def test_takes_a_bundle_or_a_recipe(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(args) == 2
    assert "either a bundle folder or --engine" in capsys.readouterr().err


def test_reasons_that_differ_in_a_number_are_one_row() -> None:
    whys = [
        f"E2M1 is exact in E4M3, {kind}; |sum| <= {most}" for kind, most in [("own", 42), ("own", 7), ("ties 0.5", 7)]
    ]
    targets = [{"cpu": {"path": "int8", "why": "plain"}, "rtx": {"path": "fp8", "why": why}} for why in whys]
    table = inspect._reasons([{"targets": choices} for choices in targets], ["cpu", "rtx"])
    assert isinstance(table, Table) and table.rows == [
        ("cpu", "int8", 3, "plain"),
        ("rtx", "fp8", 2, "E2M1 is exact in E4M3, own; |sum| <= 7 to 42"),
        ("rtx", "fp8", 1, "E2M1 is exact in E4M3, ties 0.5; |sum| <= 7"),
    ]


def test_columns_are_aligned() -> None:
    lines = rendered([Table(("name", "bytes", "why"), [("a", 1200, "x"), ("longer", 7, "y")])]).splitlines()
    assert lines == ["name    bytes  why", "------  -----  ---", "a       1,200  x", "longer      7  y"]
