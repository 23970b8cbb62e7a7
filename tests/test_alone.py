"""The run-time part stands alone: what runs a bundle does so without the compiler's packages, here and from a wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.errors import EnvironmentLacksError
from pipeline import compiler, load, machine
from pipeline.build import main as build
from pipeline.generate.__main__ import main as generate
from plugins.cpu import library, packaged
from tests.support import absent, hostile, native
from tests.support.requirements import closure

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # a bundle is built, and every verb is a process of its own
DRAW = ("--prompt", "7", "--n-steps", "2", "--scale", "1", "--threads", "1")
# The picture that DRAW asks for, by the module for users.
DRAW_IN_PYTHON = """
import sys
from ditc import Pipeline
with Pipeline.load(sys.argv[1], threads=1) as pipeline:
    pipeline("7", num_inference_steps=2).images[0].save("python.png")
"""
# What `load` is asked for: prints the sum of each target's output as the bytes that it is.
HIDE = "from tests.support.absent import hide\nhide()\n"
RUN = """
import sys
import numpy as np
from pipeline import load
bundle = load(sys.argv[1], threads=1)
with np.load(sys.argv[2]) as stored:
    inputs = dict(stored)
for target in sys.argv[3:]:
    engine = bundle.engine(target)
    print(target, engine.run(inputs)["sample"].tobytes().hex())
    engine.close()
"""


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundle/: of a DiT that draws digits, for `cpu` with the kernel library, `cuda` and `onnx`.

    Its gates and its measurement are left out.
    """
    folder = tmp_path_factory.mktemp("alone")
    hostile.make_models(folder)
    recipe = folder / "recipe.toml"
    path = "stock" if library.problem() else "fused"
    text = hostile.RECIPE.format(model=folder / "model").replace('path = "stock"', f'path = "{path}"')
    recipe.write_text(text)
    flags = ["--engine", str(recipe)]
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("verified", "benched"):
            patch.setattr(compiler, stage, lambda *_: None)
        assert build([*flags, "--target", "cpu,cuda", "-o", str(folder / "bundle")]) == 0
    return folder


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "hidden_states": rng.standard_normal((2, 1, 8, 8)).astype(np.float32),
        "timestep": np.array([999, 17], np.float32),
        "class_labels": np.array([3, 10], np.int64),
    }


def python(*args: object, cwd: Path = ROOT, executable: str = sys.executable, **environment: str) -> Any:
    """A fresh interpreter's exit code and answers."""
    command = [executable, *map(str, args)]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=300)


def without_compiler(*args: object) -> Any:
    """A verb, where the compiler's packages are nowhere."""
    return python("-m", "tests.support.absent", *args)


# --- packages hidden -----------------------------------------------------------------------------------------------


def test_what_is_hidden_is_nowhere() -> None:
    code = """
from importlib import metadata
from importlib.util import find_spec
from tests.support.absent import HIDDEN, hide
metadata.version("torch"), metadata.version("onnx-ir"), metadata.version("numpy")
hide()
assert find_spec("torch") is None and find_spec("onnx_ir.passes".partition(".")[0]) is None and find_spec("numpy")
metadata.version("numpy")
for name in ("torch", "onnx-ir"):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
    raise SystemExit(f"{name} is still there")
import torch
"""
    done = python("-c", code)
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'torch'" in done.stderr, done.stderr
    assert set(machine.COMPILER) <= absent.HIDDEN


def test_doctor_and_list() -> None:
    done = without_compiler("doctor")
    assert done.returncode == 0, done.stderr + done.stdout
    verdict = "bundles can run\nnothing can be built: the compiler is not installed, pip install 'ditc[build]'\n"
    assert done.stdout.endswith(verdict) and "MISSING" not in done.stdout
    done = without_compiler("doctor", "--json")
    answer = json.loads(done.stdout)
    assert answer["runs"] and not answer["ok"]
    assert {row["remedy"] for row in answer["checks"] if row["name"] in machine.COMPILER} == {
        "pip install 'ditc[build]'"
    }
    done = without_compiler("list")
    assert done.returncode == 0 and "pixart_w4a6" in done.stdout and "zoo:pixart_mini" in done.stdout, done.stderr


