"""Search group sizes with pictures as the judge: `python -m benchmarks.quality.search_groups --engine NAME -o DIR`.

Q-DiT's search (arXiv 2406.17343): each candidate draws the same pictures from the same noise and costs their Frechet
distance in the bundled judge's features, from the held-out real data or from the float model's own pictures (finer for
few pictures: both sets share noise and prompts). `--fitness proxy` scores by the denoiser's error instead, as
`--set calibrate.options.search=proxy` does in a build. Everything else is an option of the method "qdit", such as
`--set calibrate.options.population=50`, or candidates=nearest to round to nearest while searching, as the authors do.

A generation's candidates are jobs: of this process, of as many as `--set calibrate.options.workers=N` says, or with
`--ray ADDRESS` of a Ray cluster whose machines have this checkout and DIR at the same paths. The numbers are the same.

Writes DIR/scores.json while it goes (a stopped run goes on), DIR/NAME.toml, a recipe with the sizes that were found
(`python -m pipeline.build --engine DIR/NAME.toml`), and DIR/search_groups.json with the cost of the sizes that were
found and of the recipe's own, and the settings that give them to any other recipe of the model, as `--set` takes them
(calibrate.method=fp4dit takes the same group_sizes, and learns the rounding in them).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import record
from benchmarks.quality.drawing import float_pictures, make_subject
from benchmarks.quality.frechet_score import FrechetScore
from benchmarks.record import Json
from export.errors import RecipeError, UserError
from export.models import load as models
from pipeline import recipe as recipes
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.groups.candidates import Candidates, scored_keys
from pipeline.calibrate.groups.proxy import ProxyScore
from pipeline.calibrate.groups.search import SearchOutcome, Space, search
from pipeline.calibrate.groups.space import layer_sizes, to_text
from pipeline.calibrate.method import Context
from pipeline.calibrate.methods.qdit import QDit, search_settings, search_workers
from pipeline.calibrate.plan import make_plans
from pipeline.files import sha256_json
from pipeline.jobs.flags import add_flags, chosen
from pipeline.jobs.jobs import Runner
from pipeline.jobs.processes import in_processes
from pipeline.methods import METHODS
from pipeline.recipe import Recipe

logger = logging.getLogger("benchmarks.quality")
AGAINST = ("real", "float")
CPUS = 1  # of a candidate, which one thread scores


def make_parser() -> argparse.ArgumentParser:
    parser = record.parser("benchmarks.quality.search_groups", __doc__)
    parser.add_argument("--engine", default="dit_w4a8", metavar="NAME|RECIPE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key")
    parser.add_argument("--fitness", choices=("fid", "proxy"), default="fid")
    parser.add_argument("--against", choices=AGAINST, default="real", help="what the distance is measured from")
    parser.add_argument("--count", type=int, default=256, help="pictures of each candidate")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("-o", "--output-dir", type=record.whole_path, default="work/groups")
    add_flags(parser, CPUS)
    return parser


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with the method that uses what is found."""
    recipe = recipes.with_settings(recipes.load(arguments.engine), ["calibrate.method=qdit", *arguments.set])
    if not recipe.model.startswith("zoo:"):
        raise RecipeError(f"{recipe.name}: {recipe.model} has no bundled judge; use --set model=zoo:dit_mini, or build")
    return recipe


def make_method(recipe: Recipe, folder: Path) -> QDit:
    """The method with its calibration data; it says what there is to choose from, and makes the layers."""
    model, settings = models.load(recipe.model), recipe.calibrate
    options = METHODS["qdit"].resolve(settings.preset, settings.options)
    return QDit(Context(model, recipe, options, folder, calibration_data(model, recipe)))


