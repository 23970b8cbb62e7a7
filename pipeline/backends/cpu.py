"""The `cpu` target: integer GEMMs in stock onnxruntime, weights expanded once into int8."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import lowering_file
from pipeline.backends.base import Arrays, BuildResult, Capabilities, Engine, GemmRow, LoweredGraph
from pipeline.passes import run_shared
from pipeline.passes.cpu_paths import WIDE_SUM
from pipeline.passes.fold_weights import FoldWeights
from pipeline.passes.lower_cpu import LowerCpu
from pipeline.passes.split_condition import split_condition

logger = logging.getLogger(__name__)
MODEL, CONDITION, DATA = "model.onnx", "condition.onnx", "model.onnx.data"
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
    return Capabilities("cpu", GEMMS, frozenset({WIDE_SUM}) if WIDE_SUM_FLAGS & set(flags) else frozenset())


class CpuEngine:
    """One or two onnxruntime sessions on the CPU. Not safe for concurrent calls.

    What depends on the condition alone (keys and values of cross-attention) is computed when the condition changes,
    and kept. Whether it has changed is decided by comparing all its numbers with a copy, so callers may reuse or
    overwrite their arrays.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.step = open_session(folder / MODEL, threads)
        split = (folder / CONDITION).is_file()
        self.condition = open_session(folder / CONDITION, threads) if split else None
        self.outputs = [output.name for output in self.step.get_outputs()]
        self.step_inputs = {value.name for value in self.step.get_inputs()}
        self.kept_for: Arrays = {}
        self.kept: Arrays = {}

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name."""
        if self.condition is not None:
            self._prepare(self.condition, {value.name: inputs[value.name] for value in self.condition.get_inputs()})
        feeds = {name: array for name, array in (inputs | self.kept).items() if name in self.step_inputs}
        return dict(zip(self.outputs, self.step.run(self.outputs, feeds), strict=True))

    def _prepare(self, session: Any, condition: Arrays) -> None:
        """Make `kept` belong to this condition."""
        if self.kept and all(np.array_equal(array, self.kept_for[name]) for name, array in condition.items()):
            return
        names = [output.name for output in session.get_outputs()]
        self.kept = dict(zip(names, session.run(names, condition), strict=True))
        self.kept_for = {name: np.array(array) for name, array in condition.items()}

    def close(self) -> None:
        """Free the sessions; the engine cannot run afterwards."""
        self.step = self.condition = None
        self.kept, self.kept_for = {}, {}


def open_session(path: Path, threads: int = 0) -> Any:
    """Session of a lowered graph; `threads` 0: one for each core.

    onnxruntime adds its fusions of transposes, scales and biases. It may not touch pairs of QuantizeLinear and
    DequantizeLinear: here they split an image into limbs.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle threads sleep instead of spinning, so that engines do not steal each other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class CpuBackend:
    """Builds for the CPU it runs on."""

    name = "cpu"

    def __init__(self, flags: tuple[str, ...] | None = None) -> None:
        self.capabilities = capabilities(machine.cpu_flags() if flags is None else flags)

    def problems(self, recipe: Any) -> list[str]:
        """What is missing for a build: only onnxruntime can be."""
        try:
            machine.require(("onnxruntime",), "target cpu")
        except EnvironmentLacksError as error:
            return [str(error)]
        return []

    def lower(self, portable: Path, work_dir: Path, recipe: Any) -> LoweredGraph:
        """Write model.onnx and model.onnx.data, lowered, into `work_dir`; weights stream from the portable file."""
        model = ir.load(portable)
        run_shared(model)
        lowering = LowerCpu(self.capabilities)
        lowering(model)
        FoldWeights()(model)
        ir.save(model, work_dir / MODEL, external_data=DATA, size_threshold_bytes=1024)
        return LoweredGraph(work_dir / MODEL, tuple(lowering.probes), tuple(lowering.choices))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Any) -> BuildResult:
        """Put the lowered graph, split by how often its parts run, its weights and lowering.json into `out_dir`."""
        link_or_copy(lowered.path.with_name(DATA), out_dir / DATA)
        model = ir.load(lowered.path)
        split = split_condition(model)
        parts = {MODEL: model} if split is None else {MODEL: split.step, CONDITION: split.condition}
        for name, part in parts.items():
            ir.save(part, out_dir / name)
        lowering_file.write(
            LoweredGraph(out_dir / MODEL, lowered.probes, lowered.choices), out_dir / lowering_file.NAME
        )
        files = tuple(f"{out_dir.name}/{name}" for name in (*parts, DATA, lowering_file.NAME))
        return BuildResult(files, lowered, {"requires": sorted(self.capabilities.ops)})

    def load(self, bundle_dir: Path) -> Engine:
        """Engine of a verified bundle folder. Raises EnvironmentLacksError without onnxruntime."""
        machine.require(("onnxruntime",), "running the cpu engine")
        return CpuEngine(bundle_dir / self.name)


def link_or_copy(source: Path, destination: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
