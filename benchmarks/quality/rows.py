"""The rows of the quality tables, and the question that each table answers. A new method is a new row.

A row is a model, a recipe and settings as of `--set`. Several tables may show the same row: it is measured once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

# Model -> the recipe that its rows start from.
MODELS = {"pixart_mini": "pixart_w4a6", "dit_mini": "dit_w4a8", "pixart_scenes": "pixart_w4a6"}
SMALL = ("pixart_mini", "dit_mini")  # of pixels, quicker to draw with
WIDTHS = ("w4a8", "w4a6", "w4a4")
# Formats of equal bits: floating point as FP4DiT has them (arXiv 2503.15465), and symmetric integers.
FP = {"w4": "E2M1", "w6": "E2M3", "a8": "E3M4", "a6": "E2M3", "a4": "E2M1"}
INT = {"w4": "INT4", "w6": "INT6", "a8": "INT8", "a6": "INT6", "a4": "INT4"}
PLAIN, MIXED = "formats.weight_of={}", 'formats.weight_of={"ff.in" = "E3M0"}'
CHANNEL = ("weights.granularity=per_channel",)
# Attention of rows that do not name its formats, whatever their recipe has for it.
FLOAT_ATTENTION = ("attention.qk=float", "attention.pv=float")
# One of ModelOpt, as `mtq.quantize` takes it: its method, and options of that.
Algorithm = Mapping[str, str | int]
# Of the records of sensitivity: what is quantized of the linears, and their kind if it is none in particular.
PARTS = WEIGHTS, ACTIVATIONS, BOTH = "weights", "activations", "both"
ALL = "all"


@dataclass(frozen=True)
class Row:
    """One quantized model. `multipliers`: the only group multipliers that round to nearest may use, () for all.
    `algorithm`: of ModelOpt, with its options, which calibrates in the row's formats; None for methods of ours."""

    name: str
    model: str
    recipe: str
    settings: tuple[str, ...]
    multipliers: tuple[int, ...] = ()
    algorithm: Algorithm | None = None


@dataclass(frozen=True)
class Line:
    """A row in a table, once for each width in `widths` ("" in the name stands for a row of one width)."""

    label: str
    name: str
    settings: tuple[str, ...]
    formats: dict[str, str] | None = None
    widths: tuple[str, ...] = WIDTHS
    multipliers: tuple[int, ...] = ()
    weight_of: str = PLAIN
    algorithm: Algorithm | None = None

    def rows(self, model: str) -> list[Row]:
        """For one model, in order of `widths`."""
        formats = self.formats or FP
        chosen = () if any(key.startswith("method=") for key in self.settings) else ("method=rtn",)
        rows = []
        for width in self.widths:
            weight, activation = formats[width[:2]], formats[width[2:]]
            base = (f"formats.weight={weight}", f"formats.activation={activation}", self.weight_of, *FLOAT_ATTENTION)
            settings = (*base, *chosen, *self.settings)
            name = f"{self.name}-{width}"
            rows.append(Row(name, model, MODELS[model], settings, self.multipliers, self.algorithm))
        return rows


@dataclass(frozen=True)
class Table:
    """What is compared. models: those whose rows are measured unasked; an ablation asks one model, the quicker."""

    name: str
    question: str
    lines: tuple[Line, ...]
    models: tuple[str, ...] = SMALL


def exact(size: int) -> tuple[str, ...]:
    return ("weights.granularity=exact_group", f"weights.group_size={size}")


def real(size: int) -> tuple[str, ...]:
    return ("weights.granularity=group", f"weights.group_size={size}")


def method(name: str, granularity: tuple[str, ...] = CHANNEL, **options: str | int | bool) -> tuple[str, ...]:
    """Settings of a calibration method, its options, and the recipe's granularity."""
    chosen = (f"calibrate.options.{key}={str(value).lower()}" for key, value in options.items())
    return (f"method={name}", *chosen, *granularity)


