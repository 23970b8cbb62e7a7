"""Fill the generated parts of README.md and docs/, and write docs/cli.md: `python -m benchmarks.readme`.

Tables come from code (formats, flags), from the JSON of the benchmark scripts (numbers) and from docstrings (folders),
so that no page states anything of which the origin is unknown. A part stands between `<!-- begin NAME -->` and
`<!-- end NAME -->`. docs/quality.md is written by `python -m benchmarks.quality.tables`.
"""

from __future__ import annotations

import ast
import math
import re
from argparse import Action
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.targets import cells, judged
from benchmarks.quality.tables import SHORT, short_table
from benchmarks.record import RESULTS, Json, markdown, read
from benchmarks.tools.matrix import FORMS, TOOLS
from benchmarks.zoo.pixart_scenes.publish import NAME as SCENES
from benchmarks.zoo.pixart_scenes.reader import SLOTS
from export.formats.format import FORMATS
from export.formats.operands import HARDWARE, embeds, exact_multipliers
from export.models.sources import ZOO
from pipeline.__main__ import VERBS
from pipeline.bench.contest import FIRST_STEP
from pipeline.bench.profile import ATTENTION, BETWEEN, BYTE_ATTENTION, GEMM, REST
from pipeline.command import parser
from pipeline.methods import METHODS
from pipeline.recipe import load, recipe_names
from pipeline.verify.baseline import Tolerance, load_tolerances

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README, CLI = ROOT / "README.md", DOCS / "cli.md"
# Pages with generated parts.
PAGES = (README, *(DOCS / f"{name}.md" for name in ("calibration", "ci", "deployment", "design", "gpu")))
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
        if recipe.half is not None:
            rows.append([f"`{recipe.name}`", f"`{recipe.model}`", "not quantized", *["-"] * 3])
            continue
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
    """One row for each bundled model, from the judge's JSON, and for the pipeline, from its own."""
    rows = []
    for path in sorted(RESULTS.glob("zoo_*.json")):
        quality = read(path)
        worst, judge = min(quality["accuracy"].values()), min(quality["judge_test_accuracy"].values())
        size = f"{quality['training']['parameters'] / 1e6:.1f} M"
        rows.append(
            [f"`{quality['model']}`", size, quality["conditions"], quality["count"], f"{worst:.1%}", f"{judge:.1%}"]
        )
    facts, quality = (read(ZOO / SCENES / name) for name in ("training.json", "quality.json"))
    size = f"{sum(facts['parameters'].values()) / 1e6:.1f} M"
    least = (f"{min(quality[key][slot] for slot in SLOTS):.1%}" for key in ("accuracy", "accuracy_of_scenes"))
    rows.append([f"`{SCENES}`", size, quality["conditions"], quality["count"], *least])
    header = ["model", "parameters", "pictures of", "count", "right (least of all slots)", "the judge's own accuracy"]
    return markdown(header, rows)


NOT_MEASURED = "Not measured yet: run `python -m benchmarks.denoiser`."


def speed() -> str:
    """For each measured machine and contestant, ours first: time of a call in each case, error, memory, load;
    from the JSON of benchmarks/denoiser.py."""
    runs = _denoiser_runs()
    if not runs:
        return NOT_MEASURED
    columns = sorted({_column(case) for run in runs for case in run["cases"]})
    header = ["machine", "", *(f"{tokens} tokens, batch {batch}" for tokens, batch in columns)]
    header += ["error, dB", "peak memory, MB", "drawing, MB", "load, s"]
    rows = [
        [_machine(run), name, *_times(run, name, columns), *_facts(run, name)]
        for run in runs
        for name in _contestants(run)
    ]
    notes = [f"- {_machine(run)}: {_load_average(run)}" for run in runs]
    notes += [
        f"- {_machine(run)}: {name} was not measured: {reason}" for run in runs for name, reason in _absent(run).items()
    ]
    return "\n".join([markdown(header, rows), "", *notes])


