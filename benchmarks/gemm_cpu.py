"""Speed of the byte GEMMs of PixArt-XL on this CPU: `python -m benchmarks.gemm_cpu`.

The kernel library's PackedGemm with several formats beside onnxruntime's MatMulInteger, torch's quantized linear and,
where ai-edge-litert is installed, XNNPACK's linears, each once per round, on operands that use the whole range of their
formats. A row says how many operations a second the kernel did at best and by the median, what share of the machine's
measured rate of byte products that is, and how far its integer sums are from the exact ones: kernels without dot
products of bytes add pairs in saturating 16 bits.
Writes benchmarks/results/gemm_MACHINE.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks import record, xnnpack
from benchmarks.record import Json
from export.dialect.graph import GraphBuilder, add_initializer
from export.formats.format import get_format, pack
from export.formats.operands import fits_byte, largest_code, limb_base, zero_point
from pipeline import machine
from pipeline.backends.cpu.packed_gemm import packed_gemm
from pipeline.backends.cpu.quantizers import Operand
from pipeline.backends.cpu.token_chain import VERSION, drop_unread_outputs
from pipeline.backends.sessions import session_options
from pipeline.passes.quantized_gemm import QuantizedGemm, StoredWeight
from plugins.cpu import library, limits

ROWS = (256, 512, 1024)
CHANNELS = ((1152, 1152), (4608, 1152), (1152, 4608))  # (N, K)
PEER, TORCH = "onnxruntime MatMulInteger", "torch quantized linear"
ENGINES = ("x86", "onednn", "fbgemm")


@dataclass(frozen=True)
class Kernel:
    """PackedGemm with these formats; group: input channels that share a scale of the weight and of a token, 0: none."""

    weight: str
    activation: str
    group: int = 0

    @property
    def name(self) -> str:
        return f"{self.weight} x {self.activation}" + f" by groups of {self.group}" * bool(self.group)


KERNELS = (
    Kernel("E2M1", "E2M3"),
    Kernel("INT4", "INT8"),
    Kernel("E2M1", "E3M4"),
    Kernel("INT4", "INT8", 128),
    Kernel("INT8", "E2M3"),
    Kernel("INT8", "INT8"),
)


@dataclass(frozen=True)
class Contestant:
    """run: one product. error: largest distance of its integer sums from the exact ones, None where it gives none."""

    run: Callable[[], object]
    error: float | None


def random_gemm(kernel: Kernel, n: int, k: int, rng: np.random.Generator) -> QuantizedGemm:
    """A linear of random codes that decode to the whole range of the weight's format."""
    fmt, groups = get_format(kernel.weight), k // kernel.group if kernel.group else 1
    usable = np.flatnonzero(np.abs(fmt.integers) <= fmt.kmax).astype(np.uint8)
    arrays: dict[str, NDArray[np.generic]] = {
        "codes": pack(rng.choice(usable, (n, k)), fmt.bits),
        "scales": np.ones((n, groups), np.float32),
        "multiplier_codes": np.zeros((1, (groups + 1) // 2), np.uint8),
        "bias": np.zeros(n, np.float32),
    }
    stored = StoredWeight(**{name: ir.Tensor(array, name=name) for name, array in arrays.items()})
    activation, group = get_format(kernel.activation), kernel.group
    return QuantizedGemm("a", activation, fmt, k, n, group, (1,), bool(group), stored, activation_group=group)


def ours(kernel: Kernel, m: int, n: int, k: int, rng: np.random.Generator, threads: int) -> Contestant:
    """PackedGemm in an onnxruntime session, its scales chosen so that one float32 result is the integer sum."""
    gemm = random_gemm(kernel, n, k, rng)
    limbs = 1 if fits_byte(gemm.activation) else 2
    base, kmax = limb_base(gemm.activation.kmax, limbs), gemm.activation.kmax
    zero = zero_point(kmax if limbs == 1 else round(kmax / base))
    low, high = 2 * zero - largest_code(gemm.activation, limbs), largest_code(gemm.activation, limbs)
    feeds: dict[str, NDArray[np.generic]] = {
        name: rng.integers(low, high + 1, (m, k)).astype(np.uint8) for name in ("high", "low")[:limbs]
    }
    codes = tuple(ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8)) for name in feeds)
    scale = ir.Value(name="scale", type=ir.TensorType(ir.DataType.FLOAT)) if kernel.group else None
    operand = Operand(codes[0], codes, (base, 1) if limbs == 2 else (1,), zero, scale)
    integers = sum(
        w * (feeds[v.name or ""].astype(np.float64) - zero) for w, v in zip(operand.weights, codes, strict=True)
    )
    if kernel.group:
        feeds["scale"] = np.ones((m, k // kernel.group, 1), np.float32)
    inputs = [*codes, *([] if scale is None else [scale])]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21, library.DOMAIN: VERSION}, name="g")
    end = ir.Node("", "Identity", [codes[0]], name="end")
    graph.append(end)
    product, _ = packed_gemm(GraphBuilder(graph, end, "a"), gemm, operand)
    graph.remove(end)
    graph.outputs.append(product.value)
    model = ir.Model(graph, ir_version=10)
    drop_unread_outputs(model)
    run = _session(model, threads, native=True)
    exact = (integers @ gemm.integers(np.float64).T).astype(np.float32) * np.float32(gemm.unit)
    return Contestant(partial(run, feeds), float(np.abs(run(feeds) - exact).max()) / gemm.unit)


