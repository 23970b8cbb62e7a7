"""The GPU kernels as torch ops, namespace `fpq`: torch.ops.fpq.packed_gemm and its neighbours.

Importing this module registers them. Their tensors, sizes, outputs and fake tensors are those of the kernel table: what
every kernel of a row reads comes in order, what only some read by name, and so do the fields of the spec that tensors
do not tell. They have fake tensors, so torch.compile and torch.export take them, and allocate nothing but their
results, so a CUDA graph does.

On a CUDA tensor an op runs the Triton kernel; on a CPU tensor the same kernel under Triton's interpreter where
TRITON_INTERPRET=1, else what the kernel computes in plain torch (plugins/torch_reference.py). No GPU was at hand: on
CUDA tensors the ops are compiled, not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from export.errors import ContractError
from plugins.gpu import launch
from plugins.gpu.spec import Before
from plugins.gpu.table import QUANTIZER_OF, Argument, Kernel, Spec, kernel, resolved, run_time_sizes
from plugins.torch_reference import REFERENCES, TYPE_NAMES

NAMESPACE = "fpq"
Operands = Mapping[str, Tensor]  # those that a call has
Fields = dict[str, Any]  # of a spec
# Type of a spec's field -> type of an op's argument.
SCHEMA_TYPES = {
    "str": "str", "Epilogue": "str", "FloatType": "str", "int": "int", "bool": "bool", "float": "float",
    "tuple[int, ...]": "int[]",
}  # fmt: skip
# How a kernel is launched where it is more than one launch.
GEMMS: dict[str, Callable[..., Tensor]] = {"packed_gemm": launch.packed_gemm, "expanded_gemm": launch.expanded_gemm}


def on_kernels(x: Tensor) -> bool:
    """Does an op on `x` run the Triton kernel?"""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class TorchOp:
    """One op: a kernel of the table, and where each field of its spec comes from.

    choices: fields that are arguments of the op. inferred(tensors by name) -> fields that follow from the tensors.
    fixed: fields that the op stands for; a tensor that only depends on these is always there, or never.
    """

    name: str
    kernel: str
    choices: tuple[str, ...]
    inferred: Callable[[Operands], Fields]
    fixed: Fields = field(default_factory=dict)

    @property
    def row(self) -> Kernel:
        return kernel(self.kernel)

    @property
    def inputs(self) -> tuple[list[str], list[str]]:
        """Names of the tensors that every call has, and of those that some have."""
        always: list[str] = []
        sometimes: list[str] = []
        for argument in self._tensors("input"):
            is_always_there = argument.when is None or argument.when in self.fixed
            (always if is_always_there else sometimes).append(argument.name)
        return always, sometimes

    def _tensors(self, role: str) -> list[Argument]:
        """Arguments of a role but those that the fixed fields exclude."""
        return [
            argument
            for argument in self.row.arguments
            if argument.role == role
            and self.fixed.get(argument.when or "", True)
            and not self.fixed.get(argument.unless or "", False)
        ]

    @property
    def schema(self) -> str:
        """The op's arguments and results, as torch declares them."""
        tokens = [argument for argument in self.row.arguments if argument.name == "tokens"]
        always, sometimes = self.inputs
        parts = [f"Tensor {name}" for name in always] + ["*"] + [f"Tensor? {name}=None" for name in sometimes]
        parts += [f"SymInt tokens{'=0' if argument.when else ''}" for argument in tokens]
        spec_fields = {one.name: one for one in fields(self.row.spec)}
        for one in (spec_fields[name] for name in self.choices):
            default = "" if one.default is MISSING else f"={_literal(one.default)}"
            parts.append(f"{SCHEMA_TYPES[str(one.type)]} {one.name}{default}")
        outputs = [f"Tensor {argument.name}" for argument in self._tensors("output")]
        parts = parts[:-1] if parts[-1] == "*" else parts
        returned = "Tensor" if len(outputs) == 1 else f"({', '.join(outputs)})"
        return f"({', '.join(parts)}) -> {returned}"

    def bound(self, tensors: tuple[Tensor, ...], named: Mapping[str, Any]) -> tuple[Spec, Operands, dict[str, int]]:
        """(spec, tensors by name, sizes by name) of a call. Raises RecipeError or ContractError as the spec does."""
        always, sometimes = self.inputs
        operands = dict(zip(always, tensors, strict=True))
        operands |= {name: named[name] for name in sometimes if named.get(name) is not None}
        choices = {name: named[name] for name in self.choices if name in named}
        choices = {name: tuple(value) if isinstance(value, list) else value for name, value in choices.items()}
        spec = self.row.spec(**{**self.fixed, **self.inferred(operands), **choices})
        read = {argument.name for argument in self.row.inputs(spec)}
        if read != operands.keys():
            missing, unused = sorted(read - operands.keys()), sorted(operands.keys() - read)
            raise ContractError(f"{self.name} for {spec}: missing {missing or 'nothing'}, unused {unused or 'nothing'}")
        return spec, operands, {"tokens": named["tokens"]} if "tokens" in named else {}

    def run(self, *tensors: Tensor, **named: object) -> Tensor | tuple[Tensor, ...]:
        """On the kernel, or what it computes."""
        spec, operands, sizes = self.bound(tensors, named)
        if not on_kernels(tensors[0]):
            outputs = REFERENCES[self.kernel](spec, **operands, **sizes)
        elif self.kernel in GEMMS:
            outputs = (GEMMS[self.kernel](spec, **operands, **sizes),)
        else:
            outputs = launch.launched(self.row, spec, operands, sizes.get("tokens", 0))
        return outputs if len(outputs) > 1 else outputs[0]

    def fake(self, *tensors: Tensor, **named: object) -> Tensor | tuple[Tensor, ...]:
        """Results without data."""
        spec, _, _ = self.bound(tensors, named)
        first, sizes = tensors[0], run_time_sizes(tensors[0].shape[0])
        outputs = [
            first.new_empty(
                resolved(argument.shape_for(spec), sizes),
                dtype=getattr(torch, argument.element_for(spec)),
            )
            for argument in self.row.outputs(spec)
        ]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _literal(value: object) -> str:
    """A default as schemas write it."""
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def _of_gemm(operands: Operands) -> Fields:
    """Sizes; several real scales in a row of w_scales are scales of groups; a zero point is there if it is operands."""
    a, w_scales = operands["a"], operands["w_scales"]
    sizes = {"in_features": int(a.shape[1]), "out_features": int(w_scales.shape[0])}
    return {**sizes, "real_groups": w_scales.shape[1] > 1, "zero_point": "a_zero" in operands}


