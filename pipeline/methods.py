"""The calibration methods: one row each, with what it observes and the options it understands.

Light on purpose: recipes are checked against this table without loading torch or any method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from export.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.calibrate.method import Method

PRESETS = ("fast", "full")
Scalar = int | float | str | bool


@dataclass(frozen=True)
class Option:
    """One option of a method: its value in each preset, and what it means. `full` is `fast` unless given.

    decides: whether the layers depend on it; a run may be resumed with another value of an option that decides nothing.
    """

    fast: Scalar
    full: Scalar | None = None
    help: str = ""
    decides: bool = True

    def __post_init__(self) -> None:
        if self.full is not None and type(self.full) is not type(self.fast):
            raise ValueError(f"fast={self.fast!r} and full={self.full!r} must have one type")

    def value(self, preset: str) -> Scalar:
        return self.full if preset == "full" and self.full is not None else self.fast

    def read(self, value: object) -> Scalar:
        """`value` as this option's type. Raises ValueError in words; an integer may stand for a number."""
        kind = type(self.fast)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"expected {kind.__name__}, found {value!r}")
        return value


# A method's options, resolved -> the values of `QuantizedLinear.activation_scaling` that its layers may have besides
# "per_token", which every target runs.
Scalings = Callable[[Mapping[str, Scalar]], tuple[str, ...]]


