"""Group sizes of layers as something to choose: what sizes there are, what they take, plans that follow a choice."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from export.errors import RecipeError
from pipeline.calibrate.blocks import block_of
from pipeline.calibrate.groups.search import Gene, Individual, Space
from pipeline.calibrate.plan import LayerPlan

logger = logging.getLogger(__name__)
# Q-DiT's sizes. Exact multipliers cost no run time, so that smaller groups are worth trying there.
SIZES = {"group": (32, 64, 128, 192, 288), "exact_group": (16, 32, 64, 128, 192, 288)}
GENES = ("kind", "layer")


def gene_names(plans: Sequence[LayerPlan], genes: str) -> list[str | None]:
    """The gene that each layer belongs to: its own, or that of its block and kind, so that layers that read one tensor
    (query, key and value) share its quantizer, as the one linear of theirs does in the paper's model. None: no groups.
    """
    if genes not in GENES:
        raise RecipeError(f"genes {genes!r} of the group search are unknown; use one of {', '.join(GENES)}")
    names = [plan.name if genes == "layer" else f"{block_of(plan.name)} {plan.linear.kind}" for plan in plans]
    return [name if plan.group_size else None for name, plan in zip(names, plans, strict=True)]


def make_space(plans: Sequence[LayerPlan], genes: str, sizes: Sequence[int] = (), budget_bytes: int = 0) -> Space:
    """The genes of all grouped layers. budget_bytes: 0 for what the plans take now.

    sizes: what to choose from, empty for `SIZES`. A size that does not divide K is left out there, which is logged; a
    gene that none divides keeps its own. Raises RecipeError where no gene has a choice.
    """
    members: dict[str, list[LayerPlan]] = {}
    for name, plan in zip(gene_names(plans, genes), plans, strict=True):
        if name:
            members.setdefault(name, []).append(plan)
    if not members:
        raise RecipeError("the group search found no layer with groups; use --set weights.granularity=group")
    skipped: Counter[tuple[int, int]] = Counter()
    rows = tuple(_gene(name, group, sizes, skipped) for name, group in members.items())
    for (size, k), count in sorted(skipped.items()):
        logger.info("group search: groups of %d do not divide K=%d, left out for %d genes", size, k, count)
    if all(len(gene.sizes) == 1 for gene in rows):
        _refuse_single_sizes([plan for group in members.values() for plan in group], sizes)
    now = sum(plan.size_bytes for group in members.values() for plan in group)
    space = Space(rows, budget_bytes or now)
    if space.least_bytes == space.budget_bytes:
        remedy = "add larger sizes (calibrate.options.sizes) or raise calibrate.options.budget_bytes"
        logger.warning("group search: the budget is what the largest groups take, nothing can be finer; %s", remedy)
    return space


def _gene(name: str, plans: list[LayerPlan], sizes: Sequence[int], skipped: Counter[tuple[int, int]]) -> Gene:
    k = math.gcd(*(plan.linear.module.in_features for plan in plans))
    offered = _offered(plans[0], sizes)
    fitting = tuple(size for size in offered if size > 0 and k % size == 0)
    skipped.update((size, k) for size in offered if size not in fitting)
    fitting = fitting or (plans[0].group_size,)  # divides K, as the recipe's size has to
    return Gene(name, fitting, tuple(sum(replace(p, group_size=size).size_bytes for p in plans) for size in fitting))


def _refuse_single_sizes(plans: list[LayerPlan], sizes: Sequence[int]) -> None:
    widths = sorted({plan.linear.module.in_features for plan in plans})
    offered = ",".join(map(str, _divisors(math.gcd(*widths))))
    raise RecipeError(
        f"the group search has nothing to choose: of the group sizes {_offered(plans[0], sizes)} at most one divides "
        f"any layer's K ({widths}); give some that do, such as --set calibrate.options.sizes={offered}"
    )


def _offered(plan: LayerPlan, sizes: Sequence[int]) -> list[int]:
    return sorted(set(sizes or SIZES[plan.granularity]))


def _divisors(k: int) -> list[int]:
    """Four sizes to offer: the divisors of K from 16 up, or its largest.

    >>> _divisors(72), _divisors(256)
    ([18, 24, 36, 72], [16, 32, 64, 128])
    """
    divisors = [size for size in range(1, k + 1) if k % size == 0]
    return [size for size in divisors if size >= 16][:4] or divisors[-4:]


def layer_sizes(plans: Sequence[LayerPlan], genes: str, space: Space, individual: Individual) -> list[int]:
    """Group size of every layer, 0 for a layer without groups."""
    chosen = dict(zip((gene.name for gene in space.genes), individual, strict=True))
    return [chosen[name] if name else 0 for name in gene_names(plans, genes)]


def with_sizes(plans: Sequence[LayerPlan], sizes: Sequence[int]) -> list[LayerPlan]:
    """The plans with these group sizes. Raises RecipeError for a wrong count, or a size that does not divide K."""
    if len(sizes) != len(plans):
        raise RecipeError(f"{len(sizes)} group sizes for {len(plans)} layers; give one for each, 0 for no groups")
    for plan, size in zip(plans, sizes, strict=True):
        k = plan.linear.module.in_features
        if bool(size) != bool(plan.group_size) or size < 0 or (size and k % size):
            allowed = f"a divisor of K={k}" if plan.group_size else f"0, as {plan.granularity} has no groups"
            raise RecipeError(f"{plan.name}: group size {size}; use {allowed}")
    return [replace(plan, group_size=size) for plan, size in zip(plans, sizes, strict=True)]


def to_text(sizes: Iterable[int]) -> str:
    """Group sizes of all layers as one text for a recipe, runs of equal ones shortened.

    >>> to_text([32, 64, 64, 64, 0])
    '32,64*3,0'
    """
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    return ",".join(f"{size}*{count}" if count > 1 else str(size) for size, count in runs)


def from_text(text: str) -> list[int]:
    """Inverse of `to_text`.

    >>> from_text("32,64*3,0")
    [32, 64, 64, 64, 0]
    """
    sizes: list[int] = []
    for part in text.split(","):
        size, _, count = part.strip().partition("*")
        if not size.isdecimal() or (count and not count.isdecimal()):
            raise RecipeError(f"group sizes {text!r}: {part.strip()!r} is no size; expected for example 32,64*3,128")
        sizes += [int(size)] * int(count or 1)
    return sizes
