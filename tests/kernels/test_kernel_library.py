"""The kernel library in the user's cache: made once, trusted only where nobody else could have written it; and bundles,
which never bring code of their own."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.documents import sha256
from export.errors import ContractError, EnvironmentLacksError
from pipeline import load, machine
from pipeline.backends import BACKENDS
from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.bundle.contents import OLD_LIBRARY, OTHER_FILES, is_made_by_build
from pipeline.recipe import Recipe
from plugins.cpu import library
from tests.support import native
from tests.support.bundles import make_bundle

pytestmark = pytest.mark.kernels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's cache; the folder of this machine's libraries in it."""
    monkeypatch.delenv("DITC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_UNCACHED", {})
    return library.library_folder()


@pytest.fixture
def builds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Compiling, replaced by a note of where to: a file with the sources' version."""

    def build(path: Path, *_: Any, **__: Any) -> None:
        paths.append(path)
        path.write_text(library.version())

    paths: list[Path] = []
    monkeypatch.setattr(library, "build", build)
    monkeypatch.setattr(library, "compiler", lambda: "/bin/true")
    return paths


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise EnvironmentLacksError("cpu.path=fused needs one of cc, gcc, clang")

    monkeypatch.setattr(library, "compiler", refuse)


# --- version -------------------------------------------------------------------------------------------------------


def test_the_version_follows_the_code_and_not_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*library.SOURCES, *library.HEADERS):
        (tmp_path / name).write_text((library.FOLDER / name).read_text())

    def version() -> str:
        library.version.cache_clear()
        return library.version()

    known = version()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    text = (tmp_path / "epilogue.h").read_text()
    (tmp_path / "epilogue.h").write_text("/* another comment */\n\n" + text)
    assert version() == known
    (tmp_path / "epilogue.h").write_text(text.replace("0.0713548163f", "0.08f"))
    assert version() != known
    (tmp_path / "epilogue.h").write_text(text)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-ffast-math"))
    assert version() != known
    monkeypatch.undo()
    assert version() == known and library.requirement() == f"kernel_library_{known}"


def test_all_files_that_are_compiled_are_in_the_version() -> None:
    included = {line.split('"')[1] for name in library.SOURCES for line in _includes(name)}
    included |= {line.split('"')[1] for name in included for line in _includes(name)}
    assert included == set(library.HEADERS)
    assert not any('"' in line and "/*" in line.split('"')[1::2] for name in library.SOURCES for line in _lines(name))


def _lines(name: str) -> list[str]:
    return (library.FOLDER / name).read_text().splitlines()


def _includes(name: str) -> list[str]:
    return [line for line in _lines(name) if line.startswith('#include "')]


# --- cache ---------------------------------------------------------------------------------------------------------


def test_it_is_made_once_whole_and_for_the_user_alone(builds: list[Path], cache: Path, tmp_path: Path) -> None:
    path = library.path_of_library()
    assert path.parent == cache and cache.is_relative_to(tmp_path / "cache" / "ditc" / "native")
    assert library.path_of_library() == path and len(builds) == 1
    assert builds[0] != path, "written apart, then renamed"
    assert set(cache.iterdir()) == {path, path.with_suffix(".json")}
    assert cache.stat().st_mode & 0o777 == 0o700 and not path.stat().st_mode & 0o022


