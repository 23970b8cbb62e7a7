"""What a quality table says, in sentences computed from its numbers: one function for each question.

"Within chance" means that the intervals of two rows overlap; since all rows share prompts and noise, that is cautious.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.quality.results import MEASURED
from benchmarks.quality.rows import (
    ACTIVATIONS,
    ALL,
    BOTH,
    EQUAL_BYTES,
    EQUAL_FORMATS,
    METHODS,
    MSFP,
    QDIT,
    WEIGHTS,
    WIDTHS,
    Table,
    nearest_rows,
)
from benchmarks.record import Json, markdown

Records = Mapping[str, Json]
LATE = 0.25  # of the steps, the last ones, of which the share of the noise is told
DISTANCE, GROWTH, PSNR = "frechet_to_float", "frechet_increase", "psnr_db"
# The aim: a method's distance over float's is at most this share of that of round to nearest in the same formats.
# Float's pictures have no distance to themselves, so of the distance to them the whole is over float's.
AIM = 0.25
REACHED, REACHED_MAYBE, MISSED_MAYBE, MISSED = "reached", "reached within chance", "missed within chance", "missed"
GREW = "grew, so rows are judged by it"
UNSURE = "within chance of no growth, which judges no row"
SHRANK = "wholly below 0, nearer to real data than float's own pictures, so that nothing grew and it judges no row"
# Round to nearest in the formats and groups of the default recipe.
DEFAULT = "rtn-fp-exact64"
AGAINST_NEAREST = f"""Each against round to nearest in the same formats, granularity and group size: what the method
adds to them (bits per weight, above, say where it adds bytes as well). A low share of a bad row may still be a bad row,
so the last column has `{DEFAULT}` of the same width, the formats and groups of the default recipe, for all:"""


def compare(first: Mapping[str, float], second: Mapping[str, float], less_is_better: bool) -> str:
    """ "better", "worse" or "within chance": the first estimate against the second.

    >>> compare({"value": 1, "low": 0.9, "high": 1.1}, {"value": 2, "low": 1.8, "high": 2.2}, less_is_better=True)
    'better'
    """
    if first["low"] <= second["high"] and second["low"] <= first["high"]:
        return "within chance"
    return "better" if (first["value"] < second["value"]) == less_is_better else "worse"


def _measured(records: Records, *names: str) -> bool:
    return all(records.get(name, {}).get("status") == MEASURED for name in names)


def verdict(records: Records, first: str, second: str) -> str:
    """One row against another: distance and PSNR with how sure each comparison is. "" unless both are measured."""
    if not _measured(records, first, second):
        return ""
    return f"distance {_ratio(records, first, second)}, PSNR {_gain(records, first, second)}"


def _ratio(records: Records, first: str, second: str) -> str:
    """ "" unless both are measured."""
    if not _measured(records, first, second):
        return ""
    one, other = records[first][DISTANCE], records[second][DISTANCE]
    return f"x {one['value'] / other['value']:.2f} ({compare(one, other, less_is_better=True)})"


def _gain(records: Records, first: str, second: str) -> str:
    one, other = records[first][PSNR], records[second][PSNR]
    return f"{one['value'] - other['value']:+.1f} dB ({compare(one, other, less_is_better=False)})"


def bullets(title: str, rows: Mapping[str, str]) -> list[str]:
    """A title and a bullet for each row with a verdict; nothing if none has one."""
    lines = [f"- {name}: {text}" for name, text in rows.items() if text]
    return ["\n".join([title, "", *lines])] if lines else []


def _bits(records: Records, *names: str) -> str:
    if not _measured(records, *names):
        return ""
    shown = [f"{8 * records[name]['weight_bytes'] / records[name]['weights']:.2f}" for name in names]
    return f", {' and '.join(shown)} bits per weight"


Answer = Callable[[Records], list[str]]


def pairs(heading: str, compared: Mapping[str, tuple[str, str]], bits: bool = False) -> Answer:
    """Rows against others, title -> (row, other); bits: the title ends in what a weight takes in both."""

    def answer(records: Records) -> list[str]:
        ends = {title: _bits(records, *names) if bits else "" for title, names in compared.items()}
        return bullets(heading, {f"{title}{ends[title]}": verdict(records, *compared[title]) for title in compared})

    return answer


# --- methods and the aim --------------------------------------------------------------------------------------------


def methods(records: Records) -> list[str]:
    """Every method against round to nearest in its own formats and groups, and what of the aim is reached."""
    rows = {width: judged_rows(records, width) for width in WIDTHS}
    every = [pair for pairs in rows.values() for pair in pairs]
    if not every:
        return []
    titles = ["distance to float", "PSNR to float", f"at most {AIM:g} of the distance", f"distance to `{DEFAULT}`'s"]
    by_float = {width.upper(): aim_to_float(records, rows[width]) for width in WIDTHS}
    return [
        AGAINST_NEAREST,
        markdown(["row", "round to nearest", *titles], [against_nearest(records, *pair) for pair in every]),
        *bullets(f"The aim by float's pictures, a distance of at most {AIM:g} of round to nearest's:", by_float),
        *bullets(f"The aim by real data, a growth over float's of at most {AIM:g} of:", aim_to_real(records, every)),
    ]


def judged_rows(records: Records, width: str) -> list[tuple[str, str]]:
    """The measured rows of METHODS at one width, each with its row of round to nearest."""
    nearest = nearest_rows()
    names = [f"{line.name}-{width}" for line in METHODS.lines]
    return [(name, nearest[name]) for name in names if name in nearest and _measured(records, name)]


def against_nearest(records: Records, name: str, base: str) -> list[str]:
    """The cells of one row; empty ones where round to nearest is not measured."""
    default = _ratio(records, name, f"{DEFAULT}-{name.rpartition('-')[2]}")
    if not _measured(records, base):
        return [f"`{name}`", f"`{base}`: not measured yet", "", "", "", default]
    one, other = records[name][DISTANCE], records[base][DISTANCE]
    distances = f"{one['value']:.3g} of {other['value']:.3g}, {_ratio(records, name, base)}"
    return [f"`{name}`", f"`{base}`", distances, _gain(records, name, base), aimed(one, other), default]


def aimed(one: Mapping[str, float], base: Mapping[str, float]) -> str:
    """Is an estimate at most AIM of a positive one? Within chance where the intervals of both sides overlap."""
    limit = {part: AIM * value for part, value in base.items()}
    by_chance = REACHED_MAYBE if one["value"] <= limit["value"] else MISSED_MAYBE
    return {"better": REACHED, "worse": MISSED}.get(compare(one, limit, less_is_better=True), by_chance)


def aim_to_float(records: Records, rows: Sequence[tuple[str, str]]) -> str:
    """How the rows of one width fare by the distance to float's pictures, the best first; "" if no base is measured."""
    pairs = [(name, base) for name, base in rows if _measured(records, base)]
    known = [(name, records[name][DISTANCE], records[base][DISTANCE]) for name, base in pairs]
    shares = sorted((one["value"] / base["value"], name, aimed(one, base)) for name, one, base in known)
    by_outcome: dict[str, list[str]] = {}
    for share, name, outcome in shares:
        by_outcome.setdefault(outcome, []).append(f"`{name.rpartition('-')[0]}` ({share:.2f})")
    order = [outcome for outcome in (REACHED, REACHED_MAYBE, MISSED_MAYBE, MISSED) if outcome in by_outcome]
    return "; ".join(f"{outcome} by {', '.join(by_outcome[outcome])}" for outcome in order)


