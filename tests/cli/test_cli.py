"""Command line: flags, exit codes, answers on stdout, and verbs that work without the heavy packages."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, EnvironmentLacksError, ParityError, RecipeError, ResourceError
from pipeline import __main__ as cli
from pipeline import progress
from pipeline import recipe as recipes
from pipeline.backends.rtx import RtxOptions
from pipeline.build import make_parser, resolve
from pipeline.command import Answer, AnswerError, Parser, Table, judge, kebab, parser, rendered, run
from pipeline.compiler import BuildRequest, drop_other_targets
from pipeline.list import tables as list_tables
from pipeline.methods import METHODS

ROOT = Path(__file__).parents[2]
CAPTURE: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "tensorrt_rtx",
    "triton",
    "matplotlib",
    "onnxscript",
    "pydantic",
    "fastapi",
    "prometheus_client",
    "starlette",
    "uvicorn",
)


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in the project's folder."""
    return subprocess.run([sys.executable, "-c", code, *args], check=False, **CAPTURE)


BLOCKED = (
    f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); from pipeline.__main__ import main; sys.exit(main())"
)


@pytest.mark.process
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["list"], 0),
        (["list", "--json"], 0),
        (["doctor"], 3),
        *(([verb, "--help"], 0) for verb in cli.VERBS),
    ],
    ids=str,
)
def test_light_verbs_work_without_the_heavy_packages(args: list[str], code: int) -> None:
    done = python(BLOCKED, *args)
    assert done.returncode == code, done.stderr
    assert done.stdout and "Traceback" not in done.stderr
    if "--help" in args:
        assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.process
def test_build_without_torch_is_refused_before_work() -> None:
    done = python(BLOCKED, "build", "--engine", "pixart_w4a6", "--target", "cpu")
    assert done.returncode == 3
    assert done.stdout.startswith("FAILED building an engine needs torch, diffusers")
    assert "install with: pip install 'ditc[build]'" in done.stdout


@pytest.mark.process
def test_doctor_names_a_remedy_for_each_missing_thing() -> None:
    answer = json.loads(python(BLOCKED, "doctor", "--json").stdout)
    missing = [row for row in answer["checks"] if not row["ok"]]
    assert {"torch", "onnxruntime", "tensorrt_rtx"} <= {row["name"] for row in missing}
    assert all(row["remedy"] for row in missing) and not answer["ok"]


@pytest.mark.process
def test_no_heavy_import_before_work() -> None:
    verbs = "pipeline.build, pipeline.bundle.bundle, pipeline.inspect, pipeline.list, pipeline.doctor, pipeline.verify"
    verbs += ", pipeline.serve.__main__, ditc"
    code = f"import sys, {verbs}; sys.exit(', '.join(name for name in {HEAVY!r} if name in sys.modules) or None)"
    done = python(code)
    assert done.returncode == 0, f"imported: {done.stderr}"


@pytest.mark.process
def test_list_shows_every_method_with_its_options() -> None:
    methods = {row["name"]: row for row in json.loads(python(BLOCKED, "list", "--json").stdout)["methods"]}
    assert methods.keys() == METHODS.keys() and methods["rtn"]["data"] == "none"
    assert methods["msfp"]["options"].keys() == METHODS["msfp"].options.keys()
    shown = python(BLOCKED, "list").stdout
    assert all(f"\n{name} " in shown for name in METHODS) and "lora_rank" in shown


@pytest.mark.process
def test_list_says_what_each_width_buys() -> None:
    answer = json.loads(python(BLOCKED, "list", "--json").stdout)
    rows = {row["name"]: row for row in answer["recipes"]}
    assert "no speed over 8-bit" in rows["pixart_w4a6"]["worth"]
    assert {row["target"]: row["available"] for row in answer["targets"]}["trt"] is False


def test_unknown_verb() -> None:
    assert cli.main(["bild"]) == 2


