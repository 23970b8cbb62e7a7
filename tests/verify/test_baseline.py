"""Baselines: what of a bundle is compared, by how much it may be worse, and what is not compared, with the reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError, RecipeError, UserError
from pipeline.verify.baseline import NOTHING, Comparison, Tolerance, compare, load_tolerances
from pipeline.verify.gates import FACTOR_DB, LAYER_RULES
from pipeline.verify.pipeline_gates import FACTOR, SCHEDULER_ULPS, STEPS
from pipeline.verify.record import (
    Number,
    Record,
    Timing,
    open_any,
    read_bench,
    read_record,
    record_of,
    stored_record,
    write_record,
)
from pipeline.verify.report import Gate
from tests.bundle.test_pipeline_bundle import COMPONENTS, seal, write
from tests.support.bundles import make_reported, measured

GATES = [
    Gate("quant_sqnr_db", 29.5, 18, "dB", "budget", at_most=False),
    Gate("cpu/gemm_exact", 0, 0, "", "exact"),
    Gate("cpu/segments", 0.4, 1, "x bound", "roundings"),
    Gate("cpu/step_sqnr_db", 34.5, 25, "dB", "float32 runs", at_most=False),
    Gate("cpu/median_sqnr_db", math.inf, 32, "dB", "float32 runs", at_most=False),
]
TIMING: Timing = {"cpu": "one", "threads": 2, "batch_size": 1, "shapes": {"x": [1]}}


def record(quick: bool = False, timing: Timing | None = TIMING, model: str = "m", **values: float) -> Record:
    """Of GATES, a size and a ratio; values: others than theirs, by names with _ for /."""
    numbers = {f"gates/{gate.name}": Number(gate.value, gate.unit, gate.at_most, gate.limit) for gate in GATES}
    numbers |= {"bytes/cpu": Number(1000, "bytes", True), "speed/cpu/onnxruntime_fp32": Number(10.0, "x", False)}
    named = {name.replace("/", "_"): name for name in numbers}
    changed = {named[name]: replace(numbers[named[name]], value=value) for name, value in values.items()}
    return Record("e", numbers | changed, {} if timing is None else {"": timing}, {"": model}, quick)


def verdicts(comparison: Comparison) -> dict[str, str]:
    """Of what is not as good."""
    return {row.name: row.verdict for row in comparison.rows if row.verdict != "as good"}


def worse(after: Record, before: Record | None = None, *tolerances: Tolerance) -> list[str]:
    return [row.name for row in compare(before or record(), after, [*tolerances, *load_tolerances()]).worse]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_record_is_as_good_as_itself() -> None:
    found = compare(record(), record(), load_tolerances())
    assert verdicts(found) == {"gates/cpu/median_sqnr_db": "not compared"}
    assert found.sentence() == "no worse than the baseline in 6 numbers" and not found.notes


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("gates_quant_sqnr_db", 29.15, 29.05),
        ("gates_cpu_gemm_exact", 0, 1),
        ("gates_cpu_segments", 1.0, 1.01),
        ("gates_cpu_step_sqnr_db", 25, 24.9),  # what flips may do is its limit
        ("gates_cpu_median_sqnr_db", 33, 31),  # its own limit alone judges
        ("bytes_cpu", 1010, 1011),
        ("speed_cpu_onnxruntime_fp32", 7.1, 6.9),
    ],
)
def test_the_default_tolerances_hold_on_both_sides_of_their_edge(name: str, within: float, beyond: float) -> None:
    assert worse(record(**{name: within})) == []
    [found] = worse(record(**{name: beyond}))
    assert found.replace("/", "_") == name


def test_without_a_tolerance_nothing_is_tolerated() -> None:
    found = compare(record(), record(gates_quant_sqnr_db=29.49, bytes_cpu=999), [])
    assert verdicts(found) == {"gates/quant_sqnr_db": "worse", "bytes/cpu": "better"}
    assert found.worse[0].why == NOTHING.why
    assert "quant_sqnr_db = 29.49 dB, baseline 29.5 dB: worse by 0.01, 0 is tolerated" in found.sentence()
    nothing = replace(record(), numbers={})
    assert compare(record(), nothing, []).sentence().endswith("this bundle does not; and 1 more")


def test_the_first_tolerance_that_fits_holds() -> None:
    strict = Tolerance("gates/*", "strict")
    assert worse(record(gates_quant_sqnr_db=29.4), None, strict) == ["gates/quant_sqnr_db"]
    assert worse(record(bytes_cpu=5000), None, Tolerance("bytes/*", "any", ignore=True)) == []


def test_both_amounts_add_up_and_enough_is_enough() -> None:
    assert Tolerance("*", "", absolute=1, relative=0.5).allowed(-10) == 6
    assert Tolerance("*", "", absolute=1, relative=0.5).allowed(math.inf) == 1
    above = Tolerance("gates/cpu/step*", "", enough=100)
    best = record(gates_cpu_step_sqnr_db=math.inf)
    assert worse(record(gates_cpu_step_sqnr_db=100), best, above) == []
    assert worse(record(gates_cpu_step_sqnr_db=99.9), best, above) == ["gates/cpu/step_sqnr_db"]


def test_flips_may_do_what_the_limit_of_the_baseline_allows() -> None:
    """Also where the bundle has another limit, as of another calibration, which decides nothing here."""
    name, before = "gates/cpu/step_sqnr_db", record(gates_cpu_step_sqnr_db=124)
    for value, found in ((19, []), (18.9, [name])):
        other = {name: replace(before.numbers[name], value=value, limit=10.0)}
        assert worse(replace(before, numbers={**before.numbers, **other}), before) == found
    own = Tolerance("*", "", enough="limit")
    assert own.enough_beside(record().numbers[name]) == 25 and own.enough_beside(record().numbers["bytes/cpu"]) is None
    assert worse(record(bytes_cpu=1001), None, own) == ["bytes/cpu"]


def test_nan_is_worse_but_as_a_baseline_it_is_nothing_to_compare_with() -> None:
    for name in ("gates_cpu_step_sqnr_db", "bytes_cpu", "gates_cpu_median_sqnr_db"):
        assert len(worse(record(**{name: math.nan}))) == 1, name
    found = compare(record(bytes_cpu=math.nan), record(), load_tolerances())
    assert verdicts(found)["bytes/cpu"] == "not compared"


def test_what_the_bundle_lacks_is_worse_and_what_is_new_is_not_compared() -> None:
    less = record()
    less = replace(less, numbers={name: row for name, row in less.numbers.items() if "gemm" not in name})
    assert worse(less) == ["gates/cpu/gemm_exact"]
    assert worse(record(), less) == []
    [row] = [row for row in compare(less, record(), []).rows if "gemm" in row.name]
    assert row.sentence() == "gates/cpu/gemm_exact: the baseline does not have it"
    assert worse(record(gates_cpu_gemm_exact=1), less) == ["gates/cpu/gemm_exact"], "but what is new may not fail"


def test_gates_of_a_quick_verification_are_compared_with_such_alone() -> None:
    found = compare(record(), record(quick=True, gates_quant_sqnr_db=20, bytes_cpu=2000), load_tolerances())
    assert [row.name for row in found.worse] == ["bytes/cpu"]
    assert "these of a quick one" in found.notes[0]
    assert worse(record(quick=True, gates_quant_sqnr_db=20), record(quick=True)) == ["gates/quant_sqnr_db"]


@pytest.mark.parametrize(
    ("key", "value"), [("cpu", "another"), ("threads", 4), ("batch_size", 2), ("shapes", {"x": [2]})]
)
def test_times_under_other_conditions_are_not_compared(key: str, value: object) -> None:
    other: Any = {**TIMING, key: value}
    found = compare(record(), record(timing=other, speed_cpu_onnxruntime_fp32=1), load_tolerances())
    assert not found.worse and f"{key} was {TIMING[key]}, is {value}" in found.notes[0]  # type: ignore[literal-required]
    unmeasured = compare(record(), record(timing=None, speed_cpu_onnxruntime_fp32=1), load_tolerances())
    assert not unmeasured.worse and unmeasured.notes == ("speed is not compared: it was not measured in both",)


def test_another_model_is_said() -> None:
    assert "other weights" in compare(record(), record(model="n"), []).notes[0]


# --- the file of tolerances -------------------------------------------------------------------------------------------


def test_the_default_numbers_are_those_of_the_gates() -> None:
    rows = {row.of: row for row in load_tolerances()}
    assert rows["gates/*_db"].absolute == pytest.approx(FACTOR_DB, abs=0.001)
    assert rows["gates/*_db"].enough == rows["gates/*/calls"].enough == "limit"
    assert rows["gates/*calls_ulps"].enough == FACTOR * STEPS * SCHEDULER_ULPS
    bounds = {rule.name for rule in LAYER_RULES if rule.unit == "x bound"}
    assert all(rows[f"gates/*{name}"].enough == 1 for name in bounds)


def test_a_file_stands_before_the_default(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('schema_version = 1\n[[tolerance]]\nof = "bytes/*"\nrelative = 0.5\nwhy = "a change of format"\n')
    first, *others = load_tolerances(path)
    assert first == Tolerance("bytes/*", "a change of format", relative=0.5) and others == load_tolerances()
    assert compare(record(), record(bytes_cpu=1400), load_tolerances(path)).worse == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'schema_version' is missing"),
        ("schema_version = 2", "this version reads 1"),
        ("schema_version = 1\nx = 1", "key 'x' is unknown"),
        ("schema_version = 1\n[[tolerance]]\nof = 'a'", "'tolerance.0.why' is missing"),
        ("schema_version = 1\n[[tolerance]]\nof = 'a'\nwhy = 'b'\nabsolute = -1.0", "absolute"),
        ("schema_version = 1\n[[tolerance]]\nof = 'a'\nwhy = 'b'\nrelative = nan", "relative"),
        ("schema_version = 1\n[[tolerance]]\nof = 'a'\nwhy = 'b'\nabsolute = inf", "absolute"),
        ("schema_version = 1\n[[tolerance]]\nof = 'a'\nwhy = 'b'\nenough = 'most'", "enough"),
        ("schema_version =", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_tolerances(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "docs/ci.md" in str(caught.value)
    with pytest.raises(RecipeError, match="is missing"):
        load_tolerances(tmp_path / "none.toml")


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_by_its_report_its_sizes_and_its_measurement(tmp_path: Path) -> None:
    found = read_record(make_reported(tmp_path / "a", GATES, ratio=12.0))
    assert {name: number.value for name, number in found.numbers.items()} == {
        "gates/quant_sqnr_db": 29.5,
        "gates/cpu/gemm_exact": 0,
        "gates/cpu/segments": 0.4,
        "gates/cpu/step_sqnr_db": 34.5,
        "gates/cpu/median_sqnr_db": math.inf,
        "bytes/quantized_weights": found.numbers["bytes/quantized_weights"].value,
        "bytes/cpu": len(b"lowered"),
        "speed/cpu/torch_fp32": 12.0,
    }
    assert found.failures == [] and found.timings[""]["cpu"] == "a processor" and not found.quick


def test_a_written_record_comes_back(tmp_path: Path) -> None:
    bundle = open_any(make_reported(tmp_path / "a", GATES, ratio=12.0))
    failed = replace(GATES[0], value=math.nan)
    found = record_of(bundle, [failed, *GATES[1:]], quick=True)
    write_record(found, tmp_path / "b.json")
    again = read_record(tmp_path / "b.json")
    assert again.failures == ["gates/quant_sqnr_db"] and math.isnan(again.numbers["gates/quant_sqnr_db"].value)
    kept = {name: row for name, row in found.numbers.items() if row.value == row.value}
    assert {name: again.numbers[name] for name in kept} == kept
    assert (again.timings, again.models, again.quick, again.engine) == (found.timings, found.models, True, "small")
    assert {"tools", "code", "machine"} <= json.loads((tmp_path / "b.json").read_text()).keys()


def test_speed_may_come_from_a_file_of_bench(tmp_path: Path) -> None:
    bundle = open_any(make_reported(tmp_path / "a", GATES, ratio=12.0))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(measured(9.0, cpu="here")))
    found = record_of(bundle, GATES, read_bench(path, bundle.path))
    assert found.numbers["speed/cpu/torch_fp32"].value == 9 and found.timings[""]["cpu"] == "here"
    path.write_text("{}")
    with pytest.raises(RecipeError, match=r"bench\.json.*write it with bench BUNDLE -o"):
        read_bench(path, bundle.path)


def pipeline(folder: Path, gate: float = 0) -> Path:
    """A pipeline bundle with reports of its own and of its components."""
    from export.documents import sha256
    from pipeline.files import MANIFEST_FILE
    from pipeline.verify.report import Report

    write(folder)
    for name in COMPONENTS:
        make_reported(folder / "new" / name, [Gate("cpu/finite", 0, 0, "values", "all")], ratio=3.0)
        (folder / name).rename(folder.with_name(f"{folder.name}-old-{name}"))
        (folder / "new" / name).rename(folder / name)
    (folder / "new").rmdir()
    (folder / "report").mkdir()
    path = folder / "report/parity.json"
    path.write_text(Report([Gate("tokenizer/ids_differing", gate, 0, "", "equal")]).to_json())
    listed = ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "report/parity.json")
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in listed}
    rows = {name: {"engine": "small", "sha256": sha256(folder / name / MANIFEST_FILE)} for name in COMPONENTS}
    seal(folder, files=files, components=rows)
    return folder


def test_a_pipeline_is_read_with_its_components(tmp_path: Path) -> None:
    found = read_record(pipeline(tmp_path / "whole"))
    assert list(found.numbers) == [
        "gates/tokenizer/ids_differing",
        *(f"gates/{name}/cpu/finite" for name in COMPONENTS),
        *(f"bytes/{name}/{what}" for name in COMPONENTS for what in ("quantized_weights", "cpu")),
        *(f"speed/{name}/cpu/torch_fp32" for name in COMPONENTS),
    ]
    assert found.timings.keys() == found.models.keys() == set(COMPONENTS)
    failing = read_record(pipeline(tmp_path / "other", gate=2))
    assert [row.name for row in compare(found, failing, load_tolerances()).worse] == ["gates/tokenizer/ids_differing"]
    with pytest.raises(RecipeError, match="is a pipeline, whose components are measured one by one"):
        read_bench(tmp_path / "bench.json", tmp_path / "whole")


def test_what_is_no_baseline_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.json").write_text('{"schema_version": 3}')
    wrong = make_reported(tmp_path / "none", GATES)
    (wrong / "report/parity.json").write_text("{}")
    cases: dict[str, tuple[type[UserError], str]] = {
        "folder": (RecipeError, "a folder without a bundle"),
        "a.json": (RecipeError, "schema version 3.*write it again with verify --write-baseline"),
        "missing": (RecipeError, "is missing"),
        "none": (ContractError, r"parity\.json"),
    }
    for name, (kind, words) in cases.items():
        with pytest.raises(kind, match=words):
            read_record(tmp_path / name)


def test_a_bundle_without_a_report_says_nothing_of_its_gates(tmp_path: Path) -> None:
    from tests.support.bundles import make_bundle

    with pytest.raises(ContractError, match=r"has no report/parity\.json"):
        stored_record(open_any(make_bundle(tmp_path / "bare")))
    write(tmp_path / "whole")
    with pytest.raises(ContractError, match=r"has no report/parity\.json"):
        stored_record(open_any(tmp_path / "whole"))
