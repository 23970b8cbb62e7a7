"""Attentions by name: which calls are replaced, what they are called, and each as one node of an exported model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from export.dialect.ops import DOMAIN, OPS
from export.errors import ContractError
from export.formats.attention import MOST_KEYS, AttentionFormats
from export.models.attention_calls import attention_calls, attention_names
from export.models.load import load, sample_inputs
from export.to_onnx import export_float, export_portable
from pipeline.backends.reference import ReferenceEngine, fake_quant
from tests.support import tiny
from tests.support.attentions import Operands, bound

INT8 = AttentionFormats("INT8", "INT8")
NAMES = {
    "pixart": [f"transformer_blocks.{block}.attn{part}" for block in range(tiny.LAYERS) for part in (1, 2)],
    "hunyuan": [f"blocks.{block}.attn{part}" for block in range(4) for part in (1, 2)],
    "unknown": [f"transformer_blocks.{block}.attn" for block in range(tiny.LAYERS)],
}
# Of whose attentions one is left in floats: HunyuanDiT pools its text by torch's multi_head_attention_forward.
POOLED = ("hunyuan",)
# As for linears (tests/export/test_export.py): codes on midpoints flip, so much of what quantizing costs.
FLIPS = 0.25


# --- the context -----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Attention of x with itself, `calls` times."""

    def __init__(self, calls: int = 1, **options: Any) -> None:
        super().__init__()
        self.calls, self.options = calls, options

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = scaled_dot_product_attention(x, x, x, **self.options)
        return x


