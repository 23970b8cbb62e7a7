"""What the kernels are held to on an H100, and whether a document's numbers meet it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.results import rows_of
from benchmarks.record import Json, markdown
from benchmarks.shapes import CHANNEL, EXACT_64, Granularity

LARGE = 4096  # rows of a GEMM, or tokens, that fill the GPU
LARGE_PIXELS = 1024  # of the picture that the denoiser's target is about


@dataclass(frozen=True)
class Target:
    """One number to reach. value(document) -> every number it is about; the worst counts. at_least, else at most."""

    name: str
    limit: float
    at_least: bool
    values: Callable[[Json], list[float]]

    def judge(self, document: Json) -> Json:
        """The worst value and whether it meets the limit; "not measured" where there is none."""
        values = self.values(document)
        row: Json = {"name": self.name, "limit": self.limit, "at_least": self.at_least, "of": len(values)}
        if not values:
            return {**row, "value": None, "verdict": "not measured"}
        worst = min(values) if self.at_least else max(values)
        met = worst >= self.limit if self.at_least else worst <= self.limit
        return {**row, "value": worst, "verdict": "met" if met else "missed"}


def _unpassed(document: Json) -> list[float]:
    """Checks that failed or were not reached; one more if the section did not come to its end."""
    section = document["sections"].get("check", {"rows": [], "not_reached": [], "stopped": ""})
    failed = sum(not row.get("passed") for row in section["rows"])
    count = failed + len(section["not_reached"]) + bool(section["stopped"])
    return [float(count)] if section["rows"] or count else []


def _gemm(kernel: str, granularity: str) -> Callable[[Json], list[float]]:
    """Of the quicker of FP8 and INT8 operands in each row; a kernel whose output is wrong has no speed, 0."""

    def values(document: Json) -> list[float]:
        rows = [row for row in rows_of(document, "gemm") if row["m"] >= LARGE and row["granularity"] == granularity]
        speeds = [[_speed(row, name) for name in (kernel, f"{kernel}_int8")] for row in rows]
        return [max(ratio for ratio in both if ratio is not None) for both in speeds if both != [None, None]]

    return values


def _speed(row: Json, name: str) -> float | None:
    ratio = row["ratios"].get(name, {}).get("fp8")
    return ratio if ratio is None or name not in row["wrong"] else 0.0


def _fused(kind: str, ratio: str) -> Callable[[Json], list[float]]:
    def values(document: Json) -> list[float]:
        rows = [row for row in rows_of(document, "fused") if row["kind"] == kind and row["m"] >= LARGE]
        return [row["ratios"][ratio] for row in rows if ratio in row["ratios"]]

    return values


def _denoiser(document: Json) -> list[float]:
    rows = [row for row in rows_of(document, "denoiser") if row.get("pixels") == LARGE_PIXELS]
    return [row["ratios"]["over_compiled"] for row in rows if "over_compiled" in row.get("ratios", {})]


def _weights(document: Json) -> list[float]:
    return [row["packed_of_bf16"] for row in rows_of(document, "denoiser") if "packed_of_bf16" in row]


def _exact(granularity: Granularity) -> Callable[[Json], list[float]]:
    """Share of outputs of expanded_gemm that differ from their integer sums, E2M3 x E2M1."""
    conditions = {"activation": "E2M3", "interval": None, "granularity": granularity.name}

    def values(document: Json) -> list[float]:
        rows = [row for row in rows_of(document, "exactness") if conditions.items() <= row.items()]
        return [sum(row["differ"].values()) / (row["outputs"] * len(row["differ"])) for row in rows]

    return values


def _gemm_targets(scales: str, granularity: Granularity) -> tuple[Target, Target]:
    limits = {"expanded_gemm": 0.90, "packed_gemm": 0.75}
    expanded, packed = (
        Target(
            f"{name}, {scales}: FP8 or INT8 of cuBLASLt FP8's speed, M >= 4096",
            limit,
            True,
            _gemm(name, granularity.name),
        )
        for name, limit in limits.items()
    )
    return expanded, packed


TARGETS = (
    Target("kernel checks that did not pass or were not reached", 0.0, False, _unpassed),
    *_gemm_targets("scales per channel", CHANNEL),
    *_gemm_targets("exact groups of 64, the default recipe", EXACT_64),
    Target(
        "norm_modulate_quantize, time of LayerNorm + modulate's", 1.05, False, _fused("norm_modulate", "over_alone")
    ),
    Target("norm_modulate_quantize, bandwidth of a copy's", 0.85, True, _fused("norm_modulate", "of_copy")),
    Target("gelu_quantize, time of GELU's", 1.05, False, _fused("gelu", "over_alone")),
    Target(f"denoiser at {LARGE_PIXELS} pixels, speed of torch.compile bf16's", 1.6, True, _denoiser),
    Target("weights in memory, packed, of bf16's", 0.29, False, _weights),
    Target("E2M3 x E2M1 sums that differ, as compiled, scales per channel", 0.0, False, _exact(CHANNEL)),
    Target("E2M3 x E2M1 sums that differ, as compiled, exact groups of 64", 0.0, False, _exact(EXACT_64)),
)


def judged(document: Json) -> list[Json]:
    """Every target's row."""
    return [target.judge(document) for target in TARGETS]


def cells(row: Json) -> list[str]:
    """Of a table: name, limit, worst value and verdict of a row of `judged`."""
    limit = f"{'at least' if row['at_least'] else 'at most'} {row['limit']:g}"
    return [row["name"], limit, "-" if row["value"] is None else f"{row['value']:.3f}", row["verdict"]]


def table(rows: list[Json]) -> str:
    """The rows of `judged` as text."""
    return markdown(["target", "limit", "worst", "verdict"], map(cells, rows))
