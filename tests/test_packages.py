"""What pyproject.toml asks for: the run-time part is small, and the extras say what the code looks up."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from pipeline import machine
from tests.support.absent import HIDDEN
from tests.support.requirements import closure, size_bytes

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# The largest that `pip install ditc` may be, in bytes; its own files are some 25 MB.
MOST_BYTES = 275 * 10**6


def test_the_run_time_part_is_small_and_has_nothing_of_the_compiler() -> None:
    distributions = closure(PROJECT["dependencies"])
    # What tokenizers asks for is installed, and never imported: tests/support/absent.py hides it.
    assert HIDDEN & {name.replace("-", "_") for name in distributions} <= {"huggingface_hub"}
    assert sum(map(size_bytes, distributions.values())) < MOST_BYTES


def test_a_package_has_one_range_of_releases_in_all_extras() -> None:
    ranges: dict[str, set[str]] = {}
    for rows in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for row in map(Requirement, rows):
            ranges.setdefault(row.name, set()).add(str(row.specifier))
    assert not {name: both for name, both in ranges.items() if len(both) > 1}


def test_the_extra_build_is_what_the_compiler_looks_up() -> None:
    names = {Requirement(row).name for row in PROJECT["optional-dependencies"]["build"]}
    assert names == set(map(machine.distribution, machine.COMPILER))


def test_the_extras_of_the_server_are_what_it_looks_up() -> None:
    for extra, modules in (("serve", machine.SERVER), ("ray", machine.RAY)):
        names = {Requirement(row).name for row in PROJECT["optional-dependencies"][extra]} - {"ditc"}
        assert names == set(map(machine.distribution, modules))
