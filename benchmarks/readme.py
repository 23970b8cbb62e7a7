"""Fill the generated parts of README.md and docs/, and write docs/cli.md: `python -m benchmarks.readme`.

Tables come from code (formats, flags), from the JSON of the benchmark scripts (numbers) and from docstrings (folders),
so that no page states anything of which the origin is unknown. A part stands between `<!-- begin NAME -->` and
`<!-- end NAME -->`. docs/quality.md is written by `python -m benchmarks.quality.tables`.
"""

from __future__ import annotations

import ast
import re
from argparse import Action
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.denoiser import BASELINES, PATHS
from benchmarks.gpu.targets import cells, judged
from benchmarks.quality.tables import SHORT, short_table
from benchmarks.record import RESULTS, Json, markdown, read
from export.formats.format import FORMATS
from export.formats.operands import HARDWARE, embeds, exact_multipliers
from pipeline.__main__ import VERBS
from pipeline.command import parser
from pipeline.methods import METHODS
from pipeline.recipe import load, recipe_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README, CLI = ROOT / "README.md", DOCS / "cli.md"
# Pages with generated parts.
PAGES = (README, *(DOCS / f"{name}.md" for name in ("calibration", "deployment", "design", "gpu")))
PACKAGES = ("export", "plugins", "pipeline", "benchmarks")


def formats() -> str:
    """One row for each signed format: what its bits give, and where it embeds."""
    rows = []
    for fmt in (row for row in FORMATS.values() if row.sign_bits):
        fits = ["yes" if embeds(fmt.name, target) else "no" for target in HARDWARE]
        shown = ", ".join(map(str, exact_multipliers(fmt.name))) if fmt.bits == 4 else "-"
        rows.append([fmt.name, fmt.bits, f"{fmt.max_value:g}", fmt.fraction_bits, fmt.kmax, *fits, shown])
    multipliers = "group multipliers exact in INT8 and E4M3"
    return markdown(["format", "bits", "largest", "f", "kmax", *HARDWARE, multipliers], rows)


def recipes() -> str:
    """One row for each bundled recipe."""
    rows = []
    for recipe in map(load, recipe_names()):
        weights = [recipe.formats.weight, *(f"{kind}: {name}" for kind, name in recipe.formats.weight_of.items())]
        scales = recipe.weights.scales_text()
        formats = (", ".join(weights), recipe.formats.activation, recipe.attention.text())
        rows.append([f"`{recipe.name}`", f"`{recipe.model}`", *formats, scales])
    return markdown(["recipe", "default model", "weights", "activations", "attention", "weight scales"], rows)


def methods() -> str:
    """One row for each calibration method."""
    data = {"weights": "none", "blocks": "sampled"}
    rows = [[f"`{row.name}`", data[row.observes], row.summary] for row in METHODS.values()]
    return markdown(["`--set method=`", "data", "what it does"], rows)


def bundled_models() -> str:
    """One row for each bundled model, from the judge's JSON."""
    rows = []
    for path in sorted(RESULTS.glob("zoo_*.json")):
        quality = read(path)
        worst, judge = min(quality["accuracy"].values()), min(quality["judge_test_accuracy"].values())
        size = f"{quality['training']['parameters'] / 1e6:.1f} M"
        rows.append(
            [f"`{quality['model']}`", size, quality["conditions"], quality["count"], f"{worst:.1%}", f"{judge:.1%}"]
        )
    header = ["model", "parameters", "pictures of", "count", "right (least of all slots)", "the judge's own accuracy"]
    return markdown(header, rows)


NOT_MEASURED = "Not measured yet: run `python -m benchmarks.denoiser`."


def speed() -> str:
    """One row for each measured machine, engine and batch size, from the JSON of benchmarks/denoiser.py."""
    rows = []
    for run, path, suffix in _measured_paths():
        place = f"{_machine(run)}, {run['layers']} layers"
        build = ", ".join([run["recipe"], *run.get("settings", [])])
        load = f"{run['processes'][f'engine{suffix}']['load_s']:.1f} s"
        for batch in run["batches"]:
            ratios = _ratios(suffix, batch)
            rows.append([place, build, path, batch["batch_size"], *ratios, _memory(run, suffix), load])
    times = ["times as fast as ONNX Runtime fp32", "as its dynamic INT8"]
    header = ["machine, model", "engine", "`cpu.path`", "batch", *times, "peak memory, of fp32's", "load"]
    return markdown(header, rows) if rows else NOT_MEASURED


