"""`python -m pipeline.calibrate`: quantize a model into a checkpoint, without building an engine."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint import LAYERS_FILE
from export.errors import RecipeError, UserError
from pipeline import machine
from pipeline.backends import PORTABLE
from pipeline.build import resolve
from pipeline.calibrate.state import KEPT, ORIGIN_FILE
from pipeline.command import Answer, Parser, add_model_flags, parser, run
from pipeline.compiler import with_attention
from pipeline.files import lock, refuse_unwritable, remove
from pipeline.recipe import Recipe, load_float_model
from pipeline.signals import leave

if TYPE_CHECKING:
    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
DESCRIPTION = "Quantize a model's linears by a recipe and write the checkpoint; --resume finishes a stopped run."


def make_parser() -> Parser:
    """All flags of `calibrate`."""
    flags = parser("calibrate", DESCRIPTION)
    flags.add_argument("--engine", required=True, metavar="NAME|RECIPE.toml", help="a recipe (see `list`) or a file")
    add_model_flags(flags, "diffusers folder, .safetensors file, hub id or zoo:NAME (default: recipe's)")
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="folder (default: checkpoints/NAME)")
    flags.add_argument("--calib-size", type=int, help="number of prompts whose trajectories are used")
    flags.add_argument("--seed", type=int, help="sampling.seed and calibrate.seed (data and learning)")
    flags.add_argument(
        "--from-modelopt",
        type=Path,
        metavar="FILE|DIR",
        help="take the layers over from a file of modelopt.torch.opt.save or a folder of save_pretrained with "
        "modelopt_state.pth; formats are its own",
    )
    flags.add_argument("--resume", action="store_true", help="go on with an interrupted calibration")
    flags.add_argument("--force", action="store_true", help="replace what is in the folder")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key")
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Calibrate and say what came out."""
    machine.require_compiler("calibrating a model")
    from export.models.load import save_kept
    from pipeline.calibrate import calibrate

    recipe = resolve(args)
    folder = args.output_dir or Path("checkpoints") / recipe.name
    _refuse_occupied(folder, args.resume, args.force)
    with _noting_what_is_kept(folder):
        model = load_float_model(recipe)
        if args.from_modelopt:
            recipe = _taken_over(model, recipe, args.from_modelopt)
        attention = with_attention(recipe, model, (PORTABLE,)).attention  # `export` writes the portable model
        layers = calibrate(model, recipe, folder, args.resume)
        save_kept(model, folder / KEPT)
        if args.from_modelopt:
            _write_recipe(recipe, folder)
    if attention.formats is not None:
        logger.info("a checkpoint holds linears alone: export it with --attention %s", attention.text())
    size_bytes = sum(layer.size_bytes for layer in layers)
    document = {"event": "result", "path": str(folder), "linears": len(layers), "size_bytes": size_bytes}
    answer.document(document, f"{len(layers)} linears, {size_bytes / 1e6:.1f} MB in {folder}")
    return 0


def _taken_over(model: LoadedModel, recipe: Recipe, path: Path) -> Recipe:
    """The recipe whose method takes the file over. Raises before any work what has no equal here."""
    from pipeline.calibrate.modelopt.take_over import recipe_of_file

    recipe = recipe_of_file(model, recipe, path)
    words = (recipe.formats.weight, recipe.formats.activation, recipe.weights.scales_text())
    logger.info("ModelOpt's layers are mostly %s x %s, %s", *words)
    return recipe


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    from pipeline.calibrate.modelopt.take_over import RECIPE_FILE, write_recipe

    write_recipe(recipe, folder)
    logger.info("build it by: build --engine %s --checkpoint %s", folder / RECIPE_FILE, folder)


def _refuse_occupied(folder: Path, resume: bool, force: bool) -> None:
    """Refuse to touch what another run left, unless told to; `force` removes it."""
    refuse_unwritable(folder, True, "--output-dir")
    if not folder.is_dir() or not any(folder.iterdir()) or (resume and not force):
        return
    if not (folder / ORIGIN_FILE).is_file():
        raise RecipeError(f"{folder} is not a calibration and is not replaced; choose another --output-dir")
    if not force:
        complete = (folder / LAYERS_FILE).is_file()
        held = (
            "a finished calibration; add" if complete else "an interrupted calibration; add --resume to finish it, or"
        )
        raise RecipeError(f"{folder} holds {held} --force to start again, or choose another --output-dir")
    os.close(lock(folder, "calibration"))  # not while another run writes it
    remove(folder)


@contextmanager
def _noting_what_is_kept(folder: Path) -> Iterator[None]:
    """Add to an interruption, a lack of memory or a bug that the finished units are kept."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, UserError) and (folder / ORIGIN_FILE).is_file():
            error.add_note(f"state saved in {folder}; run the same command again with --resume")
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
