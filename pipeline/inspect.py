"""`python -m pipeline.inspect`: what a bundle (or a recipe on its model) does, layer by layer, and why."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import RecipeError
from export.formats.format import get_format, packed_size
from export.formats.operands import HARDWARE, embeds
from pipeline import machine
from pipeline.build import resolve
from pipeline.bundle.bundle import load_bundle
from pipeline.calibrate.plan import LayerPlan, group_multipliers, make_plans
from pipeline.command import Answer, Parser, Part, Table, add_model_flags, parser, run
from pipeline.compiler import tensor_counts
from pipeline.recipe import Recipe, load_model
from pipeline.signals import leave

# What `input_text` says of most layers; the column is shown where it says more.
PLAIN_INPUT = "per_token"
NOT_BUILT = "Which path each layer takes on a target, and why, is decided when it is built: inspect the bundle then."


def embedding(row: Mapping[str, Any]) -> str:
    """The hardware types that hold both operands of a layer exactly; '-' where a real group scale prevents it."""
    if row["granularity"] == "group" or row.get("activation_scaling") == "token_group":
        return "-"
    multipliers: tuple[int, ...] = (1,)
    if row["granularity"] == "exact_group":
        multipliers = group_multipliers(row["weight_format"], row["activation_format"])
    return " ".join(name for name in HARDWARE if _holds(row, name, multipliers)) or "in limbs"


def _holds(row: Mapping[str, Any], target: str, multipliers: Sequence[int]) -> bool:
    weight = all(embeds(row["weight_format"], target, m) for m in multipliers)
    return weight and embeds(row["activation_format"], target)


def bundle_document(path: Path) -> dict[str, Any]:
    """Per layer: formats, scales, embedding, the path of each target and why; totals. From a verified bundle."""
    manifest = load_bundle(path).manifest
    targets = manifest["targets"]
    layers = [
        {**row, "embedding": embedding(row), "targets": _choices(targets, row["name"])} for row in manifest["layers"]
    ]
    return {key: manifest[key] for key in ("engine", "model", "kept", "counts", "bytes")} | {"layers": layers}


def _choices(targets: Mapping[str, Any], layer: str) -> dict[str, Any]:
    missing = {"path": "-", "why": "the target does not compute this layer"}
    return {name: target["choices"].get(layer, missing) for name, target in targets.items()}


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The same for a recipe on its model, before anything is built: formats, scales, embedding and bytes."""
    machine.require_compiler("looking into the model of a recipe")
    model = load_model(recipe)
    layers = [planned_layer(plan) for plan in make_plans(model.linears(), recipe)]
    kept = [{"name": name, "reason": reason} for name, reason in model.kept()]
    sizes = {
        "quantized_weights": sum(row["size_bytes"] for row in layers),
        "same_weights_fp16": sum(2 * row["shape"][0] * row["shape"][1] for row in layers),
    }
    row: dict[str, Any] = {"source": model.source, "family": model.family.name, "sha256": model.sha256}
    row["tensors"] = tensor_counts(model)
    return {"engine": recipe.name, "model": row, "layers": layers, "kept": kept, "bytes": sizes}


def planned_layer(plan: LayerPlan) -> dict[str, Any]:
    """What calibration will do with one linear [N, K], and the bytes of its codes, scales and multipliers."""
    n, k = plan.linear.module.out_features, plan.linear.module.in_features
    groups = k // plan.group_size if plan.group_size else 1
    scales = 4 * n * (groups if plan.granularity == "group" else 1)
    multipliers = n * packed_size(4, groups) if plan.granularity == "exact_group" else 0
    row = {
        "name": plan.name,
        "kind": plan.linear.kind,
        "shape": [n, k],
        "weight_format": plan.weight_format,
        "activation_format": plan.activation_format,
        "granularity": plan.granularity,
        "group_size": plan.group_size,
        "size_bytes": n * packed_size(get_format(plan.weight_format).bits, k) + scales + multipliers,
    }
    return {**row, "embedding": embedding(row), "targets": {}}


