"""The native library: compiling, its binary interface, and engines of `cpu.path=fused` from build to load."""

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import ContractError, EnvironmentLacksError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.backends.cpu.engine import MODEL, CpuEngine, CpuMetadata, open_session
from pipeline.recipe import Recipe
from pipeline.verify.oracle import activation_oracle, check_linear
from pipeline.verify.probe import ProbedGraph
from plugins.cpu import library, rounding_errors
from tests.support import native
from tests.support.learned import with_scaling
from tests.support.portable import activations, portable, random_linear

pytestmark = pytest.mark.kernels

RECIPE = Recipe(name="test", model="zoo:pixart_mini").with_options(CpuOptions(path="fused"))
CROSS = """
  k = fpq.QuantizedLinear <layer="a"> (text)
  h = fpq.QuantizedLinear <layer="b"> (hidden_states)
  y = Add(k, h)
"""
LAYERS = [random_linear("a"), random_linear("b", granularity="exact_group", group=16, seed=1)]
INPUTS = "float[B,S,64] hidden_states, float[B,S,64] text"

HEADERS = ("ort_abi.h", "token_chain.h", "variants.h")


@pytest.fixture
def source(tmp_path):
    """Folder of a bundle with the portable model; the first linear reads the condition alone."""
    native.need_compiler()
    folder = tmp_path / "bundle"
    folder.mkdir()
    ir.save(portable(CROSS, LAYERS, INPUTS), folder / "model.onnx", external_data="model.onnx.data")
    return folder


def built(folder, name="cpu", recipe=RECIPE):
    backend = CpuBackend()
    work = folder.parent / f"work-{name}"
    for path in (work, folder / name):
        path.mkdir()
    return backend.build(backend.lower(folder / "model.onnx", work, recipe), folder / name, recipe)


def feeds(seed=0):
    rng = np.random.default_rng(seed)
    return {name: activations(rng, tokens=9)[:, 3:] for name in ("hidden_states", "text")}


def test_the_same_compiler_gives_the_same_bytes(tmp_path):
    native.need_compiler()
    library.build(tmp_path / "first.so")
    library.build(tmp_path / "second.so")
    first = (tmp_path / "first.so").read_bytes()
    assert first == (tmp_path / "second.so").read_bytes()
    assert str(tmp_path).encode() not in first and str(library.FOLDER).encode() not in first


def test_the_sources_are_part_of_the_code_version_and_of_the_package():
    assert {".c", ".h", ".py"} == set(machine.SOURCES)
    assert all((library.FOLDER / name).is_file() for name in (*library.SOURCES, *rounding_errors.SOURCES, *HEADERS))


def test_every_declared_function_of_onnxruntime_is_called():
    """A wrong place in the table would crash or fail the numeric tests, as long as something uses it."""
    header = (library.FOLDER / "ort_abi.h").read_text()
    code = "".join((library.FOLDER / name).read_text() for name in (*library.SOURCES, "ort_op.h"))
    declared = re.findall(r"^  F\((\w+), (\d+),", header, re.MULTILINE)
    places = [int(place) for _, place in declared]
    assert len(declared) > 10 and places == sorted(set(places))
    assert all(f"CALL(api, {name})" in code for name, _ in declared if name != "create_status")
    assert places[-1] < int(re.search(r"slot\[(\d+)\]", header).group(1))


def test_sessions_may_come_and_go():
    for _ in range(3):
        sessions = [native.session(native.chain_model([native.In.X], [native.Out.Y], activation=1)) for _ in range(2)]
        for session in sessions:
            assert session.run(None, {"X": np.ones((1, 3), np.float32)})[0].shape == (1, 3)


def test_an_engine_gives_what_the_stock_engine_gives(source):
    result, stock = built(source), built(source, "stock", RECIPE.with_options(CpuOptions("stock")))
    for build in (result, stock):
        names = {file.split("/")[1] for file in build.files}  # data only; the model here has no timestep
        assert names == CpuBackend.file_names - {"timestep.onnx"}
    engines = [CpuEngine(source / name) for name in ("cpu", "stock")]
    y, expected = (engine.run(feeds())["y"] for engine in engines)
    np.testing.assert_array_equal(y, expected)  # no norm, no GELU: the same roundings
    for engine in engines:
        engine.close()


def test_building_again_gives_the_same_bytes(source):
    first, _ = built(source), built(source, "again")
    for file in first.files:
        name = file.split("/")[1]
        assert (source / "cpu" / name).read_bytes() == (source / "again" / name).read_bytes(), name


