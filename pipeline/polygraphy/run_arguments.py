"""What `polygraphy run` learns of this package, by its entry point `polygraphy.run.plugins`: two runners more.

    polygraphy run BUNDLE --ditc --ditc-target cpu
    polygraphy run BUNDLE/cpu/model.onnx --ditc-onnxrt

Every `polygraphy run` imports this module, so it imports nothing of the compiler. Polygraphy reads the docstrings of
the classes: their first paragraph is a heading of its help.
"""

from __future__ import annotations

from argparse import Namespace

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args import util as arguments
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import Script, make_invocable

RUNNERS = "pipeline.polygraphy.runners"


class DitcRunnerArgs(BaseRunnerArgs):
    """
    ditc Inference: running an engine of a ditc bundle, given in place of a model.

    Depends on:

        - ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "an engine of a ditc bundle", "ditc"

    def add_parser_args_impl(self) -> None:
        text = "The target of the bundle to run; auto: the fastest that this machine runs"
        self.group.add_argument("--ditc-target", help=text, default="auto")
        self.group.add_argument("--ditc-threads", help="Threads of a call on the CPU", type=int, default=None)

    def parse_impl(self, args: Namespace) -> None:
        self.target = arguments.get(args, "ditc_target")
        self.threads = arguments.get(args, "ditc_threads")

    def add_to_script_impl(self, script: Script) -> None:
        script.add_import(imports=["DitcRunner", "EngineFromBundle"], frm=RUNNERS)
        path = self.arg_groups[ModelArgs].path
        loader = make_invocable("EngineFromBundle", path, target=self.target, threads=self.threads)
        script.add_runner(make_invocable("DitcRunner", script.add_loader(loader, "engine_from_bundle")))


class CpuGraphRunnerArgs(BaseRunnerArgs):
    """
    ditc ONNX-Runtime Inference: running a graph of a ditc bundle's target cpu in ONNX-Runtime.

    Depends on:

        - ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "ONNX-Runtime with the kernel library of ditc", "ditc-onnxrt"

    def add_to_script_impl(self, script: Script) -> None:
        script.add_import(imports=["OnnxrtRunner"], frm="polygraphy.backend.onnxrt")
        script.add_import(imports=["SessionFromCpuGraph"], frm=RUNNERS)
        loader = make_invocable("SessionFromCpuGraph", self.arg_groups[ModelArgs].path)
        script.add_runner(make_invocable("OnnxrtRunner", script.add_loader(loader, "session_from_cpu_graph")))


def argument_groups() -> list[BaseArgs]:
    """The entry point."""
    return [DitcRunnerArgs(), CpuGraphRunnerArgs()]
