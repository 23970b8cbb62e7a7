"""`python -m pipeline.export`: a checkpoint as portable ONNX; a bundle as a static page, or for a Triton server.

CHECKPOINT -o DIR needs no float model; with --inline it may be a bundle. --web DIR BUNDLE and --triton DIR BUNDLE take
what `build` wrote.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from export import checkpoint
from export.errors import RecipeError
from export.formats.attention import AttentionFormats
from pipeline import load, machine
from pipeline.backends import PORTABLE
from pipeline.backends.base import DATA, MODEL
from pipeline.bundle.hub import PREFIX, located
from pipeline.bundle.pipeline_bundle import is_pipeline, load_pipeline
from pipeline.calibrate.state import KEPT
from pipeline.command import Answer, Parser, parser, run
from pipeline.files import is_bundle, new_folder, refuse_unwritable
from pipeline.signals import leave
from pipeline.web.onnxruntime_web import FLAG as ONNXRUNTIME_WEB
from pipeline.web.onnxruntime_web import PACKAGE, VERSION

FILES = {MODEL, DATA}
DESCRIPTION = (
    "Write a calibrated checkpoint as one portable ONNX model (-o), in standard ops alone with --inline, for which a "
    "bundle will do; or a bundle as a page that draws in the browser (--web) or as a model repository of Triton "
    "Inference Server (--triton)."
)


def make_parser() -> Parser:
    """All flags of `export`."""
    flags = parser("export", DESCRIPTION)
    text = "a folder that `calibrate` wrote; with --inline, --web or --triton a bundle, or hf://OWNER/NAME[@REVISION]"
    flags.add_argument("source", metavar="CHECKPOINT|BUNDLE", help=text)
    forms = flags.add_mutually_exclusive_group(required=True)
    forms.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="where to write model.onnx")
    text = "without functions, for tools that read none; with -o"
    flags.add_argument("--inline", action="store_true", help=text)
    text = "where to write the page, with its model, for any server of static files"
    forms.add_argument("--web", type=Path, metavar="DIR", help=text)
    text = "where to write the repository, for the server's Python backend; not run in a server"
    forms.add_argument("--triton", type=Path, metavar="DIR", help=text)
    text = f"of {PACKAGE} {VERSION} as npm installs it, for --web (default: npm fetches it)"
    flags.add_argument(ONNXRUNTIME_WEB, type=Path, metavar="FOLDER", help=text)
    flags.add_argument("--height", type=int, default=0, help="of the image in pixels (default: the model's own)")
    flags.add_argument("--width", type=int, default=0, help="of the image in pixels (default: the model's own)")
    flags.add_argument(
        "--attention",
        metavar="QK/PV",
        help="its formats, as INT8/INT8: a checkpoint holds linears alone (default: attention in float32)",
    )
    text = "of the engine in the server, for --triton (default: one for each core)"
    flags.add_argument("--threads", type=int, metavar="N", help=text)
    flags.add_argument("--force", action="store_true", help="replace an earlier export in the folder")
    return flags


def work(args: argparse.Namespace, answer: Answer) -> int:
    """Write the one form that is asked for into a folder beside the destination, then rename."""
    if args.output_dir is None and (args.height or args.width or args.attention):
        raise RecipeError("--height, --width and --attention are for a checkpoint; a bundle has its own")
    if args.output_dir is None and args.inline:
        raise RecipeError("--inline is for -o alone; --web and --triton write no portable model")
    if args.web is None and args.onnxruntime_web is not None:
        raise RecipeError(f"{ONNXRUNTIME_WEB} is for --web alone")
    if args.triton is None and args.threads is not None:
        raise RecipeError("--threads is for --triton alone")
    if args.web is not None:
        return export_page(args, answer)
    if args.triton is not None:
        return export_repository(args, answer)
    if args.source.startswith(PREFIX) or is_bundle(Path(args.source)):
        return export_portable_of_bundle(args, answer)
    return export_checkpoint(args, answer)


def export_checkpoint(args: argparse.Namespace, answer: Answer) -> int:
    """What `calibrate` wrote, as portable ONNX."""
    machine.require_compiler("exporting a checkpoint")
    source = Path(args.source)
    refuse(source, args.output_dir, args.force)
    attention = None if args.attention is None else AttentionFormats.parsed(args.attention)
    from export.models.load import load as load_model
    from export.to_onnx import export_portable

    layers = checkpoint.load(source)
    names = {layer.name for layer in layers}
    model = load_model(str(source / KEPT), kept_only=True, keep=lambda path: path not in names)
    with new_folder(args.output_dir) as partial:
        summary = export_portable(model, layers, partial / MODEL, args.height, args.width, attention)
        if args.inline:
            inline(partial / MODEL)
    path = args.output_dir / MODEL
    answer.document({"event": "result", "path": str(path), "linears": len(layers)}, f"{path}: {summary}")
    return 0


def inline(path: Path) -> None:
    """The portable model at `path` without functions in its place."""
    from export.inline import write_inlined

    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        write_inlined(path, Path(place) / MODEL)
        for name in (DATA, MODEL):
            (Path(place) / name).replace(path.with_name(name))


def export_portable_of_bundle(args: argparse.Namespace, answer: Answer) -> int:
    """A bundle's portable model without functions."""
    machine.require_compiler("inlining functions")
    from export.inline import write_inlined

    if args.height or args.width or args.attention:
        raise RecipeError("--height, --width and --attention are for a checkpoint; a bundle has its own")
    if not args.inline:
        raise RecipeError(
            f"{args.source} is a bundle, whose portable model is its {MODEL}; add --inline to have it in "
            "standard ops alone"
        )
    refuse_place(args.output_dir, "--output-dir", args.force, FILES.issuperset)
    bundle = load(args.source)
    if PORTABLE not in bundle.targets or MODEL not in bundle.manifest["files"]:
        raise RecipeError(f"{args.source} has no portable model; build it without --drop-portable")
    with bundle.copied({MODEL, DATA}.__contains__) as private, new_folder(args.output_dir) as partial:
        nodes = write_inlined(private.path / MODEL, partial / MODEL)
    path = args.output_dir / MODEL
    answer.document({"event": "result", "path": str(path), "nodes": nodes}, f"{path}: {nodes} nodes of standard ops")
    return 0


