"""A whole PixArt-XL/2 denoiser: bf16 by eager torch and torch.compile against ours, all in CUDA graphs.

Weights are random and packed with exact groups of 64, as the recipe pixart_w4a6 has them. torch.compile gets the block,
as is usual for deep models, and at 1024 pixels the whole model too if the budget lasts. Replaying a graph is the time
of the kernels; a call without one shows what launching adds, and how long the host is busy with it. What the engines of
the cuda backend do otherwise is in every row: OTHERWISE.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.denoiser import Denoiser, Run, Size, fake_quantized, randomize, run_block, sample
from benchmarks.gpu.gemm import Form
from benchmarks.gpu.quantized_denoiser import (
    ACTIVATION,
    QuantizedDenoiser,
    quantize_blocks,
    quantized,
    weight_bytes,
)
from benchmarks.gpu.run import Device, Task, error_line, failed_of
from benchmarks.gpu.targets import LARGE_PIXELS
from benchmarks.gpu.timing import Call, capture_all, contest, flusher, host_milliseconds, interleaved
from benchmarks.gpu.weights import Packed, relative_error
from benchmarks.record import Json
from benchmarks.shapes import EXACT_64, WORKLOADS
from export.models.description import LATENT_PIXELS

SECONDS = 3.0  # of timing, for each row


FORMS = {
    "packed": Form("packed_gemm"),
    "expanded": Form("expanded_gemm"),
    "expanded_int8": Form("expanded_gemm", integers=True),
}
OURS, COMPILED = tuple(FORMS), ("bf16_compiled_blocks", "bf16_compiled_whole")
SIZES = ((LARGE_PIXELS, 1), (512, 1), (256, 1), (LARGE_PIXELS, 2))  # (pixels, batch) of the rows
LEAST_PIXELS = min(pixels for pixels, _ in SIZES)
# Ours and plain bf16 arithmetic on the same grid round the stream alike, so neither may be far from float32's result:
# at most twice as far as the plain one, whose roundings are as many.
TIMES_PLAIN = 2.0
# This denoiser, beside an engine of pipeline/backends/cuda/build.py of the same recipe.
OTHERWISE = {
    "dtype": "bf16 between the kernels of all contestants; the engine: fp16",
    "recomputed": "keys and values of the cross-attention, in every call of all contestants; the engine: once a prompt",
}
ATTENTION = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Models:
    """One set of weights in all forms. allocated: bytes that torch holds for each of ours, its scales included.

    refused: why a form of ours could not be made.
    """

    size: Size
    bf16: Denoiser
    weights: list[dict[str, Packed]]
    ours: dict[str, QuantizedDenoiser] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def make_models(device: Device, size: Size) -> Models:
    """Random weights, quantized; on the device. A form that cannot be made is named."""
    with torch.device(device.type):
        bf16 = randomize(Denoiser(size, 1)).to(torch.bfloat16).requires_grad_(False)
    start = torch.cuda.memory_allocated()
    weights = quantize_blocks(bf16, EXACT_64)
    models = Models(size, bf16, weights)
    for name, form in FORMS.items():
        try:
            models.ours[name] = quantized(bf16, weights, form=form)
        except Exception as error:  # the other forms can be measured without it
            models.refused[name] = error_line(error)
        models.allocated[name] = torch.cuda.memory_allocated() - start
        start = torch.cuda.memory_allocated()
    return models


def weights_row(models: Models) -> Json:
    """Bytes of all weights of the denoiser, bf16 and ours; what is not quantized counts as bf16 in both."""
    bf16 = 2 * sum(x.numel() for x in models.bf16.parameters())
    counted = {name: weight_bytes(models.bf16, model.blocks) for name, model in models.ours.items()}
    kept = 2 * sum(x.numel() for name, x in models.bf16.named_parameters() if ".linears." not in name)
    return {
        "parameters": bf16 // 2,
        "bf16_bytes": bf16,
        "bytes": counted,
        "bytes_not_quantized": kept,
        "allocated_for_blocks": models.allocated,
        "packed_of_bf16": counted["packed"] / bf16,
        "expanded_of_bf16": counted["expanded"] / bf16,
    }


@torch.no_grad()
def numbers_row(models: Models, pixels: int) -> Json:
    """Ours, and the same in plain bf16 arithmetic, from the float32 run on dequantized weights and activations."""
    models.bf16.resize(grid(models.size, pixels))
    inputs = sample(models.bf16, 1)
    expected = fake_quantized(models.bf16, models.weights, ACTIVATION, torch.float32)(*(x.float() for x in inputs))
    plain = relative_error(fake_quantized(models.bf16, models.weights, ACTIVATION, torch.bfloat16)(*inputs), expected)
    errors = {name: relative_error(model(*inputs), expected) for name, model in models.ours.items()}
    return {
        "pixels_compared": pixels,
        "error": errors,
        "plain_bf16_error": plain,
        "quantization_costs": relative_error(models.bf16(*inputs), expected),
        "passed": all(error <= TIMES_PLAIN * plain for error in errors.values()),
        **failed_of(models.refused, OURS),
    }


def grid(size: Size, pixels: int) -> int:
    return pixels // LATENT_PIXELS // size.patch


def contestants_of(models: Models, inputs: tuple[Tensor, ...], whole: bool) -> dict[str, Callable[[], Tensor]]:
    """Calls of the denoiser; whole: torch.compile gets all of it, beside the quicker of ours, else each block."""
    if whole:
        compiled = torch.compile(models.bf16, dynamic=False, fullgraph=True)
        quick = {name: partial(model, *inputs) for name, model in models.ours.items() if name == "expanded"}
        return {"bf16_compiled_whole": partial(compiled, *inputs), **quick}
    block: Run = torch.compile(run_block, dynamic=False, fullgraph=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "bf16_eager": lambda: models.bf16(*inputs),
        "bf16_compiled_blocks": lambda: models.bf16(*inputs, run=block),
    }
    return calls | {name: partial(model, *inputs) for name, model in models.ours.items()}


@torch.no_grad()
def times_row(models: Models, flush: Call, pixels: int, batch: int, whole: bool = False) -> Json:
    """One row: kernel time (a graph's replay), time without a graph, and the host's share, of every contestant."""
    torch._dynamo.reset()
    models.bf16.resize(grid(models.size, pixels))
    inputs = sample(models.bf16, batch)
    calls = contestants_of(models, inputs, whole)
    graphs, refused = capture_all({name: [call] for name, call in calls.items()})
    refused = models.refused | refused
    times = interleaved({name: (graph.replay, 1) for name, graph in graphs.items()}, flush, SECONDS)
    bare = interleaved({name: (calls[name], 1) for name in graphs}, flush, SECONDS / 2)
    rows = {
        name: row
        | {
            "ungraphed_ms": bare[name]["latency_ms"],
            "launch_ms": host_milliseconds(calls[name]),
            "graph_launch_ms": host_milliseconds(graphs[name].replay),
        }
        for name, row in times.items()
    }
    flops = sum(row.flops for row in WORKLOADS["pixart"].at(pixels).gemms(batch))
    return {
        "pixels": pixels,
        "batch": batch,
        "gemm_flops": flops,
        "contestants": rows,
        "refused": refused,
        "ratios": ratios(rows),
        "engine_otherwise": OTHERWISE,
        **failed_of(refused, OURS),
    }


@torch.no_grad()
def attention_row(size: Size, device: str, flush: Call, pixels: int) -> Json:
    """Self-attention of one block by each of torch's implementations, in the bf16 that all denoisers here give it: how
    much of their time no GEMM can save."""
    shape = (1, size.heads, grid(size, pixels) ** 2, size.width // size.heads)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    flops = 4 * shape[1] * shape[2] ** 2 * shape[3]
    calls = {name: [partial(attend, name, q, k, v)] for name in ATTENTION}
    rows, refused = contest(calls, flush, SECONDS / 3, lambda _, ms: {"tflops": flops / ms / 1e9})
    return {
        "pixels": pixels,
        "heads": shape[1],
        "tokens": shape[2],
        "head_size": shape[3],
        "contestants": rows,
        "refused": refused,
    }


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v [B, heads, tokens, size] by one implementation; "default": the one torch takes."""
    backend = ATTENTION[name]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v)


