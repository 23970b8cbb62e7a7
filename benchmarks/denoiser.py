"""Speed of one denoiser call at true size on this CPU: `python -m benchmarks.denoiser --model FOLDER --work-dir DIR`.

FOLDER holds a model of true configuration (`python -m benchmarks.zoo.make_xl` writes one with random weights). Engines
of ours are measured beside every peer of pipeline/bench/peers.py that is installed: each in a process of its own, all
called in turn, for several numbers of image tokens and batch sizes; with each its error against the float model, its
load time and its peak memory. Engines are the recipe's, fused and stock, with attention in float whatever the recipe
has for it, and any more by `--engine NAME:SETTINGS`, such as `--engine 'attn_e2m3: attention.qk=E2M3,
attention.pv=E2M3'`, which may begin with another recipe: `--engine 'int8: pixart_w8a8, attention.qk=INT8,
attention.pv=INT8'`. Writes benchmarks/results/denoiser_MACHINE.json.

What is expensive to make is kept in DIR for the next run; `--only-prepare` makes it and measures nothing. The result is
written after each case; with `--append` cases that are in it already, of the same code, stay.

`--profile` says instead where a call of each engine with the kernel library spends its time, beside the floor that the
machine's measured rates give; it writes benchmarks/results/call_profile_MACHINE.json.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from typing_extensions import TypedDict

from benchmarks import record
from benchmarks.quality.rows import FLOAT_ATTENTION
from benchmarks.record import Json
from export import checkpoint
from export.documents import read_json
from export.errors import EnvironmentLacksError, RecipeError
from export.models.description import Description, sample_inputs
from export.models.families import STEP_INPUTS
from export.models.load import LoadedModel, load
from pipeline import machine
from pipeline.backends.cpu import CpuBackend
from pipeline.bench import peers
from pipeline.bench.contest import Given, contest, figures
from pipeline.bench.convert import FloatModel, place
from pipeline.bench.peers import Absences, Entry
from pipeline.bench.profile import conditions, profile
from pipeline.bench.profile import summary as profile_summary
from pipeline.bench.runners import Spec
from pipeline.bench.worker import save_arrays, save_case
from pipeline.distance import sqnr_db
from pipeline.files import remove, sha256_json, write_json
from pipeline.generate.case import Case
from pipeline.recipe import Recipe, settled_attention, with_settings
from pipeline.recipe import load as load_recipe

logger = logging.getLogger(__name__)
RECIPE = "pixart_w4a6"
PATHS = ("fused", "stock")  # of cpu.path; engines of these names, with FLOAT_ATTENTION
TARGET = "cpu"
# The engine and the float32 reference flip codes against each other wherever float rounding meets a midpoint, and
# flips grow over the layers: the reference in float32 is itself about 33 dB from its float64 run at 28 layers. A
# defect (a wrong scale, a lost bias) leaves less than 10 dB.
LEAST_SQNR_DB = 20.0
CASES = ("256x1:9", "256x2:5", "1024x1:4", "1024x2:4", "4096x1:2")
LOADS = 3  # in the first case; in the others one
# From so many tokens on, where a call takes half a minute, only so many peers are measured, and draw nothing.
MANY_TOKENS, FASTEST = 4096, 3
STAMP = "made.json"


@dataclass(frozen=True)
class Sizes:
    """One case. tokens: of the image, whose sides are `pixels` each."""

    tokens: int
    batch: int
    rounds: int

    @staticmethod
    def parse(text: str) -> Sizes:
        """TOKENSxBATCH or TOKENSxBATCH:ROUNDS.

        >>> Sizes.parse("256x2:15"), Sizes.parse("1024x1")
        (Sizes(tokens=256, batch=2, rounds=15), Sizes(tokens=1024, batch=1, rounds=7))
        """
        match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
        sizes = tuple(int(part or 7) for part in match.groups()) if match else ()
        if not sizes or min(sizes) < 1 or math.isqrt(sizes[0]) ** 2 != sizes[0]:
            raise RecipeError(f"case {text!r} is none; give TOKENSxBATCH:ROUNDS, TOKENS a square number, as 256x1:15")
        return Sizes(*sizes)

    def pixels(self, model: Description) -> int:
        """Height and width of a picture of so many tokens."""
        return math.isqrt(self.tokens) * int(model.config["patch_size"]) * model.pixels_per_cell


# --- engines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """An engine to build. base: the recipe it begins with, by name. settings: as typed, beside those of all engines.
    recipe: of all that, with what attention "auto" means for TARGET."""

    name: str
    base: str
    settings: tuple[str, ...]
    recipe: Recipe


def parse_engine(text: str, base: str, common: Sequence[str]) -> Ours:
    """NAME:SETTINGS or NAME:RECIPE,SETTINGS, settings separated by commas as those of `--set`. base: the recipe where
    none is given; common: settings of all engines. Raises RecipeError."""
    name, separator, rest = text.partition(":")
    if not separator or not re.fullmatch(r"[a-z]\w*", name.strip()) or name.strip() in peers.PEERS:
        form = "NAME:KEY=VALUE,KEY=VALUE or NAME:RECIPE,KEY=VALUE with a name in small letters"
        raise RecipeError(f"engine {text!r} is none; give {form}")
    # A comma inside a value, as in a list, is not followed by a key.
    parts = [part.strip() for part in re.split(r",(?=\s*[\w.\"]+\s*=)", rest) if part.strip()]
    if parts and "=" not in parts[0]:
        base = parts.pop(0)
    recipe = with_settings(load_recipe(base), [*common, *parts])
    return Ours(name.strip(), base, tuple(parts), settled_attention(recipe, (TARGET,)))


class Stamp(TypedDict):
    """Of a built engine: what it was made of. sqnr_to_reference_db: None where it was not compared."""

    model: str
    recipe: str
    code: str
    sqnr_to_reference_db: float | None


def calibration_of(recipe: Recipe) -> str:
    """Key of what is calibrated: the recipe without its targets and the size of its pictures."""
    plain = replace(recipe, targets={}, sampling=replace(recipe.sampling, height=0, width=0))
    return sha256_json(plain.document())[:12]


def build_engines(model: LoadedModel, engines: Sequence[Ours], pixels: int, folder: Path, compare: bool) -> None:
    """Build what is not there yet, or was built by other code, into `folder`/PIXELS/NAME.

    compare: each with the fake-quant reference, which at least LEAST_SQNR_DB must be reached of. Raises AssertionError.
    """
    stale = [ours for ours in engines if not is_built(ours, model.sha256, folder / str(pixels))]
    for key in dict.fromkeys(calibration_of(ours.recipe) for ours in stale):
        group = [ours for ours in stale if calibration_of(ours.recipe) == key]
        _build_group(model, group, pixels, folder, folder / "calibrated" / key, compare)


def is_built(ours: Ours, model_sha256: str, folder: Path) -> bool:
    """Is the engine there, of this model and recipe and built by this code?"""
    path = folder / ours.name / STAMP
    if not path.is_file():
        return False
    stamp = read_json(path, Stamp)
    wanted = (model_sha256, sha256_json(ours.recipe.document()), machine.code_version())
    return (stamp["model"], stamp["recipe"], stamp["code"]) == wanted


def _build_group(
    model: LoadedModel, group: Sequence[Ours], pixels: int, folder: Path, calibrated: Path, compare: bool
) -> None:
    """Engines of one calibration and one form of attention."""
    from export.to_onnx import export_portable
    from pipeline.calibrate import calibrate

    backend, scratch = CpuBackend(), folder / "scratch"
    remove(scratch)
    scratch.mkdir(parents=True)
    calibrated.parent.mkdir(parents=True, exist_ok=True)
    layers, attention = calibrate(model, group[0].recipe, calibrated), group[0].recipe.attention.formats
    export_portable(model, layers, scratch / "model.onnx", pixels, pixels, attention)
    for ours in group:
        if problems := backend.problems(ours.recipe):
            raise EnvironmentLacksError(f"engine {ours.name}: {'; '.join(problems)}")
        logger.info("building engine %s for %d pixels", ours.name, pixels)
        bundle = folder / str(pixels) / ours.name
        remove(bundle)
        (bundle / TARGET).mkdir(parents=True)
        lowered = scratch / f"lowered_{ours.name}"
        lowered.mkdir()
        backend.build(backend.lower(scratch / "model.onnx", lowered, ours.recipe), bundle / TARGET, ours.recipe)
    remove(scratch)
    distances = _compared(model, group, pixels, folder / str(pixels), calibrated) if compare else {}
    for ours in group:
        stamp: Stamp = {
            "model": model.sha256,
            "recipe": sha256_json(ours.recipe.document()),
            "code": machine.code_version(),
            "sqnr_to_reference_db": distances.get(ours.name),
        }
        write_json(folder / str(pixels) / ours.name / STAMP, stamp)


def _compared(
    model: LoadedModel, group: Sequence[Ours], pixels: int, folder: Path, calibrated: Path
) -> dict[str, float]:
    """SQNR in dB of each engine against the fake-quant reference; AssertionError if one computes something else."""
    import torch

    from pipeline.backends.reference import ReferenceEngine, fake_quant

    inputs = sample_inputs(model, 1, 0, pixels, pixels)
    layers, attention = checkpoint.load(calibrated), group[0].recipe.attention.formats
    reference = ReferenceEngine(fake_quant(model, layers, torch.float32, attention))
    expected, values = reference.run(inputs)["sample"], {}
    for ours in group:
        engine = CpuBackend().load(folder / ours.name)
        values[ours.name] = sqnr_db(expected, engine.run(inputs)["sample"])
        engine.close()
    if not min(values.values()) >= LEAST_SQNR_DB:
        raise AssertionError(f"an engine is {values} dB from its reference, at least {LEAST_SQNR_DB} dB expected")
    return values


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What a run measures. model: without its weights. source: the float model, whose size each case sets."""

    model: Description
    sha256: str
    source: FloatModel
    engines: tuple[Ours, ...]
    peers: tuple[str, ...]
    threads: int
    folder: Path

    def of_size(self, pixels: int) -> tuple[FloatModel, Path]:
        """The float model of that size, and the folder of what peers run and all are given."""
        own = pixels == self.model.cells()[0] * self.model.pixels_per_cell
        source = self.source if own else replace(self.source, height=pixels, width=pixels)
        home = place(source, self.sha256, self.folder / "peers")
        home.mkdir(parents=True, exist_ok=True)
        return source, home

    def entrants(self, pixels: int) -> tuple[list[Entry], Absences]:
        """Engines first, then peers, which are prepared as far as they are not."""
        source, _ = self.of_size(pixels)
        ours = [
            Entry(
                row.name,
                Spec("engine", self.threads, str(self.folder / "engines" / str(pixels) / row.name), TARGET),
                is_ours=True,
                draws=True,
            )
            for row in self.engines
        ]
        others, absences = peers.entries(self.peers, source, self.sha256, self.folder / "peers", self.threads)
        return ours + others, absences

    def given(self, sizes: Sizes) -> Given:
        """Inputs, what is drawn (in batch 1), and the float model's answer, kept for the next run."""
        pixels = sizes.pixels(self.model)
        source, home = self.of_size(pixels)
        inputs = sample_inputs(self.model, sizes.batch, sizes.batch, pixels, pixels)
        fed = save_arrays(home / f"inputs_{sizes.batch}.npz", inputs)
        case = None
        if sizes.batch == 1:
            condition = {name: value for name, value in inputs.items() if name not in STEP_INPUTS}
            noise, shared = inputs["hidden_states"], self.model.shared
            drawn = Case(("random",), (condition, condition), noise, "ddim", 1000.0, 2, 4.5, "latents", shared)
            case = save_case(home / "case.npz", drawn)
        return Given(fed, case, peers.reference(source, fed, home / f"reference_{sizes.batch}.npz", self.threads))

    def profiled(self, sizes: Sizes) -> Json:
        """Where the time of a call goes, of each engine with the kernel library."""
        pixels = sizes.pixels(self.model)
        inputs = sample_inputs(self.model, sizes.batch, sizes.batch, pixels, pixels)
        engines = {}
        for ours in self.engines:
            if CpuBackend().options(ours.recipe).path != "stock":
                engines[ours.name] = profile(
                    self.folder / "engines" / str(pixels) / ours.name / TARGET, inputs, self.threads
                )
                print(f"{ours.name}, {sizes.tokens} tokens: {conditions(engines[ours.name])}")
                print(record.markdown(*profile_summary(engines[ours.name])), flush=True)
        return {"tokens": sizes.tokens, "batch": sizes.batch, "pixels": pixels, "engines": engines}

    def measure(self, sizes: Sizes, before: Json | None) -> Json:
        """One case. before: the one of fewer tokens that decides who is fast, None for no such."""
        pixels = sizes.pixels(self.model)
        entrants, absences = self.entrants(pixels)
        slow = slow_ones(before, entrants) if before is not None and sizes.tokens >= MANY_TOKENS else []
        # Two steps with guidance take minutes there.
        draws = {entry.name: entry.draws and (entry.is_ours or sizes.tokens < MANY_TOKENS) for entry in entrants}
        chosen = [replace(entry, draws=draws[entry.name]) for entry in entrants if entry.name not in slow]
        time.sleep(1)
        load_average = round(os.getloadavg()[0], 2)  # of the last minute: how quiet the machine was
        loads = LOADS if before is None else 1
        found = contest(chosen, self.given(sizes), sizes.rounds, self.folder / "logs", loads)
        return {
            **asdict(sizes),
            "pixels": pixels,
            "load_average": load_average,
            "contestants": found["contestants"],
            "failed": absences["failed"] | found["failed"],
            "left_out": absences["left_out"]
            | dict.fromkeys(slow, f"slower than the {FASTEST} fastest peers of {before and before['tokens']} tokens"),
        }


