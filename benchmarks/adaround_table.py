"""The study of learned rounding as Markdown, from benchmarks/results/adaround_study.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import markdown

QUESTION = "What does learned rounding gain in a block, and how many iterations does it take?"
PREFACE = """`python -m benchmarks.adaround_study`: loss of a block's output on the calibration calls, and in brackets
on calls of other prompts and noise. All arms of a block get the same inputs and start from rounding to nearest."""
LABELS = {
    "nearest": "round to nearest",
    "scale_aware_fast": "scale-aware, fast preset",
    "scale_aware_2500": "scale-aware, published rate",
    "scale_aware_2500_quick": "scale-aware, four times that rate",
    "plain_fast": "plain, fast preset",
    "plain_2500_same": "plain, the same rate",
    "plain_20000_same": "plain, the same rate",
    "plain_2500": "plain, ten times the rate (Q-Diffusion's)",
    "plain_2500_quick": "plain, a hundred times the rate",
    "plain_20000": "plain, ten times the rate (Q-Diffusion's)",
}

AGAINST = (
    ("scale_aware_fast", "nearest"),
    ("scale_aware_fast", "plain_fast"),
    ("scale_aware_2500", "nearest"),
    ("scale_aware_2500", "plain_2500_same"),
    ("scale_aware_2500", "plain_20000_same"),
    ("scale_aware_2500", "plain_20000"),
    ("scale_aware_2500_quick", "plain_20000"),
    ("scale_aware_2500_quick", "plain_2500_quick"),
)


def study_text(folder: Path = record.RESULTS) -> str:
    """One table for each model and formats; empty if nothing was measured."""
    path, parts = folder / "adaround_study.json", []
    recipes = json.loads(path.read_text())["recipes"] if path.is_file() else {}
    for name, blocks in recipes.items():
        arms = [arm for block in blocks.values() for arm in block.values()]
        cpus, commits = (", ".join(dict.fromkeys(arm[key] for arm in arms)) for key in ("cpu", "commit"))
        parts.append(f"### {name}\n\n{cpus}, commit {commits}.\n\n{_table(blocks)}\n\n{_answer(blocks)}".rstrip())
    return "\n\n".join([f"## {QUESTION}", PREFACE, *parts]) if parts else ""


def _table(blocks: Mapping[str, Any]) -> str:
    arms = [arm for arm in LABELS if any(arm in block for block in blocks.values())]
    rows = [[name, *(_cell(block.get(arm)) for arm in arms)] for name, block in blocks.items()]
    return markdown(["block", *(_title(arm, blocks) for arm in arms)], rows)


def _title(arm: str, blocks: Mapping[str, Any]) -> str:
    iterations = next(block[arm]["iterations"] for block in blocks.values() if arm in block)
    return f"{LABELS[arm]}, {iterations:,} iterations" if iterations else LABELS[arm]


def _cell(result: Mapping[str, Any] | None) -> str:
    return f"{result['loss']:.4f} ({result['held_out_loss']:.4f})" if result else "not measured yet"


def _answer(blocks: Mapping[str, Any]) -> str:
    """Every pair of AGAINST, in the blocks where both were run."""
    return " ".join(filter(None, (_compared(blocks, *pair) for pair in AGAINST)))


def _compared(blocks: Mapping[str, Any], arm: str, other: str) -> str:
    pairs = [(found[arm], found[other]) for found in blocks.values() if {arm, other} <= set(found)]
    if not pairs:
        return ""
    wins = {key: sum(one[key] <= two[key] for one, two in pairs) for key in ("loss", "held_out_loss")}
    ratio = math.exp(sum(math.log(one["loss"] / two["loss"]) for one, two in pairs) / len(pairs))
    return (
        f"{_title(arm, blocks).capitalize()}: no worse than {_title(other, blocks)} in {wins['loss']} of {len(pairs)} "
        f"blocks, on held-out calls in {wins['held_out_loss']}; {ratio:.2f} times its loss in the geometric mean."
    )
