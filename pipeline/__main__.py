"""`ditc <verb>`: the same verbs as `python -m pipeline.<verb>`, each module imported only when it is called."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from export.errors import RecipeError
from pipeline import machine
from pipeline.signals import leave

# verb: (module with main(), what it does)
VERBS = {
    "build": ("pipeline.build", "build a verified engine bundle from a recipe"),
    "sweep": ("pipeline.sweep.__main__", "build many engines from a table of recipes, and compare them"),
    "calibrate": ("pipeline.calibrate.__main__", "quantize a model into a checkpoint, without building an engine"),
    "export": ("pipeline.export", "write a checkpoint as ONNX, a bundle as a web page or for Triton"),
    "verify": ("pipeline.verify.__main__", "check a bundle again: files, lowering, all parity gates"),
    "compare": ("pipeline.compare", "show two bundles side by side, and where one is worse"),
    "bench": ("pipeline.bench.__main__", "measure a bundle on this machine"),
    "generate": ("pipeline.generate.__main__", "draw an image with a bundle"),
    "serve": ("pipeline.serve.__main__", "answer the OpenAI images API, and a web page, with a bundle"),
    "push": ("pipeline.push", "upload a bundle, with a card, to the hub"),
    "inspect": ("pipeline.inspect", "show what a bundle or recipe does, layer by layer"),
    "list": ("pipeline.list", "show recipes, bundled models and targets"),
    "doctor": ("pipeline.doctor", "check what this machine can build, and what is missing"),
}


def usage() -> str:
    """The help text."""
    rows = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    ends = "`ditc VERB --help` shows the options of a verb, `ditc --version` what is\ninstalled."
    return f"usage: ditc VERB [options]\n\n{rows}\n\n{ends}"


def version() -> str:
    """This release and the machine's Python, then the packages of machine.TOOLS that are installed, and those not."""
    here = machine.tool_versions()
    missing = ", ".join(name for name in machine.TOOLS if name not in here)
    place = f"Python {here.pop('python')}, {platform.system()} {platform.machine()}"
    tools = ", ".join(f"{name} {release}" for name, release in here.items())
    return f"{machine.PROGRAM} {machine.own_version()} ({place})\nwith {tools}" + (
        f"; without {missing}" if missing else ""
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0
    if verb == "--version":
        sys.stdout.write(version() + "\n")
        return 0
    if verb not in VERBS:
        sys.stderr.write(f"ditc: verb {verb!r} is unknown; use one of {', '.join(VERBS)}\n")
        return RecipeError.exit_code
    return int(import_module(VERBS[verb][0]).main(rest))


def command() -> NoReturn:
    """The console script."""
    leave(main)


if __name__ == "__main__":
    command()