def speed_short() -> str:
    """For each measured machine and engine of ours how many times as fast as the fastest peer it is, case by case."""
    runs = _denoiser_runs()
    columns = sorted({_column(case) for run in runs for case in run["cases"]})
    rows = [[_machine(run), f"`{name}`", *_ratios(run, name, columns)] for run in runs for name in run["engines"]]
    header = ["machine", "engine", *(f"{tokens} tokens, batch {batch}" for tokens, batch in columns)]
    return markdown(header, rows) if rows else NOT_MEASURED


def speed_equal() -> str:
    """For each measured machine and peer the fastest engine of ours whose error is no more than the peer's: how many
    times as fast as the peer it is, case by case."""
    runs = [run for run in _denoiser_runs() if _knows_errors(run)]
    columns = sorted({_column(case) for run in runs for case in run["cases"]})
    rows = [
        [_machine(run), f"`{name}`", *_equals(run, name, columns)]
        for run in runs
        for name in _contestants(run)
        if not _is_ours(run, name)
    ]
    header = ["machine", "peer", *(f"{tokens} tokens, batch {batch}" for tokens, batch in columns)]
    return markdown(header, rows) if rows else NOT_MEASURED


def _knows_errors(run: Json) -> bool:
    """Results from before there were peers have none."""
    return all(row["sqnr_db"] is not None for case in run["cases"] for row in case["contestants"].values())


def _equals(run: Json, peer: str, columns: list[tuple[int, int]]) -> list[str]:
    """How many times as fast as the peer the fastest engine of no more error is, with both errors."""
    cells = dict.fromkeys(columns, "-")
    for case in run["cases"]:
        rows = case["contestants"]
        if peer not in rows:
            continue
        least, peer_ms = rows[peer]["sqnr_db"], rows[peer]["call_ms"]["median"]
        times = {
            name: row["call_ms"]["median"]
            for name, row in rows.items()
            if name in run["engines"] and row["sqnr_db"] >= least
        }
        cells[_column(case)] = f"none has {least:.0f} dB"
        if times:
            name = min(times, key=lambda name: times[name])
            errors = f"({rows[name]['sqnr_db']:.1f} to {least:.1f} dB)"
            cells[_column(case)] = f"{peer_ms / times[name]:.2f} x by `{name}` {errors}"
    return list(cells.values())


def _denoiser_runs() -> list[Json]:
    return [read(path) for path in sorted(RESULTS.glob("denoiser_*.json"))]


def _column(case: Json) -> tuple[int, int]:
    return case["tokens"], case["batch"]


def _load_average(run: Json) -> str:
    """How quiet the machine was before each case, in words: contestants suffer differently from what runs beside."""
    loads = [case["load_average"] for case in run["cases"]]
    return f"load average before the cases {min(loads):.1f} to {max(loads):.1f}, {_stamp(run)}"


def _stamp(run: Json) -> str:
    """What was measured: the commit and the runtimes."""
    runtimes = [f"{name} {run['versions'][name]}" for name in ("onnxruntime", "openvino") if name in run["versions"]]
    return ", ".join([f"commit {run['commit']}", *runtimes])


def _machine(run: Json) -> str:
    return f"{run['machine']['cpu']}, {run['machine']['cpus']} CPUs"


def _is_ours(run: Json, name: str) -> bool:
    return name.removesuffix(FIRST_STEP) in run["engines"]


def _contestants(run: Json) -> list[str]:
    """Ours as they were named, then peers, the fastest of the first case first."""
    names = dict.fromkeys(name for case in run["cases"] for name in case["contestants"])
    first = {name: row["call_ms"]["median"] for name, row in run["cases"][0]["contestants"].items()}
    others = sorted((name for name in names if not _is_ours(run, name)), key=lambda name: first.get(name, math.inf))
    return [*(name for name in names if _is_ours(run, name)), *others]


