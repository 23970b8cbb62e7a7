"""Fill README.md's generated parts: `python -m benchmarks.readme`.

Tables come from code (formats), from the JSON of the benchmark scripts (numbers) and from docstrings (code map), so
that the README states nothing of which the origin is unknown. A part stands between `<!-- begin NAME -->` and
`<!-- end NAME -->`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.denoiser import BASELINES, PATHS
from benchmarks.gpu.targets import judged
from benchmarks.quality.tables import short_table
from benchmarks.record import RESULTS, markdown
from export.formats.format import FORMATS
from export.formats.operands import embeds, exact_multipliers
from pipeline.methods import METHODS
from pipeline.recipe import load, recipe_names

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PACKAGES = ("export", "plugins", "pipeline", "benchmarks")


def formats() -> str:
    """One row for each signed format: what its bits give, and where it embeds."""
    rows = []
    for fmt in (row for row in FORMATS.values() if row.sign_bits):
        multipliers = exact_multipliers(fmt.name)
        fits = ["yes" if embeds(fmt.name, target) else "no" for target in ("INT8", "E4M3", "FP16")]
        shown = ", ".join(map(str, multipliers)) if fmt.bits == 4 else "-"
        rows.append([fmt.name, fmt.bits, f"{fmt.max_value:g}", fmt.fraction_bits, fmt.kmax, *fits, shown])
    header = [
        "format",
        "bits",
        "largest",
        "f",
        "kmax",
        "INT8",
        "E4M3",
        "FP16",
        "group multipliers exact in INT8 and E4M3",
    ]
    return markdown(header, rows)


def recipes() -> str:
    """One row for each bundled recipe."""
    rows = []
    for recipe in map(load, recipe_names()):
        weights = [recipe.formats.weight, *(f"{kind}: {name}" for kind, name in recipe.formats.weight_of.items())]
        scales = f"{recipe.weights.granularity} of {recipe.weights.group_size}"
        rows.append([f"`{recipe.name}`", f"`{recipe.model}`", ", ".join(weights), recipe.formats.activation, scales])
    return markdown(["recipe", "default model", "weights", "activations", "weight scales"], rows)


def methods() -> str:
    """One row for each calibration method."""
    data = {"weights": "none", "blocks": "sampled"}
    rows = [[f"`{row.name}`", data[row.observes], row.summary] for row in METHODS.values()]
    return markdown(["`--set method=`", "data", "what it does"], rows)


def bundled_models() -> str:
    """One row for each bundled model, from the judge's JSON."""
    rows = []
    for path in sorted(RESULTS.glob("zoo_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        worst, judge = min(found["accuracy"].values()), min(found["judge_test_accuracy"].values())
        size = f"{found['training']['parameters'] / 1e6:.1f} M"
        rows.append([f"`{found['model']}`", size, found["conditions"], found["count"], f"{worst:.1%}", f"{judge:.1%}"])
    header = ["model", "parameters", "pictures of", "count", "right (least of all slots)", "the judge's own accuracy"]
    return markdown(header, rows)


def speed() -> str:
    """One row for each measured machine, engine and batch size, from the JSON of benchmarks/denoiser.py."""
    rows = [
        row
        for path in sorted(RESULTS.glob("denoiser_*.json"))
        for row in _speed_rows(json.loads(path.read_text(encoding="utf-8")))
    ]
    if not rows:
        return "Not measured yet: run `python -m benchmarks.denoiser`."
    times = ["times as fast as ONNX Runtime fp32", "as its dynamic INT8"]
    return markdown(["machine, model", "engine", "`cpu.path`", "batch", *times, "peak memory, of fp32's", "load"], rows)


def _speed_rows(found: dict[str, Any]) -> list[list[Any]]:
    place = f"{found['machine']['cpu']}, {found['machine']['cpus']} CPUs, {found['layers']} layers"
    build = ", ".join([found["recipe"], *found.get("settings", [])])
    rows = []
    for path, suffix in PATHS.items():
        for batch in found["batches"] if f"engine{suffix}" in found["processes"] else ():
            engine, peer = found["processes"][f"engine{suffix}"], found["processes"]["onnxruntime_fp32"]
            ratios = [f"{batch[f'times_faster{suffix}'][name]:.2f}" for name in BASELINES]
            memory = f"{engine['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f}"
            rows.append([place, build, path, batch["batch_size"], *ratios, memory, f"{engine['load_s']:.1f} s"])
    return rows


def gpu_speed() -> str:
    """For each measured GPU, every target with what was found, from the JSON of benchmarks/gpu/__main__.py."""
    rows = [
        row
        for path in sorted(RESULTS.glob("gpu_*.json"))
        for row in _gpu_rows(json.loads(path.read_text(encoding="utf-8")))
    ]
    if not rows:
        return (
            "No GPU was at hand: nothing measured. The GPU kernels are compiled, not run; on a machine with one, "
            "`python -m benchmarks.gpu` checks and measures them."
        )
    return markdown(
        ["GPU, commit", "number, the worst of its rows", "target, set for an H100", "found", "verdict"], rows
    )


def _gpu_rows(found: dict[str, Any]) -> list[list[Any]]:
    commits = ", ".join(sorted({part["commit"] for part in found["sections"].values()}))
    rows = []
    for target in judged(found):
        limit = f"{'at least' if target['at_least'] else 'at most'} {target['limit']:g}"
        value = "-" if target["value"] is None else f"{target['value']:.3f}"
        rows.append([f"{found['gpu']['name']}, {commits}", target["name"], limit, value, target["verdict"]])
    return rows


def first_sentence(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def code_map() -> str:
    """One bullet for each module, and one for each folder below a package (or for a package without modules)."""
    lines = []
    for package in PACKAGES:
        folder = ROOT / package
        if not _modules(folder):
            lines.append(f"- `{package}/`: {first_sentence(folder / '__init__.py')}")
        lines += [f"- `{path.relative_to(ROOT)}`: {first_sentence(path)}" for path in _modules(folder)]
        for below in sorted(path.parent for path in folder.rglob("*/__init__.py")):
            names = ", ".join(f"`{path.stem}`" for path in _modules(below))
            lines.append(f"- `{below.relative_to(ROOT)}/`: {first_sentence(below / '__init__.py')} ({names})")
    return "\n".join(lines)


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "recipes": recipes,
    "methods": methods,
    "bundled-models": bundled_models,
    "quality": short_table,
    "speed": speed,
    "gpu-speed": gpu_speed,
    "code-map": code_map,
}


def part(text: str, name: str) -> str:
    """What stands in the README between the marks of a part."""
    found = re.search(rf"<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no part {name}; write <!-- begin {name} --> and <!-- end {name} -->")
    return found.group(1)


def filled(text: str) -> str:
    """The README with all parts written anew."""
    for name, make in PARTS.items():
        marks = f"<!-- begin {name} -->\n{{}}\n<!-- end {name} -->"
        text = text.replace(marks.format(part(text, name)), marks.format(make()))
    return text


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