def test_the_parity_gates_see_the_native_ops_and_hold(source):
    work = source.parent / "work"
    work.mkdir()
    lowered = CpuBackend().lower(source / "model.onnx", work, RECIPE)
    graph = ProbedGraph(lowered)
    assert {node.domain for node in graph.model.graph.node} >= {"fpq.native"}
    assert graph.complete == {"a", "b"}
    checked = 0
    for name, probes in graph.probes(["a", "b"], [feeds(), feeds(1)]):
        layer = next(layer for layer in LAYERS if layer.name == name)
        for probe in probes:
            parity = check_linear(layer, probe, activation_oracle(probe.x, layer))
            assert parity.gemm_max_abs_diff == 0 and parity.codes_inadmissible == 0 and parity.nonfinite == 0
            assert parity.scale_error <= 1 and parity.output_error <= 1
            checked += parity.codes
    assert checked > 1000
    assert all("native" in choice.why for choice in lowered.choices)


def test_it_is_loaded_only_where_it_runs(source, monkeypatch):
    result = built(source)
    assert result.metadata == {"requires": [library.requirement()]}
    CpuBackend().load(source).close()
    built_with = library.version()
    monkeypatch.setattr(library, "version", lambda: "0123456789abcdef")
    with pytest.raises(EnvironmentLacksError, match=rf"with version {built_with} .* has 0123456789abcdef; build"):
        CpuBackend().load(source)


def problem_of(document):
    return CpuBackend().fitness_problem(document, Path("manifest.json"))


def test_a_bundle_says_what_it_needs(monkeypatch):
    tools = {"onnxruntime": machine.tool_version("onnxruntime")}
    document = {"tools": tools, "targets": {"cpu": {"metadata": {"requires": ["kernel_library_aa"]}}}}
    assert f"version aa of the kernel library, this installation has {library.version()}" in problem_of(document)
    document["targets"]["cpu"]["metadata"] = {"requires": ["quantum_dots"]}
    assert "CPUs with quantum_dots, which this one lacks" in problem_of(document)


def test_a_graph_with_native_ops_is_refused_without_the_library(source):
    built(source)
    with pytest.raises(ContractError, match=r"onnxruntime refuses it .*TokenChain.*build it again"):
        open_session(source / "cpu" / MODEL)


def test_a_missing_compiler_is_found_before_work_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("DITC_CACHE", str(tmp_path))  # a library that lies there would do
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    (problem,) = CpuBackend().problems(RECIPE)
    assert "needs a C compiler" in problem and "apt install gcc" in problem and "cpu.path=stock" in problem
    assert CpuBackend().problems(Recipe(name="test", model="none")) == []


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    native.need_compiler()
    monkeypatch.setenv("DITC_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-include", "no/such/header.h"))
    (problem,) = CpuBackend().problems(RECIPE)
    assert "no/such/header.h" in problem and "apt install" in problem


def test_a_compiler_that_does_not_end_is_refused(monkeypatch, tmp_path):
    def wait(command, **_):
        raise subprocess.TimeoutExpired(command, library.TIMEOUT_S)

    monkeypatch.setattr(library.subprocess, "run", wait)
    monkeypatch.setattr(library.shutil, "which", lambda name: "/usr/bin/cc")
    for work in (partial(library.build, tmp_path / "a.so"), partial(library.compiler_key, "/usr/bin/cc")):
        with pytest.raises(EnvironmentLacksError, match="does not end within 120 s; install a C compiler"):
            work()
    assert rounding_errors.compiled.__wrapped__() is None, "scales are searched by NumPy"


def test_a_model_without_anything_to_fuse_has_stock_ops_and_needs_no_library(tmp_path, caplog):
    native.need_compiler()
    layer = with_scaling(random_linear(weight="E4M3"), "per_tensor")
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [layer])
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    work = tmp_path / "work"
    work.mkdir()
    lowered = CpuBackend().lower(tmp_path / "model.onnx", work, RECIPE)
    assert metadata_file.read(work, CpuMetadata) == {"requires": []}
    assert "fpq.native" not in {node.domain for node in ir.load(lowered.path).graph}


def test_damaged_metadata_is_refused(source):
    built(source)
    (source / "cpu" / "metadata.json").write_text(json.dumps({}))
    with pytest.raises(ContractError, match="'requires' is missing"):
        CpuBackend().load(source)


def test_no_two_functions_with_variants_have_one_name():
    """A linker takes one of two for both without a word, where compilers make them of weak parts."""
    texts = [library.code((library.FOLDER / name).read_text(encoding="utf-8")) for name in library.SOURCES]
    names = [name for text in texts for name in re.findall(r"VARIANTS \w+ \*?(\w+)\(", text)]
    assert "finish_rows" in names and len(names) == len(set(names))
