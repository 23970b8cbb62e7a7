"""What a target is: capability rows for lowering, a builder, and an engine that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
# Name of a capability: products of bytes are summed in 32 bits (x86 VNNI, Arm dot product), never in saturating 16.
WIDE_SUM = "int32_dot_product"


@dataclass(frozen=True)
class GemmRow:
    """One way a target can run a quantized GEMM; lowering takes the first row that fits.

    `limbs`: into how many hardware operands an activation image may be split. `path` is the name shown to people.
    """

    path: str
    activation_type: str
    weight_type: str
    limbs: int = 1
    real_groups: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What lowering may know of a target: its name, GEMM rows in order of preference, and fused ops it runs."""

    target: str
    gemms: tuple[GemmRow, ...]
    ops: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """What lowering chose for one quantized linear, and why; refusals name the rule and the culprit."""

    layer: str
    path: str
    why: str


@dataclass(frozen=True)
class ProbeRow:
    """Where the parity gate finds one quantized linear inside a lowered ONNX graph (names of tensors).

    x: the float tensor that the linear reads, before it is balanced channel by channel. codes: the hardware operands
    that hold the activation's integer image, image = sum_i limb_weights[i] * (codes[i] * codes_unit - codes_offset).
    act_scale: the per-token scale, value = image * 2^-f * act_scale; of groups, one after the other; "" for a static
    scale, which is part of the GEMM's. gemm: the GEMM's result, which must equal
    float32(integer sum * gemm_unit) * gemm_scale, with gemm_scale the name of a float32 initializer [N], or "" for
    none. gemm_groups: above 1 it is [groups, M, N], the sums of as many parts of K. gemm_columns: (first, count) of the
    layer's own columns in it, (0, 0) for all. `exact` is False only where the
    path is not an integer embedding (then `why` of the choice says so).
    codes_format: the codes are those of this number format, not integers; '' for integers.
    operands: the dequantized activation and weight [K, N], zero point included, where the GEMM multiplies float32
    values that are already scaled; else ().
    half_roundings: how often such a path rounds a factor or the sum of a product to FP16.
    output: the linear's float result, scaled and with its bias added (it proves weight scales and bias). low_rank: the
    result of its low-rank branch, which `output` includes; "" without one.
    """

    layer: str
    path: str
    x: str
    codes: tuple[str, ...]
    limb_weights: tuple[float, ...]
    codes_unit: float
    codes_offset: float
    act_scale: str
    gemm: str
    gemm_unit: float
    gemm_scale: str
    exact: bool = True
    output: str = ""
    half_roundings: int = 0
    low_rank: str = ""
    gemm_groups: int = 1
    gemm_columns: tuple[int, int] = (0, 0)
    codes_format: str = ""
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoweredGraph:
    """A lowered ONNX file, where its quantized linears are, and what was chosen for each."""

    path: Path
    probes: tuple[ProbeRow, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class BuildResult:
    """Files written by a backend (relative to the bundle), its lowered graph, and facts for the manifest.

    `lowered.path` is an ONNX file that stock onnxruntime runs; for `rtx` it is the very graph given to the builder.
    """

    files: tuple[str, ...]
    lowered: LoweredGraph
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A built denoiser. Inputs and outputs are NumPy arrays named as in the portable model.

    Both methods may be called from any number of threads at once: each call of `run` gets the results of its own
    inputs, or RecipeError in words where they do not fit (see `feeds`) or the engine is closed.
    """

    def run(self, inputs: Arrays) -> Arrays: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One row of `pipeline.backends.BACKENDS`."""

    name: str
    capabilities: Capabilities

    def problems(self, recipe: Any) -> list[str]:
        """What this machine or recipe lacks for a build, as messages with a remedy; empty if nothing."""
        ...

    def lower(self, portable: Path, work_dir: Path, recipe: Any) -> LoweredGraph:
        """Lower the portable model (path of model.onnx) into an ONNX file under `work_dir`; deterministic bytes."""
        ...

    def build(self, lowered: LoweredGraph, out_dir: Path, recipe: Any) -> BuildResult:
        """Make the engine from the lowered graph and write it into `out_dir` (the target's folder of the bundle)."""
        ...

    def load(self, bundle_dir: Path, threads: int = 0) -> Engine:
        """Engine of a folder of verified files that may go once it is loaded.

        threads: of one call, for engines that compute on the CPU; 0: as many as `machine.threads` allows."""
        ...