def test_package_runs_as_ditc(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


def test_version_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    place = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    assert first == f"ditc {metadata.version('ditc')} ({place})"
    assert f"onnxruntime {metadata.version('onnxruntime')}" in second and "; without " in second


@pytest.mark.process
def test_version_needs_none_of_the_packages_that_it_looks_for() -> None:
    done = python(BLOCKED, "--version")
    assert done.returncode == 0 and done.stdout.startswith("ditc "), done.stderr


@pytest.mark.process
@pytest.mark.parametrize("name", ["python -m pipeline.build", "ditc build"])
def test_help_says_the_command_that_was_typed(name: str, tmp_path: Path) -> None:
    script = tmp_path / "ditc"
    script.write_text("from pipeline.__main__ import command; command()\n")
    words = [str(script), "build"] if name.startswith("ditc") else name.split()[1:]
    done = subprocess.run([sys.executable, *words, "--help"], check=False, **CAPTURE)
    assert done.stdout.startswith(f"usage: {name} ["), done.stdout + done.stderr


# --- tables for people ----------------------------------------------------------------------------------------------

LONG = "a remedy of many words that says at length what is to be done, and why, and by whom"
ROWS = [("ok", "a name", "12"), ("MISSING", "another.name.with.dots", LONG)]


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_table_is_a_line_for_each_row_where_nobody_looks() -> None:
    lines = rendered([Table(("", "what", "remedy"), ROWS)]).splitlines()
    assert len(lines) == 4 and lines[3].endswith(LONG) and "\x1b" not in "".join(lines)


def test_a_table_fits_the_terminal_and_loses_no_letter() -> None:
    for width in (40, 60, 80):
        text = rendered([Table(("", "what", "remedy"), ROWS), LONG], width)
        assert max(map(len, plain(text).splitlines())) <= width
        letters = "".join(sorted("".join(plain(text).split()).replace("-", "")))
        expected = "".join(
            sorted("".join(["what", "remedy", LONG, *(cell for row in ROWS for cell in row)]).replace(" ", ""))
        )
        assert letters == expected


def test_what_all_rows_agree_in_is_told_above_a_table_that_is_too_wide() -> None:
    rows = [(f"transformer_blocks.{i}.attn1.to_q", "E2M1 x E2M3", "exact_group(64)", 1000 + i) for i in range(3)]
    table = Table(("layer", "formats", "scales", "bytes"), rows)
    assert plain(rendered([table], 70)).splitlines()[2].endswith("E2M1 x E2M3  exact_group(64)  1,000")
    assert plain(rendered([table], 62)).splitlines() == [
        "In all rows: formats = E2M1 x E2M3, scales = exact_group(64).",
        "",
        "layer                            bytes",
        "-------------------------------  -----",
        *(f"transformer_blocks.{i}.attn1.to_q  {1000 + i:,}" for i in range(3)),
    ]


def test_a_table_of_too_many_columns_is_a_table_for_each_row() -> None:
    header, rows = (
        ("", "call, ms", "p10-p90", "cpu faster by"),
        [("cpu", "10.6", "6.71-14.9", "-"), ("torch", "113", "92.3-133", "10.67 x")],
    )
    assert plain(rendered([Table(header, rows)], 36)).splitlines()[-2:] == [
        "cpu        10.6  6.71-14.9         -",
        "torch       113  92.3-133    10.67 x",
    ]
    assert [line.rstrip() for line in plain(rendered([Table(header, rows)], 25)).splitlines()[6:]] == [
        "               torch",
        "-------------  --------",
        "call, ms       113",
        "p10-p90        92.3-133",
        "cpu faster by  10.67 x",
    ]


@pytest.mark.parametrize("width", [24, 40, 60, 80])
def test_no_number_of_a_verb_is_broken(width: int) -> None:
    layers = [
        (
            "transformer_blocks.10.attn1.to_out.0",
            "1152 x 4608",
            "exact_group(64)",
            2_654_208,
            "per_tensor 0.4571 from -0.2",
        )
    ]
    bench = ("onnxruntime_int8", "16.3", "10.4-22.5", "3,035", "19.4", "1,292", "10.67 x", "1.54 x")
    parts = [
        *list_tables([recipes.load(name) for name in recipes.recipe_names()]),
        Table(("layer", "N x K", "scales", "bytes", "input"), layers * 2),
        Table(
            ("", "call, ms", "p10-p90", "picture, ms", "weights, MB", "peak memory, MB", "cpu faster by", "rtx"),
            [bench] * 2,
        ),
    ]
    text = plain(rendered(parts, width))
    assert max(map(len, text.splitlines())) <= width
    number = re.compile(r"\d(?:[\d.,]*\d)?")
    assert set(number.findall(text)) == set(number.findall(rendered(parts)))


def test_colours_are_for_terminals_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in rendered([Table(("", "what"), [("ok", "a")])], 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in rendered([Table(("", "what"), [("ok", "a")])], 80)


@pytest.mark.process
@pytest.mark.parametrize("verb", ["list", "doctor"])
def test_answers_fit_a_terminal_of_80_columns(verb: str) -> None:
    """Of a pseudo-terminal; doctor may find something missing."""
    shown = in_terminal(verb, columns=80)
    assert max(map(len, shown)) <= 80 and len(shown) > 10


def in_terminal(verb: str, columns: int) -> list[str]:
    """The lines that a verb writes on a terminal, without colours."""
    reader, writer = os.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"pipeline.{verb}"], cwd=ROOT, stdout=writer, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(writer)
    data = b""
    with contextlib.suppress(OSError):  # what Linux says when the other end is closed
        while block := os.read(reader, 1 << 16):
            data += block
    os.close(reader)
    assert process.wait(timeout=120) in (0, 3)
    return plain(data.decode()).splitlines()


def test_kebab_leaves_values_alone() -> None:
    assert kebab("--calib_size") == "--calib-size"
    assert kebab("--set=weights.group_size=32") == "--set=weights.group_size=32"


FLAGS = [
    "--engine",
    "r.toml",
    "--n_steps",
    "5",
    "--seed",
    "3",
    "--batch-size=2",
    "--target-sm",
    "86,89",
    "--calib_size=9",
]


def test_flags_reach_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text('name = "mine"\nmodel = "zoo:pixart_mini"\n')
    (tmp_path / "model").mkdir()
    extra = [
        "--set",
        "weights.group_size=32",
        "--set",
        "rtx.weights=int4",
        "-m",
        "model",
        "--height",
        "64",
        "--width",
        "32",
    ]
    recipe = resolve(make_parser().parse_args(FLAGS + extra))
    sampling = recipe.sampling
    assert (sampling.n_steps, sampling.seed, sampling.batch_size, sampling.height, sampling.width) == (5, 3, 2, 64, 32)
    rtx = recipe.options(RtxOptions)
    assert (recipe.weights.group_size, rtx.weights, rtx.sm) == (32, "int4", (86, 89))
    assert (recipe.calibrate.size, recipe.calibrate.seed) == (9, 3) and recipe.model == str(tmp_path / "model")
    (tmp_path / "again.toml").write_text(recipes.to_toml(recipe))
    assert recipes.load("again.toml") == recipe


ERRORS: list[tuple[BaseException, int, str]] = [
    (RecipeError("bad\nkey"), 2, "bad key"),
    (ContractError("damaged"), 2, "damaged"),
    (EnvironmentLacksError("no torch"), 3, "no torch"),
    (ParityError("gate"), 4, "gate"),
    (ResourceError("disk"), 5, "disk"),
    (MemoryError(), 5, "memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "memory ran out"),
    (OSError(errno.ENOSPC, "No space left on device"), 5, "the disk is full"),
    (RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'), 5, "the disk is full"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "memory ran out"),
    (RuntimeError("can't start new thread"), 5, "memory ran out"),
    (OSError(errno.EMFILE, "Too many open files", "/x"), 5, "the system has too little left"),
    (
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        2,
        "/x cannot be used (Permission denied); choose a place",
    ),
    (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x cannot be used (Read-only file system)"),
    (FileNotFoundError(errno.ENOENT, "No such file", str(ROOT / "pipeline/gone.css")), 1, "internal error"),
    (FileNotFoundError(errno.ENOENT, "No such file"), 1, "internal error"),
    (AnswerError(errno.EPIPE, "Broken pipe"), 141, "whoever read the answers left"),
    (AnswerError(errno.EBADF, "Bad file descriptor"), 2, "stdout cannot be written"),
    (ZeroDivisionError("a bug"), 1, "internal error, ZeroDivisionError: a bug"),
]


@pytest.mark.parametrize(("error", "code", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_exit_codes(error: BaseException, code: int, text: str) -> None:
    found_code, message = judge(error)
    assert found_code == code and text in message and "\n" not in message


def raiser(error: BaseException) -> Any:
    def work(args: Any, answer: Any) -> int:
        raise error

    return work


def verb_parser() -> Parser:
    return parser("test", "A verb.")


def test_user_errors_have_no_stack_trace_unless_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb_parser(), raiser(RecipeError("no such key")), [], verdict=True) == 2
    plain = capsys.readouterr()
    assert plain.out == "FAILED no such key\n" and "Traceback" not in plain.err and "no such key" in plain.err
    run(verb_parser(), raiser(RecipeError("no such key")), ["-v"])
    assert "Traceback" in capsys.readouterr().err


def test_bugs_show_their_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb_parser(), raiser(ZeroDivisionError("a bug")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_answers_are_json_lines_even_when_libraries_print(capsys: pytest.CaptureFixture[str]) -> None:
    def work(args: Any, answer: Any) -> int:
        print("noise")  # noqa: T201 - what an exporter does
        answer.event(event="stage", name="a")
        answer.line("for people")
        return 0

    assert run(verb_parser(), work, ["--json"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == [{"event": "stage", "name": "a"}]
    assert "noise" in shown.err
    run(verb_parser(), raiser(RecipeError("no such key")), ["--json"], verdict=True)
    last = json.loads(capsys.readouterr().out)
    assert last == {"event": "result", "passed": False, "exit_code": 2, "reason": "no such key"}


@pytest.mark.parametrize(
    "args", [[], ["--engine"], ["--engine", "x", "--nonsense"], ["--engine", "x", "--target-sm", "new"]]
)
def test_usage_errors_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(args)
    assert stop.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["engines/pixart_w4a6.v2", ".", "engines/../e"])
def test_work_and_rejected_folders_stand_beside_the_output(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = BuildRequest(recipes.Recipe(name="a", model="b"), ("cpu",), Path(output))
    resolved = Path(output).resolve()
    assert request.work_path == resolved.parent / f"{resolved.name}.partial"
    assert request.rejected_path == resolved.parent / "rejected" / resolved.name


def test_engines_of_targets_not_asked_for_are_dropped(tmp_path: Path) -> None:
    for name in ("cpu", "rtx", "report"):
        (tmp_path / name).mkdir()
    drop_other_targets(tmp_path, ("cpu",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu", "report"]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--target", "trt"], 3, "target trt needs tensorrt; install with: pip install tensorrt"),
        (["--target", "gpu"], 2, "target 'gpu' is unknown"),
        (["--target", "cpu", "--target-sm", "89"], 2, "--target-sm belongs to the target rtx"),
    ],
)
def test_targets_are_refused_before_work(
    args: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "--engine", "pixart_w4a6", *args]) == code
    assert text in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("list | true; exit ${PIPESTATUS[0]}", (0, 141), ""),
        ("list > /dev/full", (5,), "the disk is full"),
        ("list >&-", (0,), ""),
        ("list 2>&-", (0,), ""),
        ("inspect nowhere --json > /dev/full", (2,), "is not a folder"),
        ("inspect nowhere >&- 2>&-", (2,), ""),
    ],
)
def test_answers_that_nobody_can_read_are_no_internal_error(command: str, code: tuple[int, ...], words: str) -> None:
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m pipeline.{command}"], check=False, **CAPTURE)
    assert done.returncode in code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and words in done.stderr


@pytest.mark.process
def test_a_reader_that_left_is_told_by_the_exit_code() -> None:
    code = (
        "import os; from pipeline.list import main; from pipeline.signals import leave\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); leave(lambda: main([]))"
    )
    done = python(code)
    assert done.returncode == 141 and done.stderr.count("\n") == 1
    assert "whoever read the answers left" in done.stderr


def test_progress_lines_tell_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline.progress")
    assert list(progress.track("abc", 5, "calibrate", first=2, every_s=0.0)) == ["a", "b", "c"]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [f"calibrate: {done} of 5" for done in (3, 4, 5)]
    assert lines[-1].endswith("ETA 0 s")


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text"), [(1, 4, 10, "30 s"), (0, 2, 5, "10 s"), (1, 61, 10, "10 min")]
)
def test_eta_goes_by_the_mean_pace(done: int, total: int, elapsed_s: float, text: str) -> None:
    assert progress.eta_text(done, total, elapsed_s) == text


def test_heartbeat_shows_life_and_ends(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "pipeline.progress")
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.01)
    with progress.heartbeat("verify"):
        while not caplog.records:
            time.sleep(0.01)
    count = len(caplog.records)
    time.sleep(0.05)
    assert "verify: still at work after" in caplog.text and len(caplog.records) == count


def test_answers_are_json_whatever_the_numbers_are() -> None:
    """RFC 8259 has neither Infinity nor NaN, and readers of other languages refuse them."""
    stream = io.StringIO()
    answer = Answer(stream, as_json=True)
    answer.event(event="gate", value=math.inf, limit=-math.inf, of=Path("a"))
    answer.document({"rows": [{"value": math.nan}, np.float32(1.5)]})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    event, document = (json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines())
    assert event == {"event": "gate", "value": "inf", "limit": "-inf", "of": "a"}
    assert document == {"rows": [{"value": None}, 1.5]}
