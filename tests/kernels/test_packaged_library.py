"""The kernel library that a wheel carries: used if it is whole and of the sources beside it, else refused by name."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.errors import EnvironmentLacksError
from pipeline.backends.cpu import CpuBackend
from plugins.cpu import library, packaged
from tests.support import native

VERSION = "0123456789abcdef"


def compiled(folder: Path) -> Path:
    """The true library, as a wheel of these sources carries it."""
    packaged.add(folder, library.version(), lambda path: shutil.copy(native.folder() / library.NAME, path))
    return folder / packaged.NAME


def problem(folder: Path, version: str = VERSION) -> str | None:
    packaged.problem.cache_clear()
    return packaged.problem(folder, version)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a library that is none, in a record that is true of it."""
    packaged.add(tmp_path, VERSION, lambda path: path.write_text("no machine code"))
    return tmp_path


def test_a_record_says_what_was_compiled(folder: Path) -> None:
    record = json.loads((folder / packaged.RECORD).read_text())
    assert record.keys() == {"version", "sha256"} and record["version"] == VERSION and len(record["sha256"]) == 64


def test_a_folder_without_one_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert problem(tmp_path) == packaged.ABSENT and not caplog.records


def test_what_does_not_load_is_refused_by_name_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = problem(folder)
    assert text is not None and text.startswith(f"{folder / packaged.NAME} does not load here (")
    assert text.endswith("; install the package again")
    packaged.problem(folder, VERSION)
    assert [record.message for record in caplog.records] == [text]


def test_one_of_other_sources_is_refused(folder: Path) -> None:
    text = problem(folder, "fedcba9876543210")
    assert text is not None and f"is of version {VERSION}, its sources of fedcba9876543210" in text


def test_every_changed_byte_is_refused(folder: Path) -> None:
    path = folder / packaged.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        text = problem(folder)
        assert text is not None and f"{path} is damaged: its sha256 is" in text
    path.write_bytes(whole[:-1])
    assert "is damaged" in str(problem(folder))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, f"{packaged.RECORD}"),
        ("", "is not valid JSON"),
        ("{}", "'version' is missing"),
        ('{"version": 1, "sha256": "00"}', "version"),
        ("[]", packaged.RECORD),
    ],
)
def test_a_record_that_is_none_is_refused(record: str | None, words: str, folder: Path) -> None:
    (folder / packaged.RECORD).unlink()
    if record is not None:
        (folder / packaged.RECORD).write_text(record)
    text = problem(folder)
    assert text is not None and text.startswith(f"{folder / packaged.NAME} is not used: ") and words in text


def test_a_build_that_fails_leaves_neither_library_nor_record(folder: Path) -> None:
    def refuse(path: Path) -> None:
        raise EnvironmentLacksError("no compiler")

    with pytest.raises(EnvironmentLacksError):
        packaged.add(folder, VERSION, refuse)
    assert not list(folder.iterdir())


@pytest.mark.kernels
def test_a_whole_one_is_used_and_nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*library.SOURCES, *library.HEADERS):
        shutil.copy(library.FOLDER / name, tmp_path)
    path = compiled(tmp_path)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "COMPILERS", ())
    packaged.problem.cache_clear()
    assert library.path_of_library() == path and library.problem() is None
    text = path.read_bytes()
    path.write_bytes(text[:4000] + bytes([text[4000] ^ 16]) + text[4001:])
    packaged.problem.cache_clear()
    with pytest.raises(EnvironmentLacksError, match=r"kernels\.so is damaged: .*; so cpu.path fused needs a C comp"):
        library.path_of_library()
    assert "is damaged" in (library.problem() or "")
    packaged.problem.cache_clear()


def test_windows_takes_the_packaged_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sys, "platform", "win32")
    with pytest.raises(EnvironmentLacksError, match=r"carries no compiled .* on Windows cpu.path fused needs a wheel"):
        library.path_of_library()


@pytest.mark.kernels
def test_the_package_s_library_and_the_cache_s_serve_in_one_process(tmp_path: Path) -> None:
    """Two files of the same sources: sessions of both, called side by side, each as if it were alone."""
    other = shutil.copy(native.folder() / library.NAME, tmp_path / "other.so")
    model = native.chain_model([native.In.X], [native.Out.CODES, native.Out.SCALE], **native.quantizer("E2M3"))
    sessions = []
    for path in (native.folder() / library.NAME, Path(other)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(path))
        data = ir.to_proto(model).SerializeToString()
        sessions.append(onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]))
    rows = np.random.default_rng(0).standard_normal((8, 33, 130)).astype(np.float32)
    expected = [sessions[0].run(None, {"X": x}) for x in rows]
    calls = [(session, x) for x in rows for session in sessions]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda call: call[0].run(None, {"X": call[1]}), calls))
    for i, answer in enumerate(answers):
        for result, first in zip(answer, expected[i // 2], strict=True):
            np.testing.assert_array_equal(result, first)


def test_one_that_is_refused_is_made_anew_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update that has changed the sources alone."""
    for name in (*library.SOURCES, *library.HEADERS):
        shutil.copy(library.FOLDER / name, tmp_path)
    packaged.add(tmp_path, "of another release", lambda path: path.write_text("old"))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "compiler", lambda: "/bin/true")
    monkeypatch.setattr(library, "build", lambda path, *_: path.write_text("new"))
    path = library.path_of_library()
    assert path.is_relative_to(tmp_path / "cache" / "native") and path.read_text() == "new"


def test_doctor_says_where_the_library_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[bool, str]:
        [check] = [check for check in CpuBackend().checks() if check.name == "kernel library"]
        return check.ok, check.found

    monkeypatch.setattr(packaged, "problem", lambda folder, version: None)
    assert found() == (True, f"{library.version()}, in this installation")
    monkeypatch.setattr(packaged, "problem", lambda folder, version: packaged.ABSENT)
    monkeypatch.setattr(library.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert found() == (True, "compiled at first use by /usr/bin/cc")
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert found() == (False, "none")