def test_inspect(work_folder: Path) -> None:
    done = without_compiler("inspect", work_folder / "bundle")
    assert done.returncode == 0 and "transformer_blocks.1.ff.net.2" in done.stdout, done.stderr


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_generate_draws_the_picture_that_the_compiler_s_machine_draws(
    target: str, work_folder: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "alone.png", tmp_path / "here.png"]
    flags = [str(work_folder / "bundle"), *DRAW, "--target", target, "-o"]
    done = without_compiler("generate", *flags, files[0])
    assert done.returncode == 0, done.stderr
    assert generate([*flags, str(files[1])]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_load_and_run(work_folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **inputs())
    targets = ("cpu", "onnx", "auto")
    done = python("-c", HIDE + RUN, work_folder / "bundle", tmp_path / "inputs.npz", *targets)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split() for line in done.stdout.splitlines())
    bundle = load(work_folder / "bundle", threads=1)
    for target in targets:
        assert rows[target] == bundle.engine(target).run(inputs())["sample"].tobytes().hex()
    assert rows["auto"] == rows["cpu"]


@pytest.mark.parametrize(
    "verb",
    [
        ("build", "--engine", "pixart_w4a6"),
        ("build", "--engine", "pixart_w4a6", "--target", "cpu"),
        ("calibrate", "--engine", "pixart_w4a6", "-o", "CHECKPOINT_2"),
        ("export", "CHECKPOINT", "-o", "EXPORT"),
        ("verify", "BUNDLE"),
        ("bench", "BUNDLE", "-m", "zoo:dit_mini"),
        ("inspect", "--engine", "pixart_w4a6"),
    ],
    ids=" ".join,
)
def test_verbs_of_the_compiler_say_what_to_install(verb: tuple[str, ...], work_folder: Path) -> None:
    done = without_compiler(*(work_folder / word.lower() if word.isupper() else word for word in verb))
    assert done.returncode == EnvironmentLacksError.exit_code, done.stdout + done.stderr
    sentence = hostile.sentence(done.stderr)
    assert re.search(r"needs torch, diffusers, .*; install with: pip install 'ditc\[build\]'$", sentence), sentence


def test_bench_measures_the_engines_alone(work_folder: Path) -> None:
    done = without_compiler("bench", work_folder / "bundle", "--target", "cpu,cuda,onnx", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "the engines are measured alone: comparing with the float model needs torch, diffusers" in done.stderr
    document = json.loads(done.stdout)
    assert document["contestants"].keys() == document["ratios"].keys() == {"cpu", "onnx"}
    assert all(row["call_ms"]["median"] > 0 and row["peak_rss_bytes"] for row in document["contestants"].values())


def test_a_stand_in_for_diffusers_says_what_to_install(work_folder: Path) -> None:
    code = f"{HIDE}import sys\nfrom pipeline import load\nload(sys.argv[1]).as_diffusers()"
    done = python("-c", code, work_folder / "bundle")
    assert (
        "EnvironmentLacksError: standing in for a diffusers transformer needs torch, diffusers; install" in done.stderr
    )


# --- a wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of an environment that has a wheel of this tree and links to what the wheel says it needs: no more."""
    folder = tmp_path_factory.mktemp("wheel")
    make_wheel(folder)
    venv.create(folder / "venv", symlinks=os.name != "nt", with_pip=False)
    executable = folder / "venv/bin/python"
    done = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=str(executable))
    place = Path(done.stdout.strip())
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    [own] = metadata.distributions(name="ditc", path=[str(place)])
    for row in closure(own.requires or ()).values():
        for part in {file.parts[0] for file in row.files or () if file.parts[0] != ".."}:
            if not (place / part).exists():  # of namespaces that several share, the first brings all
                (place / part).symlink_to(Path(str(row.locate_file(part))).absolute())
    return str(executable)


