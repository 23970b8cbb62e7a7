"""Numbers, budgets, verdict: what verification writes and a person or a script reads."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from export.documents import plain

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Gate:
    """One condition of a build. `at_most` tells on which side of `limit` the value must lie; NaN never passes.

    Raises ValueError for a limit that is not a number.
    """

    name: str
    value: float
    limit: float
    unit: str
    why: str
    at_most: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.limit):
            raise ValueError(f"gate {self.name}: the limit is not a number, a bug of verification; please report it")

    @property
    def passed(self) -> bool:
        return within(self.value, self.limit, self.at_most)


def within(value: float, limit: float, at_most: bool) -> bool:
    """Does the value lie on the right side of the limit? nan never does."""
    return bool(value <= limit if at_most else value >= limit)


@dataclass(frozen=True)
class LayerResult:
    """One quantized linear on one target.

    On the oracle's inputs: gemm_max_abs_diff (nan where the path is no integer embedding), operand_max_abs_diff (nan
    where the GEMM's operands are not scaled beforehand), codes_equal_share and its derived codes_limit_share,
    codes_inadmissible, scale_error and output_error (1 is the rounding bound), nonfinite. calls: of those that are
    wrong, the call in which each is worst, in words.
    In the running engine: input_sqnr_db, its float input against the float64 reference's, and the same number for the
    worst float32 run of the reference.
    """

    target: str
    name: str
    kind: str
    path: str
    weight_format: str
    activation_format: str
    granularity: str
    group_size: int
    gemm_max_abs_diff: float
    codes_equal_share: float
    codes_limit_share: float
    codes_inadmissible: int
    scale_error: float
    output_error: float
    nonfinite: int
    input_sqnr_db: float
    input_limit_db: float
    weight_sqnr_db: float
    size_bytes: int
    operand_max_abs_diff: float = math.nan
    calls: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionResult:
    """One quantized attention on one target, on the engine's own q, k, v and mask.

    path: the domain of its op, "fpq" for the function body. output_error: largest difference from the oracle over the
    bound that float32 roundings allow, so at most 1. nonfinite: numbers that are not finite. rows: queries that were
    judged, of rows_of. ambiguous_share: of the judged integers that exponentials become, how many roundings may change.
    call: in which output_error was met; diagnosis: where it is wrong and what is likely the cause, None within the
    limit.
    """

    target: str
    name: str
    path: str
    qk_format: str
    pv_format: str
    output_error: float
    nonfinite: int
    rows: int
    rows_of: int
    ambiguous_share: float
    call: str
    diagnosis: str | None


@dataclass(frozen=True)
class StepResult:
    """One denoising step on one target, all on the same x_t: engine against the float64 reference, the worst float32
    run of the reference against it, and the reference against the float model. sqnr_db is nan where a slow target was
    not run."""

    target: str
    step: int
    sqnr_db: float
    reference_fp32_db: float
    quant_sqnr_db: float


@dataclass(frozen=True)
class SegmentResult:
    """The worst call of one stretch: the one that ends at the input of the quantized linear `layer`, None for the
    one that ends at the model's output, or at the one called `output` where it has several.

    error: over its limit, 1 is the bound. noise_ulps: what rounding does in it, in units of 2^-24 of its result's root
    mean square. call: which one was worst. diagnosis: what is likely wrong; None within the limit.
    """

    target: str
    layer: str | None
    call: str
    error: float
    noise_ulps: float
    diagnosis: str | None
    output: str | None = None

    @property
    def end(self) -> str:
        """What the stretch ends at, for people."""
        return self.layer or self.output or "the output"


@dataclass
class Report:
    """Everything that verification found. Gate names carry the target as prefix: `cpu/gemm_exact`."""

    gates: list[Gate] = field(default_factory=list)
    layers: list[LayerResult] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)
    segments: list[SegmentResult] = field(default_factory=list)
    attentions: list[AttentionResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Report) -> None:
        """Append what a part of the verification found."""
        for rows in fields(self):
            getattr(self, rows.name).extend(getattr(part, rows.name))

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    def failures(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]

    def sentence(self) -> str:
        """What failed in one line: value and limit of every gate, and why the first of them may have failed."""
        failed = self.failures()
        if not failed:
            return "no parity gate failed" if self.gates else "no parity gate was run"
        rows = (f"{gate.name} = {gate.value:g} {gate.unit}".rstrip() + f", limit {gate.limit:g}" for gate in failed)
        return f"parity gate failed: {'; '.join(rows)}; {failed[0].name}: {failed[0].why}"

    def to_json(self) -> str:
        """The document parity.json; nan becomes null, and inf the text "inf", which JSON lacks."""
        document = {"schema_version": SCHEMA_VERSION, "passed": self.passed, **asdict(self)}
        document["gates"] = [{**asdict(gate), "passed": gate.passed} for gate in self.gates]
        return json.dumps(plain(document), indent=1, allow_nan=False)


def number(value: float) -> str:
    """Four digits are enough for people, of large numbers all before the point; shares close to 1 keep what matters."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.8f}" if 0.99 < value < 1 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def write_layers_csv(report: Report, path: Path) -> None:
    """One line for each quantized linear and target."""
    names = [name for name in LayerResult.__dataclass_fields__ if name != "calls"]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.layers)
