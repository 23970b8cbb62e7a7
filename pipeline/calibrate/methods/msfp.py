"""The method "msfp" (arXiv 2505.21591): signed and unsigned FP by search, then TALoRA tuned with the DFA loss.

Layers whose input is one-sided (AAL: those behind SiLU, and here those behind GELU, whose least value is -0.17) try
signed formats and unsigned ones with a zero point, the lower squared error wins; all others (NAL) stay signed. In a
DiT these are the second linear of a feed-forward and the adaLN linears (option kinds). The rule is structural, as in
the paper; kinds="all" lets every layer try both, which costs nothing at run time either.
Weights: signed FP, one scale per output channel unless the option granularity says otherwise. Activations: static, one
scale per tensor, or ("per_token") our dynamic signed quantizer with a searched format, where an AAL may still take
the static unsigned one. Bit widths are those of the recipe's formats.

Rank, learning rates and iterations of the tuning are our choices (talora.py); of the paper only a rank of 32 and two
branches are recalled, options lora_rank and lora_count.

The paper evaluated U-Nets; that its rules carry over to a DiT is our reading, and the ablation by options tells:
mixed_sign=false and use_lora=false is its base, then mixed sign, TALoRA (use_lora, without use_dfa), DFA.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from export.checkpoint import QuantizedLinear
from export.errors import RecipeError
from export.formats.format import Format, get_format
from pipeline.calibrate.balance import kinds
from pipeline.calibrate.blocks import Tensors
from pipeline.calibrate.memory import Sizes, tuning_bytes
from pipeline.calibrate.method import Unit
from pipeline.calibrate.methods.baseline import Baseline
from pipeline.calibrate.methods.msfp_search import search_range, search_token_format, search_weight, splits
from pipeline.calibrate.plan import Activation, LayerPlan

logger = logging.getLogger(__name__)
ACTIVATIONS = ("per_tensor", "per_token")
STATE_FOLDER = "talora"


class Msfp(Baseline):
    """See the options of the row "msfp" in pipeline/methods.py."""

    def plan(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        choice = self.context.options["activations"]
        if choice not in ACTIVATIONS:
            raise RecipeError(f"calibrate.options.activations {choice!r}; use one of {', '.join(ACTIVATIONS)}")
        return super().plan(plans)

    def quantize(self, unit: Unit) -> list[QuantizedLinear]:
        return [self._quantize(unit, plan) for plan in unit.plans]

    def _quantize(self, unit: Unit, plan: LayerPlan) -> QuantizedLinear:
        rows = unit.observed.layer_inputs(plan.name, rows=self.rows_per_call)
        fields = self._activation(plan, rows)
        plan = replace(plan, activation_format=fields["activation_format"])  # group multipliers depend on it
        layer = search_weight(plan, bool(self.context.options["search_weight_format"]))
        logger.debug("%s: weight %s, activation %s", plan.name, layer.weight_format, fields["activation_format"])
        return replace(layer, **fields)

    def _activation(self, plan: LayerPlan, rows: Tensors) -> Activation:
        """The activation fields of least squared error for inputs [rows, K] each."""
        if self.context.options["activations"] == "per_tensor":
            static, _ = search_range(rows, self._formats(plan, True) + self._unsigned(plan), plan.name)
            return static.fields
        fmt, token_error = search_token_format(rows, self._formats(plan, True), plan.name)
        if self._unsigned(plan):
            static, error = search_range(rows, self._unsigned(plan), plan.name)
            if error < token_error:
                return static.fields
        return {"activation_format": fmt.name, "activation_scaling": "per_token"}

    def _unsigned(self, plan: LayerPlan) -> tuple[Format, ...]:
        """Unsigned formats to try: none unless the layer is anomalous."""
        options = self.context.options
        anomalous = bool(options["mixed_sign"]) and plan.linear.kind in kinds(str(options["kinds"]))
        return self._formats(plan, False) if anomalous else ()

    def _formats(self, plan: LayerPlan, signed: bool) -> tuple[Format, ...]:
        bits = get_format(plan.activation_format).bits
        return splits(bits, signed, bool(self.context.options["embedded"]))

    def apart_bytes(self, sizes: Sizes, plans: list[LayerPlan]) -> int:
        return tuning_bytes(sizes, int(self.context.options["batch"])) if self.context.options["use_lora"] else 0

    def finish(self, layers: list[QuantizedLinear]) -> list[QuantizedLinear]:
        """Branches and router, tuned end to end."""
        options, data = self.context.options, self.context.data
        if not options["use_lora"]:
            return layers
        from pipeline.calibrate.learn.dfa import loss_weights
        from pipeline.calibrate.learn.talora import Branches
        from pipeline.calibrate.learn.tuning import Tuner, TuningSettings
        from pipeline.generate.case import Case, make_case
        from pipeline.generate.sampling import make_sampler

        assert data is not None
        case = make_case(self.context.model, self.context.recipe, 1)
        assert isinstance(case, Case), "MethodRow.steps"
        sampler = make_sampler(case.sampler, data.n_steps, case.timestep_scale)
        steps = [call.step for call in data.calls]
        weights = loss_weights(sampler, steps, self.context.recipe.sampling.guidance_scale, bool(options["use_dfa"]))
        branches = Branches(int(options["lora_count"]), int(options["lora_rank"]), str(options["lora_init"]))
        settings = TuningSettings(
            iterations=int(options["iterations"]),
            learning_rate=float(options["lr"]),
            router_rate=float(options["router_lr"]),
            batch=int(options["batch"]),
            seed=self.context.seed,
        )
        folder = self.context.folder / STATE_FOLDER
        return Tuner(self.context.model, layers, data.calls, weights.tolist(), branches, settings).tune(folder)
