"""The kernels as torch ops: schema, fake tensors, torch.compile, torch.export; on the CPU they equal the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.dialect import reference as op_reference
from export.errors import ContractError, RecipeError
from export.formats.format import get_format, pack
from export.formats.operands import exact_multipliers
from plugins import torch_ops, torch_reference
from plugins.gpu.spec import operand_bytes

OPS = torch.ops.fpq
M, N, K, GROUP = 6, 10, 64, 16


def gemm_inputs(weight: str = "E2M1", activation: str = "E2M3", groups: str = "none", seed: int = 0) -> dict[str, Any]:
    """NumPy inputs of op_reference.packed_gemm, by name."""
    rng = np.random.default_rng(seed)
    fmt = get_format(activation)
    usable = np.flatnonzero(np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max_value))
    table = exact_multipliers(weight) if groups == "exact" else (1,)
    size = 0 if groups == "none" else GROUP
    count = K // size if size else 1
    return {
        "a_codes": rng.choice(usable, (M, K)).astype(np.uint8),
        "a_scale": rng.uniform(0.01, 0.1, (M, 1)).astype(np.float32),
        "w_codes": pack(rng.integers(0, 16, (N, K)).astype(np.uint8), 4),
        "w_scales": rng.uniform(0.01, 0.1, (N, count if groups == "real" else 1)).astype(np.float32),
        "multiplier_codes": pack(rng.integers(0, len(table), (N, count)).astype(np.uint8), 4),
        "bias": rng.standard_normal(N).astype(np.float32),
        "activation_format": activation,
        "weight_format": weight,
        "in_features": K,
        "group_size": size,
        "multipliers": table,
    }


def as_torch(inputs: dict[str, Any], integers: bool = False) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The same as arguments of the packed op."""
    a = operand_bytes(inputs["activation_format"], integers)[inputs["a_codes"]]
    arrays = [a, inputs["a_scale"][:, 0], inputs["w_codes"], inputs["w_scales"], inputs["bias"]]
    choices: dict[str, Any] = {key: inputs[f"{key}_format"] for key in ("activation", "weight")}
    choices |= {"group_size": inputs["group_size"], "multipliers": list(inputs["multipliers"]), "output": "fp32"}
    choices |= {"integers": True} if integers else {}
    if inputs["multipliers"] != (1,):
        choices["multiplier_codes"] = torch.from_numpy(inputs["multiplier_codes"])
    return [torch.from_numpy(array) for array in arrays], choices


OF_WEIGHT = ("activation", "weight", "group_size", "multipliers", "multiplier_codes", "integers")


