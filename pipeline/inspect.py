"""`python -m pipeline.inspect`: what a bundle (or a recipe on its model) does, layer by layer, and why."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from export.errors import RecipeError
from export.formats.operands import exact_in
from pipeline import machine
from pipeline.build import resolve
from pipeline.bundle.bundle import load_bundle
from pipeline.bundle.manifest_schema import Chosen, Counts, Kept, Layer, LowRank, Target
from pipeline.bundle.pipeline_bundle import is_pipeline, load_pipeline
from pipeline.calibrate.plan import LayerPlan, group_multipliers, make_plans
from pipeline.command import Answer, Parser, Part, Table, add_model_flags, parser, run
from pipeline.compiler import model_row
from pipeline.recipe import Recipe, load_float_model
from pipeline.signals import leave

# What `input_text` says of most layers; the column is shown where it says more.
PLAIN_INPUT = "per_token"
# A number of its own in a reason, and no part of a name such as E2M1 or of a decimal fraction.
COUNT = re.compile(r"(?<![\w.])\d+(?!\w|\.\d)")
NOT_BUILT = "Which path each layer takes on a target, and why, is decided when it is built: inspect the bundle then."


class LayerRow(Layer):
    """A layer with the hardware types that hold it, and what each target chose for it."""

    embedding: str
    targets: dict[str, Chosen]


class Document(TypedDict):
    """The answer. attention: its formats, "float", or of a recipe "auto". counts: of a bundle only."""

    engine: str
    attention: str
    model: Mapping[str, object]
    layers: list[LayerRow]
    kept: list[Kept]
    counts: NotRequired[Counts]
    bytes: Mapping[str, int]


def embedding(row: Layer) -> str:
    """The hardware types that hold both operands of a layer exactly; '-' where a real group scale prevents it."""
    weight, activation = row["weight_format"], row["activation_format"]
    if row["granularity"] == "group" or row.get("activation_scaling") == "token_group":
        return "-"
    multipliers = group_multipliers(weight, activation) if row["granularity"] == "exact_group" else (1,)
    return " ".join(exact_in(weight, activation, multipliers)) or "in limbs"


def layer_row(row: Layer, targets: Mapping[str, Target]) -> LayerRow:
    """The layer with what the targets of a bundle chose; {} for a recipe, where nothing is chosen yet."""
    missing: Chosen = {"path": "-", "why": "the target does not compute this layer"}
    choices = {name: target["choices"].get(row["name"], missing) for name, target in targets.items()}
    return {**row, "embedding": embedding(row), "targets": choices}


def bundle_document(path: Path) -> Document:
    """Per layer: formats, scales, embedding, the path of each target and why; totals. From a verified bundle."""
    bundle = load_bundle(path)
    manifest = bundle.manifest
    return {
        "engine": manifest["engine"],
        "attention": bundle.recipe.attention.text(),
        "model": manifest["model"],
        "kept": manifest["kept"],
        "counts": manifest["counts"],
        "bytes": dict[str, int](**manifest["bytes"]),
        "layers": [layer_row(row, manifest["targets"]) for row in manifest["layers"]],
    }


class PipelineDocument(TypedDict):
    """The answer for a pipeline bundle. components: by name, as of each bundle alone. left_out: parts, and why."""

    pipeline: str
    class_name: str
    source: Mapping[str, str]
    components: dict[str, Document]
    files: list[str]
    left_out: Mapping[str, str]


def pipeline_document(path: Path) -> PipelineDocument:
    """What a verified pipeline bundle holds."""
    whole = load_pipeline(path)
    return {
        "pipeline": whole.name,
        "class_name": whole.class_name,
        "source": whole.manifest["source"],
        "components": {name: bundle_document(path / name) for name in whole.components},
        "files": list(whole.manifest["files"]),
        "left_out": whole.manifest["left_out"],
    }


def pipeline_tables(document: PipelineDocument) -> list[Part]:
    """The document for people: a row for each component, whose layers `inspect BUNDLE/COMPONENT` shows."""
    rows = []
    for name, part in document["components"].items():
        formats = ", ".join(part["counts"]["formats"]) or "none"
        counts, sizes = part["counts"], part["bytes"]
        megabytes = f"{sizes['all_files'] / 1e6:.1f}"
        rows.append((name, part["engine"], formats, counts["quantized"], counts["kept"], megabytes))
    header = ("component", "recipe", "weight x act", "quantized", "kept", "MB in all files")
    left_out = [Table(("left out", "because"), list(document["left_out"].items()))] if document["left_out"] else []
    title = f"{document['pipeline']}: {document['class_name']} of {document['source']['path']}"
    return [title, Table(header, rows), *left_out, "and " + ", ".join(document["files"])]


def recipe_document(recipe: Recipe) -> Document:
    """The same for a recipe on its model, before anything is built: formats, scales, embedding and bytes."""
    machine.require_compiler("looking into the model of a recipe")
    model = load_float_model(recipe)
    layers = [layer_row(planned_layer(plan), {}) for plan in make_plans(model.linears(), recipe)]
    kept: list[Kept] = [{"name": name, "reason": reason} for name, reason in model.kept()]
    sizes = {
        "quantized_weights": sum(row["size_bytes"] for row in layers),
        "same_weights_fp16": sum(2 * row["shape"][0] * row["shape"][1] for row in layers),
    }
    return {
        "engine": recipe.name,
        "attention": recipe.attention.text(),
        "model": model_row(model),
        "layers": layers,
        "kept": kept,
        "bytes": sizes,
    }


def planned_layer(plan: LayerPlan) -> Layer:
    """What calibration will do with one linear [N, K], and the bytes of its codes, scales and multipliers."""
    return {
        "name": plan.name,
        "kind": plan.linear.kind,
        "shape": (plan.linear.module.out_features, plan.linear.module.in_features),
        "weight_format": plan.weight_format,
        "activation_format": plan.activation_format,
        "granularity": plan.granularity,
        "group_size": plan.group_size,
        "size_bytes": plan.size_bytes,
    }


def input_text(row: Layer) -> str:
    """How a layer's input is scaled and what a method has put around its GEMM, in a few words.

    >>> input_text({"activation_scaling": "per_tensor", "activation_scale": 0.25, "activation_zero": -0.17})
    'per_tensor 0.25 from -0.17'
    >>> input_text({"low_rank": {"branches": 2, "rank": 8}, "balance": ["input_multiplier"]})
    'per_token, input_multiplier, 2 branches of rank 8'
    >>> input_text({"low_rank": {"branches": 1, "rank": 16}})
    'per_token, a branch of rank 16'
    """
    scaling = row.get("activation_scaling", "per_token")
    scaling += f"({row['activation_group']})" if "activation_group" in row else ""
    scaling += f" {row['activation_scale']:.4g}" if "activation_scale" in row else ""
    scaling += f" from {row['activation_zero']:.4g}" if "activation_zero" in row else ""
    branches = [_low_rank_text(row["low_rank"])] if "low_rank" in row else []
    return ", ".join([scaling, *row.get("balance", []), *branches])


def _low_rank_text(low_rank: LowRank) -> str:
    count = low_rank["branches"]
    return f"{'a branch' if count == 1 else f'{count} branches'} of rank {low_rank['rank']}"


def tables(document: Document) -> list[Part]:
    """The document for people."""
    layers = document["layers"]
    targets = list(layers[0]["targets"]) if layers else []
    shown = ("input",) if any(input_text(layer) != PLAIN_INPUT for layer in layers) else ()
    header = ("layer", "kind", "N x K", "weight x act", "scales", *shown, "exact in", *targets, "bytes")
    rows = [_row(layer, targets, bool(shown)) for layer in layers]
    kept = Table(("kept in float", "because"), [(row["name"], row["reason"]) for row in document["kept"]])
    title = f"{document['engine']}: {document['model']['source']} ({document['model']['family']})"
    return [title, Table(header, rows), _reasons(layers, targets), kept, _totals(document)]


def _row(layer: LayerRow, targets: Sequence[str], with_input: bool) -> tuple[object, ...]:
    scales = layer["granularity"] + (f"({layer['group_size']})" if layer["group_size"] else "")
    formats = f"{layer['weight_format']} x {layer['activation_format']}"
    paths = [layer["targets"][target]["path"] for target in targets]
    shape = " x ".join(map(str, layer["shape"]))
    shown = (input_text(layer),) if with_input else ()
    facts = (layer["name"], layer["kind"], shape, formats, scales, *shown)
    return (*facts, layer["embedding"], *paths, layer["size_bytes"])


def _reasons(layers: Sequence[LayerRow], targets: Sequence[str]) -> Part:
    """For each target, every reason once, with the number of layers it holds for."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for target, choice in ((target, layer["targets"][target]) for layer in layers for target in targets):
        groups.setdefault((target, choice["path"], *COUNT.split(choice["why"])), []).append(choice["why"])
    rows = [(target, path, len(whys), in_one(whys)) for (target, path, *_), whys in sorted(groups.items())]
    return Table(("target", "path", "layers", "why"), rows) if rows else NOT_BUILT