def per_token(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    return ()


def per_tensor(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    return ("per_tensor",)


def as_asked(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    """What the option "activations" says."""
    asked = str(options["activations"])
    return () if asked == "per_token" else (asked,)


def msfp_scalings(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Layers that try a zero point get a constant scale where that is better, whatever the others have."""
    return per_tensor(options) if options["mixed_sign"] else as_asked(options)


def listed(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    """All that the option "activations" names."""
    return tuple(name for name in str(options["activations"]).split(", ") if name != "per_token")


@dataclass(frozen=True)
class MethodRow:
    """`target` is "module:Class", a subclass of pipeline.calibrate.method.Method.

    observes: "weights" (no data: every layer is a unit by itself) or "blocks" (calibration data runs through the
    float model and the quantized one, block by block). activations: how its layers scale their inputs; targets refuse
    by it, before any work, what they cannot run, so a method that gives its layers another scaling must say so here.
    steps: does it look at the steps of a sampler? Then it is for denoisers alone. taken_over: are its layers another
    program's? Then formats and scales of a recipe say what they are, and do not decide it.
    """

    name: str
    target: str
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    observes: Literal["weights", "blocks"] = "blocks"
    activations: Scalings = per_token
    steps: bool = False
    taken_over: bool = False

    def resolve(self, preset: str, chosen: Mapping[str, object]) -> dict[str, Scalar]:
        """Every option's value. Raises RecipeError for an option that the method does not have, or a wrong type."""
        unknown = sorted(set(chosen) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise RecipeError(f"calibrate.options: {self.name} has no option {unknown[0]!r}; it has {known}")
        values = {name: option.value(preset) for name, option in self.options.items()}
        for name, value in chosen.items():
            try:
                values[name] = self.options[name].read(value)
            except ValueError as error:
                raise RecipeError(f"calibrate.options.{name} of {self.name}: {error}") from error
        return values

    def deciding(self, chosen: Mapping[str, object]) -> dict[str, object]:
        """The given options that the layers depend on."""
        return {name: value for name, value in chosen.items() if self.options[name].decides}

    def load(self) -> type[Method]:
        """The method's class."""
        module, _, name = self.target.partition(":")
        method: type[Method] = getattr(import_module(module), name)
        return method


# Options of the methods that papers compare with.
_SEEN = {
    "granularity": Option("per_channel", help='weight scales: "per_channel" as published, or "recipe"'),
    "rows": Option(128, 256, help="tokens of each calibration call that ranges are settled on"),
}
_RANGES = {
    "asymmetric": Option(True, help="integer activations get a zero"),
    "search": Option("mse", help="range of activations: minmax, percentile or mse"),
}
_STATIC = _SEEN | _RANGES
_SEARCHED = {
    "granularity": Option("recipe", help='weight scales: "recipe" (groups as published), or "per_channel"'),
    "rows": _SEEN["rows"],
}
_SKEWED = {
    "mean": Option(0.4, help="of the timesteps' normal distribution, in trajectories from the clean end"),
    "deviation": Option(0.4, help="its standard deviation"),
}

_GPTQ = {
    "range": Option("absmax", help='of weight scales: "absmax" as published, "mse", or "recipe"'),
    "damping": Option(0.01, help="added to the Hessian's diagonal, as a share of its mean"),
    "act_order": Option(False, help="channels with large inputs first; groups keep the float weight's scales"),
}
_GROUP_SEARCH = {
    "search": Option("none", help='"proxy": search group sizes by the denoiser\'s error on calibration calls'),
    "candidates": Option("own", help='layers the search tries: "own", or "nearest" (rounded to nearest, as published)'),
    "genes": Option("kind", help='what gets a group size: "kind" (layers of a kind in a block) or "layer"'),
    "sizes": Option("", help='group sizes to choose from, such as "32,64,128"; default: those of the paper'),
    "budget_bytes": Option(0, help="of weights, scales and multipliers; 0: what the recipe's group size takes"),
    "generations": Option(5, 10, help="of the search"),
    "population": Option(24, 50, help="candidates in each generation"),
    "mutation": Option(0.1, help="share of genes that a mutation draws anew"),
    "samples": Option(64, 128, help="model inputs that a candidate is scored on"),
    "workers": Option(1, help="processes of the search", decides=False),
    "group_sizes": Option("", help='one for each layer, such as "32,64*3,128", instead of a search'),
}

_MSFP = {
    "activations": Option("per_tensor", help="per_tensor (static) or per_token (dynamic, signed)"),
    "granularity": Option("per_channel", help='of weights: "per_channel" as published, or "recipe"'),
    "search_weight_format": Option(True, help="search the weight's format, not only its clips"),
    "mixed_sign": Option(True, help="try unsigned formats with a zero point behind SiLU and GELU"),
    "kinds": Option("ff.out, adaln", help="of the layers that try them, or all"),
    "embedded": Option(True, help="only activation formats that run as one INT8 GEMM"),
    "rows": Option(32, 64, help="tokens of each calibration call that ranges are searched on"),
    "use_lora": Option(True, help="tune timestep-routed low-rank branches (TALoRA)"),
    "use_dfa": Option(True, help="weigh the loss by the prediction's weight in the sampler (DFA)"),
    "lora_count": Option(2, help="branches of each layer"),
    "lora_rank": Option(8, help="rank of a branch"),
    "lora_init": Option("zero", help='"zero", or "svd" of the weight\'s quantization error'),
    "iterations": Option(200, 2000, help="of tuning"),
    "lr": Option(2e-3, help="learning rate of the branches"),
    "router_lr": Option(1e-3, help="learning rate of the router"),
    "batch": Option(16, help="samples of one iteration"),
}

# Learned rounding. The full presets are the authors'; the fast ones were chosen by trials on the first block of
# pixart_mini alone, and benchmarks/quality/adaround_study.py compares them with the full ones.
_LEARNED = {
    "strength": Option(0.01, help="weight of the regulariser that draws the rounding to 0 or 1"),
    "batch": Option(8, 16, help="samples of one iteration"),
}
_FOUND_SIZES = {"group_sizes": Option("", help='one for each layer, such as "32,64*3,128", as a search of qdit finds')}
_PLAIN_ROUNDING = {
    "iterations": Option(400, 20000, help="for each block"),
    "lr": Option(1e-2, 1e-3, help="learning rate of the rounding variables"),
}

_ROWS = (
    MethodRow(
        "rtn",
        "pipeline.calibrate.methods.rtn:RoundToNearest",
        "round to nearest: scales from the weights alone, no data",
        observes="weights",
    ),
    MethodRow(
        "fp4dit",
        "pipeline.calibrate.methods.fp4dit:ScaleAwareRounding",
        "FP4DiT: scale-aware AdaRound, block by block",
        {
            "iterations": Option(400, 2500, help="for each block"),
            "lr": Option(4e-4, 1e-4, help="learning rate of V', in units of the weight"),
        }
        | _LEARNED
        | _FOUND_SIZES,
    ),
    MethodRow(
        "fp_adaround",
        "pipeline.calibrate.methods.fp4dit:BlockRounding",
        "AdaRound on the float grid without scale awareness, block by block",
        _PLAIN_ROUNDING | _LEARNED | _FOUND_SIZES,
    ),
    MethodRow(
        "adaround",
        "pipeline.calibrate.methods.fp4dit:LayerRounding",
        "AdaRound, each layer by itself; for INT formats as published",
        {
            "iterations": Option(1000, 20000, help="for each layer"),
            "lr": Option(1e-2, 1e-3, help="learning rate of the rounding variables"),
            "strength": _LEARNED["strength"],
        },
    ),
    MethodRow(
        "brecq",
        "pipeline.calibrate.methods.fp4dit:BlockRounding",
        "BRECQ: AdaRound block by block; for INT formats as published",
        _PLAIN_ROUNDING | _LEARNED,
    ),
    MethodRow(
        "qdiffusion",
        "pipeline.calibrate.methods.qdiffusion:QDiffusion",
        "Q-Diffusion: BRECQ weights per channel, static activations with learned steps",
        _STATIC
        | _PLAIN_ROUNDING
        | _LEARNED
        | {
            "step_iterations": Option(200, 5000, help="of learning activation scales for each block, 0 for none"),
            "step_lr": Option(5e-3, 4e-4, help="learning rate of a factor on each activation scale"),
        },
        activations=per_tensor,
    ),
    MethodRow(
        "qdit",
        "pipeline.calibrate.methods.qdit:QDit",
        "Q-DiT: GPTQ on groups, activations scaled per token and group, searched group sizes",
        {
            "activations": Option("token_group", help="token_group, per_token or per_tensor (static)"),
            "rounding": Option("gptq", help="of weights: gptq or nearest"),
            "rows": Option(512, 2048, help="tokens of each calibration call that the Hessians are made of"),
        }
        | _GPTQ
        | _GROUP_SEARCH,
        activations=as_asked,
    ),
    MethodRow(
        "g4w_p4a",
        "pipeline.calibrate.methods.g4w_p4a:G4wP4a",
        "GPTQ weights in groups of 128, static activations as in ptq4dm",
        {
            "granularity": Option("group", help='weight scales: "group" (real ones per 128), or "recipe"'),
            "rows": Option(512, 2048, help="tokens of each calibration call that weights and ranges are settled on"),
        }
        | _RANGES
        | _SKEWED
        | _GPTQ,
        activations=per_tensor,
        steps=True,
    ),
    MethodRow(
        "ptq4dm",
        "pipeline.calibrate.methods.ptq4dm:Ptq4dm",
        "static activation ranges from timesteps drawn towards the clean end",
        _STATIC | _SKEWED,
        activations=per_tensor,
        steps=True,
    ),
    MethodRow(
        "repq_vit",
        "pipeline.calibrate.methods.repq_vit:RepqVit",
        "percentile ranges; per-channel activations behind norms folded to per-tensor",
        {
            "rows": _SEEN["rows"],
            "asymmetric": _STATIC["asymmetric"],
            "search": Option("percentile", help="range of activations that are not behind a norm"),
            "kinds": Option("attn.qkv, ff.in", help="kinds of the layers behind a norm"),
        },
        activations=per_tensor,
    ),
    MethodRow(
        "tfmq_dm",
        "pipeline.calibrate.methods.tfmq_dm:TfmqDm",
        "AdaRound by block, layers that see the timestep only apart; static activations",
        _STATIC | _PLAIN_ROUNDING | _LEARNED,
        activations=per_tensor,
        steps=True,
    ),
    MethodRow(
        "ptq4dit",
        "pipeline.calibrate.methods.ptq4dit:Ptq4dit",
        "salient channels of activations and weights balanced; static activations",
        _STATIC
        | _PLAIN_ROUNDING
        | _LEARNED
        | {"kinds": Option("attn.qkv, attn.out, cross.q, cross.kv, cross.out, ff.in", help="kinds to balance")},
        activations=per_tensor,
    ),
    MethodRow(
        "vidit_q",
        "pipeline.calibrate.methods.vidit_q:ViditQ",
        "SmoothQuant's channel balance before activations scaled per token",
        _SEEN
        | {
            "alpha": Option(0.3, help="share of the activations' reach that the weight takes over"),
            "momentum": Option(0.95, help="of the activations' mean reach over calibration calls"),
            "kinds": Option("all", help="kinds to balance"),
        },
    ),
    MethodRow(
        "awq",
        "pipeline.calibrate.methods.awq:Awq",
        "AWQ: a balance of channels by their mean magnitude, its exponent searched; rounded to nearest",
        _SEARCHED | {"steps": Option(10, 20, help="exponents that the search tries")},
    ),
    MethodRow(
        "svdquant",
        "pipeline.calibrate.methods.svdquant:SvdQuant",
        "SVDQuant: the largest singular values in a float16 branch, behind a searched balance; the rest to nearest",
        _SEARCHED
        | {
            "rank": Option(16, 32, help="of the branch; the authors' is 32, for widths of thousands"),
            "steps": Option(5, 10, help="balances that the search tries"),
        },
    ),
    MethodRow(
        "msfp",
        "pipeline.calibrate.methods.msfp:Msfp",
        "MSFP: signed or unsigned FP by search, low-rank branches routed by the timestep, tuned with the DFA loss",
        _MSFP,
        activations=msfp_scalings,
        steps=True,
    ),
    MethodRow(
        "modelopt",
        "pipeline.calibrate.methods.from_modelopt:FromModelopt",
        "layers that NVIDIA ModelOpt has calibrated, taken over as they are (`calibrate --from-modelopt`)",
        {
            "checkpoint": Option("", help="file of modelopt.torch.opt.save, or folder", decides=False),
            "sha256": Option("", help="its hash"),
            "activations": Option("per_token", help="how the layers scale them, for example per_tensor"),
        },
        observes="weights",
        activations=listed,
        taken_over=True,
    ),
)
METHODS: dict[str, MethodRow] = {row.name: row for row in _ROWS}
COMPUTED = tuple(row.name for row in _ROWS if not row.taken_over)

# calibrate.method = "auto": the first row with at least as many parameters as the model has. Learned rounding takes
# minutes on a CPU for a model of a few million parameters and hours for PixArt-XL/2 (611 M). Parameters decide and not
# the machine's speed, so that one recipe gives the same engine everywhere.
AUTO = "auto"
AUTO_ROWS = ((100_000_000, "fp4dit"), (math.inf, "rtn"))


def activation_scalings(method: str, preset: str, options: Mapping[str, object]) -> tuple[str, ...]:
    """The scalings besides per token that layers of the method may have; none for "auto", whose rows have none."""
    row = METHODS.get(method)
    return row.activations(row.resolve(preset, options)) if row else ()