def speed_short() -> str:
    """One row for each measured machine and engine: its batches beside each other."""
    rows = [
        [_machine(run), path, *_ratios(suffix, *run["batches"]), _memory(run, suffix)]
        for run, path, suffix in _measured_paths()
    ]
    times = ["times as fast as fp32, batch 1 / 2", "as dynamic INT8, batch 1 / 2"]
    header = ["machine", "`cpu.path`", *times, "peak memory, of fp32's"]
    return markdown(header, rows) if rows else NOT_MEASURED


def _ratios(suffix: str, *batches: Json) -> list[str]:
    """How many times as fast as each baseline an engine is, batches beside each other."""
    return [" / ".join(f"{batch[f'times_faster{suffix}'][name]:.2f}" for batch in batches) for name in BASELINES]


def _measured_paths() -> list[tuple[Json, str, str]]:
    """(JSON of a machine, value of cpu.path, what it adds to the names of its rows) for every engine in them."""
    runs = [read(path) for path in sorted(RESULTS.glob("denoiser_*.json"))]
    return [(run, *path) for run in runs for path in PATHS.items() if f"engine{path[1]}" in run["processes"]]


def _machine(run: Json) -> str:
    return f"{run['machine']['cpu']}, {run['machine']['cpus']} CPUs"


def _memory(run: Json, suffix: str) -> str:
    engine, peer = run["processes"][f"engine{suffix}"], run["processes"]["onnxruntime_fp32"]
    return f"{engine['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f}"


def gpu_speed() -> str:
    """For each measured GPU, every target with what was found, from the JSON of benchmarks/gpu/__main__.py."""
    rows = []
    for run in (read(path) for path in sorted(RESULTS.glob("gpu_*.json"))):
        commits = ", ".join(sorted({part["commit"] for part in run["sections"].values()}))
        rows += [[f"{run['gpu']['name']}, {commits}", *cells(row)] for row in judged(run)]
    if not rows:
        return (
            "No GPU was at hand: nothing measured. The GPU kernels are compiled, not run; on a machine with one, "
            "`python -m benchmarks.gpu` checks and measures them."
        )
    header = ["GPU, commit", "number, the worst of its rows", "target, set for an H100", "found", "verdict"]
    return markdown(header, rows)


def first_sentence(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def folders() -> str:
    """One bullet for each folder of source."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("__init__.py")))
    return "\n".join(f"- `{path.parent.relative_to(ROOT)}/`: {first_sentence(path)}" for path in paths)


CLI_PREFACE = """# The command line

Written by `python -m benchmarks.readme` from the verbs' own parsers. `ditc VERB` and `python -m pipeline.VERB` are the
same; flags may be written with dashes or underscores. Answers go to stdout, logs and progress to stderr. What an exit
code means: [deployment.md](deployment.md#exit-codes). `ditc --version` says what is installed."""


def cli() -> str:
    """The whole of docs/cli.md: a section for each verb."""
    common = [_flag(action) for action in parser("", "").flags()]
    parts = [CLI_PREFACE, "Flags of every verb:", markdown(FLAG_HEADER, common)]
    for verb, (module, _) in VERBS.items():
        verb_parser = import_module(module).make_parser()
        own = [action for action in verb_parser.flags() if _flag(action) not in common]
        needed = [_words(action) for action in own if action.required]
        usage = " ".join(["ditc", verb, *needed, *(["[flags]"] if len(own) > len(needed) else [])])
        parts += [f"## {verb}", verb_parser.description, f"    {usage}"]
        parts += [markdown(FLAG_HEADER, map(_flag, own))] if own else []
    return "\n\n".join(parts) + "\n"


FLAG_HEADER = ("flag", "default", "what it does")


def _flag(action: Action) -> list[str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings[:-1])
    default = f"`{action.default}`" if action.default and isinstance(action.default, str | int | float) else ""
    words = f"`{_words(action)}`".replace("|", "\\|")
    return [f"{names}, {words}" if names else words, default, (action.help or "").replace("|", "\\|")]


def _words(action: Action) -> str:
    """What is typed: a flag by its last name, and the name of its value."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    return " ".join([*action.option_strings[-1:], *([value] if value else [])])


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "recipes": recipes,
    "methods": methods,
    "bundled-models": bundled_models,
    "quality-short": partial(short_table, names=SHORT),
    "speed": speed,
    "speed-short": speed_short,
    "gpu-speed": gpu_speed,
    "folders": folders,
}
PART = re.compile(r"(<!-- begin ([\w-]+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with all of its parts written anew. Raises KeyError for a part that is not in PARTS."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[4]}", text)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    CLI.write_text(cli(), encoding="utf-8")


if __name__ == "__main__":
    main()