def in_one(whys: Sequence[str]) -> str:
    """One sentence for reasons that differ in their counts alone.

    >>> in_one(["E2M1 is exact, |sum| <= 2019720", "E2M1 is exact, |sum| <= 553680", "E2M1 is exact, |sum| <= 791400"])
    'E2M1 is exact, |sum| <= 553680 to 2019720'
    """
    counts = [sorted({*column}, key=int) for column in zip(*map(COUNT.findall, whys), strict=True)]
    spans = iter([f"{column[0]} to {column[-1]}" if len(column) > 1 else column[0] for column in counts])
    return COUNT.sub(lambda count: next(spans), whys[0])


def _totals(document: Document) -> str:
    sizes = document["bytes"]
    share = sizes["quantized_weights"] / max(sizes["same_weights_fp16"], 1)
    packed = f"{sizes['quantized_weights'] / 1e6:.2f} MB packed, {share:.3f} of fp16"
    total = len(document["layers"]) + len(document["kept"])
    files = f"; {sizes['all_files'] / 1e6:.1f} MB in all files" if "all_files" in sizes else ""
    layers = f"{len(document['layers'])} of {total} layers quantized, {len(document['kept'])} kept"
    return f"{layers}; attention {document['attention']}; {packed}{files}"


def make_parser() -> Parser:
    """All flags of `inspect`."""
    verb_parser = parser("inspect", "Show per layer: formats, scales, embedding, path chosen, why, bytes; and totals.")
    verb_parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    verb_parser.add_argument("--engine", metavar="NAME|RECIPE.toml", help="a recipe instead, applied to its model")
    add_model_flags(verb_parser, "with --engine: another model")
    verb_parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --engine: any recipe key"
    )
    return verb_parser


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Answer with the table, or with --json the document."""
    if (args.bundle is None) == (args.engine is None):
        raise RecipeError("inspect takes either a bundle folder or --engine NAME; see --help")
    if args.bundle and is_pipeline(args.bundle):
        whole = pipeline_document(args.bundle)
        answer.document(whole, *pipeline_tables(whole))
        return 0
    document = bundle_document(args.bundle) if args.bundle else recipe_document(resolve(args))
    answer.document(document, *tables(document))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
