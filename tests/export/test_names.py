"""One rule for every name that comes out of a file: it means a file inside the folder, on every system."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import ContractError, ModelError
from export.names import distinct, inside

GOOD = ["a", "a.b", "cpu/model.onnx", "a b", "é", ".hidden", "a..b", "..a", "-"]
BAD = [
    "", ".", "..", "/", "/etc/passwd", "../a", "a/../b", "a/..", "a//b", "./a", "a/.", "a/", "C:\\a", "C:a", "c:/a",
    "a\\b", "\\\\host\\share", "a\0", "a\nb", "a\x1b[31m", "\ud800", "a:stream", "a*", "a?", "a|b", "a<b", 'a"',
    "NUL", "con", "com1.txt", "a.", "a ", "a" * 256, "é" * 128,
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_are_taken(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, tmp_path / "manifest.json") == tmp_path / name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_could_mean_anything_else_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"index\.json: file .*get it from its source"):
        inside(tmp_path, name, tmp_path / "index.json", ModelError)


@given(st.text(st.sampled_from("a./\\:.~ \0CNUL"), max_size=12))
def test_whatever_is_taken_lies_inside(name: str) -> None:
    folder = Path("/nowhere/at/all")
    try:
        path = inside(folder, name, folder / "x")
    except ContractError:
        return
    assert path.resolve().is_relative_to(folder) and path != folder


def test_links_may_lead_about_the_folder_and_not_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "here").write_text("")
    (tmp_path / "outside").write_text("")
    (folder / "about").symlink_to("here")
    (folder / "out").symlink_to("../outside")
    (folder / "sub/out").symlink_to(tmp_path)
    assert inside(folder, "about", folder / "x").is_file()
    for name in ("out", "sub/out/outside", "sub/out/model/../outside"):
        with pytest.raises(ContractError, match="leaves the folder"):
            inside(folder, name, folder / "x")


def test_the_hub_s_cache_keeps_content_beside_its_snapshots(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots/0123/transformer"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/sha").write_text("")
    (tmp_path / "outside").write_text("")
    (snapshot / "weights").symlink_to("../../../blobs/sha")
    (snapshot / "out").symlink_to(tmp_path / "outside")
    (repository / "blobs/deep").mkdir()
    (repository / "blobs/deep/sha").write_text("")
    (snapshot / "deep").symlink_to("../../../blobs/deep/sha")
    (snapshot / "absent").symlink_to("../../../blobs/other")
    assert inside(snapshot, "weights", snapshot / "x").is_file()
    assert not inside(snapshot, "absent", snapshot / "x").exists(), "for its reader to say that it is missing"
    for name in ("out", "deep"):
        with pytest.raises(ContractError, match="leaves the folder by a link"):
            inside(snapshot, name, snapshot / "x")


def test_names_that_differ_in_case_or_accents_alone_are_refused() -> None:
    distinct(["a", "b", "a/b"], Path("m"))
    for names in (["Config.json", "config.json"], ["caf\xe9", "cafe\u0301"]):
        with pytest.raises(ContractError, match="are one file on some systems"):
            distinct(names, Path("m"))
