"""The pytest plugin: fixtures `ditc_bundle` and `assert_parity`, for tests that hold an engine to its proof.

pytest finds it by its entry point wherever this package is installed, and imports it in every run. So it imports
nothing of its own but when a test asks for a fixture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.verify.record import AnyBundle
    from pipeline.verify.report import Report

FLAG, KEY = "--ditc-bundle", "ditc_bundle"
BUNDLE_HELP = "bundle of the fixture ditc_bundle: a folder that `ditc build` wrote, or hf://OWNER/NAME"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The bundle, as a flag or in the configuration file."""
    parser.getgroup("ditc").addoption(FLAG, metavar="BUNDLE", help=BUNDLE_HELP)
    parser.addini(KEY, f"{BUNDLE_HELP}, if {FLAG} does not name one")


@pytest.fixture(scope="session")
def ditc_bundle(request: pytest.FixtureRequest) -> AnyBundle:
    """The bundle that --ditc-bundle, or ditc_bundle of the configuration, names, every file of it verified.

    A folder is relative to where pytest was started, in the configuration to its file. Fails the test where none is
    named, or it cannot be opened.
    """
    from export.errors import UserError
    from pipeline.verify.record import open_any

    place = request.config.getoption(FLAG) or request.config.getini(KEY)
    if not place:
        pytest.fail(f"no bundle is named; run pytest {FLAG} BUNDLE, or set {KEY} in its configuration", pytrace=False)
    if not request.config.getoption(FLAG) and not place.startswith("hf:"):
        place = str(request.config.rootpath / place)
    try:
        return open_any(place)
    except UserError as error:
        pytest.fail(str(error), pytrace=False)


@dataclass
class Parity:
    """What `assert_parity` calls. A process verifies a bundle once, however many of its tests ask; one that was built
    again is another. report_dir: makes a folder for a report."""

    report_dir: Callable[[], Path]
    _reports: dict[tuple[str, bool, str | None], tuple[Report, Path]] = field(default_factory=dict)

    def __call__(
        self,
        bundle: AnyBundle | str | Path,
        *,
        baseline: str | Path | None = None,
        tolerances: str | Path | None = None,
        quick: bool | None = None,
        model: str | None = None,
    ) -> Report:
        """Verify a bundle (see `ditc verify`) and return the report; fail the test where a gate fails.

        bundle: an opened one, or its folder. baseline: a bundle, or a file of `verify --write-baseline`, that it may
        not be worse than; what of it cannot be compared is a warning. tolerances: a file that says by how much it may.
        quick: as of `verify --quick`; None: as the baseline was, without one it is. model: where the
        float model is, if it moved since the build.
        """
        from export.errors import UserError
        from pipeline.verify.baseline import compare, load_tolerances
        from pipeline.verify.record import open_any, read_record, record_of

        __tracebackhide__ = True
        try:
            stated = load_tolerances(None if tolerances is None else Path(tolerances))
            before = None if baseline is None else read_record(baseline)
            opened = open_any(bundle) if isinstance(bundle, str | Path) else bundle
            quick = (before is None or before.quick) if quick is None else quick
            report, place = self._report(opened, quick, model)
        except UserError as error:
            pytest.fail(str(error), pytrace=False)
        if not report.passed:
            pytest.fail(f"{report.sentence()}; see {place / 'index.html'}", pytrace=False)
        if before is not None:
            comparison = compare(before, record_of(opened, report.gates, quick=quick), stated)
            for note in comparison.notes:  # what was not compared, and why
                warnings.warn(f"{opened.path}: {note}", stacklevel=2)
            if comparison.worse:
                pytest.fail(comparison.sentence(), pytrace=False)
        return report

    def _report(self, bundle: AnyBundle, quick: bool, model: str | None) -> tuple[Report, Path]:
        from pipeline.bundle.bundle import Bundle
        from pipeline.bundle.pipeline_bundle import manifest_sha256
        from pipeline.verify.__main__ import verify_bundle, verify_pipeline

        key = (manifest_sha256(bundle.path), quick, model)
        if key not in self._reports:
            verify = verify_bundle if isinstance(bundle, Bundle) else verify_pipeline
            place = self.report_dir()
            self._reports[key] = verify(bundle.path, place, (model, None, None, None), quick=quick), place
        return self._reports[key]


@pytest.fixture(scope="session")
def assert_parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """A function that fails the test unless a bundle passes its gates and is no worse than its baseline."""
    return Parity(lambda: tmp_path_factory.mktemp("ditc_report"))
