"""The ops of the `fpq.cuda` dialect as torch modules: each holds its constants in the layout its kernel reads.

Codes between them are operand bytes (plugins/gpu/spec.py), not the dialect's own codes: one for one, but the byte
that an FP8 tensor core multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import plugins.torch_ops  # noqa: F401, registers torch.ops.fpq
from export.dialect.ops import Attributes
from pipeline.backends.base import LOWEST_MASK
from pipeline.backends.cuda.torch_onnx import Function
from pipeline.backends.fused.ops import EPILOGUE_OF
from plugins.gpu.spec import Epilogue
from plugins.gpu.table import EPILOGUE_OPERANDS
from plugins.gpu.tiles import EXPAND_FROM
from plugins.torch_reference import TYPE_NAMES

OPS = torch.ops.fpq


class Gemm(nn.Module):
    """Gemm, with whatever epilogue.

    weights: "packed", "expanded", or "auto" (expanded at the first call of EXPAND_FROM tokens or more, which frees
    the packed ones). output: the type of y.
    """

    w: Tensor
    w_scales: Tensor
    bias: Tensor
    multiplier_codes: Tensor | None

    def __init__(
        self, constants: Mapping[str, Tensor], attributes: Attributes, output: torch.dtype, weights: str
    ) -> None:
        super().__init__()
        multipliers, n = list(attributes["multipliers"]), len(constants["codes"])
        codes = constants["multiplier_codes"] if multipliers != [1] else None
        self.choices = {
            "weight": attributes["weight_format"],
            "group_size": attributes["group_size"],
            "multipliers": multipliers,
        }
        self.operands = {"activation": attributes["activation_format"], "integers": attributes["integers"]}
        self.epilogue: Epilogue = attributes["epilogue"]
        self.output = TYPE_NAMES[output]
        self.in_features, self.weights = attributes["in_features"], weights
        for name, tensor in (
            ("w", constants["codes"]),
            ("w_scales", constants["w_scales"]),
            ("bias", constants["bias"]),
            ("multiplier_codes", None if codes is None else codes.expand(n, -1)),
            ("static_scale", constants.get("a_scale")),
        ):
            self.register_buffer(name, None if tensor is None else tensor.contiguous(), persistent=False)
        self.is_expanded = False

    def forward(self, codes: Tensor, a_scale: Tensor | None = None, *operands: Tensor) -> Tensor:
        a = codes.reshape(-1, self.in_features)
        scale = self._scale(a_scale, len(a))
        if not self.is_expanded and (self.weights == "expanded" or (self.weights == "auto" and len(a) >= EXPAND_FROM)):
            self.expand()
        choices: Attributes = {**self.choices, **self.operands, "output": self.output, "epilogue": self.epilogue}
        for argument, operand in zip(EPILOGUE_OPERANDS[self.epilogue], operands, strict=True):
            rows = choices[argument.name] = operand.reshape(-1, operand.shape[-1]).contiguous()
            if argument.is_per_sample:
                choices["tokens"] = len(a) // len(rows)
        if self.is_expanded:
            y = OPS.expanded_gemm(a, scale, self.w, self.w_scales, self.bias, **choices)
        else:
            choices["multiplier_codes"] = self.multiplier_codes
            y = OPS.packed_gemm(a, scale, self.w, self.w_scales, self.bias, **choices)
        shaped: Tensor = y.reshape(*codes.shape[:-1], -1)
        return shaped

    def _scale(self, a_scale: Tensor | None, count: int) -> Tensor:
        """f32 [M]; a static scale is repeated."""
        if a_scale is not None:
            return a_scale.reshape(-1)
        static = self.get_buffer("static_scale")
        return static.expand(count).contiguous()

    def expand(self) -> None:
        """Replace the packed codes by bytes with multipliers folded in."""
        of_weight = {**self.choices, "in_features": self.in_features, "multiplier_codes": self.multiplier_codes}
        self.w = OPS.expand(self.w, **of_weight, **self.operands)
        self.multiplier_codes, self.is_expanded = None, True


def _quantizer(op: Callable[..., tuple[Tensor, Tensor]], attributes: Attributes) -> Function:
    """x, and the shift and gain of a norm of it -> (bytes of x's shape, scale [..., 1])."""
    choices = {key: attributes[key] for key in ("format", "epsilon", "integers") if key in attributes}

    def run(x: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
        rows, *per_sample = (item.reshape(-1, x.shape[-1]).contiguous() for item in (x, *modulation))
        tokens = {"tokens": len(rows) // len(per_sample[0])} if per_sample else {}
        codes, scale = op(rows, *per_sample, **tokens, **choices)
        return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)

    return run


def _static_quantizer(op: Callable[..., Tensor], attributes: Attributes) -> Function:
    """x, scale, zero -> bytes of x's shape."""
    choices = {key: attributes[key] for key in ("format", "integers")}

    def run(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        codes = op(rows, scale.reshape(1), zero.reshape(1), **choices)
        return (codes.reshape(x.shape),)

    return run


def _attention(attributes: Attributes) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.clamp(min=LOWEST_MASK)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attributes["scale"])

    return run


@dataclass(frozen=True)
class DialectOp:
    """make(attributes) -> function. A Gemm has no `make`: it is a module with constants of its own.

    wide: inputs that stay float32 whatever the activations are.
    """

    make: Callable[[Attributes], Function] | None
    wide: frozenset[str] = frozenset()


_STATIC = frozenset({"scale", "zero"})
DIALECT_OPS = {
    "Quantize": DialectOp(partial(_quantizer, OPS.quantize)),
    "GeluQuantize": DialectOp(partial(_quantizer, OPS.gelu_quantize)),
    "NormModulateQuantize": DialectOp(partial(_quantizer, OPS.norm_modulate_quantize)),
    "QuantizeStatic": DialectOp(partial(_static_quantizer, OPS.quantize_static), _STATIC),
    "GeluQuantizeStatic": DialectOp(partial(_static_quantizer, OPS.gelu_quantize_static), _STATIC),
    **dict.fromkeys(EPILOGUE_OF, DialectOp(None, frozenset({"a_scale"}))),
    "Attention": DialectOp(_attention),
    "MaskedAttention": DialectOp(_attention),
}
