"""Search group sizes with pictures as the judge: `python -m benchmarks.search_groups --engine dit_w4a8 -o work/groups`.

Q-DiT's search (arXiv 2406.17343): each candidate draws the same pictures from the same noise with weights rounded to
nearest, and costs their Frechet distance in the bundled judge's features, from the held-out real data or from the float
model's own pictures (finer for few pictures: both sets share noise and prompts). `--fitness proxy` scores by the
denoiser's error instead, as `--set calibrate.options.search=proxy` does in a build.

Writes DIR/scores.json while it goes (a stopped run goes on), DIR/NAME.toml, a recipe with the sizes that were found
(`python -m pipeline.build --engine DIR/NAME.toml`), and DIR/search_groups.json with what they are worth.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.quality_drawing import Subject, draw, float_pictures, judged, make_subject, real_features
from benchmarks.quality_metrics import Gaussian, frechet, gaussian
from export.errors import RecipeError
from pipeline import recipe as recipes
from pipeline.backends.reference import ReferenceEngine
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.group_proxy import CandidateModels, Candidates, ProxyScore, one_thread
from pipeline.calibrate.group_search import Found, Individual, Settings, Space, search
from pipeline.calibrate.group_space import from_text, layer_sizes, make_space, to_text
from pipeline.calibrate.plan import make_plans
from pipeline.recipe import Recipe

logger = logging.getLogger(__name__)
AGAINST = ("real", "float")


@dataclass(frozen=True)
class FrechetScore:
    """Makes the score, once in every process: `count` pictures of the bundled model `name`."""

    candidates: Candidates
    name: str
    count: int
    seed: int
    against: str
    folder: Path

    @property
    def origin(self) -> dict[str, Any]:
        """What the scores depend on beside the candidates."""
        return {"score": f"frechet from {self.against}", "count": self.count, "seed": self.seed}

    def __call__(self) -> _Frechet:
        return _Frechet(self)


class _Frechet:
    """The score itself."""

    def __init__(self, wanted: FrechetScore) -> None:
        self.subject: Subject = make_subject(wanted.name, wanted.count, wanted.seed)
        self.models = CandidateModels(replace(wanted.candidates, model=self.subject.model))
        self.goal: Gaussian = self._goal(wanted)

    def _goal(self, wanted: FrechetScore) -> Gaussian:
        if wanted.against == "real":
            return gaussian(real_features(wanted.name))
        return gaussian(judged(wanted.name, float_pictures(self.subject, wanted.folder))[0])

    def __call__(self, individual: Individual) -> float:
        engine = ReferenceEngine(self.models.module(individual), torch.float32)
        with one_thread():
            pictures = draw(self.subject, engine.run, "candidate")
            return frechet(gaussian(judged(self.subject.name, pictures)[0]), self.goal)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="dit_w4a8", metavar="NAME|RECIPE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key")
    parser.add_argument("--fitness", choices=("fid", "proxy"), default="fid")
    parser.add_argument("--against", choices=AGAINST, default="real", help="what the distance is measured from")
    parser.add_argument("--activations", choices=("token_group", "per_token"), default="token_group")
    parser.add_argument("--genes", choices=("kind", "layer"), default="kind")
    parser.add_argument("--sizes", default="", help='to choose from, such as "32,64,128"; default: those of the paper')
    parser.add_argument("--budget-bytes", type=int, default=0, help="default: what the recipe's group size takes")
    parser.add_argument("--count", type=int, default=256, help="pictures of each candidate (fid)")
    parser.add_argument("--samples", type=int, default=64, help="model inputs of each candidate (proxy)")
    for name, default in (("generations", 10), ("population", 50), ("top", 10), ("workers", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("work/groups"))
    return parser


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with the method that uses what is found."""
    recipe = recipes.with_settings(recipes.load(arguments.engine), ["calibrate.method=qdit", *arguments.set])
    if not recipe.model.startswith("zoo:"):
        raise RecipeError(
            f"{recipe.name}: {recipe.model} has no bundled judge; add --set model=zoo:dit_mini or use build"
        )
    return recipe


def score_of(arguments: argparse.Namespace, recipe: Recipe, space: Space) -> FrechetScore | ProxyScore:
    """What candidates are scored by."""
    name = recipe.model.removeprefix("zoo:")
    candidates = Candidates(recipe.model, recipe, arguments.genes, space, arguments.activations)
    if arguments.fitness == "proxy":
        model = candidates.load()
        return ProxyScore.of(candidates, calibration_data(model, recipe), arguments.samples)
    if arguments.against == "float":  # once, before every process asks for them
        float_pictures(make_subject(name, arguments.count, arguments.seed), arguments.output_dir)
    return FrechetScore(candidates, name, arguments.count, arguments.seed, arguments.against, arguments.output_dir)


def found_recipe(recipe: Recipe, arguments: argparse.Namespace, sizes: list[int]) -> Recipe:
    """The recipe that builds with these sizes."""
    options = recipe.calibrate.options | {"group_sizes": to_text(sizes), "activations": arguments.activations}
    calibrate = replace(recipe.calibrate, options=options)
    return replace(recipe, name=f"{recipe.name}_searched", calibrate=calibrate)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search, and write recipe and record; returns the record."""
    recipe, started = make_recipe(arguments), time.monotonic()
    model = Candidates(recipe.model, recipe, arguments.genes, Space((), 0), "").load()
    plans = make_plans(model.linears(), recipe)
    wanted = from_text(arguments.sizes) if arguments.sizes else ()
    space = make_space(plans, arguments.genes, wanted, arguments.budget_bytes)
    half = arguments.population // 2
    settings = Settings(
        arguments.generations,
        arguments.population,
        arguments.top,
        half,
        arguments.population - half,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    score = score_of(arguments, recipe, space)
    keys = {key: asdict(recipe)[key] for key in ("formats", "weights", "sampling")}
    origin = {**score.origin, "model_sha256": model.sha256, "activations": arguments.activations, **keys}
    found = search(space, settings, score, arguments.output_dir / "scores.json", origin)
    sizes = layer_sizes(plans, arguments.genes, space, found.best)
    made = found_recipe(recipe, arguments, sizes)
    (arguments.output_dir / f"{made.name}.toml").write_text(recipes.to_toml(made))
    document = describe(space, found, origin, sizes) | {"seconds": time.monotonic() - started}
    record.write("search_groups", document, arguments.output_dir)
    return document


def describe(space: Space, found: Found, origin: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """What was found, and what uniform sizes cost that the budget allows."""
    sizes_known = sorted({size for gene in space.genes for size in gene.sizes})
    uniform = {size: space.uniform(size) for size in sizes_known}
    return {
        "origin": origin,
        "budget_bytes": space.budget_bytes,
        "size_bytes": space.size_bytes(found.best),
        "genes": {gene.name: size for gene, size in zip(space.genes, found.best, strict=True)},
        "group_sizes": to_text(sizes),
        "cost": found.cost,
        "trace": list(found.trace),
        "scored": len(found.costs),
        "uniform": {str(size): found.costs[one] for size, one in uniform.items() if one in found.costs},
    }


def main() -> None:
    arguments = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    document = run(arguments)
    print(f"{document['cost']:.4f} with {document['group_sizes']}, {document['size_bytes']:,} bytes")


if __name__ == "__main__":
    main()
