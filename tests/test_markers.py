"""Marks of cost, and what the fast tests reach."""

from __future__ import annotations

from pathlib import Path

from tests.support import reach
from tests.support.costs import has_dear_tests, has_fast_tests


def test_a_file_is_fast_by_its_own_marks_and_those_of_its_tests(tmp_path: Path) -> None:
    path, body = tmp_path / "test_a.py", "import pytest\n{0}\n{1}\ndef test_a(): pass\n"
    marks = "@pytest.mark.torch", "@pytest.mark.rtx", "@pytest.mark.parametrize('a', [1])\n@pytest.mark.slow", ""
    for own, fast in zip(marks, (False, True, False, True), strict=True):
        for of_file in ("", "pytestmark = pytest.mark.rtx"):
            path.write_text(body.format(of_file, own), encoding="utf-8")
            assert has_fast_tests(path) is fast and has_dear_tests(path) is not fast
        path.write_text(body.format("pytestmark = [pytest.mark.rtx, pytest.mark.kernels]", own), encoding="utf-8")
        assert not has_fast_tests(path) and has_dear_tests(path)
    path.write_text(body.format("pytestmark = pytest.mark.slow", "@pytest.mark.fast"), encoding="utf-8")
    assert has_fast_tests(path) and not has_dear_tests(path)
    path.write_text(f"{path.read_text('utf-8')}\ndef test_b(): pass\n", encoding="utf-8")
    assert has_fast_tests(path) and has_dear_tests(path)


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
