"""Building and running a `trt` engine against stand-ins for TensorRT and torch.cuda: what is asked of them, in order.

TensorRT itself is not at hand: this proves what the code asks for, not that TensorRT does it.
"""

from __future__ import annotations

import ctypes
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.errors import ContractError, RecipeError, ResourceError
from pipeline.backends.base import LoweredGraph
from pipeline.backends.tensorrt import build as tensorrt_build
from pipeline.backends.tensorrt import engine as tensorrt_engine
from pipeline.backends.tensorrt import plugin_payloads
from pipeline.backends.tensorrt.engine import Buffers
from pipeline.backends.tensorrt.plugin_graph import KernelNode
from pipeline.backends.trt import TrtBackend, TrtOptions
from pipeline.backends.trt import build as trt_build
from pipeline.backends.trt import engine as trt_engine
from pipeline.recipe import Recipe
from plugins.tensorrt import plugins
from tests.backends.trt.test_trt_backend import lowered  # noqa: F401, a fixture
from tests.kernels.test_trt_aot import payload_of
from tests.kernels.test_trt_plugins import TYPES, FrontEnd
from tests.support.fake_cuda import FakeCuda
from tests.support.hooked_sessions import Worker

STRONGLY_TYPED, AOT, TF32 = 1, 2, 7