def slow_ones(before: Json, entrants: Iterable[Entry]) -> list[str]:
    """The peers that are not among the FASTEST of a case, and engines that are slower than all of those."""
    entries = list(entrants)
    times = {name: row["call_ms"]["median"] for name, row in before["contestants"].items()}
    others = sorted((times.get(entry.name, math.inf), entry.name) for entry in entries if not entry.is_ours)
    fast = [name for took, name in others[:FASTEST] if took < math.inf]
    limit = max((times[name] for name in fast), default=math.inf)
    return [
        entry.name
        for entry in entries
        if (times.get(entry.name, math.inf) > limit if entry.is_ours else entry.name not in fast)
    ]


def summary(case: Json) -> str:
    """A case as a Markdown table."""
    header = ["", "call, ms", "p10-p90", "dB", "load, s", "peak, MB", "drawing, MB", "weights, MB"]
    rows = [[name, *figures(row)] for name, row in case["contestants"].items()]
    absent = [f"{name}: {reason}" for name, reason in (case["failed"] | case["left_out"]).items()]
    title = f"{case['tokens']} tokens, batch {case['batch']}, {case['rounds']} rounds"
    return "\n".join([title, record.markdown(header, rows), *absent])


# --- the command ----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = record.parser("benchmarks.denoiser", __doc__)
    parser.add_argument("--model", required=True, help="folder of the float model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="TOKENSxBATCH:ROUNDS")
    parser.add_argument("--recipe", default=RECIPE, help="of engines that name none")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of all engines")
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=list(PATHS), help="engines of the recipe itself")
    parser.add_argument("--engine", action="append", default=[], dest="engines", metavar="NAME:[RECIPE,]SETTINGS")
    parser.add_argument("--peers", default=peers.ALL, help="names with commas, or all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only-prepare", action="store_true")
    parser.add_argument("--profile", action="store_true", help="where the time of our engines goes")
    parser.add_argument("--append", action="store_true", help="keep other cases of a result by the same code")
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    return parser


