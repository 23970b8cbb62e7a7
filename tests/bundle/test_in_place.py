"""Large files are used where they lie: hashed once, watched while an engine lives, copied where others may write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.errors import ContractError
from pipeline import load
from pipeline.backends import BACKENDS
from pipeline.bundle import in_place
from tests.bundle.test_snapshot import every_row, folder, swap, zero
from tests.support import hub

__all__ = ["folder"]
DATA = "cpu/model.onnx.data"


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of these tests are small and new, and lie where the machine that runs them has its temporary files."""
    monkeypatch.setattr(in_place, "LEAST_BYTES", 0)
    monkeypatch.setattr(in_place, "SETTLED_NS", 0)
    monkeypatch.setattr(in_place, "_DIGESTS", {})
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever modes and owners the folders above the tests' have."""
    monkeypatch.setattr(in_place, "others_may_write", lambda path: None)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    names: list[str] = []
    original = in_place.hashlib.file_digest

    def noting(file, *rest):  # type: ignore[no-untyped-def]
        path = os.readlink(f"/proc/self/fd/{file.fileno()}")
        names.append(Path(path.removesuffix(" (deleted)")).name)
        return original(file, *rest)

    monkeypatch.setattr(in_place.hashlib, "file_digest", noting)
    return names


def age(folder: Path) -> None:
    """So that a write can be told by its time, however soon it comes."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    time.sleep(0.02)


def table(folder: Path) -> np.ndarray:
    return np.fromfile(folder / DATA, np.float32).reshape(-1, 64)


def test_nothing_is_copied_and_a_file_is_hashed_once(
    folder: Path, tmp_path: Path, trusted: None, hashed: list[str]
) -> None:
    age(folder)
    bundle, expected = load(folder), table(folder)
    assert sorted(hashed) == sorted(Path(name).name for name in bundle.manifest["files"])
    hashed.clear()
    for _ in range(2):
        engine = bundle.engine("cpu")
        assert np.array_equal(engine.run(every_row())["sample"], expected)
        engine.close()
    load(folder)
    assert hashed == [] and not (tmp_path / "cache").exists()


def test_small_engines_are_copied(folder: Path, trusted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "LEAST_BYTES", 2**40)
    age(folder)
    engine, expected = load(folder).engine("cpu"), table(folder)
    zero(folder / DATA)
    assert np.array_equal(engine.run(every_row())["sample"], expected)


def test_a_file_that_is_written_under_a_live_engine_fails_its_calls_by_name(folder: Path, trusted: None) -> None:
    age(folder)
    engine = load(folder).engine("cpu")
    engine.run({"rows": np.arange(4)})
    zero(folder / DATA)
    for _ in range(2):
        with pytest.raises(ContractError, match=rf"{DATA} was changed after the engine was loaded; load it again"):
            engine.run(every_row())
    with pytest.raises(ContractError, match="differs from the manifest"):
        load(folder).engine("cpu")


def unlink(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    os.link(path, path.with_name("second"))


def touch(path: Path) -> None:
    os.utime(path)


@pytest.mark.parametrize("change", [swap, unlink, link, touch], ids=lambda change: change.__name__)
def test_what_leaves_its_bytes_alone_does_not_matter(
    change: Callable[[Path], None], folder: Path, trusted: None, hashed: list[str]
) -> None:
    age(folder)
    engine, expected = load(folder).engine("cpu"), table(folder)
    hashed.clear()
    change(folder / DATA)
    for _ in range(3):
        assert np.array_equal(engine.run(every_row())["sample"], expected)
    assert hashed == ["model.onnx.data"], "once, as its status has changed"


def test_a_file_that_is_exchanged_while_the_engine_is_loaded_is_refused(
    folder: Path, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BACKENDS["cpu"].load

    def swapped(place: Path, threads: int) -> object:
        assert place == folder
        swap(folder / DATA)
        return original(place, threads)

    age(folder)
    monkeypatch.setattr(BACKENDS["cpu"], "load", swapped)
    with pytest.raises(ContractError, match=rf"{DATA} was replaced while the engine was loaded"):
        load(folder).engine("cpu")


def test_what_was_changed_just_now_is_copied(
    folder: Path, trusted: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its next change might leave no trace."""
    monkeypatch.setattr(in_place, "SETTLED_NS", 3600 * 10**9)
    caplog.set_level("INFO")
    engine, expected = load(folder).engine("cpu"), table(folder)
    zero(folder / DATA)
    assert np.array_equal(engine.run(every_row())["sample"], expected)
    assert "was changed just now" in caplog.text and not in_place._DIGESTS


