"""What is verified is what is used: files swapped or written between the check and the load, or under a live engine."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.cache_folder import cache_folder
from export.errors import ContractError, ResourceError
from export.models.families import FAMILIES
from pipeline import load
from pipeline.backends import BACKENDS
from pipeline.backends.cpu.engine import CpuEngine
from pipeline.bundle import manifest, snapshot
from pipeline.bundle.bundle import Bundle
from tests.support.bundles import facts, make_bundle

ROWS, WIDTH = 4096, 64


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Private copies lie here, so that a test sees what is left of them."""
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose engine looks rows up in a table of 1 MiB: memory that onnxruntime maps and does not repack."""
    folder = make_bundle(tmp_path / "small")
    table = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    (folder / "cpu/model.onnx.data").write_bytes(table.tobytes())
    stored = TensorProto(
        name="table", data_type=TensorProto.FLOAT, dims=table.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", str(table.nbytes))):
        stored.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "rows"], ["sample"])],
        "g",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", WIDTH])],
        [stored],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "cpu/model.onnx"
    )
    (folder / "cpu/metadata.json").write_text('{"requires": []}')
    (folder / "manifest.json").unlink()
    manifest.write(manifest.compose(facts(folder), folder), folder)
    return folder


def every_row() -> dict[str, np.ndarray]:
    return {"rows": np.arange(ROWS)}


def zero(path: Path) -> None:
    """Overwrite in place."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


@pytest.mark.parametrize("seen_before", [False, True])
def test_a_file_written_under_a_live_engine_cannot_matter(folder: Path, seen_before: bool) -> None:
    """Also numbers that the engine has not looked at before the change."""
    expected = np.fromfile(folder / "cpu/model.onnx.data", np.float32).reshape(ROWS, WIDTH)
    engine = load(folder).engine("cpu")
    if seen_before:
        engine.run(every_row())
    for name in ("model.onnx.data", "model.onnx"):
        zero(folder / "cpu" / name)
    assert np.array_equal(engine.run(every_row())["sample"], expected)
    engine.close()


def test_without_the_copy_it_would_matter(folder: Path) -> None:
    """The test above tests something: an engine on the files themselves sees the change."""
    engine = CpuEngine(folder / "cpu")
    zero(folder / "cpu/model.onnx.data")
    if engine.run(every_row())["sample"].any():
        pytest.skip("this onnxruntime reads weights into memory of its own")


def swap(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.replace(other, path)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = {
    swap: r"differs from the manifest \(sha256\)",
    zero: r"differs from the manifest \(sha256\)",
    shorten: r"has \d+ bytes, the manifest says",
    lengthen: r"has more bytes, the manifest says",
    link: "cannot be read as a plain file",
    pipe: "is not a plain file",
    Path.unlink: "cannot be read as a plain file",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_changed_after_the_check_is_noticed(change, folder: Path, place: Path) -> None:  # type: ignore[no-untyped-def]
    bundle = load(folder)
    change(folder / "cpu/model.onnx.data")
    with pytest.raises(ContractError, match=rf"model\.onnx\.data {CHANGES[change]}"):
        bundle.engine("cpu")
    change(folder / "config.json")
    with pytest.raises(ContractError, match=r"config\.json"):
        bundle.config()
    assert list(place.iterdir()) == [], "nothing is left behind"


def test_errors_name_the_bundle_s_file_and_not_the_copy_that_is_gone(folder: Path) -> None:
    (folder / "cpu/metadata.json").write_text('{"requires": 3}')
    (folder / "config.json").write_text('{"sample_size": 0}')
    (folder / "manifest.json").unlink()
    manifest.write(manifest.compose(facts(folder), folder), folder)
    for use, name in ((Bundle.config, "config.json"), (Bundle.engine, "cpu/metadata.json")):
        with pytest.raises(ContractError) as caught:
            use(load(folder))
        assert str(caught.value).startswith(f"{folder / name}: ")


@pytest.mark.torch
def test_the_size_that_a_drop_in_draws_comes_from_the_verified_file(folder: Path) -> None:
    """Pixel models have cells of one pixel, latent ones of eight: generation.json says which."""
    from pipeline.generate.diffusers_adapter import DrawnSize

    (folder / "generation.json").write_text('{"output": "pixels"}')
    (folder / "manifest.json").unlink()
    manifest.write(manifest.compose(facts(folder), folder), folder)
    bundle, config = load(folder), {"sample_size": 32, "in_channels": 4}
    assert DrawnSize.of_bundle(bundle, FAMILIES["pixart"], config).pixels == (32, 32)
    (folder / "generation.json").write_text('{"output": "latent"}')
    with pytest.raises(ContractError, match=r"generation\.json differs from the manifest"):
        DrawnSize.of_bundle(bundle, FAMILIES["pixart"], config)


def test_a_file_swapped_while_the_engine_loads_cannot_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last moment: when the backend is handed the folder."""
    expected = np.fromfile(folder / "cpu/model.onnx.data", np.float32).reshape(ROWS, WIDTH)
    original = BACKENDS["cpu"].load

    def swapped(private: Path, threads: int) -> object:
        assert private != folder and private.stat().st_mode & 0o777 == 0o700
        for name in ("model.onnx.data", "metadata.json"):
            zero(folder / "cpu" / name)
        return original(private, threads)

    monkeypatch.setattr(BACKENDS["cpu"], "load", swapped)
    assert np.array_equal(load(folder).engine("cpu").run(every_row())["sample"], expected)


def test_nothing_is_left_behind(folder: Path, place: Path) -> None:
    engine = load(folder).engine("cpu")
    assert list(place.iterdir()) == []
    engine.run(every_row())
    engine.close()


def test_only_what_a_target_needs_is_copied(folder: Path) -> None:
    with load(folder).copied(lambda name: name.startswith("cpu/")) as private:
        names = {path.relative_to(private.path).as_posix() for path in private.path.rglob("*") if path.is_file()}
        assert names == {"cpu/model.onnx", "cpu/model.onnx.data", "cpu/metadata.json"}
        for name in names:
            digest = hashlib.sha256((private.path / name).read_bytes()).hexdigest()
            assert digest == private.manifest["files"][name]["sha256"]


def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "file"))
    assert snapshot._place() is None and cache_folder() == tmp_path / "file"
    load(folder).engine("cpu").close()


def test_a_full_disk_is_told_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.command import judge

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "read_verified", full)
    with pytest.raises(OSError) as caught:
        load(folder).engine("cpu")
    assert judge(caught.value)[0] == 5


def test_a_disk_without_room_is_said_before_anything_is_copied(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    sizes = r"a private copy of 1\.\d MB is made to load it, 0\.0 MB are free"
    with pytest.raises(ResourceError, match=rf"{sizes} at .*; free some space, or set DITC_CACHE"):
        load(folder).engine("cpu")
    assert not list(place.iterdir())