def export_page(args: argparse.Namespace, answer: Answer) -> int:
    """A bundle as a static page."""
    from pipeline.web import page_folder

    machine.require_compiler("lowering a model for the browser")
    refuse_place(args.web, "--web", args.force, page_folder.ENTRIES.issuperset)
    with located(args.source) as folder:
        bundle = load_pipeline(folder) if is_pipeline(folder) else load(folder)
        page_folder.refuse(bundle)
        with new_folder(args.web) as partial:
            size_bytes = page_folder.write(bundle, partial, args.onnxruntime_web)
    text = f"{args.web}: {size_bytes / 1e6:.1f} MB; try it with: python -m http.server -b 127.0.0.1 -d {args.web}"
    answer.document({"event": "result", "path": str(args.web), "bytes": size_bytes}, text)
    return 0


def export_repository(args: argparse.Namespace, answer: Answer) -> int:
    """A bundle as a model repository of Triton Inference Server."""
    from pipeline.triton_server import repository

    with located(args.source) as folder:
        bundle = load_pipeline(folder) if is_pipeline(folder) else load(folder)
        name = repository.model_name(bundle)
        refuse_place(args.triton, "--triton", args.force, {name}.issuperset)
        with new_folder(args.triton) as partial:
            repository.write(bundle, partial, args.threads)
    text = f"{args.triton}: model {name}, for tritonserver --model-repository; checked, not run in a server"
    answer.document({"event": "result", "path": str(args.triton), "model": name, "run": False}, text)
    return 0


def refuse(calibration: Path, output: Path, force: bool) -> None:
    """Refuse before work starts what is no finished calibration, and to replace what is no export."""
    if not ((calibration / checkpoint.LAYERS_FILE).is_file() and (calibration / KEPT).is_dir()):
        remedy = f"python -m pipeline.calibrate --engine NAME -o {calibration} makes one"
        raise RecipeError(f"{calibration} holds no finished calibration with what is not quantized ({KEPT}/); {remedy}")
    refuse_place(output, "--output-dir", force, FILES.issuperset)


def refuse_place(output: Path, flag: str, force: bool, is_export: Callable[[set[str]], bool]) -> None:
    """Raise RecipeError where a folder would be replaced that is no earlier export of the kind, or without --force.

    is_export: whether such an export may have these entries.
    """
    if output.exists() and not (output.is_dir() and is_export({path.name for path in output.iterdir()})):
        raise RecipeError(f"{output} is not an export and is not replaced; choose another {flag}")
    if output.exists() and not force:
        raise RecipeError(f"{output} exists; add --force to replace it, or choose another {flag}")
    refuse_unwritable(output, True, flag)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(make_parser(), work, argv)


if __name__ == "__main__":
    leave(main)
