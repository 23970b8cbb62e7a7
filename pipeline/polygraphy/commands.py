"""The commands of every target: which `polygraphy run` looks at its files, in which order, on what machine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from export.documents import shown
from export.errors import ContractError
from pipeline.backends import BACKENDS
from pipeline.backends.base import CONDITION, MODEL, TIMESTEP
from pipeline.backends.metadata_file import Shapes
from pipeline.backends.rtx.engine import RtxNeeds
from pipeline.backends.tensorrt.engine import ENGINE
from pipeline.bundle.bundle import Bundle
from pipeline.files import MANIFEST_FILE


class Written(str):
    """A word in which the shell puts the value of a variable: written here, as names in a bundle may be hostile."""


BUNDLE = Written("$bundle")
INPUTS, EXPECTED, LAYER_INPUTS, LAYERS, FEEDS = (
    "inputs.json",
    "expected.json",
    "layer_inputs.json",
    "layers.json",
    "feeds.py",
)
WITH_RTX, BUILT_AGAIN = "POLYGRAPHY_USE_TENSORRT_RTX=1", "rtx.engine"
# What commands may need that not every machine has: a variable that the script is run with to run them, and in words.
NEEDS = {
    "RTX": "Where TensorRT-RTX is installed, without a GPU",
    "GPU": "On the target's GPU, written without one: not run",
}
# A graph of a GPU's target in onnxruntime: optimizations beyond these take apart pairs of QuantizeLinear and
# DequantizeLinear that stand for a GEMM of the target.
AS_IT_STANDS = ("--graph-optimization-level", "ORT_ENABLE_BASIC")


@dataclass(frozen=True)
class Command:
    """One command of a script. words: of it, behind the name of its `tool`. needs: what of NEEDS, "" for nothing.
    environment: variables that it is given. makes: a file that must not be there."""

    why: str
    words: tuple[str, ...]
    needs: str = ""
    environment: str = ""
    tool: str = "$polygraphy"
    makes: str = ""

    def lines(self) -> list[str]:
        """Of a shell script."""
        space = "    " if self.needs else ""
        text = " ".join(filter(None, [self.environment, self.tool, *map(_quoted, self.words)]))
        return [f"{space}# {self.why}", *([f"{space}rm -f {self.makes}"] if self.makes else []), f"{space}{text}"]


def _quoted(word: str) -> str:
    return f'"{word}"' if isinstance(word, Written) else shlex.quote(word)


def in_bundle(name: str, before: str = "") -> Written:
    """A file of the bundle."""
    return Written(f"{before}{BUNDLE}/{name}")


def refuse_flags(bundle: Bundle, names: Iterable[str]) -> None:
    """Raise ContractError for a tensor's name that a command would read as a flag."""
    if flag := next((name for name in names if name.startswith("-")), None):
        called = f"a tensor is called {shown(flag)}, as no build calls one"
        raise ContractError(f"{bundle.path}: {called}; verify the bundle, or build it again")


@dataclass(frozen=True)
class Feed:
    """A function of feeds.py: the inputs `names` of a graph, of inputs.json and of what was saved in `before`."""

    function: str
    names: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A target of a bundle. inputs_of: names of the inputs of one of its graphs. engine_db, graphs_db: the limits of
    its engine and of its graphs by output; layers_db: by tensor of a quantized linear's output in the portable graph,
    none where they are not compared.

    Raises ContractError for a name that would be a flag in a command.
    """

    name: str
    bundle: Bundle
    inputs_of: Callable[[str], tuple[str, ...]]
    engine_db: Mapping[str, float]
    graphs_db: Mapping[str, float]
    layers_db: Mapping[str, float]

    def __post_init__(self) -> None:
        refuse_flags(self.bundle, (*self.engine_db, *self.graphs_db, *self.layers_db))

    def has(self, file: str) -> bool:
        return f"{self.name}/{file}" in self.bundle.manifest["files"]

    def engine(self) -> Command:
        words = ("run", BUNDLE, "--ditc", "--ditc-target", self.name, *_called(self.engine_db))
        return Command("The engine, whole.", words, "GPU" if BACKENDS[self.name].needs_gpu else "")

    def chain(self, *runner: str) -> tuple[list[Command], list[Feed]]:
        """Its graphs one after the other: each reads what those before it gave."""
        commands, feeds, saved = list[Command](), list[Feed](), list[str]()
        for file in filter(self.has, (CONDITION, TIMESTEP, MODEL)):
            part = file.removesuffix(".onnx")
            feeds.append(Feed(f"{self.name}_{part}", self.inputs_of(f"{self.name}/{file}"), tuple(saved)))
            words = ("run", in_bundle(f"{self.name}/{file}"), *runner)
            words += ("--data-loader-script", f"{FEEDS}:{feeds[-1].function}")
            if file == MODEL:
                words += _compared(EXPECTED, self.graphs_db)
                commands.append(Command(f"{file}, of what stands above." if saved else f"{file}.", words))
                break
            saved.append(f"{self.name}.{part}.json")
            why = f"{file}, whose results {MODEL} reads."
            commands.append(Command(why, (*words, "--save-outputs", saved[-1]), makes=saved[-1]))
        return commands, feeds


def _compared(expected: str, limits_db: Mapping[str, float]) -> tuple[str, ...]:
    """With the reference's results in the file `expected`."""
    limits = (f"{name}:{limit:.2f}" for name, limit in limits_db.items())
    return ("--load-outputs", expected, "--compare", "snr", "--snr-threshold", *limits)


def _called(limits_db: Mapping[str, float]) -> tuple[str, ...]:
    return ("--load-inputs", INPUTS, *_compared(EXPECTED, limits_db))


