"""One kernel of one layer, ready to be launched: what a plugin does at run time, without TensorRT's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from export.errors import ContractError
from plugins.tensorrt.payload import Payload
from plugins.tensorrt.rtx_driver import Arguments, CudaDriver


class Launcher:
    """Chooses machine code for the shapes at hand, loads it, and launches it.

    `prepare` does all that may allocate. `launch` writes pointers into memory of its own and calls the driver once, so
    that a stream which is being captured into a CUDA graph may take it.
    """

    def __init__(self, payload: Payload, driver: CudaDriver) -> None:
        self.payload, self.driver = payload, driver
        arguments = payload.row.arguments_of(payload.spec)
        self.inputs = [index for index, argument in enumerate(arguments) if argument.role == "input"]
        self.outputs = [index for index, argument in enumerate(arguments) if argument.role == "output"]
        self.sizes = {argument.name: index for index, argument in enumerate(arguments) if argument.role == "size"}
        # Inputs with one row for each sample, by place; `tokens` rows of the first input share it.
        self.per_sample = {
            place: one.name for place, one in enumerate(payload.row.inputs(payload.spec)) if one.is_per_sample
        }

    def load(self) -> None:
        """Load the code of every variant for this GPU, before the first shapes are known."""
        sm = self.driver.capability()
        self.payload.variant(sm, 0)
        for variant in self.payload.variants:
            if variant.sm == sm:
                self.driver.function(variant.code, variant.entry, variant.shared_bytes)

    def prepare(self, shapes: Sequence[Sequence[int]]) -> None:
        """Get ready for inputs of these shapes. Raises ContractError for shapes that do not fit each other."""
        rows = math.prod(shapes[0][:-1])
        variant = self.payload.variant(self.driver.capability(), rows)
        self.variant, self.rows = variant, rows
        self.grid = self.payload.row.grid(self.payload.spec, self.payload.tile(variant), rows)
        self.function = self.driver.function(variant.code, variant.entry, variant.shared_bytes)
        self.arguments = Arguments(variant.types)
        values = {"M": rows, "tokens": self._tokens(shapes, rows)}
        for name, index in self.sizes.items():
            self.arguments.set(index, values[name])

    def _tokens(self, shapes: Sequence[Sequence[int]], rows: int) -> int:
        """Rows that share a row of the per-sample inputs; 1 without such inputs."""
        counts = {math.prod(shapes[place][:-1]) for place in self.per_sample}
        samples = max(counts, default=rows) or 1
        if len(counts) > 1 or rows % samples:
            names = ", ".join(self.per_sample.values())
            raise ContractError(f"{self.payload.kernel}: {rows} rows do not fit {sorted(counts)} rows of {names}")
        return max(1, rows // samples)

    def launch(self, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
        """Launch on device pointers `inputs` and `outputs`, in the order of the kernel's arguments."""
        if not self.rows:
            return
        for index, pointer in zip((*self.inputs, *self.outputs), (*inputs, *outputs), strict=True):
            self.arguments.set(index, pointer)
        variant, params = self.variant, self.arguments.params
        self.driver.launch(self.function, self.grid, variant.threads, variant.shared_bytes, stream, params)
