"""The `onnx` target: the portable model itself, as it is handed to people, proven in stock onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.errors import ContractError, EnvironmentLacksError
from pipeline import machine
from pipeline.backends import PORTABLE
from pipeline.backends.base import BuildResult, Capabilities, Engine, LoweredGraph
from pipeline.backends.portable.engine import DATA, MODEL, PortableEngine


class PortableBackend:
    """Every bundle has it: its files, model.onnx and model.onnx.data, stand at the bundle's root."""

    name = PORTABLE
    capabilities = Capabilities(PORTABLE, ())

    def problems(self, recipe: Any) -> list[str]:
        """Only onnxruntime can be missing: function bodies exist for whatever can be exported."""
        try:
            machine.require(("onnxruntime",), "target onnx")
        except EnvironmentLacksError as error:
            return [str(error)]
        return []

    def lower(self, portable: Path, work_dir: Path, recipe: Any) -> LoweredGraph:
        """The portable file as it is, and where its quantized linears are. Raises ContractError if it has none."""
        import onnx_ir as ir

        from pipeline.backends.portable.linears import portable_linears

        linears = portable_linears(ir.load(portable))
        if not linears:
            raise ContractError(f"{portable} has no quantized linear; export the model again")
        return LoweredGraph(portable, tuple(row.probe for row in linears), tuple(row.choice for row in linears))

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Any) -> BuildResult:
        """Nothing is written: the engine is the file that was exported."""
        return BuildResult((MODEL, DATA), lowered)

    def load(self, bundle_dir: Path, threads: int = 0) -> Engine:
        """Engine of a verified bundle folder."""
        machine.require(("onnxruntime",), "running the portable model")
        return PortableEngine(bundle_dir, threads)
