"""What all verbs share: flags, logging, answers on stdout, errors as exit codes.

stdout carries answers only (the last line of `build` is `PASSED <dir>` or `FAILED <reason>`; with --json every line is
one JSON object); logs and progress go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

from export.documents import plain
from export.errors import RecipeError, ResourceError, UserError
from pipeline.files import is_out_of_disk, is_out_of_memory
from pipeline.machine import PROGRAM
from pipeline.signals import Terminated, exit_code, heeded

if TYPE_CHECKING:
    from rich.table import Table as RichTable

logger = logging.getLogger(__name__)

INTERNAL_ERROR = 1
PACKAGE = Path(__file__).parent
# Exit code where whoever read the answers left, as shells count: 128 and the number of SIGPIPE.
READER_LEFT = 141
# What the file system refuses for a reason outside of this program: the number of the error, and the remedy.
PLACES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, choose another",
    errno.EISDIR: "it is a folder, choose another path",
    errno.EEXIST: "choose another path",
    errno.ENOTEMPTY: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle, choose another path",
    errno.EACCES: "choose a place that you may write to, or change its permissions",
    errno.EPERM: "choose a place that you may write to, or change its permissions",
    errno.EROFS: "this file system can only be read, choose another path",
    errno.ENXIO: "it is no plain file, choose another path",
    errno.ENODEV: "it is no plain file, choose another path",
    errno.ESPIPE: "it is no plain file, choose another path",
    errno.EINVAL: "the file system does not take it, choose another path",
    errno.EIO: "the disk or the network behind it fails, choose another path",
    errno.ESTALE: "the network file system lost it, run the command again",
    errno.ETXTBSY: "it is in use, choose another path",
    errno.EBUSY: "it is in use, choose another path",
    errno.EXDEV: "choose a path on one file system",
}
TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class AnswerError(OSError):
    """The answer could not be written: its reader left, or what stdout leads to is full."""


class Parser(argparse.ArgumentParser):
    """Argument parser that takes --snake_case for --kebab-case and names the nearest remedy on a usage error."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = [kebab(arg) for arg in (sys.argv[1:] if args is None else args)]
        if any("\0" in word for word in words):
            self.error("an argument has a character of number 0, which no path or text may have")
        return super().parse_args(words, namespace)

    def flags(self) -> list[argparse.Action]:
        """What it takes, but for --help."""
        return [action for action in self._actions if action.dest != "help"]

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
    """A parser of `ditc VERB`, or `python -m pipeline.VERB`, with the flags that every verb has."""
    verb_parser = Parser(prog=called(verb, sys.argv[0]), description=description, allow_abbrev=False)
    verb_parser.add_argument("--json", action="store_true", help="answer as JSON lines on stdout; logs stay on stderr")
    verb_parser.add_argument(
        "-v", "--verbose", action="store_true", help="log details, and a stack trace with every error"
    )
    verb_parser.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    return verb_parser


def called(verb: str, program: str) -> str:
    """The command that runs a verb, as the user has typed it. program: the path of what was started.

    >>> called("build", "/usr/bin/ditc"), called("build", "/usr/lib/pipeline/build.py")
    ('ditc build', 'python -m pipeline.build')
    """
    return f"{PROGRAM} {verb}" if Path(program).stem == PROGRAM else f"python -m pipeline.{verb}"


def add_model_flags(verb_parser: Parser, model: str) -> None:
    """-m and what says more about it, for the verbs that load a float model. model: the help of -m."""
    verb_parser.add_argument("-m", "--model", metavar="ID_OR_DIR", help=model)
    verb_parser.add_argument(
        "--variant", metavar="NAME", help="which of the model's weights files, for example fp16 or ema"
    )
    verb_parser.add_argument(
        "--config", metavar="FILE_OR_ID", help="config.json of a model whose weights have none beside them"
    )
    verb_parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="merge this adapter into the model, at the scale (default: 1); may be given several times",
    )


def add_threads(verb_parser: Parser) -> None:
    """The flag of verbs that run engines."""
    text = "threads of an engine's call (default: one for each core, within the CPU limit of the container)"
    verb_parser.add_argument("--threads", type=int, metavar="N", help=text)


