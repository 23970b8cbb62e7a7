"""Marks of cost, and what the fast tests reach."""

from __future__ import annotations

from pathlib import Path

from tests.support import reach
from tests.support.costs import FEW, few, has_fast_tests


def test_a_file_is_fast_by_its_own_marks_and_those_of_its_tests(tmp_path: Path) -> None:
    path, body = tmp_path / "test_a.py", "import pytest\n{0}\n{1}\ndef test_a(): pass\n"
    slow_too = "@pytest.mark.parametrize('a', [1])\n@pytest.mark.slow"
    marks = "@pytest.mark.torch", "@pytest.mark.filterwarnings", slow_too, ""
    for own, fast in zip(marks, (False, True, False, True), strict=True):
        for of_file in ("", "pytestmark = pytest.mark.filterwarnings"):
            path.write_text(body.format(of_file, own), encoding="utf-8")
            assert has_fast_tests(path) is fast
        path.write_text(body.format("pytestmark = [pytest.mark.rtx, pytest.mark.kernels]", own), encoding="utf-8")
        assert not has_fast_tests(path)
    path.write_text(body.format("pytestmark = pytest.mark.slow", "@pytest.mark.fast"), encoding="utf-8")
    assert has_fast_tests(path)


def test_of_many_cases_a_few_are_fast_spread_over_all() -> None:
    for count in range(1, 40):
        chosen = few(range(count))
        assert len(chosen) == len(set(chosen)) == min(count, FEW) and {chosen[0], chosen[-1]} == {0, count - 1}


def test_a_module_is_reached_when_a_function_of_it_is_entered() -> None:
    from pipeline import distance, progress

    before = set(reach._entered)
    reach._entered.clear()
    try:
        with reach.noted():
            distance.psnr_db(1.0, 1.0, 1.0)
        distance_file, progress_file = str(distance.__file__), str(progress.__file__)
        assert distance_file in reach.reached() and progress_file not in reach.reached()
        left = reach.unreached(reach.reached())
        assert "pipeline/progress.py" in left and "pipeline/distance.py" not in left
    finally:
        reach._entered.update(before)