def _times(run: Json, name: str, columns: list[tuple[int, int]]) -> list[str]:
    cells = {_column(case): case["contestants"].get(name) for case in run["cases"]}
    return [f"{row['call_ms']['median']:,.0f} ms" if (row := cells.get(column)) else "-" for column in columns]


def _facts(run: Json, name: str) -> list[str]:
    """Error, memory and load in the first case that measured it."""
    row = next(case["contestants"][name] for case in run["cases"] if name in case["contestants"])
    distance = row["sqnr_db"]
    memory = [row.get(key) for key in ("peak_rss_bytes", "drawing_peak_rss_bytes")]
    sizes = ["-" if size is None else f"{size / 1e6:,.0f}" for size in memory]
    return ["-" if distance is None else f"{distance:.1f}", *sizes, f"{row['load_s']:.1f}"]


def _absent(run: Json) -> dict[str, str]:
    """Contestants of which no case has a row, and why."""
    measured = set(_contestants(run))
    reasons = {name: why for case in run["cases"] for name, why in (case["failed"] | case["left_out"]).items()}
    return {name: why for name, why in reasons.items() if name not in measured}


def _ratios(run: Json, name: str, columns: list[tuple[int, int]]) -> list[str]:
    """How many times as fast as the fastest peer, which is named with its error and the engine's."""
    cells = dict.fromkeys(columns, "-")
    for case in run["cases"]:
        rows = case["contestants"]
        others = {peer: row["call_ms"]["median"] for peer, row in rows.items() if not _is_ours(run, peer)}
        if name in rows and others:
            fastest = min(others, key=lambda peer: others[peer])
            errors = [rows[one]["sqnr_db"] for one in (name, fastest)]
            stated = "" if None in errors else f" ({errors[0]:.0f} to {errors[1]:.0f} dB)"
            ratio = others[fastest] / rows[name]["call_ms"]["median"]
            cells[_column(case)] = f"{ratio:.2f} x `{fastest}`{stated}"
    return list(cells.values())


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


def text_encoder_formats() -> str:
    """What formats cost a text encoder, plain and with planted outliers."""
    document = read(RESULTS / "text_encoder_study.json")
    header = ["weights", "activations", "weight scales", "dB", "worst token", "dB, outliers", "worst token, outliers"]
    pairs = zip(document["plain"], document["outliers"], strict=True)
    return markdown(
        header,
        [
            [
                plain["weight"], plain["activation"], f"exact_group({plain['group_size']})",
                *(f"{row[key]:.1f}" for row in (plain, planted) for key in ("sqnr_db", "worst_token_db")),
            ]
            for plain, planted in pairs
        ],
    )  # fmt: skip


def _with_notes(header: list[str], rows: list[list[str]], notes: list[str], script: str) -> str:
    """A table and what stands below it; of no rows, the script that makes some."""
    return "\n".join([markdown(header, rows), "", *notes]) if rows else f"Not measured yet: run `benchmarks.{script}`."


# Of what a tool says, from where it comes to the point.
MOST_WORDS = 120


def tools() -> str:
    """A row for each tool that the portable model was given to, a column for each of its forms."""
    document = read(RESULTS / "tools.json", {})
    rows: dict[tuple[str, str], list[str]] = {}
    for row in document.get("rows", []):
        rows.setdefault((row["tool"], row["version"]), []).append(_of_tool(row))
    notes = []
    if rows:
        sizes = " and ".join(f"{document['bytes'][form] / 1e6:.2f} MB" for form in FORMS)
        limit = f"limit {document['limit_db']} dB"
        notes = [f"- `{document['bundle']}`, {sizes}; {limit}; {_machine(document)}, {_stamp(document)}"]
    header = ["tool", "version", "as it is built", "`export --inline`"]
    return _with_notes(header, [[*key, *cells] for key, cells in rows.items()], notes, "tools")


