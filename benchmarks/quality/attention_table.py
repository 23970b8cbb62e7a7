"""The study of quantized attention as Markdown, from benchmarks/results/attention_study.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks import record
from benchmarks.record import Json, markdown

QUESTION = "What does quantized attention cost by itself, over long sequences, and with outliers?"
PREFACE = """\
`python -m benchmarks.quality.attention_study`. Formats are those of queries and keys, and of values; the weights
between them are integers of 0 to 255. The op takes the mean over the tokens out of the keys; in brackets: left in."""
DRAWN = """\
Signal-to-noise ratio in dB of what an attention of drawn numbers gives, heads of 72 channels. Each channel of the keys
has a mean of some six standard deviations, which is reported of large models (SageAttention, arXiv 2410.02367);
"planted": three channels of each head are eight times as large as the others. Flat attention looks at nearly all keys,
peaked attention at a few: "keys in use" is how many keys of equal weight have the entropy of its weights. What flat
attention gives is mostly the values' mean, which is hard to get wrong: look at the peaked rows."""


def study_text() -> str:
    """Both parts; empty if nothing was measured."""
    document = record.read(record.RESULTS / "attention_study.json", {"drawn": [], "pictures": []})
    if not document["drawn"]:
        return ""
    origin = f"{document['machine']['cpu']}, commit {document['commit']}."
    parts = [f"## {QUESTION}", PREFACE, origin, "### Long sequences and planted outliers", DRAWN]
    parts += [drawn_table(document["drawn"])]
    if document["pictures"]:
        parts += [f"### {document['model']}", *pictures_text(document)]
    return "\n\n".join(parts)


def drawn_table(rows: Sequence[Json]) -> str:
    """A line for each kind of attention, a column for each format."""
    at = {(_case(row), row["formats"], row["centre"]): row["sqnr_db"] for row in rows}
    in_use = {_case(row): row["effective_keys"] for row in rows}
    formats = list(dict.fromkeys(row["formats"] for row in rows))
    lines = []
    for case, count in in_use.items():
        keys, shape, planted = case
        cells = [f"{at[case, name, True]:.1f} ({at[case, name, False]:.1f})" for name in formats]
        lines.append([keys, shape, "planted" if planted else "none", f"{count:.0f}", *cells])
    return markdown(["keys", "attention", "outliers", "keys in use", *formats], lines)


def _case(row: Json) -> tuple[int, str, bool]:
    return row["keys"], row["shape"], row["planted"]


def pictures_text(document: Json) -> Iterable[str]:
    """The table of pictures, what was drawn, and how the formats compare with attention in floats."""
    rows: list[Json] = document["pictures"]
    yield (
        f"{document['count']} pictures by the float32 reference, {document['recipe']} with "
        f"{', '.join(document['settings'])}: the median PSNR of each picture to that of the float model from the same "
        f"noise (95% bootstrap), and the signal-to-noise ratio of the denoiser's output on the float model's calls of "
        f"{len(next(row for row in rows if row['step_sqnr_db'])['step_sqnr_db'])} steps, the mean of the ratios in dB."
    )
    at = {(row["linears"], row["formats"], row["centre"]): row for row in rows}
    lines = []
    for linears, formats in dict.fromkeys((row["linears"], row["formats"]) for row in rows):
        own, other = at[linears, formats, True], at.get((linears, formats, False))
        lines.append([linears, formats or "float", *(_cell(own, other, of) for of in (_psnr, _steps))])
    yield markdown(["linears", "attention", "PSNR to float, dB", "output, dB"], lines)
    yield "\n".join(f"- {line}" for line in _answers(at) if line)


def _cell(own: Json, other: Json | None, of: Callable[[Json], str]) -> str:
    """The number, and in brackets that with K's mean left in."""
    if own["psnr_db"] is None:
        return "-"
    return of(own) + (f" ({of(other).partition(' ')[0]})" if other else "")


def _psnr(row: Json) -> str:
    estimate = row["psnr_db"]
    return f"{estimate['value']:.1f} [{estimate['low']:.1f} to {estimate['high']:.1f}]"


def _steps(row: Json) -> str:
    return f"{np.mean(row['step_sqnr_db']):.1f}"


def _answers(at: dict[tuple[str, str | None, bool], Json]) -> Iterable[str]:
    """Of each format beside attention in floats under the same linears."""
    for (linears, formats, centre), row in at.items():
        plain = at[linears, None, True]["psnr_db"]
        if formats is None or not centre or plain is None:
            continue
        own = row["psnr_db"]
        apart = own["high"] < plain["low"] or plain["high"] < own["low"]
        verdict = "beyond chance" if apart else "within chance"
        yield f"{linears}: {formats} {own['value'] - plain['value']:+.1f} dB PSNR to attention in floats ({verdict})"