class Builder:
    """TensorRT's builder, parser, runtime and inspector in one: an engine is the list of its layers' names."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.network_flags = 0
        self.cleared: list[int] = []
        self.profiles: list[dict[str, Any]] = []
        self.layers: list[str] = []
        self.config = SimpleNamespace(clear_flag=self.cleared.append, add_optimization_profile=self.profiles.append)
        self.error = ""

    def module(self, without: tuple[str, ...] = ()) -> Any:
        """The module tensorrt, of a release that lacks the flags `without`."""
        flags = {"STRONGLY_TYPED": STRONGLY_TYPED, "PREFER_AOT_PYTHON_PLUGINS": AOT}
        logger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, WARNING=2)})
        return SimpleNamespace(
            **vars(TYPES),
            __name__="tensorrt",
            __version__="11.1.0",
            ILogger=logger,
            Builder=lambda log: self,
            OnnxParser=lambda network, log: SimpleNamespace(
                parse_from_file=self.parse, num_errors=1, get_error=self.why
            ),
            NetworkDefinitionCreationFlag=SimpleNamespace(**{k: v for k, v in flags.items() if k not in without}),
            BuilderFlag=SimpleNamespace(**({} if "TF32" in without else {"TF32": TF32})),
            ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=self.deserialize),
        )

    def create_network(self, flags: int) -> Any:
        self.network_flags = flags
        return SimpleNamespace()

    def create_builder_config(self) -> Any:
        return self.config

    def create_optimization_profile(self) -> Any:
        ranges: dict[str, Any] = {}
        return type("Profile", (dict,), {"set_shape": lambda self, name, *shapes: self.update({name: shapes})})(ranges)

    def parse(self, path: str) -> bool:
        """Every plugin node must fit one that is registered: its inputs one by one, then the payload."""
        for node in onnx.load(path, load_external_data=False).graph.node:
            fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if "plugin_namespace" in fields:
                name = f"{fields['plugin_namespace'].decode()}::{node.op_type}"
                if name not in self.front_end.found or not fields["aot"]:
                    self.error = f"no plugin {name}"
                    return False
                parameters = list(inspect.signature(self.front_end.found[name]["register"]).parameters)
                assert len(node.input) == len(parameters) - 1 and parameters[-1] == "payload" == list(fields)[-1]
            self.layers.append(node.name)
        return True

    def why(self, index: int) -> Any:
        return SimpleNamespace(node_name=lambda: "n", node_operator=lambda: "op", desc=lambda: self.error)

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        return None if self.error else json.dumps({"Layers": [{"Name": name} for name in self.layers]}).encode()

    def deserialize(self, engine: bytes) -> Any:
        inspector = SimpleNamespace(get_engine_information=lambda form: engine.decode() if form == "json" else "")
        return SimpleNamespace(create_engine_inspector=lambda: inspector)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    fake = Builder(FrontEnd())
    monkeypatch.setattr(plugins, "import_module", lambda name: fake.front_end if name.endswith(".plugin") else TYPES)
    monkeypatch.setattr(trt_build.plugins, "register", plugins.register.__wrapped__)
    for module in (trt_build, tensorrt_build):
        monkeypatch.setattr(module, "import_module", lambda name: fake.module())
    monkeypatch.setattr(plugin_payloads, "compile_payload", lambda kernel, spec, *_: payload_of(kernel, spec))
    return fake


def build(graph: LoweredGraph, engine: Path) -> tuple[dict[str, Any], list[KernelNode]]:
    with trt_build.builders_graph(graph.path, 1, 90) as (path, nodes):
        return trt_build.build_checked(path, engine, nodes, 90, 1), nodes


def test_what_the_builder_is_asked_for(lowered: LoweredGraph, builder: Builder, tmp_path: Path) -> None:  # noqa: F811
    facts, nodes = build(lowered, tmp_path / "model.engine")
    assert builder.network_flags == (1 << STRONGLY_TYPED) | (1 << AOT)
    assert builder.cleared == [TF32] and builder.config.profiling_verbosity == "detailed"
    assert set(builder.front_end.found) >= {"fpq::Quantize", "fpq::PackedGemmMultipliers"}
    assert {node.name for node in nodes} < set(builder.layers) and len(nodes) == 8
    (profile,) = builder.profiles
    assert facts["shapes"] == profile and all(
        low[0] == 1 < usual[0] <= most[0] for low, usual, most in profile.values()
    )
    assert (facts["tensorrt"], facts["compute_capabilities"]) == ("11.1.0", [90])
    assert facts["engine_bytes"] == (tmp_path / "model.engine").stat().st_size > 0


def test_the_builders_graph_is_kept_beside_the_engine(lowered: LoweredGraph, builder: Builder, tmp_path: Path) -> None:  # noqa: F811
    recipe, folder = Recipe("t", "zoo:pixart_mini").with_options(TrtOptions()), tmp_path / "trt"
    folder.mkdir()
    result = trt_build.build(lowered, folder, TrtOptions(), 90, recipe.sampling.batch_size)
    assert {"trt/model.engine", "trt/model.onnx", "trt/model.onnx.data"} < set(result.files)
    assert result.metadata["compute_capabilities"] == [90]
    assert TrtBackend().kept_problem(folder, lowered, recipe) is None
    (folder / "model.onnx").unlink()
    onnx.save(onnx.load(lowered.path, load_external_data=False), folder / "model.onnx")
    assert "is not the graph of plugins" in str(TrtBackend().kept_problem(folder, lowered, recipe))


@pytest.mark.parametrize(
    ("without", "flags", "cleared"),
    [(("STRONGLY_TYPED",), 1 << AOT, [TF32]), (("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "TF32"), 0, [])],
)
def test_flags_that_a_release_lacks_are_not_asked_for(
    without: tuple[str, ...],
    flags: int,
    cleared: list[int],
    lowered: LoweredGraph,  # noqa: F811
    builder: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (trt_build, tensorrt_build):
        monkeypatch.setattr(module, "import_module", lambda name: builder.module(without))
    build(lowered, tmp_path / "model.engine")
    assert (builder.network_flags, builder.cleared) == (flags, cleared)


def _unregistered(builder: Builder) -> None:
    builder.front_end.found = Forgets()


class Forgets(dict[str, Any]):
    """A registry that keeps nothing."""

    def setdefault(self, key: str, default: Any = None) -> Any:
        return default


def _lost_layer(builder: Builder) -> None:
    parse = builder.parse
    builder.parse = lambda path: parse(path) and builder.layers.remove("ff.down") is None  # type: ignore[method-assign]


def _no_engine(builder: Builder) -> None:
    builder.build_serialized_network = lambda network, config: None  # type: ignore[method-assign]


FAULTS: list[tuple[Callable[[Builder], None], str]] = [
    (_unregistered, r"TensorRT cannot read engine.onnx: node n \(op\): no plugin fpq::"),
    (_lost_layer, "^ff.down: the engine has no layer of that name for the plugin packed_gemm"),
    (_no_engine, "TensorRT cannot build for SM 90: no reason given"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_build_that_fails_says_where(
    fault: Callable[[Builder], None],
    words: str,
    lowered: LoweredGraph,  # noqa: F811
    builder: Builder,
    tmp_path: Path,
) -> None:
    fault(builder)
    with pytest.raises(ContractError, match=words):
        build(lowered, tmp_path / "model.engine")


# --- running --------------------------------------------------------------------------------------------------------


class Context:
    """y = 2 x on the addresses that it was given, by a launch on the stream that it was given."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> None:
        assert self.addresses.setdefault(name, address) == address, "a captured call keeps its addresses"

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        self.cuda.launch("engine", self._double)
        return True

    def _double(self) -> None:
        count = int(np.prod(self.shapes["x"]))
        x, y = (ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float)) for name in ("x", "y"))
        np.ctypeslib.as_array(y, (count,))[:] = 2 * np.ctypeslib.as_array(x, (count,))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    make = Buffers.make
    monkeypatch.setattr(Buffers, "make", lambda context, *rest: make(context, *rest, "cpu"))
    return fake