def expanded(tensors: list[torch.Tensor], choices: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The same as arguments of the expanded op."""
    rest = {key: value for key, value in choices.items() if key != "multiplier_codes"}
    own = {key: choices[key] for key in OF_WEIGHT if key in choices}
    return [*tensors[:2], OPS.expand(tensors[2], in_features=K, **own), *tensors[3:]], rest


@pytest.mark.parametrize("groups", ["none", "exact", "real"])
@pytest.mark.parametrize(
    "weight, activation, integers",
    [
        ("E2M1", "E2M3", False),
        ("E2M1", "E2M3", True),
        ("E3M0", "E3M4", False),
        ("E1M2", "INT8", False),
        ("INT4", "E4M3", False),
    ],
)
def test_both_gemms_equal_the_reference(weight: str, activation: str, integers: bool, groups: str) -> None:
    inputs = gemm_inputs(weight, activation, groups)
    (expected,) = op_reference.packed_gemm(**inputs)
    tensors, choices = as_torch(inputs, integers)
    result = OPS.packed_gemm(*tensors, **choices)
    # Exact sums rounded to float32, then at most one product for each group and the two products and sums after them.
    bound = (inputs["w_scales"].shape[1] + 4) * 2.0**-24 * (np.abs(expected).max() + np.abs(inputs["bias"]).max())
    assert np.abs(result.numpy() - expected).max() <= bound
    other, rest = expanded(tensors, choices)
    assert torch.equal(OPS.expanded_gemm(*other, **rest), result)


def test_epilogues_and_zero_point() -> None:
    tensors, choices = as_torch(gemm_inputs())
    plain = OPS.packed_gemm(*tensors, **choices)
    gate, residual = torch.randn(M // 3, N), torch.randn(M, N)
    gated = OPS.packed_gemm(*tensors, **choices, epilogue="gate_residual", gate=gate, residual=residual, tokens=3)
    assert torch.equal(gated, residual + gate.repeat_interleave(3, 0) * plain)
    a_zero, w_sums = torch.randn(M), torch.randn(N)
    shifted = OPS.packed_gemm(*tensors, **choices, a_zero=a_zero, w_sums=w_sums)
    torch.testing.assert_close(shifted, plain + a_zero[:, None] * w_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, integers",
    [(name, False) for name in ("E2M1", "E2M3", "E3M2", "E3M4", "E4M3", "INT6", "INT8", "UE2M2")] + [("E2M3", True)],
)
def test_codes_and_scales_equal_the_reference(name: str, integers: bool) -> None:
    x = np.random.default_rng(1).standard_normal((40, K)).astype(np.float32) ** 3
    x[3], x[4, 5], x[5, 6] = 0.0, np.nan, np.inf
    codes, scale = op_reference.quantize_activation(x, format=name)
    operands, scales = OPS.quantize(torch.from_numpy(x), format=name, integers=integers)
    assert np.array_equal(operands.numpy(), operand_bytes(name, integers)[codes])
    assert np.array_equal(scales.numpy(), scale[:, 0], equal_nan=True)


def test_ties_go_to_even_and_large_numbers_saturate() -> None:
    fmt = get_format("E2M3")
    grid = np.unique(fmt.values)
    x = torch.from_numpy(np.concatenate([(grid[1:] + grid[:-1]) / 2, [1e9, -1e9]]).astype(np.float32))
    result = torch_reference.byte_values("E2M3")[torch_reference.encoded("E2M3", x).int()]
    codes = op_reference.quantize_static(x.numpy(), np.ones(1, np.float32), np.zeros(1, np.float32), format="E2M3")[0]
    assert np.array_equal(result.numpy(), fmt.values[codes])


def test_fused_quantizers_equal_the_reference() -> None:
    rng = np.random.default_rng(2)
    x, shift, scale = (rng.standard_normal((2, s, K)).astype(np.float32) for s in (5, 1, 1))
    codes, expected_scale = op_reference.norm_modulate_quantize(x, shift, scale, format="E2M3", epsilon=1e-6)
    rows = [torch.from_numpy(item.reshape(-1, K)) for item in (x, shift, scale)]
    operands, scales = OPS.norm_modulate_quantize(*rows, format="E2M3", epsilon=1e-6, tokens=5)
    # Both round a float64 norm to float32, in other orders: a code differs only next to a midpoint.
    assert np.mean(operands.numpy().reshape(codes.shape) != operand_bytes("E2M3")[codes]) <= 1 / codes.size
    np.testing.assert_allclose(scales.numpy(), expected_scale.reshape(-1), rtol=4 * 2.0**-24)
    gelu, _ = OPS.gelu_quantize(rows[0], format="E2M3")
    plain, _ = OPS.quantize(torch.nn.functional.gelu(rows[0], approximate="tanh"), format="E2M3")
    assert torch.equal(gelu, plain)


def cases() -> list[Any]:
    """Every op with small arguments."""
    tensors, choices = as_torch(gemm_inputs(groups="exact"))
    other, rest = expanded(tensors, choices)
    own = {key: choices[key] for key in OF_WEIGHT if key in choices} | {"in_features": K}
    x, row = torch.randn(M, K), torch.randn(2, K)
    norm = {"format": "E2M3", "epsilon": 1e-6, "tokens": 3, "integers": True}
    static, codes = [torch.tensor([0.04]), torch.tensor([0.3])], torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    return [
        pytest.param(OPS.packed_gemm, tensors, choices, id="packed_gemm"),
        pytest.param(OPS.expanded_gemm, other, rest | {"output": "fp16"}, id="expanded_gemm"),
        pytest.param(OPS.expand, [tensors[2]], own, id="expand"),
        pytest.param(OPS.quantize, [x], {"format": "E2M3"}, id="quantize"),
        pytest.param(OPS.gelu_quantize, [x.half()], {"format": "E4M3"}, id="gelu_quantize"),
        pytest.param(OPS.norm_modulate_quantize, [x, row, row], norm, id="norm_modulate_quantize"),
        pytest.param(OPS.quantize_static, [x, *static], {"format": "INT8"}, id="quantize_static"),
        pytest.param(OPS.gelu_quantize_static, [x.half(), *static], {"format": "E2M3"}, id="gelu_quantize_static"),
        pytest.param(OPS.pack, [codes], {}, id="pack"),
    ]


@pytest.mark.parametrize("op, tensors, choices", cases())
def test_schema_and_fake_tensors(op: Any, tensors: list[torch.Tensor], choices: dict[str, Any]) -> None:
    torch.library.opcheck(op.default, tuple(tensors), choices)


def test_every_op_is_checked() -> None:
    assert {case.id for case in cases()} == {op.name for op in torch_ops.OPS}


@pytest.mark.kernels
@pytest.mark.parametrize("op, tensors, choices", cases())
def test_the_interpreted_kernel_gives_the_same(
    op: Any, tensors: list[torch.Tensor], choices: dict[str, Any], interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TRITON_INTERPRET=1 the op runs the kernel itself; without it, plain torch."""
    kernels = op(*tensors, **choices)
    monkeypatch.delenv("TRITON_INTERPRET")
    plain = op(*tensors, **choices)
    for result, expected in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (kernels, plain)), strict=True):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        if result.dtype == torch.uint8:
            # Plain torch takes the mean of a norm in float64: a code next to a midpoint may differ, no other may.
            assert int((result != expected).sum()) <= (op is OPS.norm_modulate_quantize)
        else:
            # The float32 steps behind an exact sum, or a mean, in another order; then one rounding to the output type.
            rounding = 2.0**-10 if result.dtype == torch.float16 else 8 * 2.0**-24
            assert float((result.float() - expected.float()).abs().max()) <= rounding * float(expected.abs().max())


