"""`python -m pipeline.build`: from a recipe and a model to a verified engine bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from export.errors import RecipeError
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.backends.base import Backend, Flag, Options
from pipeline.command import Answer, Parser, add_model_flags, parser, run
from pipeline.compile_pipeline import chosen_parts, compile_pipeline, part_request
from pipeline.compiler import (
    BuildRequest,
    compile_engine,
    fitting_targets,
    parse_targets,
    prepare,
    tensor_counts,
)
from pipeline.parts import is_whole, read_folder
from pipeline.signals import leave

DESCRIPTION = "Build a verified engine bundle: model, calibrate, export, targets, verify, bench."


def make_parser() -> Parser:
    """All flags of `build`."""
    flags, named = parser("build", DESCRIPTION), ", ".join(name for name in BACKENDS if name != PORTABLE)
    flags.add_argument("--engine", required=True, metavar="NAME|RECIPE.toml", help="a recipe (see `list`) or a file")
    add_model_flags(flags, "diffusers folder, .safetensors file, hub id or zoo:NAME (default: recipe's)")
    flags.add_argument(
        "--target",
        default="auto",
        help=f"{named}, or several with commas; auto: all that this recipe can be built for here; {PORTABLE}, the "
        "portable model, is part of every bundle and proven in any case",
    )
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="where to write (default: engines/NAME)")
    for _, flag in target_flags():
        flags.add_argument(flag.name, type=flag.read, metavar=flag.metavar, help=flag.help)
    flags.add_argument(
        "--drop-portable",
        action="store_true",
        help="leave the portable model out, of the bundle and of what is proven: about half the bytes, and less time; "
        "`verify` cannot prove such a bundle again",
    )
    flags.add_argument(
        "--component",
        metavar="NAME",
        help="of a pipeline's folder, build only this part, as text_encoder, and put it into the bundle that is there",
    )
    flags.add_argument("--height", type=int, help="image height of the engine, 0 for the model's own")
    flags.add_argument("--width", type=int, help="image width, likewise")
    flags.add_argument("--batch-size", type=int, help="images at a time in verification and measurement")
    flags.add_argument("--calib-size", type=int, help="number of calibration samples")
    flags.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="layers that `calibrate` wrote by these settings, taken as they are",
    )
    flags.add_argument("--n-steps", type=int, help="denoising steps in verification and measurement")
    flags.add_argument("--seed", type=int, help="sampling.seed (verification's noise) and calibrate.seed")
    flags.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key, e.g. rtx.weights=int4"
    )
    flags.add_argument("--resume", action="store_true", help="go on with an interrupted build of the same engine")
    flags.add_argument("--force", action="store_true", help="replace an existing bundle or interrupted build")
    flags.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")
    return flags


def target_flags() -> Iterator[tuple[Backend[Options], Flag]]:
    """Flags for options of single targets."""
    for backend in BACKENDS.values():
        for flag in backend.flags:
            yield backend, flag


def given_flags(args: argparse.Namespace) -> Iterator[tuple[Backend[Options], Flag, object]]:
    """Those that were given, with their values; a verb without such flags, as `inspect`, has given none."""
    for backend, flag in target_flags():
        value = getattr(args, flag.name.removeprefix("--").replace("-", "_"), None)
        if value is not None:
            yield backend, flag, value


# Flags that are keys of a recipe's tables; --seed is a key of both.
SAMPLING_FLAGS = ("n_steps", "batch_size", "height", "width", "seed")
CALIBRATE_FLAGS = {"calib_size": "size", "seed": "seed"}


def resolve(args: argparse.Namespace) -> recipes.Recipe:
    """The recipe with all flags applied; one that was not given, or that the verb does not have, changes nothing."""
    flags = {name: value for name, value in vars(args).items() if value is not None}
    recipe = recipes.with_settings(recipes.load(args.engine), args.set)
    lora = recipe.lora if args.lora is None else args.lora  # whole paths: a bundle may be verified from another folder
    recipe = recipes.with_model(recipe, args.model, args.variant, args.config, lora)
    for backend, flag, value in given_flags(args):
        recipe = recipe.with_options(replace(backend.options(recipe), **{flag.option: value}))
    sampling = {name: flags[name] for name in SAMPLING_FLAGS if name in flags}
    calibrate = {key: flags[name] for name, key in CALIBRATE_FLAGS.items() if name in flags}
    return replace(
        recipe, sampling=replace(recipe.sampling, **sampling), calibrate=replace(recipe.calibrate, **calibrate)
    )


def make_request(args: argparse.Namespace, answer: Answer) -> BuildRequest:
    """The request that the flags describe. Raises RecipeError or EnvironmentLacksError."""
    recipe, targets = resolve(args), parse_targets(args.target)
    named = {backend.name: flag.name for backend, flag, _ in given_flags(args)}
    for target, flag in named.items():
        if target not in targets:
            remedy = f"and --target is {args.target}; add {target} to --target"
            raise RecipeError(f"{flag} belongs to the target {target}, {remedy}")
    if args.target == "auto":
        targets = fitting_targets(targets, recipe, tuple(named))
    output = args.output_dir or Path("engines") / recipe.name
    return BuildRequest(
        recipe, targets, output, args.resume, args.force, args.checkpoint, args.drop_portable,
        listener=lambda event: answer.event(**event),
    )  # fmt: skip


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Build, or with --dry-run only say what would be done."""
    request = make_request(args, answer)
    if not is_whole(request.recipe.model):
        refuse_parts(request.recipe, args.component)
        if args.dry_run:
            return dry_run(request, answer)
        path = compile_engine(request)
    elif args.dry_run:
        return dry_run_parts(request, args.component, answer)
    else:
        path = compile_pipeline(request, args.component)
    answer.event(event="result", passed=True, exit_code=0, path=str(path))
    answer.line(f"PASSED {path}")
    return 0


