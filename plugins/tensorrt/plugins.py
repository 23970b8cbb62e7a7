"""The kernels as quick-deployable plugins of TensorRT: shapes and types, tactics, and ahead-of-time implementations.

A plugin takes the attribute `payload`, which holds the PTX of every tile; a tactic is the number of a tile, and
TensorRT measures which is fastest. Driven through the front end of TensorRT 11.4, not built and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

from plugins.gpu.spec import EPILOGUES, GemmSpec, QuantizeSpec
from plugins.gpu.table import Spec, kernel
from plugins.tensorrt.aot import aot_kernel, plugin_name
from plugins.tensorrt.expressions import Expression, Size
from plugins.tensorrt.payload import FIELD, NAMESPACE, PLUGINS, Payload, from_text
from plugins.tensorrt.rtx_plugin import ports_of

# TensorRT's names of element types in a tactic's list.
TACTIC_TYPES = {"int8": "INT8", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
# A spec of every set of inputs that a kernel may have.
_SPECS: dict[type, tuple[Spec, ...]] = {
    QuantizeSpec: (QuantizeSpec("E2M3", 64),),
    GemmSpec: tuple(
        GemmSpec("E2M3", "E2M1", 64, 64, 32, multipliers, epilogue=epilogue)
        for multipliers in ((1,), (1, 2))
        for epilogue in EPILOGUES
    ),
}
# One payload of each plugin: what is common to all of its layers follows from it.
EXAMPLES = tuple(Payload(name, spec, ()) for name in PLUGINS for spec in _SPECS[kernel(name).spec])


@cache
def register(module: str = "tensorrt") -> tuple[str, ...]:
    """Register every plugin with TensorRT and return their names; a second call changes nothing."""
    trt, trtp = import_module(module), import_module(f"{module}.plugin")
    for example in EXAMPLES:
        _register(trt, trtp, example)
    return tuple(map(plugin_name, EXAMPLES))


def _register(trt: ModuleType, trtp: ModuleType, example: Payload) -> None:
    name = f"{NAMESPACE}::{plugin_name(example)}"
    inputs = [argument.name for argument in example.row.inputs(example.spec)]
    outputs = len(ports_of(example).outputs)
    desc: Any = trtp.TensorDesc
    described = tuple.__class_getitem__((desc,) * outputs) if outputs > 1 else desc
    launched = tuple.__class_getitem__((str, bytes, trtp.KernelLaunchParams, trtp.SymExprs))
    rows = (
        (trtp.register, partial(_describe, trt, trtp), (), described),
        (trtp.autotune, partial(_tactics, trtp), ("outputs",), list.__class_getitem__(trtp.AutoTuneCombination)),
        (trtp.aot_impl, partial(_implement, trtp), ("outputs", "tactic"), launched),
    )
    for decorator, function, more, returned in rows:
        decorator(name)(_signed(function, desc, inputs, more, returned))


def _signed(
    function: Callable[..., object], desc: object, inputs: Sequence[str], more: Sequence[str], returned: object
) -> Callable[..., object]:
    """What calls function(inputs, payload, *more), under the signature that TensorRT reads: the inputs one by one, the
    attribute, and `more`."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind, annotation=desc) for name in inputs]
    parameters.append(Parameter(FIELD, kind, annotation=str))
    parameters += [Parameter(name, kind) for name in more]
    signature = Signature(parameters, return_annotation=returned)

    def call(*arguments: object, **named: object) -> object:
        bound = signature.bind(*arguments, **named).arguments
        payload = from_text(bound[FIELD].rstrip("\0"))
        payload = payload.complete() if more else payload
        return function([bound[name] for name in inputs], payload, *(bound[name] for name in more))

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _describe(trt: ModuleType, trtp: ModuleType, inputs: Sequence[Any], payload: Payload) -> object:
    """Shapes and types of the outputs."""
    ports, leading = ports_of(payload), list(inputs[0].shape_expr)
    shapes = [(*leading[:-1], width) for width in ports.widths]
    described = tuple(
        trtp.from_shape_expr(shape, dtype=getattr(trt, kind)) for shape, kind in zip(shapes, ports.outputs, strict=True)
    )
    return described if len(described) > 1 else described[0]


def _tactics(trtp: ModuleType, inputs: object, payload: Payload, outputs: object) -> list[object]:
    """Row-major tensors of the kernel's types, and one tactic for each tile."""
    ports = ports_of(payload)
    types = ",".join(TACTIC_TYPES[name] for name in (*ports.inputs, *ports.outputs))
    return [trtp.AutoTuneCombination(types, "LINEAR", list(range(1, len(payload.variants) + 1)))]


def _implement(trtp: ModuleType, inputs: Sequence[Any], payload: Payload, outputs: object, tactic: int) -> object:
    """(name, PTX, launch sizes, scalars) of the tile that is tactic 1, 2, ..."""
    kernel = aot_kernel(payload, payload.variants[tactic - 1], [len(tensor.shape_expr) for tensor in inputs])

    def symbol(expression: Expression) -> Size:
        return expression.resolve(lambda index, axis: inputs[index].shape_expr[axis], trtp.cdiv)

    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = map(symbol, kernel.grid)
    launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(symbol(scalar)) for scalar in kernel.scalars])
    return kernel.name, kernel.ptx.encode(), launch, scalars