def commands_of(target: Target) -> tuple[list[Command], list[Feed]]:
    """A target's commands in their order, and the functions that feed them."""
    return WAYS[BACKENDS[target.name].polygraphy](target)


def of_engine(target: Target) -> tuple[list[Command], list[Feed]]:
    """Of a target without graphs that others run."""
    return [target.engine()], []


def of_own_graphs(target: Target) -> tuple[list[Command], list[Feed]]:
    """Of ops that this package brings to onnxruntime."""
    commands, feeds = target.chain("--ditc-onnxrt")
    return [target.engine(), *commands], feeds


def of_graphs(target: Target) -> tuple[list[Command], list[Feed]]:
    """Of ops that onnxruntime has on the CPU, by themselves or by the function bodies of fused ones."""
    commands, feeds = target.chain("--onnxrt", *AS_IT_STANDS)
    return [*commands, target.engine()], feeds


def of_portable(target: Target) -> tuple[list[Command], list[Feed]]:
    path = in_bundle(MODEL)
    commands = [
        Command(
            "The portable model in onnxruntime, nothing of ditc in it.",
            ("run", path, "--onnxrt", *_called(target.graphs_db)),
        ),
        target.engine(),
    ]
    if names := target.layers_db:
        words = ("run", path, "--onnxrt", "--onnx-outputs", *names, "--load-inputs", LAYER_INPUTS)
        words += _compared(LAYERS, names)
        commands.append(Command("The output of every quantized linear.", words))
    return commands, []


def of_graph_and_plan(target: Target) -> tuple[list[Command], list[Feed]]:
    """Polygraphy does not know plugins in Python, which ours are: with them the engine alone runs."""
    if "plugins" in target.bundle.manifest["targets"][target.name]["metadata"]:
        return of_engine(target)
    commands, path = list[Command](), in_bundle(f"{target.name}/{MODEL}")
    if target.has(MODEL):
        words = ("run", path, "--onnxrt", *AS_IT_STANDS, *_called(target.graphs_db))
        commands.append(Command("The graph that the builder got, in onnxruntime on the CPU.", words))
        words = ("convert", path, "--convert-to", "trt", "-o", BUILT_AGAIN, *_build_flags(target))
        commands.append(Command("An engine of it, built by Polygraphy.", words, "RTX", WITH_RTX))
    return [*commands, target.engine(), *_of_plan(target, WITH_RTX, "tensorrt_rtx")], []


def of_plan(target: Target) -> tuple[list[Command], list[Feed]]:
    """The engine has the kernels of its plugins in it."""
    return [target.engine(), *_of_plan(target, "", "trtexec")], []


def _shapes(target: Target) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Least, usual and largest of every input."""
    manifest, source = target.bundle.manifest, target.bundle.path / MANIFEST_FILE
    shapes = BACKENDS[target.name].metadata(manifest, source, Shapes)["shapes"]
    refuse_flags(target.bundle, shapes)
    return shapes


def _build_flags(target: Target) -> list[str]:
    """Polygraphy's, for an engine of the same GPUs and shapes."""
    manifest, source = target.bundle.manifest, target.bundle.path / MANIFEST_FILE
    sms = BACKENDS[target.name].metadata(manifest, source, RtxNeeds)["compute_capabilities"]
    words = ["--compute-capabilities", *(f"{sm // 10}.{sm % 10}" for sm in sms)]
    for place, size in enumerate(("min", "opt", "max")):
        texts = (f"{name}:[{','.join(map(str, sizes[place]))}]" for name, sizes in _shapes(target).items())
        words += [f"--trt-{size}-shapes", *texts]
    return words


def _of_plan(target: Target, environment: str, tool: str) -> list[Command]:
    """An engine file in Polygraphy's own runner, and timed by the vendor's tool."""
    name = f"{target.name}/{ENGINE}"
    usual = ",".join(f"{name}:{'x'.join(map(str, sizes[1]))}" for name, sizes in _shapes(target).items())
    words = ("run", in_bundle(name), "--model-type", "engine", "--trt", *_called(target.engine_db))
    return [
        Command("The engine file in Polygraphy's own runner.", words, "GPU", environment),
        Command("How fast it is.", (in_bundle(name, "--loadEngine="), f"--shapes={usual}"), "GPU", tool=tool),
    ]


# By what a target says of itself.
WAYS: Mapping[str, Callable[[Target], tuple[list[Command], list[Feed]]]] = {
    "engine": of_engine,
    "own graphs": of_own_graphs,
    "graphs": of_graphs,
    "graph and plan": of_graph_and_plan,
    "plan": of_plan,
    "portable": of_portable,
}


def script(target: Target, commands: Sequence[Command]) -> str:
    """A shell script of a target, for any folder that it is called from."""
    lines = [
        "#!/bin/sh",
        f"# sh {target.name}.sh [BUNDLE]: target {target.name} against the float64 reference.",
        "set -eu",
        f"bundle=${{1:-{shlex.quote(str(target.bundle.path.resolve()))}}}",
        "unset CDPATH",  # or cd may lead elsewhere, and says where
        'bundle=$(cd -- "$bundle" && pwd)',
        "polygraphy=${POLYGRAPHY:-polygraphy}",
        'cd -- "$(dirname -- "$0")"',
    ]
    for needs in ("", *NEEDS):
        of_kind = [command for command in commands if command.needs == needs]
        if needs and of_kind:
            lines += ["", f"# {NEEDS[needs]}. {needs}=1 runs it.", f'if [ -n "${{{needs}:-}}" ]; then']
        for command in of_kind:
            lines += [*([] if needs else [""]), *command.lines()]
        if needs and of_kind:
            lines.append("fi")
    return "\n".join(lines) + "\n"
