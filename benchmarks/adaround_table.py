"""The study of learned rounding as Markdown, from benchmarks/results/adaround_MACHINE.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record

QUESTION = "What does learned rounding gain in a block, and how many iterations does it take?"
PREFACE = """`python -m benchmarks.adaround_study`: loss of a block's output on the calibration calls, and in brackets
on calls of other prompts and noise. All arms of a block get the same inputs and start from rounding to nearest."""
LABELS = {
    "nearest": "round to nearest",
    "scale_aware_fast": "scale-aware, fast preset",
    "scale_aware_2500": "scale-aware, published rate",
    "plain_fast": "plain, fast preset",
    "plain_2500": "plain, published rate",
    "plain_20000": "plain, published rate",
}


def study_text(folder: Path = record.RESULTS) -> str:
    """One table for each machine and model; empty if nothing was measured."""
    parts = []
    for path in sorted(folder.glob("adaround_*.json")):
        found = json.loads(path.read_text())
        for name, blocks in found["recipes"].items():
            title = f"### {name}\n\n{found['machine']['cpu']}, commit {found['commit']}."
            parts.append(f"{title}\n\n{_table(blocks)}\n\n{_answer(blocks)}".rstrip())
    return "\n\n".join([f"## {QUESTION}", PREFACE, *parts]) if parts else ""


def _table(blocks: Mapping[str, Any]) -> str:
    from benchmarks.quality_tables import markdown

    arms = [arm for arm in LABELS if any(arm in block for block in blocks.values())]
    rows = [[name, *(_cell(block.get(arm)) for arm in arms)] for name, block in blocks.items()]
    return markdown(["block", *(_title(arm, blocks) for arm in arms)], rows)


def _title(arm: str, blocks: Mapping[str, Any]) -> str:
    iterations = next(block[arm]["iterations"] for block in blocks.values() if arm in block)
    return f"{LABELS[arm]}, {iterations:,} iterations" if iterations else LABELS[arm]


def _cell(result: Mapping[str, Any] | None) -> str:
    return f"{result['loss']:.4f} ({result['held_out_loss']:.4f})" if result else "not measured yet"


def _answer(blocks: Mapping[str, Any]) -> str:
    """Scale-aware at 2,500 against plain at 20,000, in the blocks where both were run."""
    pairs = [
        (b["scale_aware_2500"], b["plain_20000"])
        for b in blocks.values()
        if {"scale_aware_2500", "plain_20000"} <= set(b)
    ]
    if not pairs:
        return ""
    wins = {key: sum(aware[key] <= plain[key] for aware, plain in pairs) for key in ("loss", "held_out_loss")}
    return (
        f"Scale-aware rounding at 2,500 iterations is no worse than plain at 20,000 in {wins['loss']} of {len(pairs)} "
        f"blocks, on held-out calls in {wins['held_out_loss']} of {len(pairs)}."
    )
