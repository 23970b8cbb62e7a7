"""Pages of a mapped file are found, given back, and read again as they were."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends import mapped_pages
from pipeline.backends.mapped_pages import MappedPages

PAGES = 64


def resident_kib(first: int) -> int:
    """Of the mapping that begins at this address, as the system counts it."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return int(re.search(rf"^{first:08x}-.*?^Rss:\s+(\d+) kB", text, re.MULTILINE | re.DOTALL)[1])


@pytest.mark.skipif(not mapped_pages.MAPS.exists(), reason="the system has no /proc/self/maps")
def test_pages_are_given_back_and_come_again(tmp_path):
    path, content = tmp_path / "weights", np.arange(PAGES * mmap.PAGESIZE, dtype=np.uint8)
    content.tofile(path)
    assert mapped_pages.mapped_pages(path) == MappedPages()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        pages = mapped_pages.mapped_pages(path)
        ((first, end),) = pages.ranges
        assert end - first == PAGES * mmap.PAGESIZE and pages - pages == MappedPages()
        assert bytes(mapping) == content.tobytes()
        assert resident_kib(first) * 1024 == end - first
        pages.give_back()
        assert resident_kib(first) == 0
        assert bytes(mapping) == content.tobytes()


def test_a_system_that_does_not_tell_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_pages, "MAPS", tmp_path / "nothing")
    (tmp_path / "weights").write_bytes(b"1")
    assert mapped_pages.mapped_pages(tmp_path / "weights") == MappedPages()
    MappedPages().give_back()


def test_a_part_is_as_large_as_it_must_be():
    pages = MappedPages(frozenset({(0, 10), (20, 30), (40, 45)}))
    assert pages.size_bytes() == 25
    for size_bytes, count in ((0, 0), (1, 1), (10, 1), (11, 2), (21, 3), (99, 3)):
        assert pages.part(size_bytes).ranges == frozenset(sorted(pages.ranges)[:count])


def test_what_is_taken_away_is_taken_by_address():
    pages = MappedPages(frozenset({(0, 10), (20, 30)}))
    other = MappedPages(frozenset({(4, 6), (8, 22), (30, 40)}))
    assert (pages - other).ranges == {(0, 4), (6, 8), (22, 30)}
    assert (other - pages).ranges == {(10, 20), (30, 40)}
