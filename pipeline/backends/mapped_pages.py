"""Pages of files that libraries have mapped into this process: which there are, and giving them back (Linux)."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.models.load import LoadedModel

MAPS = Path("/proc/self/maps")
# Address range, permissions, offset, device, inode.
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r.-p [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+) ")
DONTNEED = 4  # MADV_DONTNEED of Linux, the same on every processor that onnxruntime runs on


@dataclass(frozen=True)
class MappedPages:
    """Address ranges (first byte, first byte behind) of private mappings that nobody writes to.

    They are to be used while their mappings live: later something else may have the addresses.
    """

    ranges: frozenset[tuple[int, int]] = frozenset()

    def __sub__(self, other: MappedPages) -> MappedPages:
        """What of them is not in `other`. By address: the system lists neighbours of one file as one range."""
        left = set(self.ranges)
        for first, end in other.ranges:
            for begin, stop in [row for row in left if row[0] < end and first < row[1]]:
                left.remove((begin, stop))
                left.update(row for row in ((begin, first), (end, stop)) if row[0] < row[1])
        return MappedPages(frozenset(left))

    def part(self, size_bytes: int) -> MappedPages:
        """As few of them, by address, as have so many bytes; all of them where they have less."""
        chosen: list[tuple[int, int]] = []
        for first, end in sorted(self.ranges):
            if size_bytes <= 0:
                break
            chosen.append((first, end))
            size_bytes -= end - first
        return MappedPages(frozenset(chosen))

    def size_bytes(self) -> int:
        """Of all of them, in memory or not."""
        return sum(end - first for first, end in self.ranges)

    def give_back(self) -> None:
        """Take the pages out of this process' memory. Whoever reads them next gets them from the file's cache again."""
        if not self.ranges:
            return
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for first, end in self.ranges:
            if madvise(first, end - first, DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise of {end - first} bytes that are mapped from a file failed")


def mapped_pages(path: Path) -> MappedPages:
    """Those of a file; none where the system does not tell (it has no /proc/self/maps)."""
    try:
        inode, text = path.stat().st_ino, MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return MappedPages()
    rows = (match for match in LINE.finditer(text) if int(match[3]) == inode)
    return MappedPages(frozenset((int(row[1], 16), int(row[2], 16)) for row in rows))


def give_back_weights(model: LoadedModel) -> None:
    """Take the pages of a float model's files out of this process' memory, where they are mapped."""
    for name in model.files.names:
        mapped_pages(model.files.folder / name).give_back()
