"""Correctness and speed of the GPU kernels: `python -m benchmarks.gpu` on a machine with an NVIDIA GPU and PyTorch.

Every kernel is checked against its NumPy reference first; then the FP8 accumulator is probed, and GEMMs, fused
quantizers and a whole denoiser are timed against what PyTorch offers. Needs PyTorch, Triton, NumPy and ml_dtypes only,
takes under 8 minutes, and writes benchmarks/results/gpu_NAME.json row by row. Exit code 0; 3 without a GPU; 4 if a
result was wrong; 1 if something else failed or was not reached.

--check-only checks and stops; under TRITON_INTERPRET=1 it needs no GPU, at small sizes, and writes nothing. Without a
git checkout the variable DITC_COMMIT tells the document which commit it belongs to.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.gpu.results import Results, broken, gpu_facts, is_checked, wrong
from benchmarks.gpu.run import MOST_WORKERS, Clock, Device, GpuLostError, tasks_of, work_off, work_off_in_processes
from benchmarks.gpu.targets import judged, table
from benchmarks.record import RESULTS, Json, slug
from export.errors import EnvironmentLacksError, ParityError, UserError
from pipeline import machine

TOTAL_S = 460.0  # of all sections
GRACE_S = 15.0  # a section that overruns its time by this much is stopped; with less to go, none is begun
LOST = 75  # exit code of a section's process that lost the GPU: another one is to go on


@dataclass(frozen=True)
class Section:
    """One part, run in a process of its own, so that one that fails or hangs leaves the others alone.

    module: has tasks(device) -> list of Task. budget_s: from before its process starts; what sections before it leave
    over comes on top. parallel: its tasks may share the GPU. compiles: it has compiling(device), tasks to run in
    parallel before.
    """

    name: str
    budget_s: float
    module: str
    parallel: bool = False
    compiles: bool = False


CHECK = Section("check", 80, "benchmarks.gpu.check", parallel=True)
SECTIONS = {
    section.name: section
    for section in (
        CHECK,
        Section("exactness", 35, "benchmarks.gpu.exactness"),
        Section("gemm", 120, "benchmarks.gpu.gemm", compiles=True),
        Section("fused", 50, "benchmarks.gpu.fused"),
        Section("denoiser", 170, "benchmarks.gpu.denoiser_times"),
    )
}


def find_device(check_only: bool) -> Device:
    """The GPU, or for check_only the interpreter. Raises EnvironmentLacksError before any work if neither is there."""
    machine.require(("torch", "triton"), "benchmarks.gpu")
    if check_only and os.environ.get("TRITON_INTERPRET") == "1":
        return Device("cpu", 0, tiny=True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise EnvironmentLacksError("TRITON_INTERPRET=1 keeps kernels off the GPU; unset it, or give --check-only")
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentLacksError(
            f"torch {torch.__version__} sees no CUDA GPU; benchmarks.gpu needs one (compute capability 80 or newer). "
            "Without: TRITON_INTERPRET=1 python -m benchmarks.gpu --check-only"
        )
    facts = gpu_facts()
    if facts["compute_capability"] < 80:
        raise EnvironmentLacksError(
            f"{facts['name']} has compute capability {facts['compute_capability']}; the kernels need 80 or newer"
        )
    return Device("cuda", facts["compute_capability"], facts["l2_bytes"])


def run_section(section: Section, device: Device, results: Results, clock: Clock) -> None:
    """Run what the document lacks of `section` in this process, keeping each row as it comes. Raises GpuLostError."""
    kept = {row["name"] for row in results.document["sections"][section.name]["rows"]}

    def keep(row: Json) -> None:
        results.keep(section.name, row)
        print(f"{clock.budget_s - clock.left:6.1f} s  {section.name}: {short(row)}", flush=True)

    workers = min(MOST_WORKERS, machine.cpu_count())
    if section.parallel:
        missed = work_off_in_processes(section.module, "tasks", device, clock, keep, workers, kept)
    else:
        if section.compiles and not kept:
            half = Clock(clock.left / 2)
            with suppress(GpuLostError):  # what fails or loses the GPU does so again, and is named, where it is timed
                work_off_in_processes(section.module, "compiling", device, half, lambda row: None, workers)
        tasks = tasks_of(section.module, "tasks", device)
        missed = work_off([task for task in tasks if task.name not in kept], device, clock, keep)
    results.end(section.name, missed, clock.budget_s - clock.left)


def short(row: Json) -> str:
    """A row on one line: its name, verdict and ratios."""
    parts = [str(row["name"])]
    parts += [f"{key} {row[key]}" for key in ("failed", "skipped", "differ") if key in row]
    if "passed" in row:
        parts.append("ok" if row["passed"] else f"WRONG {row}")
    for name, part in row.get("contestants", {}).items():
        parts.append(f"{name} {part['latency_ms'] * 1e3:.1f} us")
    parts += [f"{key} {value}" for key, value in row.get("ratios", {}).items()]
    parts += [f"without {name} ({why})" for name, why in row.get("refused", {}).items()]
    return "; ".join(parts)


def exit_code(command: list[str], seconds: float) -> int:
    """Run a command; subprocess.TimeoutExpired after `seconds`. No process that it started outlives it."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_in_child(section: Section, results: Results, seconds: float) -> None:
    """Run `section` in processes of its own, another one whenever one loses the GPU, and say in the document if it did
    not come to its end. Each is told when the section's time is over, by the clock that all processes share."""
    clock = Clock(seconds)
    until = repr(clock.started + seconds)
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", section.name, "--until", until]
    command += ["--output-dir", str(results.path.parent)]
    try:
        while (code := exit_code(command, clock.left + GRACE_S)) == LOST and clock.left > GRACE_S:
            print(f"{section.name}: the GPU was lost; going on in another process", flush=True)
        why = f"its process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        why = f"stopped after {seconds + GRACE_S:.0f} s"
    results.document = Results.open(results.path, results.document["gpu"]).document
    if why:
        results.stop(section.name, why)
        print(f"{section.name}: {why}", flush=True)


