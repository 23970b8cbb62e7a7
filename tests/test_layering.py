"""Who may import whom, and which packages may be imported only inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.backends import ROWS
from tests.conftest import KERNEL_MODULES

ROOT = Path(__file__).parent.parent
# Each package may import itself and the ones after it: benchmarks, tests -> pipeline -> plugins -> export.
ALLOWED = {
    "export": {"export"},
    "plugins": {"plugins", "export"},
    "pipeline": {"pipeline", "plugins", "export"},
}
# Imported at the top of no module of the compiler, so that light verbs work without them.
HEAVY = {
    "pydantic",
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "tensorrt_rtx",
    "triton",
    "matplotlib",
    "polygraphy",
    "sklearn",
}
# Modules that define torch modules; they are themselves imported inside functions only.
DEFINES_TORCH_MODULES = {
    "export/models/attention_calls.py",
    "export/models/autoencoder_modules.py",
    "export/models/batches.py",
    "export/models/bert_modules.py",
    "export/models/causal_modules.py",
    "export/models/clip_modules.py",
    "export/models/recorded.py",
    "export/models/recording.py",
    "export/models/t5_modules.py",
    "export/models/text_modules.py",
    "export/models/torch_modules.py",
    "export/models/traceable_forms.py",
    "export/trace.py",
    "pipeline/backends/reference.py",
    "pipeline/generate/diffusers_adapter.py",
    "pipeline/generate/text_stand_in.py",
}
# Calibration's own machinery; every other module of the package belongs to a method, loaded by its row in the table.
LIGHT_CALIBRATION = {
    "__init__.py",
    "__main__.py",
    "data.py",
    "method.py",
    "plan.py",
    "methods/rtn.py",
    "scales.py",
    "state.py",
}
CALIBRATION = [path.relative_to(ROOT / "pipeline/calibrate") for path in (ROOT / "pipeline/calibrate").rglob("*.py")]
DEFINES_TORCH_MODULES |= {
    f"pipeline/calibrate/{path.as_posix()}"
    for path in CALIBRATION
    if path.as_posix() not in LIGHT_CALIBRATION and path.name != "__init__.py"
}
# The `cuda` target: torch ops, and the executor made of torch functions.
DEFINES_TORCH_MODULES |= {
    "plugins/torch_reference.py",
    "plugins/torch_ops.py",
    "pipeline/backends/cuda/torch_gemm.py",
    "pipeline/backends/cuda/module.py",
    "pipeline/backends/cuda/torch_onnx.py",
}
DEFINES_TORCH_MODULES |= {f"plugins/gpu/{name}.py" for name in KERNEL_MODULES}
# Likewise of Polygraphy: who imports these has it.
DEFINES_TORCH_MODULES |= {"pipeline/polygraphy/runners.py", "pipeline/polygraphy/run_arguments.py"}
FILES = sorted(path.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
TYPE_ONLY = "TYPE_CHECKING"

# The inside of pipeline, from the top: a part may import itself and what stands below it. The `__main__` of a folder is
# a verb, and so are the single modules of the first row; what stands in no row is below all.
# `bundle` above `generate`: an opened bundle knows how its model draws; drawing sees a bundle as a type alone.
# `recipe` above `backends`: each target owns the options that stand in its table of a recipe.
ORDER = (
    (
        "__main__",
        "build",
        "compare",
        "doctor",
        "export",
        "inspect",
        "list",
        "push",
        "pytest_plugin",
        "triton_server",
        "web",
    ),
    ("sweep",),
    ("compile_pipeline",),
    ("compiler",),
    ("bench", "polygraphy", "verify"),
    ("calibrate",),
    ("jobs",),
    ("serve",),
    ("text_to_image",),
    ("bundle",),
    ("parts",),
    ("generate",),
    ("recipe",),
    ("backends",),
    ("passes",),
)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import; type-checking blocks are left out."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and TYPE_ONLY in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", at_top) for alias in node.names)
        inside = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, True)


@cache
def imported(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse((ROOT / path).read_text())))


def test_the_walk_sees_what_it_should() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\nclass X:\n    import c\ndef f():\n    from d import e\n"
    assert list(imports(ast.parse(source))) == [("a", True), ("c", True), ("d.e", False)]
    assert len(FILES) > 20, "the compiler's files were not found"


def test_kernels_are_where_the_interpreter_finds_them() -> None:
    """tests/conftest.py imports every file with kernels while triton's interpreter is on."""
    kernels = {path.stem for path in (ROOT / "plugins/gpu").glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert kernels == set(KERNEL_MODULES)


def test_import_direction() -> None:
    own = {"benchmarks", "tests", *ALLOWED}
    wrong = {
        str(path): names
        for path in FILES
        if (names := [name for name, _ in imported(path) if name.split(".")[0] in own - ALLOWED[path.parts[0]]])
    }
    assert not wrong, f"{wrong}; the direction of imports is benchmarks, tests -> pipeline -> plugins -> export"


def test_heavy_packages_are_imported_late() -> None:
    lazy = {name.removesuffix(".py").replace("/", ".") for name in DEFINES_TORCH_MODULES}

    def is_heavy(name: str) -> bool:
        return name.split(".")[0] in HEAVY or any(f"{name}.".startswith(f"{module}.") for module in lazy)

    light = [path for path in FILES if path.as_posix() not in DEFINES_TORCH_MODULES]
    heavy = {
        str(path): names
        for path in light
        if (names := [name for name, at_top in imported(path) if at_top and is_heavy(name)])
    }
    assert not heavy, f"{heavy} at the top; move the import into the function that needs it"


def test_passes_do_not_import_backends() -> None:
    passes = [path for path in FILES if path.match("pipeline/passes/*.py")]
    backends = {
        str(path): [name for name, _ in imported(path) if name.startswith("pipeline.backends")] for path in passes
    }
    wrong = {path: names for path, names in backends.items() if names}
    assert passes and not wrong, f"{wrong}; a backend publishes rows (passes.probes) and passes get them as data"


def hand_made(tree: ast.AST) -> list[str]:
    """Nodes that are made without the builder of export/dialect/graph.py, and ports that are taken by number."""
    ports = {"input", "inputs", "output", "outputs"}
    return [
        ast.unparse(part)
        for part in ast.walk(tree)
        if (isinstance(part, ast.Call) and ast.unparse(part.func) == "ir.Node")
        or (
            isinstance(part, ast.Subscript)
            and isinstance(part.value, ast.Attribute)
            and part.value.attr in ports
            and isinstance(part.slice, ast.Constant)
            and isinstance(part.slice.value, int)
        )
    ]


def test_passes_and_backends_have_one_builder_and_ports_by_name() -> None:
    paths = [path for path in FILES if path.parts[1] in ("passes", "backends")]
    wrong = {str(path): lines for path in paths if (lines := hand_made(ast.parse((ROOT / path).read_text())))}
    assert len(paths) > 50 and not wrong, f"{wrong}; see GraphBuilder, new_node, inputs_of and outputs_of"
    assert len(hand_made(ast.parse("ir.Node('', 'Add', [a, b]).outputs[0]; node.input[1]; inputs['x']"))) == 3


TARGET_FOLDERS = {module.rpartition(".")[2] for module, _ in ROWS.values()}


def of_other_targets(folder: str, names: Iterable[tuple[str, bool]]) -> list[str]:
    """Which of the imported names stand in the folder of another target than this one's."""
    others = tuple(f"pipeline.backends.{other}." for other in TARGET_FOLDERS - {folder})
    return [name for name, _ in names if f"{name}.".startswith(others)]


def test_no_target_leans_on_another() -> None:
    """What two targets share stands in pipeline/backends itself, or in a folder that is no target's."""
    paths = [path for path in FILES if path.parts[:2] == ("pipeline", "backends") and path.parts[2] in TARGET_FOLDERS]
    wrong = {str(path): names for path in paths if (names := of_other_targets(path.parts[2], imported(path)))}
    assert {path.parts[2] for path in paths} == TARGET_FOLDERS
    assert not wrong, f"{wrong}; move what they share to pipeline/backends"


@pytest.mark.parametrize(
    "line",
    [
        "from pipeline.backends.cuda.engine import CudaEngine",
        "from pipeline.backends.cuda import CudaBackend",
        "from pipeline.backends import cuda",
        "import pipeline.backends.cuda",
        "def late():\n    from pipeline.backends.cuda import build",
    ],
)
def test_a_target_that_leans_on_another_is_found(line: str) -> None:
    planted = list(imports(ast.parse(line)))
    assert len(of_other_targets("trt", planted)) == 1 and not of_other_targets("cuda", planted)


@pytest.mark.parametrize("name", ["pipeline.backends.feeds.Declared", "pipeline.backends.fused.lower.lower"])
def test_what_no_target_owns_is_for_all(name: str) -> None:
    assert not of_other_targets("trt", [(name, True)])


def rank(name: str) -> int:
    """Row of ORDER that a module of pipeline, "pipeline.verify.study", belongs to."""
    parts = name.split(".")[1:]
    if parts[-1:] == ["__main__"]:
        return 0
    if not parts:  # the way in for users, which loads bundles
        return ORDER.index(("bundle",))
    return next((row for row, names in enumerate(ORDER) if parts[0] in names), len(ORDER))


def test_the_inside_of_pipeline_has_an_order() -> None:
    """pipeline/__init__.py is left out: it is the way in for users, who load a bundle with it."""
    wrong = {}
    for path in FILES:
        if path.parts[0] == "pipeline" and path.as_posix() != "pipeline/__init__.py":
            own = rank(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
            above = [name for name, _ in imported(path) if name.startswith("pipeline.") and rank(module_of(name)) < own]
            wrong |= {str(path): above} if above else {}
    assert not wrong, f"{wrong} stand above it: {' > '.join(' '.join(row) for row in ORDER)}"


def module_of(name: str) -> str:
    """The module of an imported name: "pipeline.verify.study" of "pipeline.verify.study.Study"."""
    place = ROOT / name.replace(".", "/")
    return name if place.is_dir() or place.with_suffix(".py").is_file() else name.rpartition(".")[0]


def test_no_circle_of_imports() -> None:
    """Of modules, whatever is imported late; type-checking alone may go round."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {
        name: {module_of(taken) for taken, _ in imported(path)} & set(names) - {name} for name, path in names.items()
    }
    while leaves := [name for name, below in graph.items() if not below]:
        graph = {name: below - set(leaves) for name, below in graph.items() if name not in leaves}
    used = set().union(*graph.values())
    assert not (circles := {name: below for name, below in graph.items() if name in used}), f"circles: {circles}"


# What runs a bundle. None of it imports the compiler's packages, at its top or later, but for what is named in
# NEEDS_TORCH; and at its top it imports nothing that imports them at its own.
RUN_TIME = [
    path
    for path in FILES
    if path.match("pipeline/bundle/*.py")
    or path.match("pipeline/generate/*.py")
    or path.match("pipeline/generate/schedulers/*.py")
    or path.match("pipeline/serve/*.py")
    or path.match("pipeline/backends/*/engine.py")
    or path.match("pipeline/backends/*/__init__.py")
    or path.match("plugins/cpu/*.py")
    or path.as_posix()
    in {
        *(
            f"pipeline/{name}.py"
            for name in ("__init__", "__main__", "command", "doctor", "files", "inspect", "list", "push")
        ),
        *(f"pipeline/{name}.py" for name in ("machine", "methods", "progress", "recipe", "signals", "text_to_image")),
        *(f"pipeline/backends/{name}.py" for name in ("__init__", "base", "feeds", "lowering_file", "metadata_file")),
        *(f"pipeline/backends/{name}.py" for name in ("sessions", "stock_runtime")),
    }
]
COMPILERS = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "matplotlib", "huggingface_hub"}
# Engines that compute with PyTorch, and engines in a diffusers pipeline.
NEEDS_TORCH = {
    "pipeline/backends/cuda/engine.py": {"torch"},
    "pipeline/backends/tensorrt/engine.py": {"torch"},
    "pipeline/backends/trt/engine.py": {"torch"},
    "pipeline/bundle/hub.py": {"huggingface_hub"},
    "pipeline/generate/convert_tokenizer.py": {"transformers"},
    "pipeline/generate/diffusers_adapter.py": {"diffusers", "torch"},
    "pipeline/generate/latent.py": {"huggingface_hub", "torch"},
    "pipeline/generate/pipeline_folder.py": {"diffusers", "torch"},
    "pipeline/generate/text_stand_in.py": {"torch", "transformers"},
    "pipeline/machine.py": {"torch"},
}


def packages(path: Path, candidates: set[str]) -> set[str]:
    return {name.split(".")[0] for name, _ in imported(path)} & candidates


def test_the_run_time_part_names_what_needs_the_compiler() -> None:
    needs = {path.as_posix(): packages(path, COMPILERS) for path in RUN_TIME}
    assert {path: names for path, names in needs.items() if names} == NEEDS_TORCH


def test_the_run_time_part_is_imported_without_the_compiler() -> None:
    """Whatever a module of it imports at its top, and what that imports at its own top, and so on."""
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    wrong = {}
    stand_ins = {Path("pipeline/generate/diffusers_adapter.py"), Path("pipeline/generate/text_stand_in.py")}
    for start in set(RUN_TIME) - stand_ins:
        ways, waiting = {start: [start]}, [start]
        while waiting:
            path = waiting.pop()
            names = {name for name, at_top in imported(path) if at_top}
            if bad := {name.split(".")[0] for name in names} & COMPILERS:
                wrong[start] = f"{' -> '.join(map(str, ways[path]))} -> {bad}"
            below = {modules[part] for name in names for part in (name, name.rpartition(".")[0]) if part in modules}
            below -= set(ways)
            ways |= {other: [*ways[path], other] for other in below}
            waiting += below
    assert not wrong, wrong
