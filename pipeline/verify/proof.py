"""Verification: every parity gate of a build, for every target, and the report that shows them.

`python -m pipeline.verify BUNDLE` checks a finished bundle again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from pipeline import machine
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arithmetic, Arrays, Engine, LoweredGraph
from pipeline.backends.feeds import TooLargeError
from pipeline.backends.side_by_side import side_by_side
from pipeline.generate.case import AnyCase, Run, TextCase, is_large
from pipeline.generate.sampling import take_samples
from pipeline.progress import track
from pipeline.recipe import Recipe
from pipeline.verify import attentions as attention
from pipeline.verify.attention_oracle import AttentionProbe
from pipeline.verify.attentions import Attentions, attention_gates
from pipeline.verify.autoencoder import verify_half
from pipeline.verify.calls import LARGE_TEXT_NOTE, call_errors, is_large_text, state_result
from pipeline.verify.effort import Effort, effort_for, note, quick_effort, quick_pictures
from pipeline.verify.extremes import LARGE_TOKENS, extreme_results, kept_beside
from pipeline.verify.gates import (
    LAYER_RULES,
    calls_gates,
    coverage_gate,
    end_gates,
    first_nonfinite,
    fp16_gate,
    layer_gates,
    notes_on_layers,
    quantization_gates,
    quantizers_gate,
    repeats_gate,
    segments_gate,
    step_results,
)
from pipeline.verify.oracle import ActivationOracle, LinearCheck, LinearProbe, activation_oracle, check_linear, joined
from pipeline.verify.probe import Beside, ProbedGraph
from pipeline.verify.reference_hooks import ARITHMETICS
from pipeline.verify.report import Gate, LayerResult, Report, write_layers_csv
from pipeline.verify.segments import SegmentCheck
from pipeline.verify.study import Realisations, Study, study

if TYPE_CHECKING:
    import torch

    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
# Targets of a large model that are judged at the same time: each takes some 2 GB besides the models.
TARGETS_AT_ONCE = 2


def verify(
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    lowered: Mapping[str, LoweredGraph],
    engines: Mapping[str, Engine],
    recipe: Recipe,
    out_dir: Path,
    threads: int | None = None,
    quick: str | None = None,
) -> Report:
    """All gates of design: `layers` are what every engine must compute, none of an autoencoder. Writes the report's
    files into `out_dir`.

    quick: less of each target is run, and this note begins the report; `recipe` is a `quick_recipe` (effort.py).

    A target of `lowered` without an entry in `engines` is judged by its lowered graph in onnxruntime, and the report
    says so. threads: how many to use, see `machine.threads`; targets are judged side by side, of a large model
    TARGETS_AT_ONCE. Raises ContractError where a lowered graph cannot be read at all.
    """
    from pipeline.verify.page import write_page

    notes = [] if quick is None else [quick]
    if model.family.half is not None:
        return verify_half(model, lowered, engines, recipe, out_dir, notes)
    arithmetics = {target: BACKENDS[target].arithmetic(recipe, target in engines) for target in lowered}
    of_graphs = {ARITHMETICS[arithmetic].of_graph for arithmetic in arithmetics.values()}
    threads = machine.threads(threads)
    pictures_asked = 0 if quick is None else quick_pictures(model)
    reference = study(model, layers, recipe, {*arithmetics.values(), *of_graphs}, threads, pictures_asked)
    at_once = min(threads, len(lowered), TARGETS_AT_ONCE if is_large(model) else threads)
    # A large model's last target has the machine to itself, and its operations are large enough for all threads.
    threads_each = threads if is_large(model) else threads // at_once
    report = Report(gates=quantization_gates(reference, recipe, of_pictures=quick is None), notes=notes)
    if is_large_text(model):
        report.notes.append(LARGE_TEXT_NOTE)

    def one(target: str) -> tuple[Report, NDArray[np.float32]]:
        part, graph = Report(), lowered[target]
        judged = (target, model, layers, graph, engines.get(target), reference, part, arithmetics[target])
        effort = whole_effort(target, reference, is_large(model), target in engines)
        pictures = verify_target(*judged, effort if quick is None else quick_effort(effort), threads_each)
        find_overflow = BACKENDS[target].overflow(graph, recipe)
        if find_overflow is not None:
            part.gates.append(fp16_gate(target, find_overflow(overflow_calls(reference, is_large(model)))))
        return part, pictures

    # The slowest first, so that no thread is left with it at the end.
    order = sorted(lowered, key=lambda target: -BACKENDS[target].speed_rank)
    by_target = dict(zip(order, side_by_side([partial(one, target) for target in order], at_once), strict=True))
    pictures = {target: by_target[target][1] for target in lowered}
    for target in lowered:
        report.add(by_target[target][0])
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "parity.json").write_text(report.to_json(), encoding="utf-8")
    write_layers_csv(report, out_dir / "layers.csv")
    write_page(report, model, recipe, reference, pictures, out_dir)
    for gate in report.failures():
        logger.error("gate %s: %g %s, limit %g; %s", gate.name, gate.value, gate.unit, gate.limit, gate.why)
    return report


def verify_target(
    target: str,
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    graph: LoweredGraph,
    engine: Engine | None,
    study: Study,
    report: Report,
    arithmetic: Arithmetic = "fp32",
    effort: Effort | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Append one target's gates and rows to `report`; returns the engine's pictures.

    arithmetic: of the engine, see `ARITHMETICS`, which has that of the lowered graph, in which layers are looked at, as
    well. effort: what is run; None: all that `effort_for` asks for. threads: with two or more a linear and the stretch
    before it are judged together.
    """
    probed, single = ProbedGraph(graph, threads), study.float32[arithmetic]
    of_graph_name = ARITHMETICS[arithmetic].of_graph
    of_graph = study.float32[of_graph_name]
    expected = {ref.name: ref.module for ref in model.linears()}
    present = [layer for layer in layers if layer.name in probed.complete and layer.name in expected]
    report.gates.append(coverage_gate(target, {layer.name for layer in present}, list(expected)))
    assert study.stretches is not None
    whole = whole_effort(target, study, is_large(model), engine is not None)
    effort = effort or whole
    calls = looked_at(study, effort)
    # Of the call with fewest tokens: that of one sample, where it is looked into.
    smallest = min(calls, key=lambda text: calls[text][model.family.streamed].size)
    order = {name: place for place, name in enumerate(study.stretches.order(study.calls[0]))}
    present.sort(key=lambda layer: order[layer.name])
    quantized = study.stretches.attentions
    found = {name: numbers for name, numbers in quantized.items() if name in probed.complete_attentions}
    attentions = Attentions(found, list(order))
    with SegmentCheck(target, study.stretches, calls, of_graph_name) as segments:
        complete = len(present) + len(found) == len(
            order
        )  # else a coverage gate fails, and nothing behind a gap can be judged
        checked = segments if complete else None
        tokens = LARGE_TOKENS if is_large(model) else None
        read = kept_beside(probed, present, found, list(calls).index(smallest), tokens)
        results = layer_results(
            target,
            present,
            expected,
            probed,
            study,
            of_graph,
            calls,
            effort.probed,
            checked,
            threads or 1,
            read,
            attentions,
        )
    report.layers += results
    report.segments += segments.results
    report.attentions += attentions.results
    report.gates += [segments_gate(target, segments.results), *tables_gate(target, model, probed)]
    report.gates += attention_gates(target, attentions.results, quantized)
    report.gates.append(
        quantizers_gate(target, extreme_results(probed, present, read, calls[smallest], found), smallest)
    )
    run = study.judged(engine.run if engine else probed.denoiser())
    if engine is None:
        report.notes.append(f"{target}: {BACKENDS[target].not_run_note(graph)}")
    errors = study.errors(run, effort.steps, f"verify {target}: steps")
    report.steps += step_results(target, errors, study, single, effort.steps)
    special = [call for call in study.special_calls if len(call.rows) in effort.special]
    strange = call_errors(special, study.pool_exact, run)
    if engine is not None and effort.state:
        calls_before = len(effort.steps) + len(special)
        state = state_result(special, study.pools, model, study.pool_exact, run, calls_before, study.nan_reach)
        strange += state.errors
        report.gates.append(repeats_gate(target, state))
    report.gates += calls_gates(target, strange, study, single, errors.samples)
    pictures = drawn(run, study.case.first(effort.pictures)) if effort.pictures else study.pictures["reference"][:0]
    nonfinite = errors.nonfinite + int(np.count_nonzero(~np.isfinite(pictures)))
    where = first_nonfinite(errors, pictures)
    report.gates += layer_gates(target, results, nonfinite, where, attentions.results, attentions.order)
    report.gates += end_gates(target, errors, pictures, study, single)
    report.notes += notes_on_layers(target, results)
    less = note(target, effort, *_extent(study)) if effort == whole else None  # else whoever asked for it says so
    report.notes += filter(None, [less, attention.note(target, attentions.results)])
    if ARITHMETICS[arithmetic].note:
        report.notes.append(f"{target}: {ARITHMETICS[arithmetic].note}")
    return pictures