def of_modelopt(label: str, name: str, scales: tuple[str, ...], algorithm: str, **options: int) -> Line:
    """A line of W4A6 that ModelOpt calibrates by one of its algorithms, as `mtq.quantize` takes it."""
    chosen: Algorithm = {"method": algorithm, **options}
    settings = method("modelopt", scales)
    return Line(f"{label}, ModelOpt's", f"modelopt-{name}", settings, None, ("w4a6",), algorithm=chosen)


METHODS = Table(
    "methods",
    "Which calibration method costs least?",
    (
        Line("round to nearest, FP", "rtn-fp-exact64", exact(64)),
        Line("round to nearest, FP with E3M0 before GELU", "rtn-mixed-exact64", exact(64), weight_of=MIXED),
        Line("round to nearest, INT", "rtn-int-channel", CHANNEL, INT),
        Line("FP4DiT", "fp4dit-mixed-group128", method("fp4dit", real(128)), weight_of=MIXED),
        Line("FP4DiT, exact groups of 64", "fp4dit-mixed-exact64", method("fp4dit", exact(64)), weight_of=MIXED),
        Line("FP4DiT without E3M0, exact groups of 64", "fp4dit-fp-exact64", method("fp4dit", exact(64))),
        Line("FP AdaRound, exact groups of 64", "fp_adaround-fp-exact64", method("fp_adaround", exact(64))),
        Line("Q-DiT, groups of 128", "qdit-int-group128", method("qdit", real(128)), INT, ("w6a8", *WIDTHS)),
        Line("MSFP", "msfp-fp", method("msfp")),
        Line("INT AdaRound", "adaround-int-channel", method("adaround"), INT),
        Line("BRECQ", "brecq-int-channel", method("brecq"), INT),
        Line("Q-Diffusion", "qdiffusion-int-channel", method("qdiffusion"), INT),
        Line("PTQ4DM", "ptq4dm-int-channel", method("ptq4dm"), INT),
        Line("RepQ-ViT", "repq_vit-int-channel", method("repq_vit"), INT),
        Line("TFMQ-DM", "tfmq_dm-int-channel", method("tfmq_dm"), INT),
        Line("PTQ4DiT", "ptq4dit-int-channel", method("ptq4dit"), INT),
        Line("G4W+P4A", "g4w_p4a-int-group128", method("g4w_p4a", real(128)), INT),
        Line("ViDiT-Q", "vidit_q-int-channel", method("vidit_q"), INT),
    ),
)
SEARCHED = '"32,64,128,256"'
ABLATED = ("dit_mini",)
# arXiv 2406.17343, its ablation: each line adds to the one before.
QDIT = Table(
    "qdit",
    "What does each part of Q-DiT bring?",
    (
        *(
            Line(label, name, method("qdit", scales, **options), INT, ("w6a8", "w4a8", "w4a6"))
            for label, name, scales, options in (
                ("round to nearest, static", "qdit-rtn", CHANNEL, {"rounding": "nearest", "activations": "per_tensor"}),
                ("+ groups of 128", "qdit-groups", real(128), {"rounding": "nearest", "activations": "per_tensor"}),
                ("+ dynamic activations per token and group", "qdit-dynamic", real(128), {"rounding": "nearest"}),
                ("+ GPTQ", "qdit-int-group128", real(128), {}),
                # The paper's 192 and 288 divide no width here; without 256 the budget of uniform 128 leaves no choice.
                ("+ searched group sizes", "qdit-searched", real(128), {"search": "proxy", "sizes": SEARCHED}),
            )
        ),
        *(
            Line(label, name, method("qdit", exact(64), activations="per_token", **options), FP, ("w4a8", "w4a6"))
            for label, name, options in (
                ("FP, exact groups of 64, per token, GPTQ", "qdit-fp-exact64", {}),
                ("+ searched exact groups", "qdit-fp-searched", {"search": "proxy", "sizes": '"16,32,64,128"'}),
            )
        ),
    ),
    ABLATED,
)
# arXiv 2505.21591, its ablation: each line adds to the one before.
MSFP = Table(
    "msfp",
    "What does each part of MSFP bring?",
    tuple(
        Line(label, name, method("msfp", **options), None, ("w4a6", "w4a4"))
        for label, name, options in (
            ("signed formats", "msfp-signed", {"mixed_sign": False, "use_lora": False}),
            ("+ mixed sign", "msfp-mixed", {"use_lora": False}),
            ("+ one low-rank branch", "msfp-lora", {"lora_count": 1, "use_dfa": False}),
            ("+ branches by timestep (TALoRA)", "msfp-talora", {"use_dfa": False}),
            ("+ DFA loss", "msfp-fp", {}),
        )
    ),
    ABLATED,
)
FAST = {line.name: replace(line, widths=("w4a6",)) for line in METHODS.lines}


