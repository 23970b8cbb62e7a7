"""Quality of quantized models: `python -m benchmarks.quality [pixart_mini] [dit_mini]`.

Every row of `benchmarks/quality/rows.py` is calibrated, built for the CPU, proven, and draws the same prompts from the
same noise; the bundled judge compares its pictures with held-out real data and with the float model's. A row that is
already in benchmarks/results/quality_MODEL.json is not measured again, so a stopped run goes on where it was. Rows
whose method is not there, or fails, are recorded with the reason. `python -m benchmarks.quality.tables` writes the
tables and plots from the JSON.

Calibrations and rows are jobs of this process, or with `--ray ADDRESS` of a Ray cluster whose machines have this
checkout, --work-dir and --output-dir at the same paths; a job whose process is lost is done again. Each record says
on which processor it was measured.

With --model FOLDER a real pipeline is measured by published metrics instead, see `benchmarks/quality/real.py`.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from benchmarks import record
from benchmarks.quality import drawing
from benchmarks.quality.drawing import Subject
from benchmarks.quality.engines import refuse_missing_gpu, refuse_missing_modelopt, row_recipe
from benchmarks.quality.judging import LABELS
from benchmarks.quality.measure import judge_pictures, make_base, measured_sensitivity, row_jobs
from benchmarks.quality.results import FLOAT, MEASURED, UNAVAILABLE, Results, outcome, row_key
from benchmarks.quality.rows import MODELS, ON_REQUEST, TABLES, Row, rows_of
from benchmarks.record import Json
from export.errors import EnvironmentLacksError, RecipeError, UserError
from pipeline import machine
from pipeline.jobs.flags import add_flags, chosen
from pipeline.jobs.jobs import Job, Runner
from pipeline.jobs.once import Once
from pipeline.recipe import Recipe

logger = logging.getLogger("benchmarks.quality")
COUNTS = {"pixart_mini": 1000, "dit_mini": 2000, "pixart_scenes": 300}
QUICK_COUNT = 100
WORK, QUICK_RESULTS = Path("work/quality"), Path("work/quality/quick")
SENSITIVITY = "sensitivity"


def run_model(name: str, arguments: argparse.Namespace, runner: Runner) -> int:
    """All chosen rows of one model; returns how many failed."""
    results = Results(name, arguments.output_dir or (QUICK_RESULTS if arguments.quick else record.RESULTS))
    count = arguments.count or (QUICK_COUNT if arguments.quick else COUNTS[name])
    subject, work = drawing.make_subject(name, count, arguments.seed), arguments.work_dir / name
    results.refuse_others(subject.facts)
    if arguments.ray is None:  # else the machines of the cluster may have one
        refuse_missing_gpu(arguments.target)
    tables = wanted_tables(name, arguments)
    rows = rows_of(name, [table for table in tables if table != SENSITIVITY], arguments.rows or ["*"])
    pending = available(subject, rows, results, arguments)
    if arguments.list:
        return 0
    drawing.float_pictures(subject, work)  # once, before every process asks for them
    shared = Once(partial(make_base, name, count, arguments.seed, work))
    key = row_key(subject.facts, None, ())
    if not results.has(FLOAT, key):  # its bytes are those of the same linears in fp16
        weights = sum(ref.module.weight.numel() for ref in subject.model.linears())
        size = {"weight_bytes": 2 * weights, "weights": weights}
        measures = judge_pictures(shared(), shared().pictures) | size
        results.add(FLOAT, {"status": MEASURED, "key": key, **measures}, subject.facts)
    records: dict[str, Json] = {}
    for row, recipe in pending:
        stated: Json = {"recipe": row.recipe, "settings": list(row.settings), "multipliers": list(row.multipliers)}
        stated |= {"key": row_key(subject.facts, recipe, row.multipliers, row.algorithm)}
        if row.algorithm is not None:
            stated |= {"algorithm": dict(row.algorithm), "modelopt": machine.tool_version("modelopt")}
        records[row.name] = stated
    jobs = row_jobs(pending, shared, subject.model.sha256, work, arguments.target, arguments.redo)
    if SENSITIVITY in tables:
        jobs.append(Job(SENSITIVITY, partial(measured_sensitivity, shared)))
    position = failed = 0
    for ended in runner(jobs):
        if ended.name in records:
            position, measured = position + 1, records[ended.name] | outcome(ended)
            results.add(ended.name, measured, subject.facts)
            summary = (name, position, len(pending), ended.name, row_summary(measured), ended.seconds)
            logger.info("%s %d of %d, %s: %s; %.0f s", *summary)
        elif ended.name == SENSITIVITY and ended.passed:
            results.put(SENSITIVITY, ended.result, subject.facts)
        failed += not ended.passed and ended.name in (*records, SENSITIVITY)  # rows fail with their calibration
    print(results.path)
    return failed


def wanted_tables(name: str, arguments: argparse.Namespace) -> list[str]:
    """Those of --table; else by --rows alone any row can be chosen, and without both all but the slow ones."""
    if arguments.table or arguments.rows:
        return arguments.table or [*TABLES]
    usual = [table.name for table in TABLES.values() if name in table.models and table.name not in ON_REQUEST]
    return [*usual, SENSITIVITY]


def available(
    subject: Subject, rows: list[Row], results: Results, arguments: argparse.Namespace
) -> list[tuple[Row, Recipe]]:
    """The rows that are still to be measured. Those that cannot be are recorded so; --list says it of all."""
    pending = []
    for row in rows:
        try:
            recipe = row_recipe(row, [*arguments.set, f"cpu.path={arguments.cpu_path}"])
            key = row_key(subject.facts, recipe, row.multipliers, row.algorithm)
            done = results.has(row.name, key) and not arguments.redo
            if not done and not arguments.list:
                refuse_missing_modelopt(row)
        except (RecipeError, EnvironmentLacksError) as error:
            logger.warning("%s %s is not available: %s", subject.name, row.name, error)
            if not arguments.list:
                reason = {"status": UNAVAILABLE, "reason": str(error), "settings": list(row.settings)}
                results.add(row.name, reason, subject.facts)
            continue
        if arguments.list:
            print(f"{subject.name} {row.name}: {'measured' if done else 'to do'}")
        if not done:
            pending.append((row, recipe))
    return pending


def row_summary(row: Json) -> str:
    """One line about a record."""
    if row["status"] != MEASURED:
        return f"{row['status']}, {row['reason']}"
    distance, psnr = row["frechet_increase"]["value"], row["psnr_db"]["value"]
    drawn = f"{row['drawn_by']}, calibrated in {row['calibration_minutes']:.1f} min"
    return f"Frechet {distance:+.3f}, right {row['accuracy']['value']:.1%}, PSNR {psnr:.1f} dB, by {drawn}"


def make_parser() -> argparse.ArgumentParser:
    parser = record.parser("benchmarks.quality", __doc__, MODELS)
    tables = [*TABLES, SENSITIVITY]
    parser.add_argument(
        "--table",
        action="append",
        choices=tables,
        help=f"rows of this table (default: of all but {', '.join(ON_REQUEST)}, ablations of one model)",
    )
    parser.add_argument(
        "--rows", action="append", metavar="PATTERN", help="rows of such names, for example 'rtn-*-w4a6'"
    )
    parser.add_argument("--count", type=int, default=0, help=f"pictures of each row (default: {COUNTS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_COUNT} pictures, results in {QUICK_RESULTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all rows' recipes; needs "
                        "--output-dir, since the rows are then not those of the tables")  # fmt: skip
    parser.add_argument("--cpu-path", choices=["stock", "fused"], default="stock", help="how the engine computes that "
                        "draws; the gates hold for both")  # fmt: skip
    parser.add_argument("--target", choices=["cpu", "cuda"], default="cpu", help="whose engine draws (cuda: on a GPU)")
    parser.add_argument("--redo", action="store_true", help="measure the chosen rows again")
    parser.add_argument("--list", action="store_true", help="say which rows are measured, and measure nothing")
    parser.add_argument(
        "--work-dir", type=record.whole_path, default=str(WORK), help="checkpoints and float pictures are kept here"
    )
    parser.add_argument("--output-dir", type=record.whole_path, help=f"default: {record.RESULTS}")
    add_flags(parser)
    real = parser.add_argument_group("a real pipeline by published metrics (needs --rows and --count)")
    real.add_argument("--model", metavar="ID_OR_DIR", help="diffusers pipeline with text encoder and VAE")
    real.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt on each line; class names for DiT")
    real.add_argument("--metric", action="append", choices=["fid", "clip", "image_reward", "hpsv2"])
    real.add_argument("--real-pictures", type=record.whole_path, metavar="DIR", help="for fid")
    real.add_argument("--scorer-python", type=record.whole_path, metavar="FILE", help="for image_reward and hpsv2")
    real.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="draws and scores; auto: a GPU "
                      "where torch has one")  # fmt: skip
    return parser


def main() -> int:
    parser = make_parser()
    arguments = record.parsed(parser)
    if arguments.model and not (arguments.rows and arguments.metric):
        parser.error("--model needs --rows PATTERN and at least one --metric")
    if arguments.set and not arguments.output_dir:
        parser.error("--set changes what rows are; give an --output-dir of your own for their results")
    if not 0 <= arguments.count <= LABELS:
        parser.error(f"--count {arguments.count}: use 1 to {LABELS}")
    try:
        with chosen(arguments, "measuring quality") as runner:
            if arguments.model:
                from benchmarks.quality.real import run_real

                return min(run_real(arguments, runner), 1)
            return min(sum(run_model(name, arguments, runner) for name in arguments.names), 1)
    except UserError as error:
        logger.error("error: %s", error)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
