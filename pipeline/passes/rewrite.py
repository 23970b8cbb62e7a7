"""Passes that count what they changed and keep why they left the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.passes.probes import Choice, ProbeRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """One candidate that a pass looked at and did not change. `culprit` is the node or tensor that decided it."""

    culprit: str
    reason: str


class RewritePass(ir.passes.InPlacePass):
    """An in-place pass that counts what it changed and says why it left the rest.

    `fired` and `refusals` describe the latest call; the refusals are in the log of `-v`.
    """

    def __init__(self) -> None:
        self.fired = 0
        self.refusals: list[Refusal] = []

    def rewrite(self, model: ir.Model) -> None:
        """Change `model`, counting in `self.fired`; subclasses implement this."""
        raise NotImplementedError

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.fired, self.refusals = 0, []
        self.rewrite(model)
        name = type(self).__name__
        logger.info("%s: fired %d times, refused %d", name, self.fired, len(self.refusals))
        for refusal in self.refusals:
            logger.debug("%s left %s: %s", name, refusal.culprit, refusal.reason)
        return ir.passes.PassResult(model, modified=self.fired > 0)

    def refuse(self, culprit: str | None, reason: str) -> None:
        self.refusals.append(Refusal(culprit or "(unnamed)", reason))


class LoweringPass(RewritePass):
    """A pass that lowers quantized linears for a target; `choices` and `probes` have a row for each."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []
        self.probes: list[ProbeRow] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.choices, self.probes = [], []
        return super().call(model)
