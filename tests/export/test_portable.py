"""A portable model's file gives back the layers that it was made of."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import ContractError
from export.portable import read_layers
from tests.support import learned
from tests.support.portable import HEADER, portable, random_linear


def test_layers_are_read_back_with_all_that_a_method_may_learn(tmp_path: Path) -> None:
    of = learned.router()
    balanced = learned.with_balance(random_linear("a", granularity="exact_group", group=16))
    layers = [
        learned.with_low_rank(balanced, of, half=True),
        learned.with_scaling(random_linear("b", bias=False), "zero"),
        learned.with_scaling(random_linear("c", granularity="group", group=32), "token_group", group=32),
    ]
    body = "\n".join(f'{layer.name}y = fpq.QuantizedLinear <layer="{layer.name}"> (x)' for layer in layers)
    outputs = ", ".join(f"float[B,S,16] {layer.name}y" for layer in layers)
    model = portable(body, layers, inputs="float[B,S,64] x, float[B] timestep", outputs=outputs)
    ir.save(model, tmp_path / "model.onnx")
    for layer, again in zip(layers, read_layers(tmp_path / "model.onnx"), strict=True):
        for key in (field.name for field in fields(layer) if field.name != "router"):
            np.testing.assert_array_equal(getattr(again, key), getattr(layer, key), err_msg=f"{layer.name} {key}")
        assert (again.router is None) == (layer.router is None)


def test_a_file_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    plain = ir.from_onnx_text(f"{HEADER}\ng (float[B,64] x) => (float[B,64] y) {{ y = Relu(x) }}")
    ir.save(plain, tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="no quantized linear in it; it is not a portable model, or one lowered"):
        read_layers(tmp_path / "model.onnx")
