"""Quantizers, those of attentions among them, on numbers that no call reaches: tokens near zero, of zeros only, and
huge ones.

The graph is cut at the tensor that a quantizer reads, and fed that of a real call times a factor. Where the quantizer
is one op with what stands before it (a norm, GELU), its inputs are fed so, and it is judged by what it then reads. Of
an attention q, k and v are fed so, beside its mask, and its result is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from pipeline.backends.base import Arrays
from pipeline.passes.probes import ProbeRow
from pipeline.progress import raise_if_stopped
from pipeline.verify.attention_oracle import AttentionNumbers, check_attention
from pipeline.verify.effort import MOST_SCORES
from pipeline.verify.oracle import check_quantizer
from pipeline.verify.probe import Beside, ProbedGraph, activation_integers

# From the floor of absmax (1e-30) to far beyond what float16 holds; squares of the largest stay finite in float32.
FACTORS = (1e-25, 1e-6, 0.0, 1e12)
# Tokens of a sample that a large model's quantizers get: they treat each token alike.
LARGE_TOKENS = 32


@dataclass(frozen=True)
class ExtremeResult:
    """The quantizer of `layer` (one of those that share it) on its tokens times `factor`, against the oracle; or those
    of an attention, of which output_error is known alone."""

    layer: str
    factor: float
    codes_inadmissible: int = 0
    scale_error: float = 0.0
    output_error: float = 0.0

    @property
    def passed(self) -> bool:
        """Does rounding explain all that was found?"""
        return not self.codes_inadmissible and self.scale_error <= 1 and self.output_error <= 1


def read_by_quantizers(probed: ProbedGraph, layers: Sequence[QuantizedLinear]) -> dict[str, list[str]]:
    """By layer the tensors that its quantizer reads, of one layer for each quantizer."""
    quantizers = {(probed.rows[layer.name].x, probed.rows[layer.name].codes): layer.name for layer in layers}
    return {name: _fed(probed, probed.rows[name]) for name in quantizers.values()}


def read_by_attentions(probed: ProbedGraph, attentions: Iterable[str]) -> dict[str, list[str]]:
    """By attention the tensors that it reads, of which an initializer is none."""
    rows = [probed.attentions[name] for name in attentions]
    return {row.layer: [name for name in (row.q, row.k, row.v, row.mask) if name in probed.produced] for row in rows}


def kept_beside(
    probed: ProbedGraph, layers: Sequence[QuantizedLinear], attentions: Iterable[str], call: int, tokens: int | None
) -> Beside:
    """What `extreme_results` feeds: kept in the call of that place, of each sample so many tokens at most."""
    of_attentions = read_by_attentions(probed, attentions)
    rows = [probed.attentions[name] for name in of_attentions]
    heads = frozenset(name for row in rows for name in (row.q, row.k, row.v))
    masks = frozenset(row.mask for row in rows)
    return Beside(call, read_by_quantizers(probed, layers) | of_attentions, tokens, heads, masks)


def extreme_results(
    probed: ProbedGraph,
    layers: Sequence[QuantizedLinear],
    read: Beside,
    call: Arrays,
    attentions: Mapping[str, AttentionNumbers] = MappingProxyType({}),
) -> list[ExtremeResult]:
    """Every quantizer of a graph on every factor times the tensors `read`, kept by the names of `kept_beside` in the
    call with the inputs `call`."""
    quantizers = [layer for layer in layers if layer.name in read.names]
    rows_of_attentions = {name: probed.attentions[name] for name in attentions if name in read.names}
    if not quantizers and not rows_of_attentions:
        return []
    rows, fed = {layer.name: probed.rows[layer.name] for layer in quantizers}, read.arrays
    fused = {row.x for row in rows.values() if row.x not in read.names[row.layer]}
    scales = {row.act_scale for row in rows.values() if row.act_scale is not None}
    asked = fused.union(scales, *(row.codes for row in rows.values()))
    run = probed.cut(sorted(asked.union(row.output for row in rows_of_attentions.values())), fed)
    results = []
    for factor in FACTORS:
        scaled = {name: array if name in read.masks else _times(array, factor) for name, array in fed.items()}
        computed = run(call | scaled)
        tensors = {**scaled, **computed}
        for layer in quantizers:
            raise_if_stopped()
            results.append(_judge(layer, rows[layer.name], tensors, factor))
        for name, row in rows_of_attentions.items():
            # What one attention gives may be what another was fed.
            probe = probed.attention_probe(row, {**computed, **scaled, row.output: computed[row.output]})
            error = check_attention(probe, attentions[name], MOST_SCORES).output_error
            results.append(ExtremeResult(name, factor, output_error=error))
    return results


def _fed(probed: ProbedGraph, row: ProbeRow) -> list[str]:
    """The tensors to feed: what the quantizer reads, or what the op reads that gives that tensor beside the codes."""
    node = next((node for node in probed.model.graph.node if row.x in node.output), None)
    if node is None or not set(row.codes) & set(node.output):
        return [row.x]
    return [name for name in node.input if name and name in probed.produced]


def _times(array: NDArray, factor: float) -> NDArray:
    """Floats times the factor, within what their type holds; integers as they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    largest = np.finfo(array.dtype).max
    with np.errstate(invalid="ignore"):  # masks of -inf times 0 are NaN, as they are in the graph
        return np.clip(array.astype(np.float64) * factor, -largest, largest).astype(array.dtype)


def _judge(layer: QuantizedLinear, row: ProbeRow, tensors: Mapping[str, NDArray], factor: float) -> ExtremeResult:
    x = tensors[row.x].reshape(-1, layer.in_features)
    integers = activation_integers(row, [tensors[name].reshape(x.shape) for name in row.codes])
    scale = tensors[row.act_scale].reshape(len(x), -1) if row.act_scale else None
    return ExtremeResult(layer.name, factor, *check_quantizer(layer, x, integers, scale))