def test_compilers_sources_and_systems_have_their_own(
    builds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {library.path_of_library()}
    monkeypatch.setattr(library, "compiler_key", lambda path: "another")
    paths.add(library.path_of_library())
    monkeypatch.setattr(library, "version", lambda: "newer")
    paths.add(library.path_of_library())
    monkeypatch.setattr(library.platform, "machine", lambda: "riscv64")
    paths.add(library.path_of_library())
    monkeypatch.setattr(library.platform, "libc_ver", lambda: ("glibc", "9.99"))
    paths.add(library.path_of_library())
    assert len(paths) == len(builds) == 5 and all(path.is_file() for path in paths)


def group_writable(path: Path) -> None:
    path.chmod(0o720)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def open_above(path: Path) -> None:
    path.parent.parent.chmod(0o777)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (group_writable, "can be written by others"),
        (open_folder, "can be written by others"),
        (open_above, "native, which can be written by others"),
        (link, "is neither a file nor a folder"),
    ],
)
def test_what_others_may_have_written_is_not_loaded(
    spoil: Callable[[Path], None],
    words: str,
    builds: list[Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = library.path_of_library()
    path.write_text("planted")
    spoil(path)
    assert library.path_of_library().read_text() == library.version(), "made anew"
    assert words in caplog.text
    path.write_text("planted")
    spoil(path) if spoil is not link else None
    without_compiler(monkeypatch)
    if spoil is not link:  # the link was replaced by a good file above
        with pytest.raises(EnvironmentLacksError, match="holds none"):
            library.path_of_library()


def test_every_changed_byte_is_made_anew(
    builds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.path_of_library()
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))] + [whole[:-1], b""]
    for data in damaged:
        path.write_bytes(data)
        caplog.clear()
        assert library.path_of_library() == path and path.read_bytes() == whole
        assert f"{path} is damaged: its sha256 is" in caplog.text and "a C compiler makes it anew" in caplog.text
    assert len(builds) == 1 + len(damaged)
    path.write_bytes(damaged[0])
    without_compiler(monkeypatch)
    with pytest.raises(EnvironmentLacksError, match="holds none"):
        library.path_of_library()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "is missing"),
        ("", "is not valid JSON"),
        ('{"version": "0123456789abcdef", "sha256": "00"}', "is of version 0123456789abcdef"),
    ],
)
def test_without_a_true_record_it_is_made_anew(
    record: str | None, words: str, builds: list[Path], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.path_of_library()
    path.with_suffix(".json").unlink()
    if record is not None:
        path.with_suffix(".json").write_text(record)
    assert library.path_of_library() == path and len(builds) == 2 and words in caplog.text
    assert library.path_of_library() == path and len(builds) == 2, "with a record again"


def test_one_that_did_not_load_is_made_anew_and_auto_is_fused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what is left where a disk ran full."""
    native.need_compiler()
    compiled = native.folder() / library.NAME
    monkeypatch.setattr(library, "build", lambda path, *_: shutil.copy(compiled, path))
    path = library.path_of_library()
    path.write_bytes(path.read_bytes()[:1000])
    assert library.problem() is None
    recipe = Recipe(name="test", model="none")
    assert CpuBackend().options(CpuBackend().settled(recipe)).path == "fused"


def test_of_another_user(builds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.path_of_library()
    owner = os.getuid()
    monkeypatch.setattr(library.os, "getuid", lambda: owner + 1)
    assert f"belongs to user {owner}" in library.refusal(path)
    assert not library.trusted(path)


def test_a_cache_that_cannot_be_written_costs_time_only(
    builds: list[Path], cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    path = library.path_of_library()
    assert path.read_text() == library.version() and "cannot be kept" in caplog.text
    assert library.path_of_library() == path and len(builds) == 1, "once for each process"


def test_a_compiler_that_does_not_run_is_told_and_auto_is_stock(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "cc"
    fake.write_bytes(b"\x00 no program")
    fake.chmod(0o755)
    monkeypatch.setattr(library, "compiler", lambda: str(fake))
    assert "does not run" in (library.problem() or "")
    with pytest.raises(EnvironmentLacksError, match="does not run"):
        library.build(tmp_path / library.NAME)
    recipe = Recipe(name="test", model="none")
    assert CpuBackend().options(CpuBackend().settled(recipe)).path == "stock"


def test_a_library_that_does_not_load_makes_auto_stock(builds: list[Path], cache: Path) -> None:
    """As where code may not run from the cache's file system, or the compiler makes no library: it would make the same
    again, so it is not asked."""
    assert "does not load here" in (library.problem() or "")
    assert "does not load here" in (library.problem() or "") and len(builds) == 1
    recipe = Recipe(name="test", model="none")
    assert CpuBackend().options(CpuBackend().settled(recipe)).path == "stock"


def test_where_nothing_can_be_kept_is_told(
    builds: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(library, "_UNCACHED", {})
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path / "absent"))
    assert "can be kept nowhere" in (library.problem() or "")


def test_without_a_compiler_the_cached_one_serves(
    builds: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library.path_of_library()
    without_compiler(monkeypatch)
    assert library.path_of_library() == path
    path.unlink()
    with pytest.raises(EnvironmentLacksError, match=r"holds none; install a C compiler .*cpu.path=stock") as caught:
        library.path_of_library()
    assert str(cache) in str(caught.value) and caught.value.exit_code == 3


def test_a_library_that_does_not_load(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    cache.mkdir(parents=True)
    (cache / "broken.so").write_text("no library")
    monkeypatch.setattr(library, "path_of_library", lambda: cache / "broken.so")
    with pytest.raises(EnvironmentLacksError, match=r"broken.so does not load here .*remove it"):
        library.register(ort.SessionOptions())


def test_the_true_library_is_made_and_loads(cache: Path) -> None:
    native.need_compiler()
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    library.register(ort.SessionOptions())
    (path,) = cache.glob("*.so")
    assert hasattr(ctypes.CDLL(str(path)), "RegisterCustomOps")


# --- bundles hold no code ------------------------------------------------------------------------------------------

PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void planted(void) { FILE *f = fopen("%s", "w"); if (f) fclose(f); }
void *RegisterCustomOps(void *options, void *base) { planted(); return 0; }
"""


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A library that writes a marker file when it is loaded, and the marker's place; it is shown to work."""
    native.need_compiler()
    source, path, marker = tmp_path / "planted.c", tmp_path / "planted.so", tmp_path / "it_ran"
    source.write_text(PLANTED % marker)
    subprocess.run([library.compiler(), "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    ctypes.CDLL(str(path))
    assert marker.exists()
    marker.unlink()
    return path, marker


def reseal(folder: Path) -> None:
    """Make the manifest true of the files again, as whoever planted something would."""
    document = json.loads((folder / "manifest.json").read_text())
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    del paths["manifest.json"]
    document["files"] = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    (folder / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("verb", ["load", "verify", "bench", "generate", "inspect"])
def test_a_planted_library_never_runs(verb: str, planted: tuple[Path, Path], tmp_path: Path) -> None:
    from pipeline.__main__ import main

    path, marker = planted
    folder = make_bundle(tmp_path / "small")
    (folder / "cpu" / OLD_LIBRARY).write_bytes(path.read_bytes())
    reseal(folder)
    if verb == "load":
        with pytest.raises(ContractError, match=r"cpu/fpq_native.so is compiled code, .*; build the bundle again"):
            load(folder)
    else:
        assert main([verb, str(folder), *(["--prompt", "a red circle"] if verb == "generate" else [])]) == 2
    assert not marker.exists()


@pytest.mark.torch
def test_the_session_helpers_do_not_look_beside_the_graph(planted: tuple[Path, Path], tmp_path: Path) -> None:
    """Where a library lies beside a graph nevertheless: in an engine's folder, or beside a lowered graph."""
    import onnx_ir as ir

    from pipeline.backends.cpu import CpuBackend
    from pipeline.backends.cpu.engine import CpuEngine
    from pipeline.recipe import Recipe
    from pipeline.verify.probe import ProbedGraph
    from tests.support.portable import activations, portable, random_linear

    path, marker = planted
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [random_linear("a")])
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    for name in ("work", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / OLD_LIBRARY).write_bytes(path.read_bytes())
    recipe = Recipe("test", "none")
    lowered = CpuBackend().lower(tmp_path / "model.onnx", tmp_path / "work", recipe)
    CpuBackend().build(lowered, tmp_path / "cpu", recipe)
    import numpy as np

    feeds = {"x": activations(np.random.default_rng(0))[:, 3:]}
    CpuEngine(tmp_path / "cpu").run(feeds)
    ProbedGraph(lowered).denoiser()(feeds)
    ProbedGraph(lowered).cut(["y"], {})(feeds)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["cpu/plugin.dll", "cpu/libextra.so.1", "extra.py", "cpu/__init__.py", "report/run.sh", "report/images/x.svg",
     "conftest.py", ".hidden", "rtx/model.engine", "cpu/sub/model.onnx", "weights.pkl", "report/images/../x.png"],
)  # fmt: skip
def test_files_that_no_build_makes_are_refused(name: str, tmp_path: Path) -> None:
    assert not is_made_by_build(name, {"cpu": {}})
    if ".." in name:
        return
    folder = make_bundle(tmp_path / "small")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    reseal(folder)
    with pytest.raises(ContractError, match="is not a file that build makes; do not use this bundle"):
        load(folder)


def test_what_builds_make_is_known() -> None:
    targets = {name: {} for name in BACKENDS}
    for name in (
        "model.onnx", "model.onnx.data", "config.json", "recipe.toml", "generation.json", "token_embedding.safetensors",
        "bench.json", "report/index.html", "report/parity.json", "report/layers.csv", "report/images/cpu-0.png",
        "report/images/cpu-difference-3.png", "cpu/condition.onnx", "cuda/condition.onnx", "rtx/model.engine",
    ):  # fmt: skip
        assert is_made_by_build(name, targets), name
    assert OTHER_FILES.fullmatch("report/images/quantization-0.png")


# --- auto ----------------------------------------------------------------------------------------------------------


def test_auto_is_fused_where_a_library_can_be_had(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.need_compiler()
    recipe = Recipe(name="test", model="none")
    assert CpuBackend().options(recipe).path == "auto"
    assert CpuBackend().options(CpuBackend().settled(recipe)).path == "fused"
    named = recipe.with_options(CpuOptions("stock"))
    assert CpuBackend().settled(named) == named


def test_auto_is_stock_where_none_can_be_had_and_the_log_says_why(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiler(monkeypatch)
    recipe = Recipe(name="test", model="none")
    with caplog.at_level("INFO"):
        assert CpuBackend().options(CpuBackend().settled(recipe)).path == "stock"
    assert "cpu.path is stock here" in caplog.text and "install a C compiler" in caplog.text
    assert CpuBackend().problems(recipe) == []
    (problem,) = CpuBackend().problems(recipe.with_options(CpuOptions("fused")))
    assert "holds none" in problem


def test_an_engine_with_the_library_does_not_fit_where_none_can_be_had(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bundle then runs its portable model, which needs onnxruntime alone."""
    without_compiler(monkeypatch)
    tools = {"onnxruntime": machine.tool_version("onnxruntime")}
    manifest = {"tools": tools, "targets": {"cpu": {"metadata": {"requires": [library.requirement()]}}}}
    problem = CpuBackend().fitness_problem(manifest, tmp_path)
    assert problem is not None and "holds none" in problem
