"""Numbers, budgets, verdict: what verification writes and a person or a script reads."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Gate:
    """One condition of a build. `at_most` tells on which side of `limit` the value must lie; NaN never passes."""

    name: str
    value: float
    limit: float
    unit: str
    why: str
    at_most: bool = True

    @property
    def passed(self) -> bool:
        return not math.isnan(self.value) and (self.value <= self.limit if self.at_most else self.value >= self.limit)


@dataclass(frozen=True)
class LayerResult:
    """One quantized linear on one target, on the oracle's inputs."""

    target: str
    name: str
    kind: str
    path: str
    gemm_max_abs_diff: float
    codes_equal_share: float
    weight_sqnr_db: float
    size_bytes: int


@dataclass(frozen=True)
class StepResult:
    """One denoising step on one target: engine against reference, and reference against float."""

    target: str
    step: int
    sqnr_db: float
    quant_sqnr_db: float


@dataclass
class Report:
    """Everything that verification found. Gate names carry the target as prefix: `cpu/gemm_exact`."""

    gates: list[Gate] = field(default_factory=list)
    layers: list[LayerResult] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    def failures(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]

    def to_json(self) -> str:
        gates = [{**asdict(gate), "passed": gate.passed} for gate in self.gates]
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "passed": self.passed, "gates": gates}
        document["layers"] = [asdict(row) for row in self.layers]
        document["steps"] = [asdict(row) for row in self.steps]
        return json.dumps(document, indent=1, default=float)
