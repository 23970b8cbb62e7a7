"""The `cpu` target: integer GEMMs in stock onnxruntime, weights expanded once into int8, optionally ops of our own."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends import metadata_file
from pipeline.backends.base import BuildResult, Engine, LoweredGraph
from pipeline.backends.cpu.engine import CONDITION, DATA, METADATA, MODEL, CpuEngine, required
from pipeline.passes.probes import WIDE_SUM, Capabilities, Choice, GemmRow, ProbeRow
from plugins.cpu import library

logger = logging.getLogger(__name__)
GEMMS = (
    GemmRow("u8 x s8", "U8", "S8"),
    GemmRow("u8 x s8, 2 limbs", "U8", "S8", limbs=2),
    GemmRow("u8 x s8 per group", "U8", "S8", real_groups=True),
    GemmRow("u8 x s8 per group, 2 limbs", "U8", "S8", limbs=2, real_groups=True),
)
# Instruction sets whose byte products are summed in 32 bits; without one of them x86 sums pairs in saturating int16.
WIDE_SUM_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


def capabilities(flags: tuple[str, ...]) -> Capabilities:
    """What a CPU with these instruction sets runs."""
    wide = {WIDE_SUM} if WIDE_SUM_FLAGS & set(flags) else set()
    return Capabilities("cpu", GEMMS, frozenset(wide | {library.requirement()}))


def native(recipe: Any) -> bool:
    """Does the recipe ask for the native ops? Without a recipe: no."""
    return recipe is not None and recipe.cpu.path == "native"


class CpuBackend:
    """Builds for the CPU it runs on."""

    name = "cpu"

    def __init__(self, flags: tuple[str, ...] | None = None) -> None:
        self.capabilities = capabilities(machine.cpu_flags() if flags is None else flags)

    def problems(self, recipe: Any) -> list[str]:
        """What is missing for a build: onnxruntime, or a C compiler for the native ops."""
        try:
            machine.require(("onnxruntime",), "target cpu")
        except EnvironmentLacksError as error:
            return [str(error)]
        return library.problems() if native(recipe) else []

    def lower(self, portable: Path, work_dir: Path, recipe: Any) -> LoweredGraph:
        """Write model.onnx and model.onnx.data, lowered, into `work_dir`; weights stream from the portable file."""
        import onnx_ir as ir

        from export.onnx_files import load_model
        from pipeline.backends.cpu.lower import LowerCpu
        from pipeline.passes import run_shared
        from pipeline.passes.fold_weights import FoldWeights

        model = load_model(portable)
        run_shared(model)
        lowering = LowerCpu(self.capabilities, chains=native(recipe))
        lowering(model)
        if not lowering.choices:
            raise ContractError(f"{portable} has no quantized linear to lower; export the model again")
        choices, needs = lowering.choices, set(lowering.needs)
        if native(recipe):
            choices = use_native(model, choices, lowering.probes)
            needs.add(library.requirement())
        FoldWeights()(model)
        ir.save(model, work_dir / MODEL, external_data=DATA, size_threshold_bytes=1024)
        (work_dir / METADATA).write_text(json.dumps({"requires": sorted(needs)}) + "\n", encoding="utf-8")
        return LoweredGraph(work_dir / MODEL, tuple(lowering.probes), tuple(choices))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Any) -> BuildResult:
        """Put the lowered graph, split by how often its parts run, its weights and lowering.json into `out_dir`."""
        import onnx_ir as ir

        from pipeline.backends import lowering_file
        from pipeline.backends.cpu.token_chain import drop_unread_outputs
        from pipeline.passes.split_condition import split_condition

        beside = (DATA, METADATA)
        for name in beside:
            link_or_copy(lowered.path.with_name(name), out_dir / name)
        model = ir.load(lowered.path)
        split = split_condition(model)
        parts = {MODEL: model} if split is None else {MODEL: split.step, CONDITION: split.condition}
        for name, part in parts.items():
            drop_unread_outputs(part)
            ir.save(part, out_dir / name)
        lowering_file.write(
            LoweredGraph(out_dir / MODEL, lowered.probes, lowered.choices), out_dir / lowering_file.NAME
        )
        files = tuple(f"{out_dir.name}/{name}" for name in (*parts, *beside, lowering_file.NAME))
        return BuildResult(files, lowered, dict(metadata_file.read(out_dir, metadata_file.CpuMetadata)))

    def load(self, bundle_dir: Path, threads: int = 0) -> Engine:
        """Engine of a verified bundle folder. Raises EnvironmentLacksError where it would not run, or not exactly."""
        machine.require(("onnxruntime",), "running the cpu engine")
        folder = bundle_dir / self.name
        if lacking := problem(required(folder), self.capabilities.ops):
            raise EnvironmentLacksError(lacking)
        return CpuEngine(folder, threads)


def problem(needs: Collection[str], ops: Collection[str]) -> str:
    """Why an engine with these needs does not run exactly here, with a remedy; '' if it does."""
    missing = sorted(set(needs) - set(ops))
    versions = [name.removeprefix(library.PREFIX) for name in missing if name.startswith(library.PREFIX)]
    if versions:
        return (
            f"target cpu was proven with version {versions[0]} of the kernel library, this installation has "
            f"{library.version()}; build the engine again, or install the release that built it"
        )
    if missing:
        return f"target cpu was built for CPUs with {', '.join(missing)}, which this one lacks; build it here"
    return ""


def use_native(model: Any, choices: list[Choice], probes: list[ProbeRow]) -> list[Choice]:
    """Rewrite a lowered graph with native ops; the choices then say which layers they quantize and finish."""
    from pipeline.backends.cpu.finish_with_chain import finish_with_chains
    from pipeline.backends.cpu.token_chain import is_chain

    passes = finish_with_chains(model)
    made = {value.name for node in model.graph if is_chain(node) for value in node.outputs}
    if not made:
        reasons = [refusal.reason for rewrite in passes for refusal in rewrite.refusals]
        why = (reasons or ["no activation has a scale for each token"])[0]
        raise RecipeError(f"cpu.path native has nothing to fuse in this model ({why}); build with --set cpu.path=stock")
    fused = {row.layer for row in probes if made.issuperset((*row.codes, row.output))}
    return [replace(row, why=f"{row.why}; native ops around it") if row.layer in fused else row for row in choices]


def link_or_copy(source: Path, destination: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
