"""What all verbs share: flags, logging, answers on stdout, errors as exit codes.

stdout carries answers only (the last line of `build` is `PASSED <dir>` or `FAILED <reason>`; with --json every line is
one JSON object); logs and progress go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from export.errors import RecipeError, ResourceError, UserError
from pipeline.files import is_out_of_disk

logger = logging.getLogger(__name__)

INTERNAL_ERROR, INTERRUPTED = 1, 130
# Messages by which libraries report exhausted memory in an exception of their own kind.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "bad allocation", "out of memory", "failed to allocate memory")


class Parser(argparse.ArgumentParser):
    """Argument parser that takes --snake_case for --kebab-case and names the nearest remedy on a usage error."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args([kebab(arg) for arg in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(RecipeError.exit_code, f"{self.prog}: {message}; see {self.prog} --help\n")


def kebab(argument: str) -> str:
    """The flag with its underscores as dashes; values stay as they are.

    >>> kebab("--output_dir=my_dir"), kebab("weights.group_size=32")
    ('--output-dir=my_dir', 'weights.group_size=32')
    """
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def parser(verb: str, description: str) -> Parser:
    """A parser of `python -m pipeline.VERB` with the flags that every verb has."""
    made = Parser(prog=f"python -m pipeline.{verb}", description=description, allow_abbrev=False)
    made.add_argument("--json", action="store_true", help="answer as JSON lines on stdout; logs stay on stderr")
    made.add_argument("-v", "--verbose", action="store_true", help="log details, and a stack trace with every error")
    made.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    return made


def add_model_flags(made: Parser, model: str) -> None:
    """-m and what says more about it, for the verbs that load a float model. model: the help of -m."""
    made.add_argument("-m", "--model", metavar="ID_OR_DIR", help=model)
    made.add_argument("--variant", metavar="NAME", help="which of the model's weights files, for example fp16 or ema")
    made.add_argument(
        "--config", metavar="FILE_OR_ID", help="config.json of a model whose weights have none beside them"
    )


class Answer:
    """Writes to the real stdout, even while stray prints of libraries are sent to stderr."""

    def __init__(self, stream: TextIO, as_json: bool) -> None:
        self.stream, self.as_json = stream, as_json

    def line(self, text: str) -> None:
        """One line for people; nothing with --json."""
        if not self.as_json:
            self._write(text)

    def event(self, **fields: Any) -> None:
        """One JSON line; nothing without --json."""
        if self.as_json:
            self._write(json.dumps(fields, default=str))

    def document(self, document: Any, text: str) -> None:
        """The whole answer of a verb: `document` with --json, else `text`."""
        self._write(json.dumps(document, default=str) if self.as_json else text)

    def _write(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


Work = Callable[[Any, Answer], int]


def run(made: Parser, work: Work, argv: Sequence[str] | None = None, verdict: bool = False) -> int:
    """Parse, set up logging, do the work, and turn whatever is raised into an exit code and one sentence.

    verdict: a failure is also answered on stdout, as `FAILED <reason>`.
    """
    args = made.parse_args(argv)
    set_up_logging(args.verbose, args.quiet)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the locale lacks is no reason to end without an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    answer = Answer(sys.stdout, args.json)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return work(args, answer)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our answers left; Python would complain about it at exit
        return INTERNAL_ERROR
    except (Exception, KeyboardInterrupt) as error:
        code, message = judge(error)
        logger.error("error: %s", message, exc_info=args.verbose or code == INTERNAL_ERROR)
        if verdict:
            answer.line(f"FAILED {message}")
        answer.event(event="result", passed=False, exit_code=code, reason=message)
        return code


def judge(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message of an exception; its notes (PEP 678) are part of the message."""
    code, reason = _judge(error, " ".join(str(error).split()))
    return code, "; ".join([reason, *getattr(error, "__notes__", ())])


def _judge(error: BaseException, text: str) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, UserError):
        return error.exit_code, text
    if isinstance(error, MemoryError) or any(words in text.lower() for words in OUT_OF_MEMORY):
        remedy = "close other programs, or use a smaller --batch-size, --height and --width"
        return ResourceError.exit_code, f"memory ran out ({text or type(error).__name__}); {remedy}"
    if is_out_of_disk(error):
        return ResourceError.exit_code, f"the disk is full ({text}); free some space or choose another --output-dir"
    return INTERNAL_ERROR, f"internal error, {type(error).__name__}: {text}"


class _StderrHandler(logging.Handler):
    """Writes to the current stderr, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):
            self.handleError(record)


def set_up_logging(verbose: bool, quiet: bool) -> None:
    """Our own messages from INFO on, other libraries' from WARNING on; -v lowers and -q raises that by one step."""
    handler = _StderrHandler()
    long_form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(long_form if verbose else "%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for name in ("export", "pipeline", "plugins", "__main__"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