def ratios(rows: Json) -> dict[str, float]:
    """Speed of the quicker of ours, of eager bf16's and of the quicker compiled one's; and of each of ours.

    >>> row = lambda ms: {"latency_ms": ms}
    >>> ratios({"bf16_eager": row(6.0), "bf16_compiled_blocks": row(4.0), "packed": row(4.0), "expanded": row(2.0)})
    {'over_eager': 3.0, 'over_compiled': 2.0, 'packed_over_compiled': 1.0, 'expanded_over_compiled': 2.0}
    """
    times = {name: row["latency_ms"] for name, row in rows.items()}
    ours = {name: times[name] for name in OURS if name in times}
    compiled = [times[name] for name in COMPILED if name in times]
    speedups = {}
    if ours and "bf16_eager" in times:
        speedups["over_eager"] = times["bf16_eager"] / min(ours.values())
    if ours and compiled:
        speedups["over_compiled"] = min(compiled) / min(ours.values())
        speedups |= {f"{name}_over_compiled": min(compiled) / time for name, time in ours.items()}
    return speedups


def tasks(device: Device) -> list[Task]:
    """Bytes and numbers first; then LARGE_PIXELS, which the target is about; the whole model compiled last.

    The models are made by the first row that needs them; should that fail, by the next one.
    """
    flush, size = flusher(device.l2_bytes), Size()
    models = cache(partial(make_models, device, size))

    def times(pixels: int, batch: int, whole: bool = False) -> Json:
        return times_row(models(), flush, pixels, batch, whole)

    return [
        Task("weights", lambda: weights_row(models())),
        Task(f"numbers at {LEAST_PIXELS} pixels", lambda: numbers_row(models(), LEAST_PIXELS), 5.0),
        *(Task(f"{pixels} pixels, batch {batch}", partial(times, pixels, batch), 20.0) for pixels, batch in SIZES),
        Task(
            f"attention alone at {LARGE_PIXELS} pixels",
            lambda: attention_row(size, device.type, flush, LARGE_PIXELS),
            4.0,
        ),
        Task(f"numbers at {LARGE_PIXELS} pixels", lambda: numbers_row(models(), LARGE_PIXELS), 8.0),
        Task(f"{LARGE_PIXELS} pixels, batch 1, compiled whole", lambda: times(LARGE_PIXELS, 1, whole=True), 85.0),
    ]