def test_descriptors_live_as_long_as_the_engine(folder: Path, trusted: None) -> None:
    age(folder)
    bundle = load(folder)
    before = set(os.listdir("/proc/self/fd"))
    engine = bundle.engine("cpu")
    assert len(set(os.listdir("/proc/self/fd")) - before) >= 3
    engine.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_files_of_the_hub_s_cache_are_used_behind_their_links(folder: Path, tmp_path: Path, trusted: None) -> None:
    laid_out = hub.snapshot(folder, tmp_path / "repository")
    age(tmp_path / "repository" / "blobs")
    engine, expected = load(laid_out).engine("cpu"), table(folder)
    if in_place._onnxruntime() >= in_place.FOLLOWS_LINKS:
        assert isinstance(engine, in_place.HoldingEngine)
    assert np.array_equal(engine.run(every_row())["sample"], expected)


# --- who may write ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file that is this user's alone."""
    path = tmp_path / "one" / "two" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("weights")
    for part in (path, path.parent, path.parent.parent):
        part.chmod(0o600 if part == path else 0o700)
    if reason := in_place.others_may_write(path):
        pytest.skip(f"the temporary folder is not this user's alone: {reason}")
    return path


@pytest.mark.parametrize("depth", range(3))
def test_a_file_or_folder_that_others_may_write_is_named(place: Path, depth: int) -> None:
    part = (place, *place.parents)[depth]
    part.chmod(part.stat().st_mode | 0o002)
    reason = in_place.others_may_write(place)
    assert reason is not None and reason.startswith(f"{part} can be written by other users (mode ")


def test_folders_behind_a_link_count_and_those_before_it(place: Path, tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    (tmp_path / "link").symlink_to(open_folder / "back")
    (open_folder / "back").symlink_to(place.parent)
    assert in_place.others_may_write(tmp_path / "link" / place.name) is None
    open_folder.chmod(0o777)
    reason = in_place.others_may_write(tmp_path / "link" / place.name)
    assert reason is not None and reason.startswith(f"{open_folder} can be written"), "the link in it can be exchanged"
    open_folder.chmod(0o1777)
    assert in_place.others_may_write(tmp_path / "link" / place.name) is None, "not where a folder is sticky"


def test_a_group_counts_unless_it_is_this_user_s_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid())
    place.chmod(0o660)
    if not os.listxattr(place):
        os.chown(place, -1, user.pw_gid)
        for members, is_private in (([], True), ([user.pw_name], True), (["somebody"], False)):
            row = grp.struct_group((user.pw_name, "x", user.pw_gid, members))
            monkeypatch.setattr(grp, "getgrgid", lambda gid, row=row: row)
            assert (in_place.others_may_write(place) is None) == is_private, members
    monkeypatch.setattr(in_place, "_has_access_list", lambda place: True)
    assert in_place.others_may_write(place) is not None, "an access list may name more than the group"


def test_another_user_s_file_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be made writable at any time."""
    if os.geteuid() == 0:
        os.chown(place, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    reason = in_place.others_may_write(place)
    assert reason is not None and "belongs to another user" in reason


def test_what_others_may_write_is_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And said, once."""
    (folder / DATA).chmod(0o666)
    age(folder)
    caplog.set_level("INFO")
    bundle, expected = load(folder), table(folder)
    engines = [bundle.engine("cpu") for _ in range(2)]
    zero(folder / DATA)
    assert all(np.array_equal(engine.run(every_row())["sample"], expected) for engine in engines)
    assert caplog.text.count("loaded from a private copy") == 1