def prepare(args: argparse.Namespace, cases: Sequence[Sizes]) -> Bench:
    """Engines, files of peers and the float model's answers for all cases, as far as they are not there."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    of_paths = [f"{path}:{','.join((f'cpu.path={path}', *FLOAT_ATTENTION))}" for path in args.paths]
    engines = tuple(parse_engine(text, args.recipe, args.settings) for text in [*of_paths, *args.engines])
    model, source = load(args.model), FloatModel(str(Path(args.model).resolve()), "", "", 0, 0)
    all_pixels = sorted({sizes.pixels(model) for sizes in cases})
    for pixels in all_pixels:
        build_engines(model, engines, pixels, args.work_dir / "engines", pixels == all_pixels[0])
    described = Description(model.family, model.config, model.folder, model.source)
    names, threads = peers.parse_peers(args.peers), machine.threads(args.threads)
    bench = Bench(described, model.sha256, source, engines, names, threads, args.work_dir)
    del model
    gc.collect()  # the float weights
    for pixels in all_pixels:
        bench.entrants(pixels)
    for sizes in cases:
        bench.given(sizes)
    return bench


def main(argv: Sequence[str] | None = None) -> None:
    args = record.parsed(make_parser(), argv)
    cases = [Sizes.parse(text) for text in args.cases]
    bench = prepare(args, cases)
    if args.only_prepare:
        print(f"prepared in {args.work_dir}")
        return
    slug = record.slug(f"{machine.cpu_name()} {machine.cpu_count()}cpu")
    if args.profile:
        load_average = round(os.getloadavg()[0], 2)
        document = {"recipe": args.recipe, "load_average": load_average, "code": machine.code_version()}
        document["cases"] = [bench.profiled(sizes) for sizes in cases]
        print(record.write(f"call_profile_{slug}", document, args.output_dir))
        return
    path = args.output_dir / f"denoiser_{slug}.json"
    first = str(min(sizes.pixels(bench.model) for sizes in cases))
    head: Json = {
        "model": bench.model.config["_class_name"],
        "layers": bench.model.config["num_layers"],
        "recipe": args.recipe,
        "settings": args.settings,
        "engines": {
            ours.name: {
                "recipe": ours.base,
                "settings": list(ours.settings),
                "sqnr_to_reference_db": read_json(args.work_dir / "engines" / first / ours.name / STAMP, Stamp)[
                    "sqnr_to_reference_db"
                ],
            }
            for ours in bench.engines
        },
        "peers": {name: peers.PEERS[name].words for name in bench.peers},
        "threads": bench.threads,
        "code": machine.code_version(),
    }
    earlier = record.read(path, {}) if args.append else {}
    kept = cases_of(earlier, head, path) if earlier else []
    head["peers"] = earlier.get("peers", {}) | head["peers"]
    for name, row in earlier.get("engines", {}).items():  # compared with the reference at the smallest size alone
        if head["engines"].get(name, {"sqnr_to_reference_db": None})["sqnr_to_reference_db"] is None:
            head["engines"][name] = row
    done = [case for case in kept if (case["tokens"], case["batch"]) not in {(one.tokens, one.batch) for one in cases}]
    for sizes in cases:
        fewer = [case for case in done if case["tokens"] < sizes.tokens and case["batch"] == 1]
        done.append(bench.measure(sizes, fewer[-1] if fewer else done[0] if done else None))
        print(summary(done[-1]), flush=True)
        cases_in_order = sorted(done, key=lambda case: (case["tokens"], case["batch"]))
        record.write(path.stem, head | {"cases": cases_in_order}, args.output_dir)
    print(path)


def cases_of(earlier: Json, head: Json, path: Path) -> list[Json]:
    """The cases of an earlier result, read from `path`. Raises RecipeError if other code or settings gave it."""
    for key in ("model", "layers", "recipe", "settings", "threads", "code"):
        if earlier.get(key) != head[key]:
            raise RecipeError(
                f"{path}: its {key} is {earlier.get(key)!r}, now {head[key]!r}; cases of one file are of one code and "
                "recipe, so measure all of them, or write elsewhere (--output-dir)"
            )
    return list(earlier["cases"])


if __name__ == "__main__":
    main()
