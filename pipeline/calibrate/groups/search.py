"""Evolutionary search for group sizes (Q-DiT, arXiv 2406.17343, algorithm 1): which layers need fine groups?

An individual gives every gene (a layer, or the layers of one kind in one block) a group size. Each generation is
scored, the best of all so far are the parents, and the next generation is half crossover, half mutation. Individuals
that take more bytes than the budget are not let in: where the paper draws again, here random genes go up to a larger
group until the rest fits, which ends even where hardly anything fits.

What is scored, and how, is the caller's: a score is a cost, lower is better. The individuals of a generation are jobs,
done by whichever runner is given. Scores are kept in a file after every individual. A run that was stopped goes the
same way again, since nothing but the seed and the scores decides, and finds them there. So does another runner.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Predicate
from typing_extensions import TypedDict

from export.documents import read_json
from export.errors import ContractError, RecipeError
from pipeline.files import write_json
from pipeline.jobs.jobs import Job, Runner, error_of, in_turn
from pipeline.jobs.once import Once
from pipeline.progress import track

logger = logging.getLogger(__name__)
Individual = tuple[int, ...]  # the group size of every gene
Score = Callable[[Individual], float]  # cost, lower is better
TRIES = 100  # draws for a child that was not there before


@dataclass(frozen=True)
class Gene:
    """A choice: `sizes`, rising, and what all its layers take with each of them in bytes."""

    name: str
    sizes: tuple[int, ...]
    size_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """All genes, and how many bytes an individual may take."""

    genes: tuple[Gene, ...]
    budget_bytes: int

    def __post_init__(self) -> None:
        if self.least_bytes > self.budget_bytes:
            raise RecipeError(
                f"the group search may use {self.budget_bytes:,} bytes, but the largest groups take "
                f"{self.least_bytes:,}; raise the budget or add larger group sizes"
            )

    @property
    def least_bytes(self) -> int:
        """What the largest groups take."""
        return sum(min(gene.size_bytes) for gene in self.genes)

    def size_bytes(self, individual: Individual) -> int:
        pairs = zip(self.genes, individual, strict=True)
        return sum(gene.size_bytes[gene.sizes.index(size)] for gene, size in pairs)

    def fits(self, individual: Individual) -> bool:
        return self.size_bytes(individual) <= self.budget_bytes

    def uniform(self, size: int) -> Individual:
        """Everywhere `size`, or the gene's next smaller one, or its smallest."""
        return tuple(max([one for one in gene.sizes if one <= size] or [gene.sizes[0]]) for gene in self.genes)


@dataclass(frozen=True)
class SearchSettings:
    """How long and how wide. The defaults are those of Q-DiT's script.

    population: of each generation, the first or children of the best fifth, half by crossover and half by mutation.
    """

    generations: int = 10
    population: int = 50
    mutation_probability: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("generations", "population"):
            if getattr(self, name) < 1:
                raise RecipeError(f"group search: {name} {getattr(self, name)} must be at least 1")
        if not 0 < self.mutation_probability <= 1:
            raise RecipeError(f"group search: mutation probability {self.mutation_probability} must be in (0, 1]")


@dataclass(frozen=True)
class SearchOutcome:
    """The best individual, the lowest cost after each generation, and the costs of all that were scored."""

    best: Individual
    trace: tuple[float, ...]
    costs: Mapping[Individual, float]

    @property
    def cost(self) -> float:
        return self.costs[self.best]


def search(
    space: Space,
    settings: SearchSettings,
    make_score: Callable[[], Score],
    path: Path,
    origin: Mapping[str, object],
    runner: Runner = in_turn,
) -> SearchOutcome:
    """The best group sizes. make_score: makes the score, once in every process of the runner's (so it must be picklable
    for other processes). path: the file of scores; one that was made from another `origin` is not used.

    Where individuals cannot be scored, the others of their generation are, and an error names the first.
    """
    scores = Scores(path, {**origin, "genes": [[gene.name, list(gene.sizes)] for gene in space.genes]})
    rng = np.random.default_rng(settings.seed)
    trace: list[float] = []
    seen: list[Individual] = []  # not all that the file holds: it may be ahead
    score, generation = Once(make_score), first_generation(space, settings, rng)
    for number in range(settings.generations):
        _score_all(generation, scores, score, runner, f"group search {number + 1}/{settings.generations}")
        seen = scores.ranked(seen + generation)
        trace.append(scores.costs[seen[0]])
        logger.info("group search: generation %d of %d, best %.4f", number + 1, settings.generations, trace[-1])
        generation = next_generation(space, settings, rng, seen)
    return SearchOutcome(seen[0], tuple(trace), {one: scores.costs[one] for one in seen})


