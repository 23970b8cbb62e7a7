"""The outputs of all quantized linears in every target, against the float64 reference: one table, the worst first."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint import QuantizedLinear
from pipeline.backends.base import Arithmetic, LoweredGraph
from pipeline.distance import sqnr_db
from pipeline.polygraphy.reference_calls import ReferenceCalls
from pipeline.verify.probe import ProbedGraph


@dataclass(frozen=True)
class LayerRow:
    """One quantized linear. db: by target the SQNR of its output in the target's lowered graph, from the model's input
    on, so that flips of all layers before it count; nan where the graph has no such tensor. limit_db: by target, what
    float32 runs of the reference reach, see `reference_calls`."""

    name: str
    kind: str
    formats: str
    db: Mapping[str, float]
    limit_db: Mapping[str, float]

    @property
    def margin_db(self) -> float:
        """The least of all targets; nan is the worst there is."""
        margins = [self.db[target] - self.limit_db[target] for target in self.db]
        return -math.inf if any(map(math.isnan, margins)) else min(margins)


def layer_table(
    layers: Sequence[QuantizedLinear],
    graphs: Mapping[str, LoweredGraph],
    arithmetics: Mapping[str, Arithmetic],
    calls: ReferenceCalls,
    threads: int,
) -> list[LayerRow]:
    """A row for each of `layers`, by the least distance from its limit. graphs, arithmetics: lowered graphs by
    target, which are run whether its engine runs here or not, and what they compute in."""
    sqnrs = {target: _of_target(graph, calls, threads) for target, graph in graphs.items()}
    limits = {target: calls.limits[arithmetics[target]].layers for target in graphs}
    rows = [
        LayerRow(
            layer.name,
            layer.kind,
            f"{layer.weight_format} x {layer.activation_format}",
            {target: sqnrs[target].get(layer.name, math.nan) for target in graphs},
            {target: limits[target][layer.name] for target in graphs},
        )
        for layer in layers
    ]
    return sorted(rows, key=lambda row: row.margin_db)


def _of_target(graph: LoweredGraph, calls: ReferenceCalls, threads: int) -> dict[str, float]:
    """SQNR in dB of every linear's output in the first call."""
    probed, values = ProbedGraph(graph, threads), {}
    names = [name for name in calls.layers if name in probed.complete]
    for name, (probe,) in probed.probes(names, calls.inputs[:1]):
        expected = calls.layers[name]
        if name in calls.low_rank and probed.rows[name].low_rank is None:
            expected = expected - calls.low_rank[name]  # the graph adds it behind this tensor
        values[name] = sqnr_db(expected.reshape(probe.output.shape), probe.output)
    return values


def write_table(rows: Sequence[LayerRow], path: Path) -> None:
    """One line for each row, as CSV; numbers in dB."""
    targets = list(rows[0].db)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        columns = [column for target in targets for column in (f"{target}_db", f"{target}_limit_db")]
        writer.writerow(["layer", "kind", "weight x activation", *columns])
        for row in rows:
            numbers = [f"{value:.2f}" for target in targets for value in (row.db[target], row.limit_db[target])]
            writer.writerow([row.name, row.kind, row.formats, *numbers])