def full(line: Line, label: str, name: str) -> Line:
    """A line with the full preset of its method."""
    return replace(line, label=label, name=name, settings=("preset=full", *line.settings))


FULL = Table(
    "full",
    "What does the full preset bring over the fast one?",
    (
        FAST["fp4dit-mixed-exact64"],
        full(FAST["fp4dit-mixed-exact64"], "FP4DiT, full", "fp4dit-full"),
        FAST["msfp-fp"],
        full(FAST["msfp-fp"], "MSFP, full", "msfp-full"),
    ),
    ABLATED,
)
FP_OR_INT = Table(
    "fp_or_int",
    "Floating point or integers, at the same bits and granularity?",
    tuple(
        Line(f"{label}, {scales}", f"rtn-{short}-{name}", settings, formats, weight_of=weight_of)
        for scales, name, settings in (
            ("per channel", "channel", CHANNEL),
            ("real groups of 128", "group128", real(128)),
        )
        for label, short, formats, weight_of in (
            ("INT", "int", INT, PLAIN),
            ("FP", "fp", FP, PLAIN),
            ("FP with E3M0 before GELU", "mixed", FP, MIXED),
        )
    ),
)
GROUPS = Table(
    "groups",
    "What do groups of weight scales bring, at equal bytes?",
    (
        Line("none", "rtn-fp-channel", CHANNEL, widths=("w4a6",)),
        *(
            Line(f"power of two, {size}", f"rtn-fp-power{size}", exact(size), None, ("w4a6",), (1, 2, 4, 8))
            for size in (128, 64, 32, 16)
        ),
        *(
            Line(f"exact multiplier, {size}", f"rtn-fp-exact{size}", exact(size), None, ("w4a6",))
            for size in (128, 64, 32, 16)
        ),
        *(Line(f"real scale, {size}", f"rtn-fp-group{size}", real(size), None, ("w4a6",)) for size in (128, 64, 32)),
    ),
)
LEARNED_GROUPS = Table(
    "learned_groups",
    "Are smaller exact groups worth their bytes under learned rounding?",
    tuple(
        Line(f"FP4DiT, groups of {size}", f"fp4dit-fp-exact{size}", method("fp4dit", exact(size)), None, ("w4a6",))
        for size in (64, 32, 16)
    ),
)
FULL_DEFAULT = Table(
    "full_default",
    "What does the full preset bring to the default recipe?",
    (
        replace(FAST["fp4dit-fp-exact64"], label="FP4DiT, fast"),
        full(FAST["fp4dit-fp-exact64"], "FP4DiT, full", "fp4dit-fp-full"),
    ),
    ("pixart_mini",),
)
ATTENTION = Table(
    "attention",
    "What does quantized attention cost beside quantized linears?",
    (
        Line("float", "rtn-fp-exact64", exact(64), None, ("w4a6",)),
        *(
            Line(
                f"{name}/{name}",
                f"rtn-fp-exact64-attention-{name.lower()}",
                (*exact(64), f"attention.qk={name}", f"attention.pv={name}"),
                None,
                ("w4a6",),
            )
            for name in ("INT8", "E2M3", "INT6")
        ),
    ),
    ("pixart_mini",),
)
EQUAL_FORMATS = Table(
    "equal_formats",
    "What do AWQ, SVDQuant and ModelOpt's algorithms bring, at equal formats?",
    (
        FAST["rtn-fp-exact64"],
        FAST["fp4dit-fp-exact64"],
        Line("GPTQ", "qdit-fp-exact64", method("qdit", exact(64), activations="per_token"), None, ("w4a6",)),
        Line("AWQ", "awq-fp-exact64", method("awq", exact(64)), None, ("w4a6",)),
        Line("SVDQuant, rank 16", "svdquant-fp-exact64", method("svdquant", exact(64), rank=16), None, ("w4a6",)),
        of_modelopt("round to nearest", "max-exact64", exact(64), "max"),
        of_modelopt("clipped by squared error", "mse-exact64", exact(64), "mse"),
        of_modelopt("GPTQ", "gptq-exact64", exact(64), "gptq"),
        of_modelopt("AWQ", "awq-exact64", exact(64), "awq_lite"),
        of_modelopt("SVDQuant, rank 16", "svdquant-exact64", exact(64), "svdquant", lowrank=16),
    ),
    (*ABLATED, "pixart_scenes"),
)
# A rank takes a number for each channel of input and output, which are 2 bytes of ours and 4 of ModelOpt's branches;
# groups of 16 instead of 64 take 3/32 of a byte for each weight. At these models' widths ranks of 2 and 1 take as much.
# The balances of AWQ and SVDQuant come on top, 4 bytes for each channel of an input, and are shown in the table.
EQUAL_BYTES = Table(
    "equal_bytes",
    "What do they bring, at equal bytes?",
    (
        Line("round to nearest", "rtn-fp-exact16", exact(16), None, ("w4a6",)),
        Line("FP4DiT", "fp4dit-fp-exact16", method("fp4dit", exact(16)), None, ("w4a6",)),
        Line("GPTQ", "qdit-fp-exact16", method("qdit", exact(16), activations="per_token"), None, ("w4a6",)),
        Line("AWQ", "awq-fp-exact16", method("awq", exact(16)), None, ("w4a6",)),
        Line("SVDQuant, rank 2", "svdquant-fp-rank2", method("svdquant", exact(64), rank=2), None, ("w4a6",)),
        of_modelopt("round to nearest", "max-exact16", exact(16), "max"),
        of_modelopt("clipped by squared error", "mse-exact16", exact(16), "mse"),
        of_modelopt("GPTQ", "gptq-exact16", exact(16), "gptq"),
        of_modelopt("AWQ", "awq-exact16", exact(16), "awq_lite"),
        of_modelopt("SVDQuant, rank 1", "svdquant-rank1", exact(64), "svdquant", lowrank=1),
    ),
    ABLATED,
)
TABLES = {
    table.name: table
    for table in (
        METHODS,
        EQUAL_FORMATS,
        EQUAL_BYTES,
        FP_OR_INT,
        QDIT,
        MSFP,
        GROUPS,
        LEARNED_GROUPS,
        FULL,
        FULL_DEFAULT,
        ATTENTION,
    )
}
ON_REQUEST = (FULL.name,)  # hours of calibration: measured when asked for by --table


