"""How near right engines come to the limits of the gate `segments`: `python -m benchmarks.quality.segment_margins`.

For each bundled model with its recipe, and each target, the largest ratio of an error to its limit over all stretches
and calls that a verification looks at. Weights are rounded to nearest: what lies between quantized linears does not
depend on how their weights were found. Writes benchmarks/results/segment_margins.json; takes some minutes on one core.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.quality.rows import FLOAT_ATTENTION
from export.checkpoint import QuantizedLinear
from export.models import load as models
from export.models.load import LoadedModel
from export.to_onnx import export_portable
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.base import Arithmetic, LoweredGraph
from pipeline.backends.cpu import CpuOptions
from pipeline.backends.rtx import RtxOptions
from pipeline.calibrate import calibrate
from pipeline.recipe import Recipe
from pipeline.verify import segments
from pipeline.verify.effort import Effort
from pipeline.verify.proof import verify_target
from pipeline.verify.report import Report
from pipeline.verify.study import Study, study

logger = logging.getLogger(__name__)
# Bundled model -> its recipe, and targets that are proven by their lowered graphs; GPU kernels refuse the multipliers
# of dit_w4a8.
MODELS = {"pixart_mini": ("pixart_w4a6", ("rtx", "cuda", "onnx")), "dit_mini": ("dit_w4a8", ("rtx", "onnx"))}
STEPS = 4


def main() -> None:
    """Measure and write."""
    parser = record.parser("benchmarks.quality.segment_margins", __doc__)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS, help="folder of the result")
    arguments = record.parsed(parser)
    rows = [row for name in arguments.model or MODELS for row in model_rows(name)]
    limits = {key: getattr(segments, key) for key in ("LIMIT", "PART_LIMIT", "SHARED_LIMIT", "JITTER_ULPS")}
    path = record.write("segment_margins", {"limits": limits, "steps": STEPS, "rows": rows}, arguments.output)
    logger.info("wrote %s", path)


def model_rows(name: str) -> Iterator[record.Json]:
    """One row for each target of a bundled model."""
    model = models.load(f"zoo:{name}")
    recipe_name, others = MODELS[name]
    settings = ["method=rtn", f"sampling.n_steps={STEPS}", *FLOAT_ATTENTION]  # of all targets alike
    recipe = recipes.with_settings(recipes.load(recipe_name), settings)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layers = calibrate(model, recipe, root / "calibrate")
        portable = root / "model.onnx"
        size, attention = recipe.sampling, recipe.attention.formats
        export_portable(model, layers, portable, size.height, size.width, attention)
        float_study = study(model, layers, recipe, {"fp32", recipe.options(RtxOptions).attention})
        for label, target, chosen in targets(recipe, others):
            (root / label).mkdir()
            graph = BACKENDS[target].lower(portable, root / label, chosen)
            arithmetic = BACKENDS[target].arithmetic(chosen, runs_here=False)
            row = measured(target, model, layers, graph, float_study, arithmetic)
            yield {"model": name, "target": label, "arithmetic": arithmetic, **row}


def targets(recipe: Recipe, others: Sequence[str]) -> Iterator[tuple[str, str, Recipe]]:
    """(label, target, recipe): both paths of `cpu`, then `others`."""
    for options in (CpuOptions("stock"), CpuOptions("fused")):
        yield f"cpu-{options.path}", "cpu", recipe.with_options(options)
    for target in others:
        yield target, target, recipe


def measured(
    target: str,
    model: LoadedModel,
    layers: Sequence[QuantizedLinear],
    graph: LoweredGraph,
    float_study: Study,
    arithmetic: Arithmetic,
) -> record.Json:
    """The worst stretch of a lowered graph."""
    report, probed = Report(), float_study.probed
    effort = Effort((0,), probed, 0, special=(1, 2, 3))
    verify_target(target, model, layers, graph, None, float_study, report, arithmetic, effort)
    worst = max(report.segments, key=lambda row: row.error)
    logger.info("%s %s: %.3f of the limit, up to %s in %s", model.source, target, worst.error, worst.layer, worst.call)
    stretches = len(report.segments)
    return {"ratio": worst.error, "layer": worst.layer, "call": worst.call, "stretches": stretches}


if __name__ == "__main__":
    main()