def chosen(names: Sequence[str], check_only: bool) -> list[Section]:
    """The sections to run, in order; the check is always among them."""
    if check_only:
        return [CHECK]
    return [section for section in SECTIONS.values() if not names or section.name in (*names, CHECK.name)]


def measure(sections: list[Section], results: Results, names: Sequence[str]) -> None:
    """Run sections one after the other within TOTAL_S. A check of the same code is not repeated unless asked for."""
    clock = Clock(TOTAL_S)
    for index, section in enumerate(sections):
        if section == CHECK and names and CHECK.name not in names and is_checked(results.document):
            print("check: passed before with this code and these tools", flush=True)
            continue
        seconds = clock.left - sum(later.budget_s for later in sections[index + 1 :])
        results.begin(section.name, seconds)  # here, so that a process that dies at once leaves a trace
        if seconds < GRACE_S:
            results.stop(section.name, f"not begun: {TOTAL_S:.0f} s were over")
            continue
        run_in_child(section, results, seconds)
    results.document["targets"] = judged(results.document)
    results.save()


def check_interpreted(device: Device) -> int:
    """Check under the interpreter, writing nothing; the exit code."""
    warnings.simplefilter("ignore", RuntimeWarning)  # tokens with NaN, which NumPy reports from within the interpreter
    rows: list[Json] = []

    def keep(row: Json) -> None:
        rows.append(row)
        print(short(row), flush=True)

    clock = Clock(CHECK.budget_s)
    missed = work_off(tasks_of(CHECK.module, "tasks", device), device, clock, keep)
    passed, total = sum(bool(row.get("passed")) for row in rows), len(rows) + len(missed)
    print(f"{passed} of {total} passed in {clock.budget_s - clock.left:.1f} s")
    return ParityError.exit_code if passed < total else 0


def finish(results: Results) -> int:
    """Print the targets; the exit code."""
    print(f"\n{results.document['gpu']['name']}\n{table(results.document['targets'])}\n{results.path}")
    late = [
        f"NOT REACHED within {part['budget_s']:.0f} s of {name}: {row}"
        for name, part in results.document["sections"].items()
        for row in part["not_reached"]
    ]
    wrong_rows = [f"WRONG {name}" for name in wrong(results.document)]
    failed = [f"FAILED {name}" for name in broken(results.document)]
    print("\n".join([*late, *wrong_rows, *failed]))
    return ParityError.exit_code if wrong_rows else 1 if failed or late else 0


def make_parser() -> argparse.ArgumentParser:
    parser = record.parser("benchmarks.gpu", __doc__)
    parser.add_argument("--section", action="append", default=[], choices=SECTIONS, help="only these (repeatable)")
    parser.add_argument("--check-only", action="store_true", help="check the kernels and stop")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where gpu_NAME.json is written")
    parser.add_argument("--one", choices=SECTIONS, help=argparse.SUPPRESS)  # a section, in this process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # when its time is over, by time.monotonic()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        device = find_device(arguments.check_only)
        if device.interpreted:
            return check_interpreted(device)
        facts = gpu_facts()
        results = Results.open(arguments.output_dir / f"gpu_{slug(facts['name'])}.json", facts)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.one:
        try:
            run_section(SECTIONS[arguments.one], device, results, Clock(arguments.until - time.monotonic()))
        except GpuLostError:
            return LOST
        return 0
    measure(chosen(arguments.section, arguments.check_only), results, arguments.section)
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
