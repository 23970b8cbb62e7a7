"""Faults in whole graphs and in calls, planted in the bundled models (here) and in a tiny one of each family (in
test_graph_faults_tiny.py), are all caught by the gate that is meant to catch them; the graphs without a fault pass all
gates.

Of a graph with a fault only what those gates look at is run: that the others pass or fail says nothing of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.attention_faults import ATTENDED, ATTENTION_FAULTS
from tests.support.call_faults import CALL_FAULTS, CallFault
from tests.support.fault_subjects import ZEROS, Subjects
from tests.support.graph_edit import GraphEdit, NothingToPlantError
from tests.support.graph_faults import ALL, GRAPH_FAULTS, MINIS, TINIES, GraphFault
from tests.support.linear_faults import LEARNED, LINEAR_FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.torch]

# Test -> the faults that it plants.
TABLES: dict[str, Sequence[Any]] = {
    "test_a_fault_in_the_graph_is_caught": (*GRAPH_FAULTS, *LINEAR_FAULTS, *ATTENTION_FAULTS),
    "test_a_fault_in_the_calls_is_caught": CALL_FAULTS,
}
# The subjects of this file; test_graph_faults_tiny.py has the others.
BUNDLED = True
FUSED = (*MINIS, *LEARNED, *ATTENDED)
CLEAN = (*ALL, *LEARNED, *ATTENDED, "pixart_sizes", *ZEROS)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """The models, each built when the first test asks for it."""
    return Subjects(tmp_path_factory.mktemp("faults"))


def chosen(faults: Sequence[Any], every: bool) -> list[tuple[str, Any]]:
    """(subject, fault), subject by subject, so that each is built once. Without `every` each fault is planted in one of
    its subjects, in turn: the whole table takes many minutes."""
    pairs = [
        (name, fault)
        for index, fault in enumerate(faults)
        for name in (fault.subjects if every else [fault.subjects[index % len(fault.subjects)]])
    ]
    order = list(dict.fromkeys(name for name, _ in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair[0]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `fault` gets the faults of its table, one of `path` the graphs without any: those of this file's
    subjects."""
    here = metafunc.module.BUNDLED
    if "fault" in metafunc.fixturenames:
        pairs = chosen(TABLES[metafunc.function.__name__], metafunc.config.getoption("--all-faults"))
        pairs = [(name, fault) for name, fault in pairs if name.startswith(MINIS) is here]
        metafunc.parametrize(("name", "fault"), pairs, ids=[f"{name}-{fault.name}" for name, fault in pairs])
    if "path" in metafunc.fixturenames:
        graphs = [*((name, "stock") for name in CLEAN), *((name, "fused") for name in FUSED)]
        metafunc.parametrize(("name", "path"), [row for row in graphs if row[0].startswith(MINIS) is here])


def test_a_right_graph_passes_all_gates(name: str, path: str, subjects: Subjects) -> None:
    subject = subjects.subject(name)
    assert subject.failures(subject.graph(path)) == {}


def test_a_fault_in_the_graph_is_caught(name: str, fault: GraphFault, subjects: Subjects) -> None:
    subject = subjects.subject(name)
    failed = subject.failures(subject.planted(fault.graph, fault.plant), fault.caught_by)
    assert fault.caught_by & set(failed), f"{fault.name}: only {sorted(failed)} failed"


def test_a_fault_in_the_calls_is_caught(name: str, fault: CallFault, subjects: Subjects) -> None:
    failed = subjects.subject(name).failures_of_calls(fault.plant)
    assert fault.caught_by & set(failed), f"{fault.name}: only {sorted(failed)} failed"
    said = " ".join(gate.why for key, gate in failed.items() if key in fault.caught_by | {"repeats"})
    assert re.search(fault.said, said), f"{fault.name}: the gates say {said}"


def test_a_right_engine_answers_all_calls(subjects: Subjects) -> None:
    """The wrapper that faults of calls are planted with changes nothing by itself."""
    failed = subjects.subject("dit_mini").failures_of_calls(lambda run: run)
    assert not {"calls", "step_sqnr_db", "median_sqnr_db", "final_psnr_db", "finite"} & set(failed)


def test_the_table_is_as_long_and_as_wide_as_it_should_be() -> None:
    faults = (*GRAPH_FAULTS, *LINEAR_FAULTS, *ATTENTION_FAULTS, *CALL_FAULTS)
    assert len({fault.name for fault in faults}) == len(faults) - 1 > 100  # latents are clipped in two places
    for name in (*MINIS, *LEARNED, *ATTENDED):
        assert sum(name in fault.subjects for fault in faults) >= 10
    planted = [name for table in TABLES.values() for name, _ in chosen(table, every=False)]
    assert sum(name.startswith(MINIS) for name in planted) >= 60 and {*MINIS, *TINIES} <= set(planted)


def test_a_fault_that_changes_nothing_is_none(subjects: Subjects) -> None:
    edit = GraphEdit(subjects.subject("dit_mini").graph("stock").path)
    with pytest.raises(NothingToPlantError, match="the fault changed nothing"):
        edit.save()
    with pytest.raises(NothingToPlantError, match="no kept weight caption"):
        edit.constants("caption")