class Answer:
    """Writes to the real stdout, even while stray prints of libraries are sent to stderr."""

    def __init__(self, stream: TextIO, as_json: bool) -> None:
        self.stream, self.as_json = stream, as_json
        if isinstance(stream, TextIOWrapper):  # a path need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")

    def line(self, text: str) -> None:
        """One line for people, whatever names from outside have in them; nothing with --json."""
        if not self.as_json:
            self._write(" ".join(text.splitlines()))

    def event(self, **fields: object) -> None:
        """One JSON line; nothing without --json."""
        if self.as_json:
            self._write(json.dumps(plain(fields), default=str, allow_nan=False))

    def document(self, document: object, *parts: Part) -> None:
        """The whole answer of a verb: `document` with --json, else the parts below each other: tables and paragraphs.

        On a terminal they fit its width; anywhere else a row is a line, without colours, whatever its length.
        """
        if self.as_json:
            self._write(json.dumps(plain(document), default=str, allow_nan=False))
        else:
            self._write(rendered(parts, terminal_width(self.stream)))

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text + "\n")
            self.stream.flush()
        except OSError as error:
            raise AnswerError(error.errno, error.strerror) from error

    def give_up(self) -> None:
        """Let what could not be written go nowhere, or the interpreter would complain about it at its end."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
        except OSError:  # a stream without a descriptor, which needs no care
            return
        os.close(nowhere)


Work = Callable[[argparse.Namespace, Answer], int]


def run(verb_parser: Parser, work: Work, argv: Sequence[str] | None = None, verdict: bool = False) -> int:
    """Parse, set up logging, do the work, and turn whatever is raised into an exit code and one sentence.

    verdict: a failure is also answered on stdout, as `FAILED <reason>`.
    """
    args = verb_parser.parse_args(argv)
    sys.stdout, sys.stderr = sys.stdout or open_nowhere(), sys.stderr or open_nowhere()  # closed by whoever started us
    set_up_logging(args.verbose, args.quiet)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the locale lacks is no reason to end without an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    answer = Answer(sys.stdout, args.json)
    with heeded():
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return work(args, answer)
        except (Exception, KeyboardInterrupt) as error:
            return failed(error, args, answer, verdict)


def open_nowhere() -> TextIO:
    """Takes whatever is written."""
    return open(os.devnull, "w", encoding="utf-8")


def failed(error: BaseException, args: argparse.Namespace, answer: Answer, verdict: bool) -> int:
    """Say in one sentence how the work ended; returns the exit code."""
    code, message = judge(error)
    logger.error("error: %s", message, exc_info=args.verbose or code == INTERNAL_ERROR)
    try:
        if verdict:
            answer.line(f"FAILED {message}")
        answer.event(event="result", passed=False, exit_code=code, reason=message)
    except AnswerError:  # nobody reads it; the log has the sentence
        answer.give_up()
    return code


def judge(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message of an exception; its notes (PEP 678) are part of the message."""
    code, reason = _judge(error, " ".join(str(error).split()))
    return code, "; ".join([reason, *getattr(error, "__notes__", ())])


def _judge(error: BaseException, text: str) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return exit_code(error), "terminated" if isinstance(error, Terminated) else "interrupted"
    if isinstance(error, UserError):
        return error.exit_code, text
    if is_out_of_memory(error):
        remedy = "close other programs, or ask for less at a time: fewer or smaller pictures, a smaller batch"
        return ResourceError.exit_code, f"memory ran out ({text or type(error).__name__}); {remedy}"
    if isinstance(error, AnswerError) and error.errno == errno.EPIPE:
        return READER_LEFT, "whoever read the answers left, before they were complete"
    if is_out_of_disk(error):
        return ResourceError.exit_code, f"the disk is full ({text}); free some space, or write to another place"
    if isinstance(error, AnswerError):
        return RecipeError.exit_code, f"stdout cannot be written ({error.strerror}); let it lead elsewhere"
    if isinstance(error, OSError):
        return _judge_system(error, text)
    return INTERNAL_ERROR, f"internal error, {type(error).__name__}: {text}"


def _judge_system(error: OSError, text: str) -> tuple[int, str]:
    """What the system refused: a resource, or a file that is not the program's own. Anything else is a bug."""
    if error.errno in TOO_MANY:
        return ResourceError.exit_code, f"the system has too little left ({text}); close other programs"
    name = error.filename2 or error.filename
    own = isinstance(name, str) and Path(name).absolute().is_relative_to(PACKAGE)
    if error.errno in PLACES and isinstance(name, str) and not own:
        return RecipeError.exit_code, f"{name} cannot be used ({error.strerror}); {PLACES[error.errno]}"
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


# --- tables for people ----------------------------------------------------------------------------------------------

# Wider than any row: where nobody reads the answer on a terminal, no row is broken.
UNBOUNDED = 1 << 20
GAP = 2
# What a column of sentences gets at least before names are broken for it.
SENTENCE_WIDTH = 12
NUMBER = re.compile(r"-|[\d,.]*\d( x)?")
# Where a word that is wider than its column may be broken: behind a mark, or before a bracket, never within a number.
BREAKS = re.compile(r"(?<=\w[-/_=])(?<!\d[eE]-)(?=.)|(?<=\w[.,])(?=\D)|(?<=\w)(?=\()")
# Colours on a terminal, of cells that say how it stands.
STATE_STYLES = {"ok": "green", "yes": "green", "MISSING": "bold red", "no": "yellow", "-": "dim"}