def _of_tool(row: Json) -> str:
    if "absent" in row:
        return f"not run: {row['absent']}"
    if "refuses" in row:
        words = row["refuses"]
        known = next((tool.refuses.get(row["form"], "") for tool in TOOLS if tool.name == row["tool"]), "")
        start = max(words.find(known), 0)
        shown = words[start : start + MOST_WORDS] + ("..." if len(words) > start + MOST_WORDS else "")
        return f"**refuses**: {shown}".replace("|", "\\|")
    if "db" in row:
        return "equal to the bit" if row["db"] is None else f"{row['db']:.1f} dB"
    return str(row["found"]).strip("- ")


def families() -> str:
    """One row for each class that is learned from its pipeline, from the JSON of benchmarks/families."""
    document = read(RESULTS / "families.json", {"models": {}})
    methods = list(dict.fromkeys(name for row in document["models"].values() for name in row.get("methods", {})))
    rows = []
    for name, row in document["models"].items():
        if row["refused"]:
            rows.append([name, f"`{row['class']}`", "-", *["refused"] * len(methods), row["refused"]])
            continue
        share = f"{row['linears']}, {row['quantized_parameters'] / row['parameters']:.0%}"
        built = [_built(row["methods"].get(method)) for method in methods]
        rows.append([name, f"`{row['class']}`", share, *built, f"`{row['pipeline']}`"])
    header = ["model", "class", "linears in the engine, of all parameters", *methods, "pipeline, or what is missing"]
    return markdown(header, rows) if rows else "Not run yet: run `python -m benchmarks.families`."


def _built(row: Json | None) -> str:
    """Gates that passed, and how far the pipeline's latents are from those with the float model."""
    if row is None:
        return "-"
    if row["exit_code"]:
        return "not built"
    return f"{row['gates']} gates, {row['drawn_sqnr_db']:.1f} dB"


PARTS_OF_A_CALL = (GEMM, BYTE_ATTENTION, ATTENTION, BETWEEN, REST)
RATES = {
    "byte_products_per_s": "10^9 products/s of bytes",
    "float_products_per_s": "of float32",
    "memory_bytes_per_s": "GB/s from memory",
}


def call_floor() -> str:
    """Where a call of true size spends its time, beside the machine's rates."""
    header = ["machine", "engine", "tokens", "call, ms", "times the floor", *PARTS_OF_A_CALL, "GEMMs, of the byte rate"]
    rows, notes = [], []
    for run in (read(path) for path in sorted(RESULTS.glob("call_profile_*.json"))):
        first = next(iter(run["cases"][0]["engines"].values()))
        for case in run["cases"]:
            for name, found in case["engines"].items():
                parts = {row["part"]: row for row in found["parts"]}
                gemm, rate = parts[PARTS_OF_A_CALL[0]], found["byte_products_per_s"]
                floor = f"{found['call_ms'] / found['floor_ms']:.2f}" if found["floor_ms"] else "-"
                share = f"{gemm['products'] / gemm['ms'] * 1e3 / rate:.2f}" if rate else "-"
                shares = [f"{parts[part]['ms']:,.0f} ms" for part in PARTS_OF_A_CALL]
                cells = [f"{case['tokens']}", f"{found['call_ms']:,.0f} ms", floor, *shares, share]
                rows.append([_machine(run), name, *cells])
        rates = ", ".join(f"{first[key] / 1e9:.0f} {unit}" for key, unit in RATES.items())
        notes.append(f"- {_machine(run)}: {rates}; load average before {run['load_average']:.1f}, {_stamp(run)}")
    return _with_notes(header, rows, notes, "denoiser --profile")


def text_encoder_size() -> str:
    """What a text encoder of true size takes to be built and to encode a prompt."""
    runs = [read(path) for path in sorted(RESULTS.glob("text_encoder_*cpu.json"))]
    header = ["machine", "build, min", "processor, min", "its peak, GB", "on disk, GB", "a prompt, s", "peak, GB"]
    rows = [
        [
            _machine(run),
            *(f"{run['build'][key] / 60:.1f}" for key in ("wall_s", "cpu_s")),
            f"{run['build']['peak_resident_bytes'] / 1e9:.1f}",
            f"{run['size_bytes']['all'] / 1e9:.2f}",
            f"{run['encode']['call_s']:.1f}",
            f"{run['encode']['peak_resident_bytes'] / 1e9:.2f}",
        ]
        for run in runs
    ]
    busy = (f"load average {run['build']['load_average']:.1f} at the build's end" for run in runs)
    notes = [f"- {_machine(run)}: {load}, {_stamp(run)}" for run, load in zip(runs, busy, strict=True)]
    return _with_notes(header, rows, notes, "text_encoder")