def whole_effort(target: str, study: Study, large: bool, runs: bool) -> Effort:
    """What a whole verification runs of a target; arguments as of `effort_for`."""
    return effort_for(target, *_extent(study), large=large, runs=runs)


def _extent(study: Study) -> tuple[int, tuple[int, ...], int]:
    """All steps, those whose layers are looked at, and all pictures."""
    return study.case.n_steps, study.probed, len(study.case.prompts) if study.case.makes_pictures else 0


def looked_at(study: Study, effort: Effort) -> dict[str, Arrays]:
    """The calls whose inside is looked at: the probed steps, and those that drawing does not make, of whose equal
    samples the first: each is computed by itself."""
    calls = {f"step {i + 1}": study.calls[i] for i in effort.probed}
    for call in study.special_calls:
        if len(call.rows) in effort.inside:
            places = [place for place, row in enumerate(call.rows) if row not in call.rows[:place]]
            calls[call.text] = take_samples(call.inputs, places[: effort.samples], study.case.shared)
    return calls


def overflow_calls(study: Study, large: bool) -> dict[str, Arrays]:
    """The calls in which FP16 is looked at: the first step, and the special call with the largest latents; of a large
    model one sample of the first step alone."""
    first = study.calls[study.probed[0]]
    if large:
        return {"step 1, sample 1": take_samples(first, [0], study.case.shared)}
    if not study.case.makes_pictures:
        return {"step 1": first, **{call.text: call.inputs for call in study.special_calls[-1:]}}
    special = max(study.special_calls, key=lambda call: float(np.abs(call.inputs["hidden_states"]).max()))
    return {"step 1": first, special.text: special.inputs}