def refuse_parts(recipe: recipes.Recipe, component: str | None) -> None:
    """Raise RecipeError where one model is to be built, and a part of a pipeline is asked for."""
    if component:
        raise RecipeError(
            f"--component {component}: {recipe.model} is one model, no pipeline with parts; leave --component away, or "
            "give the folder with model_index.json"
        )
    if recipe.components:
        raise RecipeError(
            f"{recipe.name}: components.{min(recipe.components)} is of a part of a pipeline, and {recipe.model} is one "
            "model; remove the table, or give the folder with model_index.json"
        )


def dry_run_parts(request: BuildRequest, component: str | None, answer: Answer) -> int:
    """As `dry_run`, for every part of a pipeline that would be built."""
    for part in chosen_parts(request, read_folder(request.recipe), component):
        answer.line(f"{part.name}:")
        dry_run(part_request(request, part), answer, request.output / part.name)
    return 0


def dry_run(request: BuildRequest, answer: Answer, output: Path | None = None) -> int:
    """All checks that need no work, and the plan: the recipe with what "auto" means for this model and machine. output:
    where the bundle would be in the end; None: where the request writes it."""
    output = request.output if output is None else output
    prepared = prepare(replace(request, listener=lambda event: None))  # a plan is all that is answered
    recipe, model = prepared.recipe, prepared.model
    linears, kept = len(model.linears()), len(model.kept())
    plan = {
        "recipe": recipe.document(),
        "targets": request.targets,
        "output": str(output),
        "family": model.family.name,
        "quantized": linears,
        "kept": kept,
        "tensors": tensor_counts(model),
    }
    text = f"{linears} linears to quantize, {kept} kept, targets {', '.join(request.targets)}; nothing was written"
    answer.document({"event": "plan", **plan}, json.dumps(plan["recipe"], indent=1) + f"\n{text}\nDRY RUN {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv, verdict=True)


if __name__ == "__main__":
    leave(main)
