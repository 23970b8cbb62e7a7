"""`verify --polygraphy DIR`: calls, what the reference gives in them, and scripts of `polygraphy run` for every target.

    inputs.json                     calls, for --load-inputs
    expected.json                   RunResults of the float64 reference, for --load-outputs
    layer_inputs.json, layers.json  the same of every quantized linear, in one call (of a large model left out)
    layers.csv                      those in all targets against the reference, the worst first
    feeds.py                        data loaders for graphs that read what others gave
    TARGET.sh, run.sh               a target's commands in their order; those of all targets

Polygraphy's own classes write the JSON files, so that the release that is installed reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint import QuantizedLinear
from export.onnx_files import read_graph
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.backends.base import Arithmetic, Arrays, LoweredGraph
from pipeline.bundle.bundle import Bundle
from pipeline.generate.case import is_large
from pipeline.polygraphy import commands
from pipeline.polygraphy.commands import Feed, Target, commands_of, script
from pipeline.polygraphy.layer_table import LayerRow, layer_table, write_table
from pipeline.polygraphy.reference_calls import ReferenceCalls, reference_calls
from pipeline.verify.reference_hooks import ARITHMETICS

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
RUNNER = "float64 reference"
TABLE, ALL = "layers.csv", "run.sh"
FEEDS_HEAD = '''\
"""Data loaders of `polygraphy run --data-loader-script`: a graph's inputs, out of the calls and of what was saved."""

from pathlib import Path

from polygraphy.comparator import RunResults
from polygraphy.json import load_json

FOLDER = Path(__file__).parent


def fed(names, before):
    calls = load_json(str(FOLDER / "inputs.json"))
    for name in before:
        [(_, results)] = RunResults.load(str(FOLDER / name)).items()
        for call, outputs in zip(calls, results, strict=True):
            call.update(outputs.items())
    return [{name: call[name] for name in names} for call in calls]
'''


def write_folder(
    folder: Path,
    bundle: Bundle,
    copy: Bundle,
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    lowered: Mapping[str, LoweredGraph],
    threads: int,
) -> None:
    """Write all files into `folder`, which is there.

    bundle: where its user has it; copy: a private copy of the same. layers: none of an autoencoder. lowered: its
    graphs by target. threads: of a lowered graph's calls.
    """
    recipe = copy.recipe
    # Scripts are for machines that run the engine, this one or another.
    engines: dict[str, Arithmetic] = {target: BACKENDS[target].arithmetic(recipe, runs_here=True) for target in lowered}
    graphs: dict[str, Arithmetic] = {target: ARITHMETICS[engines[target]].of_graph for target in lowered}
    calls = reference_calls(model, layers, recipe, {*engines.values(), *graphs.values()})
    _save_calls(calls.inputs, folder / commands.INPUTS)
    _save_results(calls.outputs, folder / commands.EXPECTED)
    rows = layer_table(layers, lowered, graphs, calls, threads) if layers else []
    if rows:
        write_table(rows, folder / TABLE)
        tell(rows)
    layer_limits: dict[str, float] = {}
    if rows and PORTABLE in lowered and not is_large(model):
        layer_limits = _save_layers(calls, lowered[PORTABLE], folder)

    def inputs_of(name: str) -> tuple[str, ...]:
        return tuple(value.name for value in read_graph(copy.path / name).graph.input)

    feeds = list[Feed]()
    for name in copy.targets:
        of_engine, of_graphs = (calls.limits[arithmetic[name]].outputs for arithmetic in (engines, graphs))
        target = Target(name, bundle, inputs_of, of_engine, of_graphs, layer_limits)
        of_target, of_feeds = commands_of(target)
        feeds += of_feeds
        (folder / f"{name}.sh").write_text(script(target, of_target), encoding="utf-8")
    (folder / commands.FEEDS).write_text(feeds_module(feeds), encoding="utf-8")
    (folder / ALL).write_text(script_of_all(copy.targets), encoding="utf-8")


def script_of_all(targets: Sequence[str]) -> str:
    """The text of run.sh: every target, and the status of the last one that fails."""
    each = (f'sh "$here/{name}.sh" "$@" || status=$?' for name in targets)
    return "\n".join(["#!/bin/sh", "set -u", 'here="$(dirname "$0")"', "status=0", *each, 'exit "$status"', ""])


def tell(rows: Sequence[LayerRow]) -> None:
    """Say in the log which linear is nearest to its limit; a warning where some are below."""
    worst, below = rows[0], sum(row.margin_db < 0 for row in rows)
    if below:
        words = "%d of %d quantized linears are below their limit, the worst is %s: %.1f dB; see %s"
        logger.warning(words, below, len(rows), worst.name, worst.margin_db, TABLE)
    else:
        words = "of %d quantized linears %s is nearest to its limit: %.1f dB above"
        logger.info(words, len(rows), worst.name, worst.margin_db)


def _save_calls(calls: Sequence[Arrays], path: Path) -> None:
    from polygraphy.json import save_json

    save_json(list(calls), str(path))


def _save_results(outputs: Sequence[Arrays], path: Path) -> None:
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add(list(outputs), runner_name=RUNNER)
    results.save(str(path))


def _save_layers(calls: ReferenceCalls, portable: LoweredGraph, folder: Path) -> dict[str, float]:
    """Write what the reference gives in place of each tensor that is the output of a quantized linear in the portable
    graph; returns the limit of each tensor, in dB."""
    expected, limits = {}, {}
    for row in portable.probes:
        without = calls.low_rank.get(row.layer) if row.low_rank is None else None
        whole = calls.layers[row.layer]
        expected[row.output] = whole if without is None else whole - without
        limits[row.output] = calls.limits["fp32"].layers[row.layer]
    _save_calls(calls.inputs[:1], folder / commands.LAYER_INPUTS)
    _save_results([expected], folder / commands.LAYERS)
    return limits


def feeds_module(feeds: Sequence[Feed]) -> str:
    """The text of feeds.py, with a function for each."""
    functions = (f"\n\ndef {f.function}():\n    return fed({list(f.names)}, {list(f.before)})\n" for f in feeds)
    return FEEDS_HEAD + "".join(functions)
