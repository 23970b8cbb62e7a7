"""What a quality table says, in sentences computed from its numbers: one function for each question.

"Within chance" means that the intervals of two rows overlap; since all rows share prompts and noise, that is cautious.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_results import MEASURED
from benchmarks.quality_rows import MSFP, QDIT, WIDTHS, Table

Records = Mapping[str, Mapping[str, Any]]
DISTANCE, PSNR = "frechet_to_float", "psnr_db"
# What stands for round to nearest: the recipes' formats and groups before any learned method.
BASE = "rtn-mixed-exact64"
AIM = 0.25


def compare(first: Mapping[str, float], second: Mapping[str, float], less_is_better: bool) -> str:
    """ "better", "worse" or "within chance": the first estimate against the second.

    >>> compare({"value": 1, "low": 0.9, "high": 1.1}, {"value": 2, "low": 1.8, "high": 2.2}, less_is_better=True)
    'better'
    """
    if first["low"] <= second["high"] and second["low"] <= first["high"]:
        return "within chance"
    return "better" if (first["value"] < second["value"]) == less_is_better else "worse"


def _measured(found: Records, *names: str) -> bool:
    return all(found.get(name, {}).get("status") == MEASURED for name in names)


def verdict(found: Records, first: str, second: str) -> str:
    """One row against another: distance and PSNR with how sure each comparison is. "" unless both are measured."""
    if not _measured(found, first, second):
        return ""
    one, other = found[first], found[second]
    ratio = one[DISTANCE]["value"] / other[DISTANCE]["value"]
    gain = one[PSNR]["value"] - other[PSNR]["value"]
    told = (compare(one[DISTANCE], other[DISTANCE], True), compare(one[PSNR], other[PSNR], False))
    return f"distance x {ratio:.2f} ({told[0]}), PSNR {gain:+.1f} dB ({told[1]})"


def bullets(title: str, rows: Mapping[str, str]) -> list[str]:
    """A title and a bullet for each row with a verdict; nothing if none has one."""
    told = [f"- {name}: {text}" for name, text in rows.items() if text]
    return ["\n".join([title, "", *told])] if told else []


def fp_or_int(found: Records) -> list[str]:
    """FP against INT at each width and granularity."""
    places = [(width, scales) for scales in ("channel", "group128") for width in WIDTHS]
    plain = {f"{w.upper()}, {s}": verdict(found, f"rtn-fp-{s}-{w}", f"rtn-int-{s}-{w}") for w, s in places}
    mixed = {f"{w.upper()}, {s}": verdict(found, f"rtn-mixed-{s}-{w}", f"rtn-fp-{s}-{w}") for w, s in places}
    return bullets("FP against INT:", plain) + bullets("E3M0 before GELU against E2M1 there:", mixed)


def groups(found: Records) -> list[str]:
    """Exact multipliers against the nearest peers in bytes."""
    pairs = {
        "exact multipliers of 64 against none": ("exact64", "channel"),
        "exact multipliers of 64 against powers of two of 64 (equal bytes)": ("exact64", "power64"),
        "exact multipliers of 32 against powers of two of 32 (equal bytes)": ("exact32", "power32"),
        "exact multipliers of 32 against real scales of 128": ("exact32", "group128"),
        "exact multipliers of 16 against real scales of 64": ("exact16", "group64"),
    }
    rows = {
        f"{name}{_bytes(found, first, second)}": verdict(found, f"rtn-fp-{first}-w4a6", f"rtn-fp-{second}-w4a6")
        for name, (first, second) in pairs.items()
    }
    return bullets("At W4A6, round to nearest:", rows)


def _bytes(found: Records, first: str, second: str) -> str:
    names = [f"rtn-fp-{part}-w4a6" for part in (first, second)]
    if not _measured(found, *names):
        return ""
    shown = [f"{8 * found[name]['weight_bytes'] / found[name]['weights']:.2f}" for name in names]
    return f", {shown[0]} and {shown[1]} bits per weight"


def methods(found: Records) -> list[str]:
    """Every method against round to nearest at the same width."""
    names = dict.fromkeys(name.rpartition("-")[0] for name in found if not name.startswith(("rtn", "float")))
    rows = {
        f"`{name}` {width.upper()}": verdict(found, f"{name}-{width}", f"{BASE}-{width}")
        for name in names
        for width in WIDTHS
    }
    aims = {width.upper(): aim(found, [f"{name}-{width}" for name in names], width) for width in WIDTHS}
    aimed = bullets(f"A distance to real data that grows by at most {AIM:g} of round to nearest's growth:", aims)
    return bullets(f"Against round to nearest (`{BASE}`):", rows) + aimed


def aim(found: Records, names: Sequence[str], width: str) -> str:
    """Which rows keep the growth of the distance to real data under AIM of the base's; "" if that is not measured."""
    base = f"{BASE}-{width}"
    if not _measured(found, base):
        return ""
    growth = found[base]["frechet_increase"]
    shown = f"round to nearest {growth['value']:+.2f} ({growth['low']:+.2f} to {growth['high']:+.2f})"
    if growth["low"] <= 0:
        return f"{shown} is within chance of no growth, so it cannot be judged by"
    rows = [name for name in names if _measured(found, name)]
    kept = [f"`{name}`" for name in rows if found[name]["frechet_increase"]["value"] <= AIM * growth["value"]]
    return f"{shown}; reached by {', '.join(kept) or 'none'} of {len(rows)} measured"


def steps_of(table: Table) -> Callable[[Records], list[str]]:
    """Each line of an ablation against the line before, at every width that both have."""

    def told(found: Records) -> list[str]:
        pairs = zip(table.lines, table.lines[1:], strict=False)
        rows = {
            f"{line.label}, {width.upper()}": verdict(found, f"{line.name}-{width}", f"{before.name}-{width}")
            for before, line in pairs
            for width in line.widths
            if width in before.widths
        }
        return bullets("Each line against the one before:", rows)

    return told


ANSWERS: dict[str, Callable[[Records], list[str]]] = {
    "fp_or_int": fp_or_int,
    "groups": groups,
    "methods": methods,
    "qdit": steps_of(QDIT),
    "msfp": steps_of(MSFP),
}
