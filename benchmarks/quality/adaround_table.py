"""The study of learned rounding as Markdown, from benchmarks/results/adaround_study.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks import record
from benchmarks.record import Json, markdown

QUESTION = "What does learned rounding gain in a block, and how many iterations does it take?"
PREFACE = """\
`python -m benchmarks.quality.adaround_study`: loss of a block's output on the calibration calls, and in brackets
on calls of other prompts and noise. All arms of a block get the same inputs and start from rounding to nearest. A title
ends in the learning rate. FP4DiT's code learns at 0.0001 with scale awareness (`fp4dit`) and without it; Q-Diffusion's,
and with it the full preset of plain rounding (`fp_adaround`), at 0.001: both rates are compared where both were run."""
LABELS = {
    "nearest": "round to nearest",
    "scale_aware_fast": "scale-aware, fast preset",
    "scale_aware_2500": "scale-aware, full preset",
    "scale_aware_2500_quick": "scale-aware",
    "plain_fast": "plain, fast preset",
    "plain_2500_same": "plain",
    "plain_2500": "plain",
    "plain_2500_quick": "plain",
    "plain_20000_same": "plain",
    "plain_20000": "plain, full preset",
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

# The pair whose absence is said: the full presets of both methods.
PRESETS = ("scale_aware_2500", "plain_20000")


def study_text() -> str:
    """One table for each model and formats; empty if nothing was measured."""
    parts = []
    for name, blocks in record.read(record.RESULTS / "adaround_study.json", {"recipes": {}})["recipes"].items():
        rows = [arm for block in blocks.values() for arm in block.values()]
        cpus, commits = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("cpu", "commit"))
        arms = [arm for arm in LABELS if any(arm in block for block in blocks.values())]
        cells = [[block_name, *(_cell(block.get(arm)) for arm in arms)] for block_name, block in blocks.items()]
        table = markdown(["block", *(_title(arm, blocks) for arm in arms)], cells)
        compared = [line for line in (_compared(blocks, *pair) for pair in AGAINST) if line]
        answer = "\n".join(f"- {line}" for line in compared)
        parts.append(f"### {name}\n\n{cpus}, commit {commits}.\n\n{table}\n\n{answer}".rstrip())
    return "\n\n".join([f"## {QUESTION}", PREFACE, *parts]) if parts else ""


def _title(arm: str, blocks: Json) -> str:
    row = next(block[arm] for block in blocks.values() if arm in block)
    learned = f": {row['iterations']:,} iterations at {row['learning_rate']:g}" if row["iterations"] else ""
    return f"{LABELS[arm]}{learned}"


def _cell(row: Json | None) -> str:
    return f"{row['loss']:.4f} ({row['held_out_loss']:.4f})" if row else "not measured yet"


def _compared(blocks: Json, arm: str, other: str) -> str:
    """A pair of AGAINST, in the blocks where both were run; "" where there is nothing to say."""
    pairs = [(block[arm], block[other]) for block in blocks.values() if {arm, other} <= set(block)]
    if not pairs:
        owed = (arm, other) == PRESETS and any(arm in block for block in blocks.values())
        return f"{_title(arm, blocks)}, against {LABELS[other]}: not measured yet" if owed else ""
    outcomes = [_outcome(pairs, key) for key in ("loss", "held_out_loss")]
    return f"{_title(arm, blocks)}, against {_title(other, blocks)}: {outcomes[0]}; on held-out calls it {outcomes[1]}"


def _outcome(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], key: str) -> str:
    """In how many blocks the first has the lower loss, an equal one counted as lost, and the mean ratio."""
    wins, count = sum(one[key] < two[key] for one, two in pairs), len(pairs)
    every = f"all {count} blocks" if count > 1 else "the one block"
    whole = {count: f"wins in {every}", 0: f"loses in {every}"}
    outcome = whole.get(wins, f"wins in {wins} of {count} blocks, loses in {count - wins}")
    ratio = math.exp(sum(math.log(one[key] / two[key]) for one, two in pairs) / count)
    return f"{outcome}, {ratio:.2f} times the loss" + (" (geometric mean)" if count > 1 else "")