def copy_tree(tree: Path) -> None:
    """What git tracks, without the tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("a wheel is built from the files that git tracks, and this tree is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())


def make_wheel(folder: Path, **environment: str) -> str:
    """A wheel of what git tracks, in a folder; what the build said."""
    copy_tree(folder / "tree")
    # What `pip wheel --no-deps --no-build-isolation .` calls; an environment need not have pip. Like pip, without the
    # tree on the path (-P).
    call = "from setuptools import build_meta\nbuild_meta.build_wheel('..')"
    done = python("-P", "-c", call, cwd=folder / "tree", **environment)
    assert done.returncode == 0, done.stderr
    return str(done.stdout + done.stderr)


def test_a_wheel_works_away_from_the_tree(installed: str, work_folder: Path, tmp_path: Path) -> None:
    cache = {"DITC_CACHE": str(tmp_path / "cache")}

    def run(*args: object) -> str:
        done = python(*args, cwd=tmp_path, executable=installed, **cache)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    assert run("-c", "import pipeline; print(pipeline.__file__)").startswith(str(Path(installed).parents[1]))
    assert "nothing can be built" in run("-m", "pipeline", "doctor")
    models = json.loads(run("-m", "pipeline.list", "--json"))["models"]
    assert models == ["zoo:dit_mini", "zoo:pixart_mini", "zoo:pixart_scenes"]
    np.savez(tmp_path / "inputs.npz", **inputs())
    rows = dict(
        line.split() for line in run("-c", RUN, work_folder / "bundle", "inputs.npz", "cpu", "onnx").splitlines()
    )
    bundle = load(work_folder / "bundle", threads=1)
    for target in ("cpu", "onnx"):
        assert rows[target] == bundle.engine(target).run(inputs())["sample"].tobytes().hex()
    run("-m", "pipeline.generate", work_folder / "bundle", *DRAW, "-o", "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    run("-c", DRAW_IN_PYTHON, work_folder / "bundle")
    assert np.array_equal(Image.open(tmp_path / "out.png"), Image.open(tmp_path / "python.png"))
    script = (
        "from importlib.metadata import entry_points as e\n[row] = e(group='console_scripts', name='ditc')\nrow.load()"
    )
    run("-c", script)


def test_a_wheel_made_without_a_compiler_is_for_any_platform(tmp_path: Path) -> None:
    said = make_wheel(tmp_path, PATH=str(tmp_path / "nowhere"))
    [path] = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl") and "this wheel carries no kernel library: " in said
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    assert "plugins/cpu/packaged.py" in names and not {f"plugins/cpu/{packaged.NAME}", packaged.RECORD} & set(names)


@pytest.fixture
def packaged_library(installed: str) -> Iterator[Path]:
    """The library that the wheel carries; what a test does to it is undone."""
    if problem := native.problem():
        pytest.skip(f"the wheel was built without a library: {problem}")
    [path] = Path(installed).parents[1].rglob(f"plugins/cpu/{packaged.NAME}")
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def test_the_wheel_s_library_serves_where_there_is_no_compiler(
    installed: str, packaged_library: Path, work_folder: Path, tmp_path: Path
) -> None:
    """Whole it is the engine's; damaged it is refused by name, and the library is compiled, or the portable model runs
    where nothing can be compiled."""
    np.savez(tmp_path / "inputs.npz", **inputs())
    bundle = load(work_folder / "bundle", threads=1)
    expected = {name: bundle.engine(name).run(inputs())["sample"].tobytes().hex() for name in ("cpu", "onnx")}

    def run(target: str, path: str) -> tuple[str, str, bool]:
        """(what the target answers, what is logged, whether a library was compiled)"""
        cache = tmp_path / f"cache-{target}-{len(list(tmp_path.iterdir()))}"
        answer = python(
            "-c", RUN, work_folder / "bundle", tmp_path / "inputs.npz", target, cwd=tmp_path, executable=installed,
            DITC_CACHE=str(cache), PATH=path,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout.split()[1], answer.stderr, (cache / "native").exists()

    nowhere, everywhere = str(tmp_path / "nowhere"), os.environ["PATH"]
    assert run("cpu", nowhere) == (expected["cpu"], "", False)
    assert run("cpu", everywhere) == (expected["cpu"], "", False)
    whole = packaged_library.read_bytes()
    packaged_library.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    refusal = f"{packaged_library} is damaged: its sha256 is"
    answer, said, compiled = run("cpu", everywhere)
    assert answer == expected["cpu"] and refusal in said and compiled
    answer, said, compiled = run("auto", nowhere)
    assert answer == expected["onnx"] and refusal in said and not compiled


def test_a_wheel_holds_every_file_of_its_folders(installed: str) -> None:
    """Zoo, recipes, C sources, style, captions: whatever git has in these folders is beside the code."""
    place = Path(installed).parents[1]
    [home] = {path.parent.parent for path in place.rglob("pipeline/__init__.py")}
    command = ["git", "ls-files", "export", "plugins", "pipeline"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(names) > 100
    assert not [name for name in names if (ROOT / name).is_file() and not (home / name).is_file()]
