"""The pytest plugin: found by its entry point, free of cost where unused, and failing tests in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.errors import EnvironmentLacksError
from pipeline.pytest_plugin import Parity
from pipeline.verify import __main__ as verb
from pipeline.verify.record import open_any
from pipeline.verify.report import Report
from tests.support.bundles import make_reported
from tests.verify.test_baseline import GATES, pipeline

ROOT = Path(__file__).parents[1]
[(NAME, MODULE)] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"].items()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How verification was called, which finds GATES."""
    made: list[Any] = []

    def verified(path: Path, report_dir: Path, flags: Any, quick: bool) -> Report:
        made.append((path, flags[0], quick))
        return Report(list(GATES))

    monkeypatch.setattr(verb, "verify_bundle", verified)
    monkeypatch.setattr(verb, "verify_pipeline", verified)
    return made


def parity_in(folder: Path) -> Parity:
    return Parity(lambda: folder)


def failure(parity: Parity, *args: Any, **named: Any) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        parity(*args, **named)
    return str(caught.value)


def test_a_bundle_is_verified_once_however_many_tests_ask(tmp_path: Path, calls: list[Any]) -> None:
    parity, path = parity_in(tmp_path), make_reported(tmp_path / "a", GATES)
    assert parity(path).passed and parity(open_any(path)) is parity(str(path))
    assert calls == [(path, None, True)]
    parity(path, quick=False, model="zoo:pixart_mini")
    assert calls[1:] == [(path, "zoo:pixart_mini", False)]
    assert parity(pipeline(tmp_path / "whole")).passed


def test_one_that_was_built_again_is_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parity, path = parity_in(tmp_path), tmp_path / "a"
    reports = iter([Report(list(GATES)), Report([replace(GATES[1], value=2.0)])])
    monkeypatch.setattr(verb, "verify_bundle", lambda *_, **__: next(reports))
    assert parity(make_reported(path, GATES)).passed and parity(path).passed
    shutil.rmtree(path)
    assert "parity gate failed: cpu/gemm_exact = 2" in failure(parity, make_reported(path, [*GATES[:2]]))


def test_a_failed_gate_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_reported(tmp_path / "a", GATES)
    bad = Report([replace(GATES[1], value=2.0)])
    monkeypatch.setattr(verb, "verify_bundle", lambda *_, **__: bad)
    said = f"parity gate failed: cpu/gemm_exact = 2, limit 0; cpu/gemm_exact: exact; see {tmp_path / 'index.html'}"
    assert failure(parity_in(tmp_path), path) == said


def test_a_bundle_that_is_worse_than_its_baseline_fails_the_test(tmp_path: Path, calls: list[Any]) -> None:
    better = [replace(GATES[0], value=35.0), *GATES[1:]]
    path, baseline = make_reported(tmp_path / "a", GATES), make_reported(tmp_path / "b", better)
    assert "gates/quant_sqnr_db = 29.5 dB, baseline 35 dB" in failure(parity_in(tmp_path), path, baseline=baseline)
    with pytest.warns(UserWarning, match="gates are not compared: the baseline's are of a whole verification"):
        assert parity_in(tmp_path)(path, baseline=baseline, quick=True).passed
    tolerances = tmp_path / "t.toml"
    tolerances.write_text('schema_version = 1\n[[tolerance]]\nof = "*"\nabsolute = 9.0\nwhy = "w"\n')
    assert parity_in(tmp_path)(path, baseline=baseline, tolerances=tolerances).passed


def test_what_a_user_does_wrong_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> Report:
        raise EnvironmentLacksError("verifying a bundle needs torch")

    path = make_reported(tmp_path / "a", GATES)
    monkeypatch.setattr(verb, "verify_bundle", lacking)
    assert failure(parity_in(tmp_path), path) == "verifying a bundle needs torch"
    assert "none is not a folder" in failure(parity_in(tmp_path), tmp_path / "none")
    assert "is missing" in failure(parity_in(tmp_path), path, baseline=tmp_path / "none.json")


# --- in pytest --------------------------------------------------------------------------------------------------------

TESTS = """
def test_it(ditc_bundle):
    assert ditc_bundle.name == "small"
"""
UNUSED = """
import json, sys

def test_it():
    print("imported", json.dumps(sorted(sys.modules)))
"""


def run_pytest(folder: Path, *args: str, autoload: bool = False) -> subprocess.CompletedProcess[str]:
    """pytest in `folder`: with all plugins that have an entry point, or with this one alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder)])
    if not autoload:
        kept["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        args = ("-p", MODULE, *args)
    (folder / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """What the test of UNUSED printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(done.stdout.split("imported ")[1].splitlines()[0]))


@pytest.mark.process
def test_it_costs_nothing_where_unused(tmp_path: Path) -> None:
    """Found by its entry point, as where the package is installed, it brings one module without the rest."""
    (tmp_path / "test_unused.py").write_text(UNUSED)
    described = tmp_path / "ditc-0.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: ditc\nVersion: 0.0\n")
    (described / "entry_points.txt").write_text(f"[pytest11]\n{NAME} = {MODULE}\n")
    loaded = imported(run_pytest(tmp_path, "-p", "no:xdist", autoload=True))
    without = imported(run_pytest(tmp_path, "-p", "no:xdist", "-p", f"no:{NAME}", autoload=True))
    more = {name for name in loaded - without if name.partition(".")[0] not in sys.stdlib_module_names}
    assert more == {"pipeline", MODULE}


@pytest.mark.process
def test_the_bundle_is_named_by_a_flag_or_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    make_reported(tmp_path / "sub/a", GATES)
    done = run_pytest(tmp_path, "--ditc-bundle", "sub/a")
    assert done.returncode == 0, done.stdout
    (tmp_path / "pytest.ini").write_text("[pytest]\nditc_bundle = sub/a\n")
    assert run_pytest(tmp_path).returncode == 0
    (tmp_path / "pytest.ini").write_text("")
    done = run_pytest(tmp_path)
    assert done.returncode == 1 and "no bundle is named; run pytest --ditc-bundle BUNDLE" in done.stdout
    done = run_pytest(tmp_path, "--ditc-bundle", "none")
    assert done.returncode == 1 and "none is not a folder" in done.stdout and "Traceback" not in done.stdout


def test_the_entry_point_is_the_plugin() -> None:
    assert ("ditc", Parity.__module__) == (NAME, MODULE)