def aim_to_real(records: Records, rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Did the distance to real data of each base grow over float's? Only there can its rows be judged by it."""
    by_kind: dict[str, list[str]] = {}
    for base in dict.fromkeys(base for _, base in rows if _measured(records, base)):
        growth = records[base][GROWTH]
        shown = f"`{base}` {growth['value']:+.2f} ({growth['low']:+.2f} to {growth['high']:+.2f})"
        own = {name: records[name][GROWTH] for name, of in rows if of == base} if growth["low"] > 0 else {}
        judged = [f"`{name}` {value['value']:+.2f}, {aimed(value, growth)}" for name, value in own.items()]
        kind = SHRANK if growth["high"] < 0 else GREW if growth["low"] > 0 else UNSURE
        by_kind.setdefault(kind, []).append(" with ".join([shown, *filter(None, ["; ".join(judged)])]))
    return {kind: "; ".join(shown) for kind, shown in by_kind.items()}


def steps_of(table: Table) -> Answer:
    """Each line of an ablation against the line before, at every width that both have."""
    compared = {
        f"{line.label}, {width.upper()}": (f"{line.name}-{width}", f"{before.name}-{width}")
        for before, line in zip(table.lines, table.lines[1:], strict=False)
        for width in line.widths
        if width in before.widths
    }
    return pairs("Each line against the one before:", compared)


def against(table: Table, base: str) -> dict[str, tuple[str, str]]:
    """Every other line of a table of W4A6 against the line called `base`."""
    return {line.label: (f"{line.name}-w4a6", f"{base}-w4a6") for line in table.lines if line.name != base}


def about_modelopt(table: Table) -> Answer:
    """How the rows of ModelOpt in a table were made, and by which version; nothing where none is measured."""
    names = [f"{line.name}-w4a6" for line in table.lines if line.algorithm is not None]

    def answer(records: Records) -> list[str]:
        versions = sorted({records[name]["modelopt"] for name in names if _measured(records, name)})
        return [f"{MODELOPTS} ModelOpt {', '.join(versions)}."] if versions else []

    return answer


def bytes_apart(table: Table) -> Answer:
    """By how much the bytes of the measured lines of a table of W4A6 differ."""
    names = [f"{line.name}-w4a6" for line in table.lines]

    def answer(records: Records) -> list[str]:
        sizes = [records[name]["weight_bytes"] for name in names if _measured(records, name)]
        return [f"The bytes of these rows differ by at most {max(sizes) / min(sizes) - 1:.1%}."] if sizes else []

    return answer


# --- sensitivity ----------------------------------------------------------------------------------------------------


def sensitivity_answers(rows: Sequence[Json]) -> list[str]:
    """Which kinds of layers cost most, and the error by step, for every format and width measured."""
    by_name: dict[str, dict[tuple[str, str], Json]] = {}
    for row in rows:
        by_name.setdefault(row["row"].replace("-", " ").upper(), {})[row["kind"], row["part"]] = row
    kinds = {name: kinds_text(cases) for name, cases in by_name.items()}
    steps = {name: steps_text(cases) for name, cases in by_name.items()}
    return [
        *bullets("One kind quantized, its weights and activations, the costliest kind first:", kinds),
        *bullets("By step, all kinds quantized; a step's noise is its share of the step's output:", steps),
    ]


Cases = Mapping[tuple[str, str], Json]  # (kind, part) -> the record


def _alone(cases: Cases, key: str) -> Json:
    """Kind -> what its record with weights and activations quantized has under `key`."""
    return {kind: case[key] for (kind, part), case in cases.items() if part == BOTH and kind != ALL}


def kinds_text(cases: Cases) -> str:
    """The order of the kinds, and whether weights or activations cost more."""
    costs = sorted(_alone(cases, "sqnr_db").items(), key=lambda pair: pair[1])
    order = ", ".join(f"`{kind}` {value:.1f} dB" for kind, value in costs)
    weights, activations, both = (cases[ALL, part]["sqnr_db"] for part in (WEIGHTS, ACTIVATIONS, BOTH))
    more, less = (WEIGHTS, ACTIVATIONS) if weights < activations else (ACTIVATIONS, WEIGHTS)
    times = 10 ** (abs(weights - activations) / 10)
    return f"{order}; all together {both:.1f} dB, with {times:.1f} times the noise from {more} as from {less}"


def steps_text(cases: Cases) -> str:
    """First, best and last step, how much of the noise the last ones hold, and which kind is the costliest in each."""
    steps = cases[ALL, BOTH]["step_sqnr_db"]
    noise = [10 ** (-value / 10) for value in steps]
    late = math.ceil(LATE * len(steps))
    kinds = _alone(cases, "step_sqnr_db")
    worst = [min(kinds, key=lambda kind: kinds[kind][step]) for step in range(len(steps))]
    counts = ", ".join(f"`{kind}` in {worst.count(kind)}" for kind in kinds if kind in worst)
    best = f"{max(steps):.1f} dB at best (step {steps.index(max(steps))})"
    share = f"the last {late} of {len(steps)} steps hold {sum(noise[-late:]) / sum(noise):.0%} of the noise"
    return f"{steps[0]:.1f} dB in the first, {best}, {steps[-1]:.1f} dB in the last; {share}; costliest: {counts}"


MODELOPTS = """Rows of ModelOpt: `mtq.quantize` calibrates in these formats, as a backend of it rounds
(`pipeline/calibrate/modelopt/backend.py`), on the calibration calls that all methods see; its result is taken over
number for number: scales and multipliers of groups are the smallest that clip no more than its amax says, where ours
are searched for the least squared error. Its SVDQuant has a branch in float32, ours in float16, so that a rank takes
twice the bytes. Measured with"""
# Of the formats of the default recipe, with their groups of 64 and with groups of 16.
DEFAULT_SMALLER = "rtn-fp-exact16"
SAME_NAME = {
    "GPTQ": ("modelopt-gptq-exact64-w4a6", "qdit-fp-exact64-w4a6"),
    "AWQ": ("modelopt-awq-exact64-w4a6", "awq-fp-exact64-w4a6"),
    "SVDQuant, rank 16": ("modelopt-svdquant-exact64-w4a6", "svdquant-fp-exact64-w4a6"),
}
PLACES = [(width, scales) for scales in ("channel", "group128") for width in WIDTHS]
# Of the formats of the default recipe: exact multipliers against the nearest peers in bytes.
GROUPS = {
    "exact multipliers of 64 against none": ("exact64", "channel"),
    "exact multipliers of 64 against powers of two of 64 (equal bytes)": ("exact64", "power64"),
    "exact multipliers of 32 against powers of two of 32 (equal bytes)": ("exact32", "power32"),
    "exact multipliers of 32 against real scales of 128": ("exact32", "group128"),
    "exact multipliers of 16 against real scales of 64": ("exact16", "group64"),
}
ROW_AGAINST_ROW = "Row against row:"
# Table -> what is said below it.
ANSWERS: dict[str, tuple[Answer, ...]] = {
    "fp_or_int": (
        pairs("FP against INT:", {f"{w.upper()}, {s}": (f"rtn-fp-{s}-{w}", f"rtn-int-{s}-{w}") for w, s in PLACES}),
        pairs(
            "E3M0 before GELU against E2M1 there:",
            {f"{w.upper()}, {s}": (f"rtn-mixed-{s}-{w}", f"rtn-fp-{s}-{w}") for w, s in PLACES},
        ),
    ),
    "groups": (
        pairs(
            "At W4A6, round to nearest:",
            {title: (f"rtn-fp-{one}-w4a6", f"rtn-fp-{other}-w4a6") for title, (one, other) in GROUPS.items()},
            bits=True,
        ),
    ),
    "methods": (methods,),
    "equal_formats": (
        about_modelopt(EQUAL_FORMATS),
        pairs("Each against round to nearest:", against(EQUAL_FORMATS, DEFAULT), bits=True),
        pairs("ModelOpt's against ours of the same name:", SAME_NAME, bits=True),
    ),
    "equal_bytes": (
        bytes_apart(EQUAL_BYTES),
        pairs("Each against round to nearest:", against(EQUAL_BYTES, DEFAULT_SMALLER)),
    ),
    "qdit": (steps_of(QDIT),),
    "msfp": (steps_of(MSFP),),
    "attention": (
        pairs(
            "At W4A6, round to nearest, against attention in floats:",
            {
                f"{name}/{name}": (f"rtn-fp-exact64-attention-{name.lower()}-w4a6", "rtn-fp-exact64-w4a6")
                for name in ("INT8", "E2M3", "INT6")
            },
        ),
    ),
    "learned_groups": (
        pairs(
            "At W4A6, FP4DiT:",
            {
                f"groups of {size} against 64": (f"fp4dit-fp-exact{size}-w4a6", "fp4dit-fp-exact64-w4a6")
                for size in (32, 16)
            },
            bits=True,
        ),
    ),
    "full": (
        pairs(
            ROW_AGAINST_ROW,
            {
                "FP4DiT, full against fast": ("fp4dit-full-w4a6", "fp4dit-mixed-exact64-w4a6"),
                "MSFP, full against fast": ("msfp-full-w4a6", "msfp-fp-w4a6"),
            },
        ),
    ),
    "full_default": (pairs(ROW_AGAINST_ROW, {"full against fast": ("fp4dit-fp-full-w4a6", "fp4dit-fp-exact64-w4a6")}),),
}
