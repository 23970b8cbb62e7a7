"""`python -m pipeline.export CHECKPOINT -o DIR`: what `calibrate` wrote as portable ONNX; no float model is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from export import checkpoint
from export.errors import RecipeError
from export.formats.attention import AttentionFormats
from pipeline import machine
from pipeline.backends.base import DATA, MODEL
from pipeline.calibrate.state import KEPT
from pipeline.command import Answer, Parser, parser, run
from pipeline.files import publish, refuse_unwritable, remove
from pipeline.signals import leave

FILES = {MODEL, DATA}
DESCRIPTION = "Write a calibrated checkpoint as one portable ONNX model; the float model is not needed."


def make_parser() -> Parser:
    """All flags of `export`."""
    flags = parser("export", DESCRIPTION)
    flags.add_argument("checkpoint", type=Path, help="a folder that `calibrate` wrote")
    flags.add_argument("-o", "--output-dir", type=Path, metavar="DIR", required=True, help="where to write model.onnx")
    flags.add_argument("--height", type=int, default=0, help="of the image in pixels (default: the model's own)")
    flags.add_argument("--width", type=int, default=0, help="of the image in pixels (default: the model's own)")
    flags.add_argument(
        "--attention",
        metavar="QK/PV",
        help="its formats, as INT8/INT8: a checkpoint holds linears alone (default: attention in float32)",
    )
    flags.add_argument("--force", action="store_true", help="replace an earlier export in the folder")
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Export into a folder beside the destination, then rename."""
    machine.require_compiler("exporting a checkpoint")
    refuse(args.checkpoint, args.output_dir, args.force)
    attention = None if args.attention is None else AttentionFormats.parsed(args.attention)
    from export.models.load import load
    from export.to_onnx import export_portable

    layers = checkpoint.load(args.checkpoint)
    names = {layer.name for layer in layers}
    model = load(str(args.checkpoint / KEPT), kept_only=True, keep=lambda path: path not in names)
    destination = args.output_dir.absolute()
    partial, aside = (destination.with_name(f"{destination.name}.{end}") for end in ("partial", "replaced"))
    remove(partial)
    partial.mkdir(parents=True)
    try:
        summary = export_portable(model, layers, partial / MODEL, args.height, args.width, attention)
        publish(partial, destination, aside)
    finally:
        remove(partial)
    path = args.output_dir / MODEL
    answer.document({"event": "result", "path": str(path), "linears": len(layers)}, f"{path}: {summary}")
    return 0


def refuse(calibration: Path, output: Path, force: bool) -> None:
    """Refuse before work starts what is no finished calibration, and to replace what is no export."""
    if not ((calibration / checkpoint.LAYERS_FILE).is_file() and (calibration / KEPT).is_dir()):
        remedy = f"python -m pipeline.calibrate --engine NAME -o {calibration} makes one"
        raise RecipeError(f"{calibration} holds no finished calibration with what is not quantized ({KEPT}/); {remedy}")
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= FILES):
        raise RecipeError(f"{output} is not an export and is not replaced; choose another --output-dir")
    if output.exists() and not force:
        raise RecipeError(f"{output} exists; add --force to replace it, or choose another --output-dir")
    refuse_unwritable(output, True, "--output-dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
