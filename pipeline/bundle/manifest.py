"""manifest.json: what a bundle is, which files it has, and everything needed to make it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from export.checkpoint import QuantizedLinear
from export.documents import Rules, read_json, sha256
from export.errors import ContractError
from export.names import distinct, inside, is_hub_link
from pipeline import machine
from pipeline.backends import tool_versions
from pipeline.backends.base import BuildResult
from pipeline.bundle.manifest_schema import Chosen, Counts, File, Manifest, Sizes, Target
from pipeline.bundle.stages import StageTime
from pipeline.files import MANIFEST_FILE, tree, write_json
from pipeline.recipe import Recipe

SCHEMA_VERSION = 1
RULES = Rules(version=SCHEMA_VERSION)


@dataclass(frozen=True)
class BuildFacts:
    """What the stages found out, from which `compose` makes the manifest. model: source, revision, sha256, family, and
    which tensors of its files are in it. key: a hash of everything that decides the bytes of the bundle."""

    key: str
    recipe: Recipe
    model: Mapping[str, object]
    layers: list[QuantizedLinear]
    kept: list[tuple[str, str]]
    results: Mapping[str, BuildResult]
    times: list[StageTime] = field(default_factory=list)


def compose(facts: BuildFacts, folder: Path) -> dict[str, object]:
    """The manifest of the finished files in `folder` (its own file left out)."""
    paths = {name: folder / name for name in tree(folder) if name != MANIFEST_FILE}
    files: dict[str, File] = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "key": facts.key,
        "engine": facts.recipe.name,
        "recipe": facts.recipe.document(),
        "model": dict(facts.model),
        "layers": [_layer_row(layer) for layer in facts.layers],
        "kept": [{"name": name, "reason": reason} for name, reason in facts.kept],
        "counts": _counts(facts),
        "bytes": _sizes(facts.layers, files),
        "targets": {name: _target_row(result) for name, result in facts.results.items()},
        "files": files,
        "tools": tool_versions(),
        "code": machine.code_version(),
        "machine": machine.facts(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": [asdict(row) for row in facts.times],
    }


def _layer_row(layer: QuantizedLinear) -> dict[str, object]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": [layer.out_features, layer.in_features],
        "weight_format": layer.weight_format,
        "activation_format": layer.activation_format,
        "granularity": layer.granularity,
        "group_size": layer.group_size,
        "size_bytes": layer.size_bytes,
        **input_facts(layer),
    }


def input_facts(layer: QuantizedLinear) -> dict[str, object]:
    """How a layer's input is scaled, and what stands before and beside its GEMM; keys that say nothing are left out."""
    row: dict[str, object] = {"activation_scaling": layer.activation_scaling}
    if layer.activation_group:
        row["activation_group"] = layer.activation_group
    for key in ("activation_scale", "activation_zero"):
        if getattr(layer, key) is not None:
            row[key] = float(getattr(layer, key)[0])
    if balance := [key for key in ("input_multiplier", "input_offset") if getattr(layer, key) is not None]:
        row["balance"] = balance
    if layer.lora_down is not None:
        row["low_rank"] = {"branches": layer.lora_down.shape[0], "rank": layer.lora_down.shape[1]}
    return row


def _counts(facts: BuildFacts) -> Counts:
    pairs = Counter(f"{layer.weight_format} x {layer.activation_format}" for layer in facts.layers)
    return {"quantized": len(facts.layers), "kept": len(facts.kept), "formats": dict(sorted(pairs.items()))}


def _sizes(layers: list[QuantizedLinear], files: Mapping[str, File]) -> Sizes:
    return {
        "quantized_weights": sum(layer.size_bytes for layer in layers),
        "same_weights_fp16": sum(2 * layer.out_features * layer.in_features for layer in layers),
        "all_files": sum(row["size"] for row in files.values()),
    }


def _target_row(result: BuildResult) -> Target:
    choices: dict[str, Chosen] = {row.layer: {"path": row.path, "why": row.why} for row in result.lowered.choices}
    return {"files": list(result.files), "metadata": dict(result.metadata), "choices": choices}


def write(document: Mapping[str, object], folder: Path) -> None:
    """Write manifest.json into `folder`."""
    write_json(folder / MANIFEST_FILE, document)


def read(folder: Path) -> Manifest:
    """The manifest of a bundle folder, its form and paths checked. Raises ContractError."""
    path = folder / MANIFEST_FILE
    if not path.is_file() or (path.is_symlink() and not is_hub_link(path, folder)):
        raise ContractError(f"{folder} is not a bundle: it has no {MANIFEST_FILE}; give the folder that build wrote")
    document = read_json(path, Manifest, RULES)
    for name in document["files"]:
        inside(folder, name, path)
    distinct([*document["files"], MANIFEST_FILE], path)
    for target, row in document["targets"].items():
        inside(folder, target, path)
        if unlisted := sorted(set(row["files"]) - set(document["files"])):
            raise ContractError(f"{path}: target {target} has a file {unlisted[0]!r} that is not in its table of files")
    return document
