"""Linears that read the same codes become one GEMM: q, k and v in one launch, with tiles for every multiprocessor.

The lowered graph keeps a node for each linear, and with it the parity gates; merging is a matter of launching.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from plugins.gpu.tiles import MERGED_COLUMNS

if TYPE_CHECKING:
    from pipeline.backends.cuda.module import Step


def merge_gemms(steps: Sequence[Step]) -> list[Step]:
    """The steps with Gemms of equal inputs and formats merged, in the place of the first; up to MERGED_COLUMNS.

    A Gemm with an epilogue reads other inputs as well and stays alone.
    """
    places: list[list[Step]] = []
    open_groups: dict[Hashable, list[Step]] = {}
    for step in steps:
        key = _key(step)
        group = open_groups.get(key, []) if key is not None else []
        if group and sum(member.run.columns for member in (*group, step)) <= MERGED_COLUMNS:
            group.append(step)
            continue
        places.append([step])
        if key is not None:
            open_groups[key] = places[-1]
    return [_merged(place) for place in places]


def _key(step: Step) -> Hashable | None:
    """Steps of equal keys can be merged; None for one that cannot."""
    from pipeline.backends.cuda.torch_gemm import Gemm

    plain = isinstance(step.run, Gemm) and len(step.inputs) == 2
    return (step.inputs, step.run.kind) if plain else None


def _merged(steps: list[Step]) -> Step:
    first = steps[0]
    if len(steps) == 1:
        return first
    first.run.append([step.run for step in steps[1:]])
    outputs = tuple(name for step in steps for name in step.outputs)
    return replace(first, name=" + ".join(step.name for step in steps), outputs=outputs)
