"""`python -m pipeline.build`: from a recipe and a model to a verified engine bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from export.errors import RecipeError
from pipeline import recipe as recipes
from pipeline.command import Answer, Parser, add_model_flags, parser, run
from pipeline.compiler import (
    BuildRequest,
    compile_engine,
    fitting_targets,
    parse_targets,
    prepare,
    tensor_counts,
)
from pipeline.signals import leave

DESCRIPTION = "Build a verified engine bundle: model, calibrate, export, targets, verify, bench."


def make_parser() -> Parser:
    """All flags of `build`."""
    made = parser("build", DESCRIPTION)
    made.add_argument("--engine", required=True, metavar="NAME|RECIPE.toml", help="a recipe (see `list`) or a file")
    add_model_flags(made, "diffusers folder, .safetensors file, hub id or zoo:NAME (default: recipe's)")
    made.add_argument(
        "--target",
        default="auto",
        help="cpu, rtx, cuda, trt, or several with commas; auto: all that this recipe can be built for here; onnx, the "
        "portable model, is part of every bundle and proven in any case",
    )
    made.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="where to write (default: engines/NAME)")
    made.add_argument("--target-sm", type=integers, metavar="89,120", help="GPUs that the rtx engine is built for")
    for flag, text in (
        ("height", "image height of the engine, 0 for the model's own"),
        ("width", "image width, likewise"),
    ):
        made.add_argument(f"--{flag}", type=int, help=text)
    made.add_argument("--batch-size", type=int, help="images at a time in verification and measurement")
    made.add_argument("--calib-size", type=int, help="number of calibration samples")
    made.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="layers that `calibrate` wrote by these settings, taken as they are",
    )
    made.add_argument("--n-steps", type=int, help="denoising steps in verification and measurement")
    made.add_argument("--seed", type=int, help="sampling.seed (verification's noise) and calibrate.seed")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key, e.g. rtx.weights=int4"
    )
    made.add_argument("--resume", action="store_true", help="go on with an interrupted build of the same engine")
    made.add_argument("--force", action="store_true", help="replace an existing bundle or interrupted build")
    made.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")
    return made


def integers(text: str) -> tuple[int, ...]:
    """Integers with commas.

    >>> integers("89,120")
    (89, 120)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 89,120") from error


def resolve(args: argparse.Namespace) -> recipes.Recipe:
    """The recipe with all flags applied."""
    found = recipes.with_settings(recipes.load(args.engine), args.set)
    found = recipes.with_model(found, args.model, args.variant, args.config)
    if args.calib_size is not None:
        found = replace(found, calibrate=replace(found.calibrate, size=args.calib_size))
    if args.target_sm is not None:
        found = replace(found, rtx=replace(found.rtx, sm=args.target_sm))
    names = ("n_steps", "batch_size", "height", "width")
    found = recipes.with_sampling(found, **{name: getattr(args, name) for name in names})
    return recipes.with_seed(found, args.seed)


def make_request(args: argparse.Namespace, answer: Answer) -> BuildRequest:
    """The request that the flags describe. Raises RecipeError or EnvironmentLacksError."""
    recipe, targets = resolve(args), parse_targets(args.target)
    if args.target_sm is not None and "rtx" not in targets:
        raise RecipeError(f"--target-sm belongs to the target rtx, and --target is {args.target}; add rtx to --target")
    if args.target == "auto":
        targets = fitting_targets(targets, recipe, named=() if args.target_sm is None else ("rtx",))
    output = args.output_dir or Path("engines") / recipe.name
    return BuildRequest(
        recipe, targets, output, args.resume, args.force, args.checkpoint, listener=lambda event: answer.event(**event)
    )


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Build, or with --dry-run only say what would be done."""
    request = make_request(args, answer)
    if args.dry_run:
        return dry_run(request, answer)
    path = compile_engine(request)
    answer.event(event="result", passed=True, exit_code=0, path=str(path))
    answer.line(f"PASSED {path}")
    return 0


def dry_run(request: BuildRequest, answer: Answer) -> int:
    """All checks that need no work, and the plan."""
    _, model, _ = prepare(replace(request, listener=lambda event: None))  # a plan is all that is answered
    linears, kept = len(model.linears()), len(model.kept())
    plan: dict[str, Any] = {"recipe": asdict(request.recipe), "targets": request.targets, "output": str(request.output)}
    plan |= {"family": model.family.name, "quantized": linears, "kept": kept, "tensors": tensor_counts(model)}
    text = f"{linears} linears to quantize, {kept} kept, targets {', '.join(request.targets)}; nothing was written"
    answer.document(
        {"event": "plan", **plan}, json.dumps(plan["recipe"], indent=1) + f"\n{text}\nDRY RUN {request.output}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv, verdict=True)


if __name__ == "__main__":
    leave(main)