def matmul_integer(m: int, n: int, k: int, rng: np.random.Generator, threads: int) -> Contestant:
    """onnxruntime's u8 x s8 of the whole range."""
    weight, codes = rng.integers(-127, 128, (k, n)).astype(np.int8), rng.integers(1, 256, (m, k)).astype(np.uint8)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape((m, k)))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    stored = [add_initializer(graph, ir.tensor(array, name=name)) for name, array in
              (("w", weight), ("zero", np.array(128, np.uint8)))]  # fmt: skip
    node = ir.Node("", "MatMulInteger", [x, *stored], name="product")
    node.outputs[0].name, node.outputs[0].type = "sum", ir.TensorType(ir.DataType.INT32)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    run = _session(ir.Model(graph, ir_version=10), threads, native=False)
    exact = (codes.astype(np.float64) - 128) @ weight.astype(np.float64)
    return Contestant(partial(run, {"x": codes}), float(np.abs(run({"x": codes}) - exact).max()))


def _session(model: ir.Model, threads: int, native: bool) -> Callable[[dict[str, NDArray[np.generic]]], NDArray]:
    import onnxruntime

    options = session_options(threads)
    if native:
        library.register(options)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def torch_linear(engine: str, m: int, n: int, k: int, rng: np.random.Generator) -> Contestant:
    """torch's quantized linear, which rounds its sums to 8 bits again."""
    import torch

    torch.backends.quantized.engine = engine
    codes, weight = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((m, k), (n, k)))
    x = torch.quantize_per_tensor(codes, 8 / 255, 128, torch.quint8)
    w = torch.quantize_per_tensor(weight, 8 / 255, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(w, None)
    return Contestant(partial(torch.ops.quantized.linear, x, packed, 1.0, 128), None)


def measure(m: int, n: int, k: int, rounds: int, threads: int) -> list[Json]:
    """Rows of all contestants at one size."""
    import torch

    rng = np.random.default_rng(0)
    contestants = {kernel.name: ours(kernel, m, n, k, rng, threads) for kernel in KERNELS}
    contestants[PEER] = matmul_integer(m, n, k, rng, threads)
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            contestants[f"{TORCH}, {engine}"] = torch_linear(engine, m, n, k, rng)
    if xnnpack.is_installed():
        for linear in xnnpack.LINEARS:
            contestants[linear.name] = Contestant(xnnpack.random_linear(linear, m, n, k, rng, threads).invoke, None)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            contestant.run()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, contestant in contestants.items():
        limbs = 2 if "E3M4" in name else 1
        operations = 2.0 * m * n * k * limbs
        best, middle = operations / min(seconds[name]), operations / median(seconds[name])
        rows.append(
            {
                "kernel": name,
                "m": m,
                "n": n,
                "k": k,
                "gop_per_s": round(best / 1e9, 3),
                "median_gop_per_s": round(middle / 1e9, 3),
                "largest_error_of_a_sum": contestant.error,
            }
        )
    return rows


def main() -> None:
    parser = record.parser("benchmarks.gemm_cpu", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    args = record.parsed(parser)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of torch
    import torch

    torch.set_num_threads(args.threads)
    rows, measured = [], [limits.measure(args.threads)]
    for m in args.rows:
        for n, k in CHANNELS:
            rows += measure(m, n, k, args.rounds, args.threads)
            measured.append(limits.measure(args.threads))
    limit = 2e-9 * max(row.byte_products_per_s for row in measured)  # at best, as the kernels
    for row in rows:
        row["share_of_limit"] = round(row["gop_per_s"] / limit, 3)
    document: Json = {
        "variant": measured[0].variant,
        "threads": args.threads,
        "limit_gop_per_s": round(limit, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "rows": rows,
    }
    columns = ("kernel", "m", "n", "k", "gop_per_s", "median_gop_per_s", "share_of_limit", "largest_error_of_a_sum")
    print(record.markdown(columns, ([row[column] for column in columns] for row in document["rows"])))
    slug = record.slug(f"{machine.cpu_name()} {machine.cpu_count()}cpu")
    print(record.write(f"gemm_{slug}", document, args.output_dir))


if __name__ == "__main__":
    main()