def first_generation(space: Space, settings: SearchSettings, rng: np.random.Generator) -> list[Individual]:
    """The uniform individuals that fit, then random ones, each once."""
    sizes = sorted({size for gene in space.genes for size in gene.sizes})
    individuals = [one for one in map(space.uniform, sizes) if space.fits(one)]
    individuals = list(dict.fromkeys(individuals))[: settings.population]
    return _fill(individuals, settings.population, set(), lambda: _random(space, rng))


def next_generation(
    space: Space, settings: SearchSettings, rng: np.random.Generator, ranked: Sequence[Individual]
) -> list[Individual]:
    """Children of the best fifth, none of which was there before (fewer, where hardly any is new)."""
    parents, old = ranked[: max(2, settings.population // 5)], set(ranked)

    def crossed() -> Individual:
        mother, father = (parents[int(i)] for i in rng.integers(len(parents), size=2))
        mask = rng.random(len(mother)) < 0.5
        mixed = tuple(a if own else b for a, b, own in zip(mother, father, mask, strict=True))
        return _repaired(space, mixed, rng)

    def mutated() -> Individual:
        parent, other = parents[int(rng.integers(len(parents)))], _random(space, rng)
        mask = rng.random(len(parent)) < settings.mutation_probability
        changed = tuple(b if change else a for a, b, change in zip(parent, other, mask, strict=True))
        return _repaired(space, changed, rng)

    half = settings.population // 2
    children = _fill([], half, old, crossed)
    return _fill(children, len(children) + settings.population - half, old, mutated)


def _fill(
    individuals: list[Individual], count: int, old: set[Individual], draw: Callable[[], Individual]
) -> list[Individual]:
    """`individuals` filled up to `count` with individuals that are in neither; given up after TRIES draws in a row."""
    tries = 0
    while len(individuals) < count and tries < TRIES:
        child = draw()
        tries += 1
        if child not in old and child not in individuals:
            individuals.append(child)
            tries = 0
    return individuals


def _random(space: Space, rng: np.random.Generator) -> Individual:
    drawn = tuple(gene.sizes[int(rng.integers(len(gene.sizes)))] for gene in space.genes)
    return _repaired(space, drawn, rng)


def _repaired(space: Space, individual: Individual, rng: np.random.Generator) -> Individual:
    """The individual, random genes moved to their next larger size until it fits."""
    sizes = list(individual)
    while not space.fits(tuple(sizes)):
        able = [i for i, gene in enumerate(space.genes) if sizes[i] != gene.sizes[-1]]
        i = able[int(rng.integers(len(able)))]
        choices = space.genes[i].sizes
        sizes[i] = choices[choices.index(sizes[i]) + 1]
    return tuple(sizes)


def _is_key(text: str) -> bool:
    return re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII) is not None


class ScoresFile(TypedDict):
    """costs: group sizes with commas to their cost, null for the worst there is."""

    origin: dict[str, object]
    costs: dict[Annotated[str, Predicate(_is_key)], float | None]


def _read_scores(path: Path) -> ScoresFile | None:
    """Scores of an interrupted search; None without any, or where they cannot be read, which costs time only."""
    try:
        return read_json(path, ScoresFile) if path.is_file() else None
    except ContractError as error:
        logger.warning("%s; the search starts again", error)
        return None


class Scores:
    """Costs by individual, in a JSON file that is written anew with every one."""

    def __init__(self, path: Path, origin: Mapping[str, object]) -> None:
        self.path, self.origin = path, json.loads(json.dumps(origin))
        self.costs: dict[Individual, float] = {}
        document = _read_scores(path)
        if document is not None and document["origin"] == self.origin:
            self.costs = {_sizes(key): math.inf if cost is None else cost for key, cost in document["costs"].items()}

    def add(self, individual: Individual, cost: float) -> None:
        """A cost that is no number counts as the worst."""
        self.costs[individual] = math.inf if math.isnan(cost) else float(cost)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        costs = {_key(one): cost if math.isfinite(cost) else None for one, cost in self.costs.items()}
        write_json(self.path, {"origin": self.origin, "costs": costs})

    def ranked(self, individuals: Iterable[Individual]) -> list[Individual]:
        """Best first; of equals the one with the larger groups."""
        return sorted(individuals, key=lambda one: (self.costs[one], tuple(-size for size in one)))


def _key(individual: Individual) -> str:
    return ",".join(map(str, individual))


def _sizes(key: str) -> Individual:
    return tuple(int(part) for part in key.split(","))


def _score_all(
    generation: Sequence[Individual], scores: Scores, score: Once[Score], runner: Runner, label: str
) -> None:
    left = {f"{label}, {number}": one for number, one in enumerate(generation, 1) if one not in scores.costs}
    jobs = [Job(name, partial(_cost, score, one)) for name, one in left.items()]
    failed = []
    for ended in track(runner(jobs), len(generation), label, len(generation) - len(left)):
        if ended.passed:
            scores.add(left[ended.name], ended.result)
        else:
            failed.append(ended)
    if failed:
        raise error_of(failed)


def _cost(score: Once[Score], individual: Individual) -> float:
    return score()(individual)