@dataclass(frozen=True)
class Table:
    """Columns aligned by spaces; numbers to the right.

    >>> print(rendered([Table(("name", "bytes"), [("a", 12), ("long", 3)])]))
    name  bytes
    ----  -----
    a        12
    long      3
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    @cached_property
    def columns(self) -> list[list[str]]:
        """The texts of each column, its header first."""
        rows = [[_text(cell) for cell in row] for row in self.rows]
        return [[title, *(row[i] for row in rows)] for i, title in enumerate(self.header)]

    def fits(self, width: int) -> bool:
        return _total(max(map(len, column)) for column in self.columns) <= width

    def without_repeats(self) -> tuple[str | None, Table]:
        """What all rows have in common, in words, None for nothing; and the columns in which they differ."""
        repeated = [i for i, column in enumerate(self.columns) if i and len(set(column[1:])) == 1]
        common = ", ".join(" = ".join(self.columns[i][:2]) for i in repeated)
        kept = [i for i in range(len(self.columns)) if i not in repeated]
        rest = Table([self.header[i] for i in kept], [[row[i] for i in kept] for row in self.rows])
        return f"In all rows: {common}." if common else None, rest


# Of an answer for people: a paragraph or a table.
Part = str | Table


def _text(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def rendered(parts: Iterable[Part], width: int | None = None) -> str:
    """Tables and paragraphs as text, an empty line between them.

    width: columns of the terminal that shows it, in colours if it has any (NO_COLOR, TERM); None: plain text, each row
    and paragraph on one line.
    """
    from rich.console import Console

    screen = Console(
        file=io.StringIO(),
        width=width or UNBOUNDED,
        force_terminal=bool(width),
        markup=False,
        emoji=False,
        highlight=False,
    )
    blocks = []
    for fitting in chain.from_iterable(_fitted(part, screen.width) for part in parts):
        with screen.capture() as capture:
            screen.print(_grid(fitting, screen.width) if isinstance(fitting, Table) else wrapped(fitting, screen.width))
        blocks.append("\n".join(line.rstrip() for line in capture.get().splitlines()))
    return "\n\n".join(blocks)


def _fitted(part: Part, width: int) -> list[Part]:
    """A table that is too wide is shown without the columns in which all rows agree, which are told above it; one with
    too many columns even then as a table for each row, with a line for each column."""
    if isinstance(part, str) or part.fits(width):
        return [part]
    common, table = part.without_repeats() if len(part.rows) > 1 else (None, part)
    above: list[Part] = [common] if common else []
    if len(table.header) < 3 or _total(_least(column, _pieces) for column in table.columns) <= width:
        return [*above, table]
    first, *titles = table.header
    rows = zip(*(cells for _, *cells in table.columns), strict=True)
    return [*above, *(Table((first, name), list(zip(titles, cells, strict=True))) for name, *cells in rows)]


def _grid(table: Table, width: int) -> RichTable:
    """The table as rich draws it."""
    from rich.rule import Rule
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    widths = _widths(table.columns, width)
    for (title, *cells), wide in zip(table.columns, widths, strict=True):
        right = bool(cells) and all(map(NUMBER.fullmatch, cells))
        justify: Literal["left", "right"] = "right" if right else "left"
        grid.add_column(wrapped(title, wide), width=wide, justify=justify, overflow="fold")
    grid.add_row(*[Rule(characters="-", style="dim")] * len(table.header))
    for row in zip(*(cells for _, *cells in table.columns), strict=True):
        texts = (wrapped(cell, wide) for cell, wide in zip(row, widths, strict=True))
        grid.add_row(*(Text(text, STATE_STYLES.get(text, "")) for text in texts))
    return grid


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` letters, broken between words, and within words that are longer between their pieces.

    >>> print(wrapped("adaln.emb.linear_1 takes 6.71-14.9", 13))
    adaln.emb.
    linear_1
    takes
    6.71-14.9
    """
    lines = [""]
    for word in text.split(" "):
        if len(word) > width:
            lines.append("")
            for piece in BREAKS.split(word):
                if len(lines[-1] + piece) > width:
                    lines.append("")
                lines[-1] += piece
        elif len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " * bool(lines[-1]) + word
        else:
            lines.append(word)
    return "\n".join(line for line in lines if line)


def _words(cell: str) -> list[str]:
    """What of a cell stays on one line unless it must be broken: a name or number; of a sentence, a few words."""
    return [cell if " " not in cell or NUMBER.fullmatch(cell) else cell[:SENTENCE_WIDTH]]


def _pieces(cell: str) -> list[str]:
    """What of a cell stays on one line even then: a number with its unit, the parts of a name."""
    return [cell] if NUMBER.fullmatch(cell) else [piece for word in cell.split() for piece in BREAKS.split(word)]


def _least(column: Sequence[str], parts: Callable[[str], list[str]]) -> int:
    """The width of a column in which the words of the header and `parts` of the cells stay whole."""
    title, *cells = column
    return max(map(len, [*title.split(), *(part for cell in cells for part in parts(cell))]), default=0)


def _total(widths: Iterable[int]) -> int:
    return sum(width + GAP for width in widths) - GAP


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """The width of each column: the widest give way until all fit, first sentences, then names, then all there is."""
    widths = [max(map(len, column)) for column in columns]
    bounds = [[_least(column, parts) for column in columns] for parts in (_words, _pieces)]
    for least in (*bounds, [1] * len(columns)):
        while _total(widths) > width and (wide := [i for i, bound in enumerate(least) if widths[i] > bound]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream leads to; None where it leads elsewhere."""
    return shutil.get_terminal_size().columns if stream.isatty() else None
