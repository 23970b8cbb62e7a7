"""Registration of the quick-deployable plugins, with a front end that calls them as TensorRT's open-source one does.

TensorRT itself is not at hand: this proves that signatures are complete, that shapes and types are right for symbols of
any kind, and what is handed over. It cannot prove that TensorRT takes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.gpu.spec import GemmSpec, QuantizeSpec
from plugins.gpu.table import kernel as kernel_row
from plugins.tensorrt import plugins
from plugins.tensorrt.payload import Payload, Variant
from tests.kernels.test_trt_aot import payload_of


@dataclass(frozen=True)
class Symbol:
    """A dimension that refuses what TensorRT's refuse: an integer on its left, and negation."""

    text: str

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} * {text(other)})")

    def __floordiv__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} // {text(other)})")


def text(value: Any) -> str:
    return value.text if isinstance(value, Symbol) else str(value)


@dataclass
class Desc:
    shape_expr: tuple[Any, ...]
    dtype: str = ""


@dataclass
class FrontEnd:
    """tensorrt.plugin: what is registered, checked as `_validate.py` of TensorRT does."""

    found: dict[str, dict[str, Callable[..., Any]]] = field(default_factory=dict)
    TensorDesc = Desc
    AutoTuneCombination = staticmethod(lambda *arguments: arguments)
    KernelLaunchParams = SimpleNamespace
    SymExprs = tuple
    SymIntExprs = SimpleNamespace(from_tuple=tuple)
    SymInt32 = staticmethod(lambda value: value)
    from_shape_expr = staticmethod(lambda shape, dtype: Desc(tuple(shape), dtype))
    cdiv = staticmethod(lambda a, b: Symbol(f"cdiv({text(a)}, {text(b)})"))

    def _decorator(self, kind: str, more: tuple[str, ...]) -> Callable[[str], Callable[[Any], Any]]:
        def register(name: str) -> Callable[[Any], Any]:
            def keep(function: Any) -> Any:
                names = list(inspect.signature(function).parameters)
                assert tuple(names[len(names) - len(more) :]) == more
                self.found.setdefault(name, {})[kind] = function
                return function

            return keep

        return register

    def register(self, name: str) -> Any:
        return self._decorator("register", ())(name)

    def autotune(self, name: str) -> Any:
        return self._decorator("autotune", ("outputs",))(name)

    def aot_impl(self, name: str) -> Any:
        return self._decorator("aot_impl", ("outputs", "tactic"))(name)


TYPES = SimpleNamespace(float32="float32", float16="float16", int8="int8", bfloat16="bfloat16")


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> FrontEnd:
    fake = FrontEnd()
    monkeypatch.setattr(plugins, "import_module", lambda name: fake if name.endswith(".plugin") else TYPES)
    assert len(plugins.register.__wrapped__("tensorrt")) == len(fake.found) == 7
    return fake


def test_signatures_are_what_tensorrt_reads(front_end: FrontEnd) -> None:
    plugin = front_end.found["fpq::PackedGemmMultipliersGateResidual"]
    names = ["a", "a_scale", "w", "w_scales", "multiplier_codes", "bias", "gate", "residual", "payload"]
    for kind, more in (("register", []), ("autotune", ["outputs"]), ("aot_impl", ["outputs", "tactic"])):
        signature = inspect.signature(plugin[kind])
        assert list(signature.parameters) == [*names, *more]
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.default is inspect.Parameter.empty for p in signature.parameters.values())
    annotations = [p.annotation for p in inspect.signature(plugin["register"]).parameters.values()]
    assert annotations == [Desc] * 8 + [str]
    two = inspect.signature(front_end.found["fpq::Quantize"]["register"]).return_annotation
    assert two == tuple[Desc, Desc]


def test_a_gemm_is_described_tuned_and_launched(front_end: FrontEnd) -> None:
    spec = GemmSpec("E2M3", "E2M1", 64, 96, 32, (1, 2), epilogue="none", output="fp32")
    payload, plugin = payload_of("packed_gemm", spec), front_end.found["fpq::PackedGemmMultipliers"]
    batch, tokens = Symbol("B"), Symbol("S")
    shapes = [(batch, tokens, 64), (batch, tokens, 1), (96, 32), (96, 1), (96, 1), (96,)]
    inputs = [Desc(shape) for shape in shapes]
    output = plugin["register"](*inputs, payload=payload.to_text() + "\0")  # the parser ends a text with a zero
    assert output == Desc((batch, tokens, 96), "float32")
    ((types, layout, tactics),) = plugin["autotune"](*inputs, payload.to_text(), [output])
    assert (types, layout, tactics) == ("INT8,FP32,INT8,FP32,INT8,FP32,FP32", "LINEAR", [1])
    name, ptx, launch, scalars = plugin["aot_impl"](*inputs, payload.to_text(), [output], 1)
    tile = payload.tile(payload.variants[0])
    assert name == "packed_gemm" and ptx.count(b".param") == len(payload.row.arguments_of(spec))
    assert launch.grid_x.text == f"(cdiv((B * S), {tile.m}) * {-(-96 // tile.n)})"
    assert (launch.grid_y, launch.grid_z, launch.block_x, launch.shared_mem) == (1, 1, 128, 4096)
    assert [scalar.text for scalar in scalars] == ["(B * S)"]


def test_a_quantizer_has_two_outputs_and_a_tactic_for_each_tile(front_end: FrontEnd) -> None:
    spec, row = QuantizeSpec("E2M3", 96, "norm_modulate", "fp32"), kernel_row("norm_modulate_quantize")
    one = payload_of("norm_modulate_quantize", spec).variants[0]
    second = Variant(90, 9999, asdict(row.tile(spec, 9999, 90)), one.entry, (), 64, 0, one.code)
    payload, plugin = (
        Payload("norm_modulate_quantize", spec, (one, second)),
        front_end.found["fpq::NormModulateQuantize"],
    )
    inputs = [Desc((Symbol("B"), Symbol("S"), 96)), Desc((Symbol("B"), 1, 96)), Desc((Symbol("B"), 1, 96))]
    outputs = plugin["register"](*inputs, payload=payload.to_text())
    assert outputs == (Desc((Symbol("B"), Symbol("S"), 96), "int8"), Desc((Symbol("B"), Symbol("S"), 1), "float32"))
    assert plugin["autotune"](*inputs, payload.to_text(), outputs) == [("FP32,FP32,FP32,INT8,FP32", "LINEAR", [1, 2])]
    _, _, launch, scalars = plugin["aot_impl"](*inputs, payload.to_text(), outputs, 2)
    assert launch.block_x == 64 and [scalar.text for scalar in scalars] == ["(B * S)", "((B * S) // (B * 1))"]


def test_a_layer_that_names_code_finds_it_with_another(front_end: FrontEnd) -> None:
    payload, plugin = payload_of("quantize", QuantizeSpec("E2M3", 80)), front_end.found["fpq::Quantize"]
    inputs = [Desc((Symbol("B"), 80))]
    outputs = plugin["register"](*inputs, payload=payload.to_text())
    assert plugin["register"](*inputs, payload=payload.shared().to_text()) == outputs
    assert plugin["aot_impl"](*inputs, payload.shared().to_text(), outputs, 1)[0] == "quantize"