class Chain(torch.nn.Module):
    """Quantize, then multiply: what a linear layer is made of."""

    def __init__(self) -> None:
        super().__init__()
        tensors, self.choices = as_torch(gemm_inputs())
        for name, tensor in zip(("w", "w_scales", "bias"), tensors[2:], strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = torch.ops.fpq.quantize(x, format="E2M3")
        weight = (self.get_buffer(name) for name in ("w", "w_scales", "bias"))
        y: torch.Tensor = torch.ops.fpq.packed_gemm(codes, scale, *weight, **self.choices)
        return y


def test_compile_and_export_keep_the_ops() -> None:
    module, x = Chain(), torch.randn(M, K)
    expected = module(x)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "fpq.quantize.default" in names and "fpq.packed_gemm.default" in names
    assert torch.equal(exported.module()(x), expected)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"activation": "E9M9"}, RecipeError, "E9M9"),
        ({"weight": "INT8"}, RecipeError, "weights in INT8: the GPU kernels take 4-bit weights"),
        ({"group_size": 7}, ContractError, "group_size 7 does not divide in_features 64"),
        ({"output": "fp64"}, ContractError, "output 'fp64'; use one of"),
        ({"epilogue": "gate_residual"}, ContractError, r"missing \['gate', 'residual'\], unused nothing"),
        ({"gate": torch.zeros(1, N)}, ContractError, r"missing nothing, unused \['gate'\]"),
        ({"a_zero": torch.zeros(M)}, ContractError, r"missing \['w_sums'\], unused nothing"),
    ],
)
def test_what_no_kernel_takes_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, choices = as_torch(gemm_inputs())
    with pytest.raises(error, match=message):
        OPS.packed_gemm(*tensors, **(choices | changed))