def rows_of(model: str, tables: Iterable[str] = tuple(TABLES), patterns: Iterable[str] = ("*",)) -> list[Row]:
    """The rows of some tables for one model whose name fits one of the patterns, each once."""
    by_name: dict[str, Row] = {}
    for name in tables:
        for line in TABLES[name].lines:
            for row in line.rows(model):
                known = by_name.setdefault(row.name, row)
                if known != row:
                    raise ValueError(f"two rows are called {row.name} and differ: {known} and {row}")
    globs = list(patterns)
    return [row for row in by_name.values() if any(fnmatchcase(row.name, pattern) for pattern in globs)]


def nearest_rows() -> dict[str, str]:
    """Row -> the row that rounds to nearest in the same formats, granularity and group size, for all rows but those
    that have none, and those that round to nearest."""
    rows = rows_of(next(iter(MODELS)))  # names and settings are those of every model
    plain = [row for row in rows if "method=rtn" in row.settings]
    nearest = {_numbers(row): row.name for row in plain if not row.multipliers}
    return {row.name: nearest[_numbers(row)] for row in rows if row not in plain and _numbers(row) in nearest}


def _numbers(row: Row) -> tuple[str, ...]:
    """The settings that say what numbers a row's weights, activations and attention are, whatever chooses them."""
    return tuple(key for key in row.settings if key.startswith(("formats.", "weights.", "attention.")))