def whole_pipelines() -> str:
    """Memory and seconds of a picture by a whole pipeline of true size."""
    runs = [read(path) for path in sorted(RESULTS.glob("whole_pipeline_*.json"))]
    header = ["machine", "parts", "pixels", "steps", "peak, GB", "picture, s", "of them"]
    rows, notes = [], []
    for run in runs:
        for way, row in run["ways"].items():
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["parts_s"].items())
            size = " x ".join(map(str, row["pixels"]))
            cells = [f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{row['picture_s']:.1f}", parts]
            rows.append([_machine(run), way, size, str(run["n_steps"]), *cells])
        notes.append(f"- {_machine(run)}: {_stamp(run)}")
    counts = read(RESULTS / "pipeline_parameters.json")["parameters"]
    parts = ", ".join(f"{name} {4 * count / 1e9:.1f}" for name, count in counts.items())
    notes.append(
        f"- In float32, as diffusers loads them, the weights of all parts are {4 * sum(counts.values()) / 1e9:.1f} GB "
        f"({parts}): by the parameters that `benchmarks.zoo.make_pipeline --count` counts, not run."
    )
    return _with_notes(header, rows, notes, "whole_pipeline")


def autoencoders() -> str:
    """Memory and time of a picture by an autoencoder of true size, whole and in tiles."""
    header = ["machine", "engine", "pixels", "computed", "peak, GB", "seconds", "processor, s"]
    rows, notes = [], []
    for run in (read(path) for path in sorted(RESULTS.glob("autoencoder_*.json"))):
        for row in run["rows"]:
            cells = [f"{row['peak_rss_bytes'] / 1e9:.2f}", f"{row['seconds']:.1f}", f"{row['processor_s']:.1f}"]
            way = "in tiles" if row["way"] == "tiles" else row["way"]
            rows.append([_machine(run), f"`{row['engine']}`", f"{row['pixels']} x {row['pixels']}", way, *cells])
        threads = f"{run['threads']} threads, load average before {run['load_average']:.1f}"
        notes.append(f"- {_machine(run)}: {threads}, {_stamp(run)}")
    return _with_notes(header, rows, notes, "autoencoder")


def tolerances() -> str:
    """By how much a bundle may be worse than its baseline, where nothing else is said."""
    rows = [[f"`{row.of}`", _tolerated(row), row.why] for row in load_tolerances()]
    return markdown(["numbers", "may be worse by", "why"], rows)


def _tolerated(row: Tolerance) -> str:
    if row.ignore:
        return "not compared"
    amounts = [f"{row.absolute:g}" if row.absolute else "", f"{100 * row.relative:g} %" if row.relative else ""]
    worse = " + ".join(filter(None, amounts)) or "nothing"
    if row.enough is None:
        return worse
    return f"{worse}; {'the limit of the baseline' if row.enough == 'limit' else format(row.enough, 'g')} is enough"


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "recipes": recipes,
    "methods": methods,
    "bundled-models": bundled_models,
    "quality-short": partial(short_table, names=SHORT),
    "tools": tools,
    "families": families,
    "speed": speed,
    "speed-short": speed_short,
    "speed-equal": speed_equal,
    "gpu-speed": gpu_speed,
    "text-encoder-formats": text_encoder_formats,
    "call-floor": call_floor,
    "text-encoder-size": text_encoder_size,
    "whole-pipelines": whole_pipelines,
    "autoencoders": autoencoders,
    "tolerances": tolerances,
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
