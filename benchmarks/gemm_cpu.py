"""Speed of the byte GEMMs and the attention of PixArt-XL on this CPU: `python -m benchmarks.gemm_cpu`.

The kernel library's PackedGemm with several formats beside onnxruntime's MatMulInteger, torch's quantized linear and,
where ai-edge-litert is installed, XNNPACK's linears, each once per round, on operands that use the whole range of their
formats. A row says how many operations a second the kernel did at best and by the median, what share of the machine's
measured rate of byte products that is, and how far its integer sums are from the exact ones: kernels without dot
products of bytes add pairs in saturating 16 bits.
Attention in float32 and of codes is measured as nanoseconds for a score and thread: a query with a key, that is its
product, its weight and the product with the value, 2 x 72 multiplications; that of a caption once without a mask and
once with one that hides most of its keys, which shows what masks cost. Keys and values of a caption are bytes already
where attention is of codes, as they are in all steps of a picture but the first.
Writes benchmarks/results/gemm_MACHINE.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks import record, xnnpack
from benchmarks.record import Json
from export.dialect.graph import GraphBuilder, add_initializer
from export.formats.attention import AttentionFormats
from export.formats.format import get_format, pack
from export.formats.operands import fits_byte, largest_code, limb_base, zero_point
from pipeline import machine
from pipeline.backends.cpu.packed_gemm import packed_gemm
from pipeline.backends.cpu.quantized_attention import attention_nodes
from pipeline.backends.cpu.quantizers import Operand
from pipeline.backends.cpu.token_chain import VERSION, drop_unread_outputs
from pipeline.backends.sessions import session_options
from pipeline.passes.quantized_gemm import QuantizedGemm, StoredWeight
from plugins.cpu import library, limits

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

FLOAT = ir.TensorType(ir.DataType.FLOAT)
ROWS = (256, 1024, 4096)
THREADS = (1, 2)
CHANNELS = ((1152, 1152), (4608, 1152), (1152, 4608))  # (N, K)
PEER, TORCH = "onnxruntime MatMulInteger", "torch quantized linear"
ENGINES = ("x86", "onednn", "fbgemm")
HEADS, HEAD_SIZE = 16, 72
CAPTION_TOKENS, CAPTION_WORDS = 120, 20  # keys of a caption, and those that are no padding
MASKED = np.float32(-10000)  # what diffusers adds to the scores of padding
ATTENTIONS = (None, AttentionFormats("E2M3", "E2M3"), AttentionFormats("INT8", "INT8"))  # None: float32


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
    Kernel("E2M3", "E2M3"),
    Kernel("INT8", "E2M3"),
    Kernel("INT8", "INT8"),
)


@dataclass(frozen=True)
class Call:
    """A call of a session of one output. It is written where the call before has written it, as torch and XNNPACK do:
    pages that the system maps for each result anew would be measured with them."""

    session: InferenceSession
    feeds: dict[str, NDArray[np.generic]]

    def result(self) -> NDArray[np.generic]:
        result: NDArray[np.generic] = self.session.run(None, self.feeds)[0]
        return result

    @cached_property
    def _binding(self) -> IOBinding:
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        for name, array in self.feeds.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        (output,) = self.session.get_outputs()
        binding.bind_ortvalue_output(output.name, OrtValue.ortvalue_from_numpy(self.result()))
        return binding

    def __call__(self) -> None:
        self.session.run_with_iobinding(self._binding)


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
    call = Call(_session(model, threads, native=True), feeds)
    exact = (integers @ gemm.integers(np.float64).T).astype(np.float32) * np.float32(gemm.unit)
    return Contestant(call, float(np.abs(call.result().astype(np.float64) - exact).max()) / gemm.unit)


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
    call = Call(_session(ir.Model(graph, ir_version=10), threads, native=False), {"x": codes})
    exact = (codes.astype(np.float64) - 128) @ weight.astype(np.float64)
    return Contestant(call, float(np.abs(call.result().astype(np.float64) - exact).max()))


def _session(model: ir.Model, threads: int, native: bool) -> InferenceSession:
    import onnxruntime

    options = session_options(threads)
    if native:
        library.register(options)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


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


def attention(
    formats: AttentionFormats | None, tokens: int, keys: int, hidden: int, heads: int, threads: int, kept: bool = False
) -> Call:
    """One call of the kernel library's attention of `heads` heads, normal q, k and v: float32 without formats.

    hidden: the last of the keys, masked as a caption's padding is; 0: no mask. kept: keys and values are bytes already,
    as those of a caption are in all steps of a picture but the first."""
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {
        name: rng.standard_normal((1, heads, rows, HEAD_SIZE), np.float32)
        for name, rows in (("q", tokens), ("k", keys), ("v", keys))
    }
    if hidden:
        mask = np.zeros((1, 1, 1, keys), np.float32)
        mask[..., keys - hidden :] = MASKED
        feeds["mask"] = mask
    values = {name: ir.Value(name=name, type=FLOAT) for name in feeds}
    if formats is None:
        options = [ir.AttrFloat32("scale", HEAD_SIZE**-0.5)]
        node = ir.Node(library.DOMAIN, "Attention", list(values.values()), options, name="attention")
        return _run([node], feeds, threads)
    inputs = [values.get(name) for name in ("q", "k", "v", "mask")]
    choices = {"qk_format": formats.qk, "pv_format": formats.pv, "scale": HEAD_SIZE**-0.5}
    first, second = attention_nodes(inputs, "attention", choices, {})
    if not kept:
        return _run([first, second], feeds, threads)
    (made,) = first.outputs
    ir.convenience.replace_all_uses_with(made, ir.Value(name="operands", type=made.type))
    operands = _run([first], feeds, threads).result()
    return _run([second], feeds | {"operands": operands}, threads)


def _run(nodes: list[ir.Node], feeds: dict[str, NDArray[np.generic]], threads: int) -> Call:
    """What the last of the nodes gives, the others lead to it, for those of the feeds that they read."""
    made = {value for node in nodes for value in node.outputs}
    read = {value: None for node in nodes for value in node.inputs if value is not None and value not in made}
    (out,) = nodes[-1].outputs
    out.name, out.type = out.name or "out", out.type or FLOAT
    imports = {"": 21, library.DOMAIN: VERSION}
    graph = ir.Graph(list(read), [out], nodes=nodes, opset_imports=imports, name="g")
    fed = {str(value.name): feeds[str(value.name)] for value in read}
    return Call(_session(ir.Model(graph, ir_version=10), threads, native=True), fed)


def measure_attention(tokens: int, heads: int, rounds: int, threads: int) -> list[Json]:
    """Rows of all attentions at one number of tokens: among themselves, and to a caption without and with a mask."""
    reaches = ((tokens, 0), (CAPTION_TOKENS, 0), (CAPTION_TOKENS, CAPTION_TOKENS - CAPTION_WORDS))
    runs = {
        (formats, keys, hidden): attention(formats, tokens, keys, hidden, heads, threads, kept=keys == CAPTION_TOKENS)
        for keys, hidden in reaches
        for formats in ATTENTIONS
    }
    seconds: dict[tuple[AttentionFormats | None, int, int], list[float]] = {case: [] for case in runs}
    for _ in range(rounds + 1):  # the first is not counted: it takes memory from the system
        for case, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[case].append(time.perf_counter() - started)
    return [
        {
            "attention": "float32" if formats is None else f"{formats.qk} x {formats.pv}",
            "tokens": tokens,
            "keys": keys,
            "hidden_keys": hidden,
            "ns_per_score": round(1e9 * min(times[1:]) / (heads * tokens * keys / threads), 3),
            "median_ns_per_score": round(1e9 * median(times[1:]) / (heads * tokens * keys / threads), 3),
        }
        for (formats, keys, hidden), times in seconds.items()
    ]


def measure_threads(threads: int, rows: list[int], rounds: int) -> Json:
    """GEMMs and attentions with so many threads, and the limits measured between them."""
    import torch

    torch.set_num_threads(threads)
    gemms, measured = [], [limits.measure(threads)]
    for m in rows:
        for n, k in CHANNELS:
            gemms += measure(m, n, k, rounds, threads)
            measured.append(limits.measure(threads))
    attentions = [row for tokens in rows for row in measure_attention(tokens, HEADS, rounds, threads)]
    limit = 2e-9 * max(row.byte_products_per_s for row in measured)  # at best, as the kernels
    for row in gemms:
        row["share_of_limit"] = round(row["gop_per_s"] / limit, 3)
    return {
        "threads": threads,
        "limit_gop_per_s": round(limit, 1),
        "limit_gflop_per_s": round(2e-9 * max(row.float_products_per_s for row in measured), 1),
        "load_average": round(os.getloadavg()[0], 2),
        "gemms": gemms,
        "attentions": attentions,
    }


def _table(rows: list[Json]) -> str:
    return record.markdown(rows[0], ([row[column] for column in rows[0]] for row in rows))


def main() -> None:
    parser = record.parser("benchmarks.gemm_cpu", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument(
        "--rows", type=int, nargs="+", default=list(ROWS), help="rows of the GEMMs, tokens of attention"
    )
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    args = record.parsed(parser)
    os.environ["OMP_NUM_THREADS"] = str(max(args.threads))  # of torch
    runs: list[Json] = []
    for threads in args.threads:
        runs.append(measure_threads(threads, args.rows, args.rounds))
        print(f"\n{threads} threads: {runs[-1]['limit_gop_per_s']} GOP/s of bytes at best\n")
        print(_table(runs[-1]["gemms"]), _table(runs[-1]["attentions"]), sep="\n\n")
    document: Json = {"variant": limits.measure(1).variant, "runs": runs}
    slug = record.slug(f"{machine.cpu_name()} {machine.cpu_count()}cpu")
    print(record.write(f"gemm_{slug}", document, args.output_dir))


if __name__ == "__main__":
    main()