class Model(nn.Module):
    """Attention in two children and, behind them, in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = Head(), nn.ModuleList([Head(2)])

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, *self.blocks):
            x = part(x)
        return scaled_dot_product_attention(x, x, x)


X = torch.ones(1, 2, 3, 4)


def seen(module: nn.Module, x: Tensor = X) -> list[tuple[str, bool, float]]:
    """(name, whether there is a mask, scale) of each call."""
    calls: list[tuple[str, bool, float]] = []

    def note(name: str, q: Tensor, _k: Tensor, _v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append((name, mask is not None, scale))
        return q

    with attention_calls(module, note):
        module(x)
    return calls


def test_names_are_paths_and_a_second_call_in_a_module_has_a_suffix() -> None:
    module = Model()
    assert [name for name, *_ in seen(module)] == ["first", "blocks.0", "blocks.0.1", "Model"]
    assert [name for name, *_ in seen(module)] == ["first", "blocks.0", "blocks.0.1", "Model"], "counted anew"
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_mask_and_scale_are_handed_on() -> None:
    assert seen(Head()) == [("Head", False, 0.5)]
    assert seen(Head(attn_mask=torch.zeros(3, 3), scale=0.25)) == [("Head", True, 0.25)]


def test_what_is_computed_in_place_of_a_call_is_its_result_and_not_replaced_itself() -> None:
    def double(_name: str, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, _scale: float) -> Tensor:
        return 2 * scaled_dot_product_attention(q, k, v)

    module = Head()
    with attention_calls(module, double):
        assert torch.equal(module(X), 2 * X)
    assert torch.equal(module(X), X)


def test_other_threads_are_left_alone() -> None:
    module, results = Model(), list[Tensor]()
    thread = threading.Thread(target=lambda: results.append(module(X)))
    with (
        pytest.raises(ContractError, match="none to quantize"),  # of this thread
        attention_calls(module, lambda *_: torch.zeros_like(X)),
    ):
        thread.start()
        thread.join()
    assert torch.equal(results[0], X)


def test_an_error_inside_leaves_no_trace() -> None:
    module = Model()

    def fail(*_: object) -> Tensor:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), attention_calls(module, fail):
        module(X)
    assert torch.equal(module(X), X)


@pytest.mark.parametrize(
    ("module", "x", "words"),
    [
        (Head(is_causal=True), X, "Head: causal, boolean or grouped heads are not quantized; leave attention.qk and"),
        (Head(attn_mask=torch.ones(3, 3, dtype=torch.bool)), X, "Head: causal, boolean"),
        (Head(dropout_p=0.5), X, "Head: causal, boolean"),
        (Head(), X[0], "Head: queries of 3 axes"),
        (nn.Identity(), X, "Identity computes no attention by scaled_dot_product_attention; there is none to quantize"),
    ],
)
def test_calls_without_a_quantized_form_are_refused(module: nn.Module, x: Tensor, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        seen(module, x)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_of_a_model_is_found_without_computing_it(name: str, tmp_path: Path) -> None:
    assert list(attention_names(load(str(tiny.folder(name, tmp_path))))) == NAMES[name]


def attentions(path: Path) -> dict[str, onnx.NodeProto]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.name: node for node in nodes if node.op_type == "QuantizedAttention" and node.domain == DOMAIN}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_is_one_node_that_computes_what_the_op_says(name: str, tmp_path: Path) -> None:
    """On the tensors that each node really reads, and the whole model beside the reference."""
    model = load(str(tiny.folder(name, tmp_path)))
    layers, path = tiny.quantized(model), tmp_path / "model.onnx"
    summary = export_portable(model, layers, path, attention=INT8)
    nodes = attentions(path)
    assert list(nodes) == NAMES[name] and str(summary).endswith(f", {len(nodes)} attentions at INT8/INT8")
    graph = onnx.load(path, load_external_data=False)
    assert sum(node.op_type == "Softmax" for node in graph.graph.node) == (name in POOLED)
    assert "QuantizedAttention" in [function.name for function in graph.functions]
    inputs = sample_inputs(model, 2, 1, tokens=5)
    tensors = computed(path, sorted({x for node in nodes.values() for x in (*node.input, *node.output)}), inputs)
    for layer, node in nodes.items():
        given = Operands(*(tensors[key] for key in node.input))
        values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        choices = {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
        assert (choices["layer"], node.output[0]) == (layer, f"{layer}/output")
        (expected,) = OPS["QuantizedAttention"].numpy(*given, **choices)
        out, limit = tensors[node.output[0]], bound(given, INT8, choices["scale"])
        # The mean of K is added up in another order, so that its codes may flip as well.
        assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
        assert np.median(np.abs(out - expected) - limit.error) <= 0, layer
    plain, quantized = (ReferenceEngine(fake_quant(model, layers, torch.float32, formats)) for formats in (None, INT8))
    expected = quantized.run(inputs)["sample"]
    cost = np.linalg.norm(expected - plain.run(inputs)["sample"])
    output = ort.InferenceSession(path).run(["sample"], inputs)[0]
    assert cost > 0 and np.linalg.norm(output - expected) <= max(FLIPS * cost, 1e-3 * np.linalg.norm(expected))


def computed(path: Path, names: list[str], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a model by name."""
    model = onnx.load(path, load_external_data=False)
    own = {value.name for value in model.graph.input}
    rows = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in own]
    model.graph.output.extend(rows)
    onnx.save(model, path.with_name("probed.onnx"))
    values = ort.InferenceSession(path.with_name("probed.onnx")).run([row.name for row in rows], inputs)
    return inputs | dict(zip([row.name for row in rows], values, strict=True))


@pytest.mark.slow
def test_a_float_export_has_none_and_a_model_without_attention_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(tiny.folder("dit", tmp_path)))
    export_float(model, tmp_path / "float.onnx")
    assert not attentions(tmp_path / "float.onnx")
    monkeypatch.setattr("export.models.torch_modules.MaskedAttention.__call__", lambda self, attn, x, **_: attn.to_v(x))
    with pytest.raises(ContractError, match="DiTTransformer2DModel computes no attention by scaled_dot_product"):
        attention_names(model)


def test_more_keys_than_add_up_are_refused_by_name() -> None:
    from export.trace import _quantized_attention

    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, MOST_KEYS + 1, 8)
    with pytest.raises(ContractError, match="attn1: quantized attention over 65794 keys"):
        _quantized_attention(INT8, "attn1", q, k, k, None, 1.0)
