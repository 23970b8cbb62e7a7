"""The portable model in tools that others made: each runs it within flips of codes, or refuses it in known words."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import readme, record
from benchmarks.tools.environments import CannotBeHadError
from benchmarks.tools.limit import Arrays, distance_db, limit_db, run
from benchmarks.tools.matrix import FORMS, FUNCTIONS, INLINED, SETS, TOOLS, Tool, feeds_of, input_shapes, prepared, ran
from export.formats.attention import AttentionFormats
from export.inline import write_inlined
from export.models.load import load
from export.onnx_files import load_model
from export.to_onnx import export_portable
from tests.support import tiny

logger = logging.getLogger(__name__)
# What taking bytes for wider or narrower than they are, and shifting bits out of them, leaves.
FAULT_DB = 20.0


class Model(NamedTuple):
    """places: the folder of each form. reference: onnxruntime's own outputs for `feeds`."""

    places: dict[str, Path]
    feeds: Arrays
    reference: Arrays
    limit_db: float


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two layers with exact groups and quantized attention."""
    return made(tmp_path_factory.mktemp("tools"), AttentionFormats("E2M3", "E2M3"))


def made(root: Path, attention: AttentionFormats | None) -> Model:
    """A tiny PixArt in both forms."""
    places = {form: root / form for form in FORMS}
    loaded = load(str(tiny.folder("pixart", root)))
    layers = tiny.quantized(loaded, granularity="exact_group")
    path = places[FUNCTIONS] / "model.onnx"
    export_portable(loaded, layers, path, attention=attention)
    write_inlined(path, places[INLINED] / "model.onnx")
    feeds = feeds_of(input_shapes(load_model(path)))
    reference = run(load_model(path), feeds)
    limit = limit_db(path, feeds, reference)
    logger.info("limit %.1f dB", limit)
    return Model(places, feeds, reference, limit)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: f"{tool.run}-{tool.where}")
def test_a_tool(tool: Tool, form: str, model: Model) -> None:
    try:
        prepared(tool)
    except CannotBeHadError as error:
        pytest.skip(f"{tool.name} cannot be had here: {error}")
    row = ran(tool, model.places[form], model.feeds, model.reference)
    logger.info("%s, %s: %s", tool.name, form, row)
    if form in tool.refuses:
        assert tool.refuses[form] in row["refuses"], (
            "where it runs now, or says otherwise, the table of tools has changed"
        )
        return
    assert "refuses" not in row, row
    assert model.limit_db > FAULT_DB
    if "db" in row:
        assert row["db"] is None or row["db"] >= model.limit_db, row
    elif reduced := re.fullmatch(r"(\d+) nodes to (\d+)", row["found"]):
        assert int(reduced[1]) > int(reduced[2]) > 0, row
    else:
        assert re.search(r"^valid$|\b[1-9]\d* Node\(s\)", row["found"]), row


@pytest.mark.slow
@pytest.mark.torch
def test_webgpu_runs_a_model_with_attention_in_float(tmp_path: Path) -> None:
    """What it refuses above is float64, which quantized attention alone asks for."""
    [tool] = [tool for tool in TOOLS if tool.run == "webgpu"]
    try:
        prepared(tool)
    except CannotBeHadError as error:
        pytest.skip(f"{tool.name} cannot be had here: {error}")
    model = made(tmp_path, None)
    row = ran(tool, model.places[INLINED], model.feeds, model.reference)
    logger.info("%s: %s", tool.name, row)
    assert "refuses" not in row and (row["db"] is None or row["db"] >= model.limit_db > FAULT_DB), row


@pytest.mark.slow
def test_the_limit_is_of_flips_and_sees_faults(model: Model) -> None:
    """A shift of bytes that saturates, as OpenVINO's does, is far below it; without flips it would be of roundings."""
    assert FAULT_DB < model.limit_db < 120


def test_every_tool_has_a_version_that_is_pinned() -> None:
    assert {tool.where for tool in TOOLS} == {*SETS, "web"}
    for name, requirements in SETS.items():
        shown = {tool.package for tool in TOOLS if tool.where == name}
        assert shown <= {row.partition("==")[0] for row in requirements if "==" in row}, name


def test_what_the_docs_show_is_within_the_limit_or_a_known_refusal() -> None:
    """Of the rows that were measured: what a test of a tool asserts of a tiny model holds of the bundle as well."""
    document = record.read(record.RESULTS / "tools.json")
    tools = {tool.name: tool for tool in TOOLS}
    assert {(row["tool"], row["form"]) for row in document["rows"]} == {
        (name, form) for name in tools for form in FORMS
    }
    for row in document["rows"]:
        refusal = tools[row["tool"]].refuses.get(row["form"])
        assert refusal in row.get("refuses", "") if refusal else "refuses" not in row, row
        assert row.get("db") is None or row["db"] >= document["limit_db"] > FAULT_DB, row


def test_nan_in_any_output_is_no_distance() -> None:
    one, bad = np.ones(3, np.float32), np.full(3, np.nan, np.float32)
    assert np.isnan(distance_db({"a": one, "b": one}, {"a": one, "b": bad}))
    assert np.isnan(distance_db({"b": one, "a": one}, {"b": bad, "a": one}))


def test_feeds_have_the_sizes_that_are_asked_for() -> None:
    feeds = feeds_of({"x": ("batch", 3, "tokens"), "timestep": ("batch",), "mask": ("batch", "tokens")}, 4, 5)
    assert {name: value.shape for name, value in feeds.items()} == {"x": (4, 3, 5), "timestep": (4,), "mask": (4, 5)}
    assert (feeds["mask"] == 1).all() and (feeds["timestep"] == 500).all()
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.float32)}


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.tools() == "Not measured yet: run `benchmarks.tools`."
    cells = [{"db": None}, {"db": 51.04}, {"refuses": "a | b"}, {"found": "valid"}, {"absent": "no npm"}, {"db": 50.0}]
    rows = [{"tool": f"t{i // 2}", "version": "1", "form": FORMS[i % 2], **cell} for i, cell in enumerate(cells)]
    sizes = dict.fromkeys(FORMS, 2_000_000)
    record.write("tools", {"bundle": "b", "bytes": sizes, "limit_db": 40.0, "rows": rows}, tmp_path)
    lines = readme.tools().splitlines()
    assert lines[2:5] == [
        "| t0 | 1 | equal to the bit | 51.0 dB |",
        "| t1 | 1 | **refuses**: a \\| b | valid |",
        "| t2 | 1 | not run: no npm | 50.0 dB |",
    ]
    assert "`b`, 2.00 MB and 2.00 MB; limit 40.0 dB" in lines[-1]