def tables_gate(target: str, model: LoadedModel, probed: ProbedGraph) -> list[Gate]:
    """Every embedding table stands in the graph, number for number: no call reads all of its rows."""
    import torch

    tables = {path: part for path, part in model.module.named_modules() if isinstance(part, torch.nn.Embedding)}
    other = [path for path, part in tables.items() if not probed.holds(part.weight.detach().numpy())]
    why = "embedding tables that stand in the graph number for number, of all that the model has"
    why += f"; {other[0]} does not, for any call: it was rounded or changed on the way there" if other else ""
    count = len(tables)
    return [Gate(f"{target}/tables", count - len(other), count, "tables", why, at_most=False)] if tables else []


def drawn(run: Run, case: AnyCase) -> NDArray[np.float32]:
    """The engine's pictures; NaN where it drives its own latents beyond the numbers that it takes."""
    try:
        return case.draw(run)
    except TooLargeError as error:
        assert not isinstance(case, TextCase), "ids have no magnitude"
        logger.warning("the pictures diverge: %s", error)
        return np.full_like(case.noise, np.nan)


# --- layers ---------------------------------------------------------------------------------------------------------

# What a row of the report has by the same name as a layer, and as what was found about it.
OF_LAYER = ("name", "kind", "weight_format", "granularity", "group_size", "size_bytes")
OF_CHECK = (
    "gemm_max_abs_diff", "codes_inadmissible", "scale_error", "output_error", "nonfinite", "operand_max_abs_diff"
)  # fmt: skip