@pytest.fixture
def contexts(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[trt_engine.TrtEngine, list[Context]]:
    """An engine opened from its folder, and the contexts it makes."""
    created: list[Context] = []
    metadata = {"tensorrt": "11.1.0", "compute_capabilities": [90], "shapes": {"x": [[1, 4], [2, 4], [8, 4]]}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "model.engine").write_bytes(b"engine")
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=["x", "y"].__getitem__,
        get_tensor_mode=lambda name: "output" if name == "y" else "input",
        get_tensor_dtype=lambda name: "float32",
        create_execution_context=lambda: created.append(Context(cuda)) or created[-1],
    )
    opened = {b"engine": engine}
    module = SimpleNamespace(
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=opened.get),
        TensorIOMode=SimpleNamespace(OUTPUT="output"),
        nptype=np.dtype,
    )
    monkeypatch.setattr(tensorrt_engine, "import_module", lambda name: module)
    monkeypatch.setattr(trt_engine.machine, "require", lambda names, what: None)
    monkeypatch.setattr(trt_engine.machine, "tool_version", lambda name: "11.1.0")
    monkeypatch.setattr(trt_engine, "visible_sm", lambda: 90)
    return trt_engine.TrtEngine(tmp_path), created


def test_a_call_is_captured_on_the_engines_stream_and_replayed(contexts: Any, cuda: FakeCuda) -> None:
    engine, created = contexts
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    first = engine.run({"x": x})["y"]
    captured = ["engine on side 1", "host waits for side 1", "capture on side 1", "replay"]
    assert cuda.events == captured and created[0].streams == [engine._stream.cuda_stream] * 2
    second = engine.run({"x": x + 1})["y"]  # the context refuses other addresses: nothing is allocated or bound again
    assert cuda.events == [*captured, "replay"] and len(created) == 1 and cuda.current.name == "main"
    assert np.array_equal(first, 2 * x) and np.array_equal(second, 2 * (x + 1))


def test_each_shape_has_its_context_buffers_and_graph(contexts: Any, cuda: FakeCuda) -> None:
    engine, created = contexts
    one, two = (np.ones((batch, 4), np.float32) for batch in (1, 2))
    for x in (one, two, one, two):
        assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    assert len(created) == 2 and set(created[0].addresses.values()).isdisjoint(created[1].addresses.values())
    assert cuda.events.count("replay") == 4 and cuda.events.count("capture on side 1") == 2
    engine.close()
    assert not engine._calls


def test_an_engine_that_refuses_to_run_is_not_captured(
    contexts: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = contexts
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(ResourceError, match="could not be run"):
        engine.run({"x": np.ones((1, 4), np.float32)})
    assert not engine._calls and cuda.events == [] and cuda.current.name == "main"


@pytest.mark.parametrize("closes", [False, True])
def test_calls_and_closing_of_other_threads_wait(
    closes: bool, contexts: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = contexts
    x, waiting, replay = np.ones((1, 4), np.float32), [], trt_engine.Captured.run

    def another_comes(captured: Any, arrays: Any) -> Any:
        if not waiting:
            waiting.append(Worker(engine.close if closes else lambda: engine.run({"x": 3 * x})["y"]))
            waiting[0].join(0.1)
            assert waiting[0].is_alive(), "it did not wait"
        return replay(captured, arrays)

    monkeypatch.setattr(trt_engine.Captured, "run", another_comes)
    assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    result = waiting[0].result()
    if not closes:
        assert np.array_equal(result, 6 * x)
        return
    with pytest.raises(RecipeError, match="the engine is closed; load it again"):
        engine.run({"x": x})


@pytest.mark.parametrize("change", [{"x": np.ones((9, 4), np.float32)}, {"x": np.ones((1, 4))}, {}])
def test_inputs_that_do_not_fit_are_refused(change: Any, contexts: Any) -> None:
    with pytest.raises(RecipeError, match=r"x has shape \(9, 4\)|x is of float64|missing or unknown"):
        contexts[0].run(change)
