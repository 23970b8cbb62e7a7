"""Cases for the tests of the GPU GEMM kernels: operands with everything awkward in them, and how to run a kernel."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from export.formats.format import decode, get_format, pack, unpack
from plugins.gpu import launch
from plugins.gpu.reference import expand
from plugins.gpu.spec import GemmSpec, operand_bytes
from plugins.gpu.table import kernel
from plugins.gpu.tile_table import Tile

Arrays = dict[str, np.ndarray]
EPS = 2.0**-24  # half a unit in the last place of float32
NUMPY_TYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
MANTISSA = {"fp16": 10, "bf16": 7, "fp32": 23}
ZERO_SCALE = np.float32(1e-30 / 7.5)  # of a token of zeros in E2M3


def finite_codes(name: str) -> np.ndarray:
    """The codes that quantizers write: finite, one zero."""
    fmt = get_format(name)
    values = fmt.values
    return np.flatnonzero(np.isfinite(values) & ~((values == 0) & (np.arange(len(values)) > 0))).astype(np.uint8)


def case(spec: GemmSpec, m: int, seed: int = 0, tokens: int = 1) -> Arrays:
    """Arguments of a GEMM kernel by name.

    Every code of both formats, -0 and the lowest integer among the weights; a token of zeros, one with a large scale, a
    channel of zeros, one with a large scale.
    """
    rng, n, k = np.random.default_rng(seed), spec.out_features, spec.in_features
    codes = rng.choice(finite_codes(spec.activation), (m, k))
    weights = rng.integers(0, 16, (n, k)).astype(np.uint8)
    codes[m // 2], weights[n // 2] = 0, 0
    a_scale = rng.uniform(0.01, 2, m).astype(np.float32)
    a_scale[m // 2], a_scale[-1] = ZERO_SCALE, 1e4
    w_scales = rng.uniform(0.01, 0.5, (n, spec.scale_groups)).astype(np.float32)
    w_scales[-1] *= 100
    indices = rng.integers(0, len(spec.multipliers), (n, spec.groups)).astype(np.uint8)
    arrays = {
        "codes": codes,
        "a": operand_bytes(spec.activation, spec.integers)[codes],
        "a_scale": a_scale,
        "w": np.ascontiguousarray(pack(weights, 4)),
        "w_scales": w_scales,
        "bias": rng.normal(size=n).astype(np.float32),
    }
    if spec.has_multipliers:
        arrays["multiplier_codes"] = np.ascontiguousarray(pack(indices, 4))
    if spec.zero_point:
        arrays |= {"a_zero": rng.normal(size=m).astype(np.float32), "w_sums": rng.normal(size=n).astype(np.float32)}
    if spec.has_gate:
        dtype = NUMPY_TYPES[spec.output]
        arrays["gate"] = rng.normal(size=(m // tokens, n)).astype(dtype)
        arrays["residual"] = rng.normal(size=(m, n)).astype(dtype)
    return arrays


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(y: torch.Tensor) -> np.ndarray:
    if y.dtype == torch.bfloat16:
        return y.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return y.numpy()


def run(
    spec: GemmSpec,
    arrays: Arrays,
    tile: Tile | None = None,
    sm: int = 0,
    tokens: int = 1,
    expanded: bool = False,
    **choices: Any,
) -> np.ndarray:
    """y of the interpreted kernel, in the output type; expanded: of expanded_gemm on NumPy's expanded weights."""
    tensors = {name: tensor(value) for name, value in arrays.items() if name != "codes"}
    if expanded:
        (w,) = expand(spec, arrays["w"], arrays.get("multiplier_codes"))
        tensors = {name: value for name, value in tensors.items() if name != "multiplier_codes"} | {"w": tensor(w)}
    first = [tensors.pop(name) for name in ("a", "a_scale", "w", "w_scales", "bias")]
    kernel_of = launch.expanded_gemm if expanded else launch.packed_gemm
    return array(kernel_of(spec, *first, **tensors, tokens=tokens, tile=tile, sm=sm, **choices))


def reference(spec: GemmSpec, arrays: Arrays, tokens: int = 1) -> np.ndarray:
    """y float32 by the table's reference."""
    inputs = {name: value for name, value in arrays.items() if name != "codes"}
    return kernel("packed_gemm").reference(spec, **inputs, tokens=tokens)[0]


def exact(spec: GemmSpec, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(y before the epilogue, the sum of the magnitudes of its terms), float64, from values and plain products.

    Shares no code with kernels and references beyond the formats' table of values.
    """
    k, groups = spec.in_features, spec.groups
    a = decode(spec.activation_format, arrays["codes"]) * arrays["a_scale"][:, None].astype(np.float64)
    w = decode(spec.weight_format, unpack(arrays["w"], 4, k)).reshape(-1, groups, k // groups)
    w = w * (arrays["w_scales"] if spec.real_groups else np.repeat(arrays["w_scales"], groups, axis=1))[..., None]
    if spec.has_multipliers:
        w = w * np.asarray(spec.multipliers)[unpack(arrays["multiplier_codes"], 4, groups)][..., None]
    w = w.reshape(len(w), k)
    y, size = a @ w.T + arrays["bias"], np.abs(a) @ np.abs(w).T + np.abs(arrays["bias"])
    if spec.zero_point:
        correction = arrays["a_zero"][:, None].astype(np.float64) * arrays["w_sums"]
        y, size = y + correction, size + np.abs(correction)
    return y, size


def stored(y: np.ndarray, output: str) -> np.ndarray:
    """float32 as the interpreted kernel stores it: rounded to fp16, but cut to bf16, which GPUs round to as well.

    (Triton 3.9's interpreter drops the lower half of a float32's bits.)
    """
    if output != "bf16":
        return y.astype(NUMPY_TYPES[output])
    return (y.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def half_unit(y: np.ndarray, output: str) -> np.ndarray:
    """Half a unit in the last place of y in the output type, fp16's subnormals included."""
    lowest = -14 if output == "fp16" else -126
    exponent = np.maximum(np.frexp(np.abs(y))[1] - 1, lowest)
    return np.ldexp(0.5, exponent - MANTISSA[output])