def layer_results(
    target: str,
    layers: Sequence[QuantizedLinear],
    modules: Mapping[str, torch.nn.Linear],
    probed: ProbedGraph,
    study: Study,
    single: Realisations,
    calls: Mapping[str, Arrays],
    steps: Sequence[int],
    segments: SegmentCheck | None = None,
    threads: int = 1,
    beside: Beside | None = None,
    attentions: Attentions | None = None,
) -> list[LayerResult]:
    """Every linear of one target in `calls`, of which the first are those of `steps`, out of `Study.probed`. `segments`
    is told of each, and needs them to be all, in the order of computation; beside the linear itself, with `threads`.
    beside: see `ProbedGraph.all_probes`. attentions: are judged among the linears, as they are computed."""
    by_name = {layer.name: layer for layer in layers}
    names = list(by_name)
    if attentions is not None:
        names = [name for name in attentions.order if name in by_name or name in attentions.numbers]
    results, outputs = [], list[Arrays]()
    known: tuple[tuple[str, bytes], ActivationOracle] | None = None
    of_layers = probed.all_probes(names, list(calls.values()), outputs, beside)
    for name, every in track(of_layers, len(names), f"verify {target}: linears"):
        if name not in by_name:
            assert attentions is not None
            of_attention = [probe for probe in every if isinstance(probe, AttentionProbe)]
            attentions.judge(target, name, probed.attentions[name].path, dict(zip(calls, of_attention, strict=True)))
            if segments is not None:
                segments.at_attention(name, of_attention)
            continue
        probes = [probe for probe in every if isinstance(probe, LinearProbe)]
        layer, row = by_name[name], probed.rows[name]
        quantizer = (row.x, quantizer_key(layer))
        # q, k and v read one quantizer and follow each other.
        shared = None if known is None or known[0] != quantizer else known[1]
        work: list[Callable[[], tuple[LinearCheck, ActivationOracle] | None]] = [
            partial(_checked, layer, probes, shared)
        ]
        if segments is not None:
            work.append(partial(segments.at, name, probes))
        checked, *_ = side_by_side(work, threads)
        assert checked is not None
        check, known = checked[0], (quantizer, checked[1])
        result = LayerResult(
            target=target,
            path=row.path,
            activation_format=activation_label(layer),
            codes_equal_share=1 - check.codes_different / check.codes,
            codes_limit_share=1 - check.codes_ambiguous / check.codes,
            input_sqnr_db=study.input_db(name, {step: probe.x for step, probe in zip(steps, probes, strict=False)}),
            input_limit_db=single.layer_db.get(name, math.nan),
            weight_sqnr_db=study.weight_db(layer, modules[name]),
            calls=worst_calls(layer, dict(zip(calls, probes, strict=True)), check),
            **{key: getattr(layer, key) for key in OF_LAYER},
            **{key: getattr(check, key) for key in OF_CHECK},
        )
        results.append(result)
    if segments is not None:
        segments.end(outputs)
    return results


def _checked(
    layer: QuantizedLinear, probes: Sequence[LinearProbe], oracle: ActivationOracle | None
) -> tuple[LinearCheck, ActivationOracle]:
    """What a linear computed in all calls, against the oracle of its quantizer, which is made where None is given."""
    probe = joined(probes)
    oracle = oracle or activation_oracle(np.nan_to_num(probe.x), layer)
    return check_linear(layer, probe, oracle), oracle


def quantizer_key(layer: QuantizedLinear) -> bytes:
    """Equal for layers that turn the same input into the same codes."""
    choices = (layer.activation_format, layer.activation_scaling, layer.activation_group)
    arrays = (layer.activation_scale, layer.activation_zero, layer.input_multiplier, layer.input_offset)
    return repr(choices).encode() + b"".join(b"-" if array is None else array.tobytes() for array in arrays)


def worst_calls(layer: QuantizedLinear, probes: Mapping[str, LinearProbe], check: LinearCheck) -> dict[str, str]:
    """Of each field of `check` that fails its gate, the call in which it is worst, and of how many. probes: by call."""
    wrong = {rule.key: rule for rule in LAYER_RULES if rule.fails(getattr(check, rule.key))}
    keys = [*wrong, *(["nonfinite"] if check.nonfinite else [])]
    if not keys:
        return {}
    checks = {text: _checked(layer, [probe], None)[0] for text, probe in probes.items()}
    texts = {}
    for key in keys:
        values = {text: float(np.nan_to_num(getattr(one, key), nan=np.inf)) for text, one in checks.items()}
        limit = wrong[key].limit if key in wrong else 0
        several = sum(value > limit for value in values.values())
        texts[key] = f"{max(values, key=values.__getitem__)} ({several} of {len(values)} calls are wrong)"
    return texts


def activation_label(layer: QuantizedLinear) -> str:
    """The format, with its scaling where that is not per token: "UE2M2 per_tensor"."""
    dynamic = layer.activation_scaling == "per_token"
    return layer.activation_format if dynamic else f"{layer.activation_format} {layer.activation_scaling}"