def make_score(arguments: argparse.Namespace, method: QDit, candidates: Candidates) -> FrechetScore | ProxyScore:
    """What candidates are scored by."""
    if arguments.fitness == "proxy":
        assert method.context.data is not None
        return ProxyScore.of(candidates, method.context.data, int(method.context.options["samples"]))
    name = candidates.source.removeprefix("zoo:")
    if arguments.against == "float":  # once, before every process asks for them
        float_pictures(make_subject(name, arguments.count, arguments.seed), arguments.output_dir)
    return FrechetScore(candidates, name, arguments.count, arguments.seed, arguments.against, arguments.output_dir)


@contextmanager
def make_runner(arguments: argparse.Namespace, workers: int) -> Iterator[Runner]:
    """What scores candidates. Raises RecipeError for a cluster and processes of this machine together."""
    if arguments.ray is not None and workers > 1:
        raise RecipeError(
            f"calibrate.options.workers={workers} with --ray, whose processes do the search; leave one out"
        )
    with chosen(arguments, "a group search", CPUS) as runner, in_processes(workers) as own:
        yield own if arguments.ray is None else runner


def run(arguments: argparse.Namespace) -> Json:
    """Search, and write recipe and record; returns the record."""
    recipe, folder, started = make_recipe(arguments), arguments.output_dir, time.monotonic()
    method = make_method(recipe, folder)
    options, model = method.context.options, method.context.model
    plans = make_plans(model.linears(), recipe)
    space, settings = method.space(plans), search_settings(options, method.context.seed)
    keys = scored_keys(recipe)
    layers = folder / sha256_json([keys, model.sha256])[:12]
    with make_runner(arguments, search_workers(options)) as runner:
        score = make_score(arguments, method, method.candidates(plans, space, layers))
        origin = {**score.origin, "model_sha256": model.sha256, **keys}
        outcome = search(space, settings, score, folder / "scores.json", origin, runner)
    sizes = layer_sizes(plans, str(options["genes"]), space, outcome.best)
    building = replace(recipe.calibrate, options=recipe.calibrate.options | {"group_sizes": to_text(sizes)})
    searched = replace(recipe, name=f"{recipe.name}_searched", calibrate=building)
    (folder / f"{searched.name}.toml").write_text(recipes.to_toml(searched), encoding="utf-8")
    unsearched = outcome.costs.get(space.uniform(recipe.weights.group_size))
    document = describe(space, outcome, origin, sizes) | {"unsearched_cost": unsearched}
    document |= {"recipe": recipe.name, "seconds": time.monotonic() - started}
    record.write("search_groups", document, folder)
    return document


def describe(space: Space, outcome: SearchOutcome, origin: Json, sizes: list[int]) -> Json:
    """What was found, and what uniform sizes cost that the budget allows."""
    uniform = {size: space.uniform(size) for size in sorted({size for gene in space.genes for size in gene.sizes})}
    return {
        "origin": origin,
        "budget_bytes": space.budget_bytes,
        "size_bytes": space.size_bytes(outcome.best),
        "genes": {gene.name: size for gene, size in zip(space.genes, outcome.best, strict=True)},
        "group_sizes": to_text(sizes),
        # What --set takes to have these sizes in a build, or in `python -m pipeline.calibrate`.
        "settings": ["calibrate.method=qdit", f"calibrate.options.group_sizes={to_text(sizes)}"],
        "cost": outcome.cost,
        "trace": list(outcome.trace),
        "scored": len(outcome.costs),
        "uniform": {str(size): outcome.costs[one] for size, one in uniform.items() if one in outcome.costs},
    }


def main() -> int:
    arguments = record.parsed(make_parser())
    try:
        document = run(arguments)
    except UserError as error:
        logger.error("error: %s", error)
        return error.exit_code
    unsearched = document["unsearched_cost"]
    print(f"{document['cost']:.4f} with {document['group_sizes']}, {document['size_bytes']:,} bytes")
    print(f"{'not scored' if unsearched is None else format(unsearched, '.4f')} with the recipe's own group size")
    print(" ".join(f"--set '{setting}'" for setting in document["settings"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