def _of_weight(operands: Operands) -> Fields:
    return {"out_features": int(operands["w"].shape[0])}


def _of_codes(operands: Operands) -> Fields:
    return {"in_features": int(operands["codes"].shape[1])}


def _of_activations(operands: Operands) -> Fields:
    x = operands["x"]
    return {"channels": int(x.shape[1]), "input": TYPE_NAMES[x.dtype]}


_GEMM = ("activation", "weight", "group_size", "multipliers", "epilogue", "output", "integers")
_EXPAND = ("activation", "weight", "in_features", "group_size", "multipliers", "integers")
_QUANTIZE = ("format", "integers")


def _quantizer(name: str, before: Before, static: bool, more: tuple[str, ...] = ()) -> TorchOp:
    fixed = {"before": before, "static": static}
    return TorchOp(name, QUANTIZER_OF[before], (*_QUANTIZE, *more), _of_activations, fixed)


OPS = (
    TorchOp("packed_gemm", "packed_gemm", _GEMM, _of_gemm),
    TorchOp("expanded_gemm", "expanded_gemm", _GEMM, _of_gemm),
    TorchOp("pack", "pack", (), _of_codes),
    TorchOp("expand", "expand", _EXPAND, _of_weight),
    _quantizer("quantize", "none", static=False),
    _quantizer("gelu_quantize", "gelu", static=False),
    _quantizer("quantize_static", "none", static=True),
    _quantizer("gelu_quantize_static", "gelu", static=True),
    _quantizer("norm_modulate_quantize", "norm_modulate", False, ("epsilon",)),
)


def _register() -> None:
    for op in OPS:
        name = f"{NAMESPACE}::{op.name}"
        torch.library.define(name, op.schema)
        torch.library.impl(name, ("cpu", "cuda"), op.run)
        torch.library.register_fake(name, op.fake)


_register()