def input_text(row: Mapping[str, Any]) -> str:
    """How a layer's input is scaled and what a method has put around its GEMM, in a few words.

    >>> input_text({"activation_scaling": "per_tensor", "activation_scale": 0.25, "activation_zero": -0.17})
    'per_tensor 0.25 from -0.17'
    >>> input_text({"low_rank": {"branches": 2, "rank": 8}, "balance": ["input_multiplier"]})
    'per_token, input_multiplier, 2 branches of rank 8'
    """
    scaling = row.get("activation_scaling", "per_token")
    scaling += f"({row['activation_group']})" if "activation_group" in row else ""
    scaling += f" {row['activation_scale']:.4g}" if "activation_scale" in row else ""
    scaling += f" from {row['activation_zero']:.4g}" if "activation_zero" in row else ""
    branches = row.get("low_rank")
    rank = [f"{branches['branches']} branches of rank {branches['rank']}"] if branches else []
    return ", ".join([scaling, *row.get("balance", []), *rank])


def tables(document: Mapping[str, Any]) -> list[Part]:
    """The document for people."""
    layers = document["layers"]
    targets = list(layers[0]["targets"]) if layers else []
    shown = ("input",) if any(input_text(layer) != PLAIN_INPUT for layer in layers) else ()
    header = ("layer", "kind", "N x K", "weight x act", "scales", *shown, "exact in", *targets, "bytes")
    rows = [_row(layer, targets, bool(shown)) for layer in layers]
    kept = Table(("kept in float", "because"), [(row["name"], row["reason"]) for row in document["kept"]])
    title = f"{document['engine']}: {document['model']['source']} ({document['model']['family']})"
    return [title, Table(header, rows), _reasons(layers, targets), kept, _totals(document)]


def _row(layer: Mapping[str, Any], targets: Sequence[str], with_input: bool) -> tuple[object, ...]:
    scales = layer["granularity"] + (f"({layer['group_size']})" if layer["group_size"] else "")
    formats = f"{layer['weight_format']} x {layer['activation_format']}"
    paths = [layer["targets"][target]["path"] for target in targets]
    shape = " x ".join(map(str, layer["shape"]))
    shown = (input_text(layer),) if with_input else ()
    facts = (layer["name"], layer["kind"], shape, formats, scales, *shown)
    return (*facts, layer["embedding"], *paths, layer["size_bytes"])


def _reasons(layers: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> Part:
    """For each target, every reason once, with the number of layers it holds for."""
    choices = [(target, layer["targets"][target]) for layer in layers for target in targets]
    counts = Counter((target, choice["path"], choice["why"]) for target, choice in choices)
    rows = [(target, path, count, why) for (target, path, why), count in sorted(counts.items())]
    return Table(("target", "path", "layers", "why"), rows) if rows else NOT_BUILT


def _totals(document: Mapping[str, Any]) -> str:
    sizes = document["bytes"]
    share = sizes["quantized_weights"] / max(sizes["same_weights_fp16"], 1)
    packed = f"{sizes['quantized_weights'] / 1e6:.2f} MB packed, {share:.3f} of fp16"
    total = len(document["layers"]) + len(document["kept"])
    files = f"; {sizes['all_files'] / 1e6:.1f} MB in all files" if "all_files" in sizes else ""
    return f"{len(document['layers'])} of {total} layers quantized, {len(document['kept'])} kept; {packed}{files}"


def make_parser() -> Parser:
    """All flags of `inspect`."""
    verb_parser = parser("inspect", "Show per layer: formats, scales, embedding, path chosen, why, bytes; and totals.")
    verb_parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="a folder that build wrote")
    verb_parser.add_argument("--engine", metavar="NAME|RECIPE.toml", help="a recipe instead, applied to its model")
    add_model_flags(verb_parser, "with --engine: another model")
    verb_parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --engine: any recipe key"
    )
    verb_parser.set_defaults(calib_size=None, n_steps=None, batch_size=None, height=None, width=None, seed=None)
    return verb_parser


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Answer with the table, or with --json the document."""
    if (args.bundle is None) == (args.engine is None):
        raise RecipeError("inspect takes either a bundle folder or --engine NAME; see --help")
    document = bundle_document(args.bundle) if args.bundle else recipe_document(resolve(args))
    answer.document(document, *tables(document))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
