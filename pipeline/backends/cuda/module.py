"""A lowered graph as a torch module: its nodes in order, each one torch function, on any device.

All decisions are made when the graph is read: what is a constant, what is a number on the host, which type every
tensor has. A node that no table knows is refused then, by name.

Activations. With "fp32" every tensor has the type that ONNX gives it. With "fp16" tensors of tokens (what descends
from an input of three axes or more) are FP16 between the kernels, which compute in float32 and round once; the
timestep's path stays float32, since sin(t * f) with t up to 1000 is noise in FP16; and unquantized products with large
weights run in FP16 wherever they are. That halves what a kernel reads and writes beside its codes. Its cost, measured
on the CPU with pixart_mini (recipe pixart_w4a6 with method rtn, 4 steps): 32 to 42 dB between engine and float64
reference, where quantization itself leaves 26 to 33 dB and "fp32" 41 to 50 dB; the final picture is as near to the
float model's either way (36.6 and 36.2 dB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.dialect.graph import inputs_of
from export.dialect.ops import Attributes
from export.errors import ContractError
from pipeline.backends.base import LARGE_ELEMENTS
from pipeline.backends.cuda.torch_gemm import DIALECT_OPS, Gemm
from pipeline.backends.cuda.torch_onnx import ONNX_OPS, TORCH_TYPES, Function
from pipeline.backends.fused.lower import takes_integers
from pipeline.backends.fused.merge_gemms import MergeGemms
from pipeline.backends.fused.ops import DOMAIN, EPILOGUE_OF, OPERANDS_KEY, OPS, fused_inputs, fused_outputs
from pipeline.machine import visible_sm
from plugins.gpu.table import EPILOGUE_OPERANDS
from plugins.gpu.tiles import prefers_integers

HALF, FULL = torch.float16, torch.float32


@dataclass
class Step:
    """One node.

    run: a function of the tensors called `inputs` (None for an absent one), converted to `types` where not None.
    outputs: names, None for one that nobody reads. widen: convert results from FP16 back to float32. done: tensors that
    no later step reads.
    """

    name: str
    run: Function
    inputs: tuple[str | None, ...]
    types: tuple[torch.dtype | None, ...]
    outputs: tuple[str | None, ...]
    widen: bool = False
    done: tuple[str, ...] = ()

    def advance(self, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
        """Run on what is known by name, add the results, drop what no later step reads. Returns the results."""
        pairs = zip((None if name is None else tensors[name] for name in self.inputs), self.types, strict=True)
        result = self.run(*(x.to(kind) if x is not None and kind is not None else x for x, kind in pairs))
        results: Sequence[Tensor] = result if isinstance(result, tuple | list) else (result,)
        if self.widen:
            results = [x.float() for x in results]
        tensors.update({name: x for name, x in zip(self.outputs, results, strict=False) if name is not None})
        for name in self.done:
            del tensors[name]
        return results


@dataclass
class TensorTypes:
    """What is known of the tensors while the graph is read. types: of those on the device; constants: on the CPU."""

    half: bool
    types: dict[str, torch.dtype] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    host: set[str] = field(default_factory=set)
    # Scale of codes -> type of the activations that were quantized.
    sources: dict[str, torch.dtype] = field(default_factory=dict)


class LoweredModule(nn.Module):
    """forward(inputs by name) -> outputs by name; float outputs are float32."""

    def __init__(self, model: ir.Model, activations: str = "fp32", weights: str = "packed") -> None:
        """activations: "fp32" or "fp16". weights: "packed", "expanded" or "auto". The visible GPU decides where codes
        that may be either are INT8. Raises ContractError for a graph that the executor does not know, naming the
        nodes."""
        super().__init__()
        self.prefers_integers = prefers_integers([visible_sm()])
        refuse_unknown(model.graph)
        MergeGemms()(model)  # bundles of earlier releases have linears of the same codes apart
        self.known, self.weights = TensorTypes(activations == "fp16"), weights
        self.inputs = tuple(str(value.name) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self.steps: list[Step] = []
        self.stored: dict[tuple[str, torch.dtype], str] = {}
        self._read_inputs(model.graph)
        for node in model.graph:
            self._add(node)
        self.gemms = nn.ModuleList(step.run for step in self.steps if isinstance(step.run, Gemm))
        _mark_last_uses(self.steps, self.outputs)

    def _read_inputs(self, graph: ir.Graph) -> None:
        for value in graph.inputs:
            dtype = _torch_type(value)
            tokens = value.shape is not None and value.shape.rank() >= 3
            self.known.types[str(value.name)] = HALF if self.known.half and dtype == FULL and tokens else dtype
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                self.known.constants[name] = torch.from_numpy(value.const_value.numpy().copy())

    def _add(self, node: ir.Node) -> None:
        names = [None if value is None else str(value.name) for value in node.inputs]
        known = [name in self.known.constants for name in names if name is not None]
        if node.domain == DOMAIN:
            self._add_dialect(node)
        elif node.op_type == "Shape" or _on_host(self.known, names):
            self._add_host(node, names)
        elif known and all(known):
            self._fold(node, names)
        else:
            self._add_onnx(node, names)

    def _fold(self, node: ir.Node, names: list[str | None]) -> None:
        """All inputs are constants, so the outputs are."""
        run = ONNX_OPS[node.op_type].make(_attributes(node))
        results = run(*(None if name is None else self.known.constants[name] for name in names))
        for value, tensor in zip(node.outputs, results if isinstance(results, Sequence) else [results], strict=False):
            self.known.constants[str(value.name)] = tensor

    def _add_host(self, node: ir.Node, names: list[str | None]) -> None:
        run = ONNX_OPS[node.op_type].make(_attributes(node))
        outputs = tuple(str(value.name) for value in node.outputs)
        self.known.host.update(outputs)
        self.known.host.update(name for name in names if name is not None and name in self.known.constants)
        self.steps.append(Step(str(node.name), run, tuple(names), (None,) * len(names), outputs))

    def _add_onnx(self, node: ir.Node, names: list[str | None]) -> None:
        row, attributes = ONNX_OPS[node.op_type], _attributes(node)
        compute, widen = self._compute_type(names, row.product)
        inputs: list[str | None] = [None] * len(names)
        types: list[torch.dtype | None] = [None] * len(names)
        on_host = {inputs_of(node).place(port) for port in row.host}
        for place, name in enumerate(names):
            if name is None:
                continue
            host, constant = place in on_host, name in self.known.constants
            if host != (name in self.known.host) and not constant:
                where = "on the GPU, but a size must be known on the CPU" if host else "on the CPU, but read by the GPU"
                raise ContractError(f"{node.name} ({node.op_type}): input {name} is computed {where}")
            kind = compute if not host and self._type(name).is_floating_point else None
            inputs[place] = self._host(name) if host else self._operand(name, kind)
            types[place] = None if constant else kind
        outputs = tuple(str(value.name) if value.uses() or value.is_graph_output() else None for value in node.outputs)
        output_type = self._result_type(node, names, FULL if widen else compute)
        self.known.types.update({name: output_type for name in outputs if name is not None})
        if node.op_type == "Cast" and compute is not None and output_type == HALF:
            attributes = {"to": ir.DataType.FLOAT16.value}
        self.steps.append(Step(str(node.name), row.make(attributes), tuple(inputs), tuple(types), outputs, widen))

    def _compute_type(self, names: list[str | None], product: bool) -> tuple[torch.dtype | None, bool]:
        """(type of all float inputs or None, whether the result goes back to float32)."""
        floats = [name for name in names if name is not None and self._type(name).is_floating_point]
        if not floats:
            return None, False
        moving = [self.known.types[name] for name in floats if name not in self.known.constants]
        if HALF in moving:
            return HALF, False
        large = max((self.known.constants[n].numel() for n in floats if n in self.known.constants), default=0)
        if self.known.half and product and large >= LARGE_ELEMENTS:
            return HALF, True
        return FULL, False

    def _result_type(self, node: ir.Node, names: list[str | None], compute: torch.dtype | None) -> torch.dtype:
        if node.op_type == "Cast":
            to = node.attributes["to"].as_int()
            wide = to == ir.DataType.FLOAT.value
            return HALF if wide and compute == HALF else TORCH_TYPES[to]
        if node.op_type == "ArgMax":
            return torch.int64
        return compute or next(self._type(name) for name in names if name is not None)

    def _add_dialect(self, node: ir.Node) -> None:
        row, op = DIALECT_OPS[node.op_type], OPS[node.op_type]
        by_port = {port: str(value.name) for port, value in fused_inputs(node).by_name().items()}
        refuse_proof_outputs(node)
        if row.make is None:
            self._add_gemm(node, by_port)
            return
        floats = [name for key, name in by_port.items() if key not in row.wide]
        compute = HALF if any(self._type(name) == HALF for name in floats) else FULL
        kinds = [(name, FULL if key in row.wide else compute) for key, name in by_port.items()]
        outputs = {key: str(value.name) for key, value in zip(op.outputs, node.outputs, strict=True)}
        outputs = {key: name for key, name in outputs.items() if key not in op.proof}
        types_of = {"codes": torch.uint8, "scale": FULL, "y": compute}
        self.known.types |= {name: types_of[key] for key, name in outputs.items()}
        if "codes" in outputs:
            self.known.sources[outputs["codes"]] = compute
        inputs = tuple(self._operand(name, kind) for name, kind in kinds)
        types = tuple(None if name in self.known.constants else kind for name, kind in kinds)
        self.steps.append(Step(str(node.name), row.make(self._choices(node)), inputs, types, tuple(outputs.values())))

    def _add_gemm(self, node: ir.Node, by_port: dict[str, str]) -> None:
        output = self.known.sources[by_port["a_codes"]]
        static = by_port["a_scale"] in self.known.constants
        epilogue = EPILOGUE_OF[node.op_type]
        operands = [operand.name for operand in EPILOGUE_OPERANDS[epilogue]]
        moved = {"a_codes", *operands, *([] if static else ["a_scale"])}
        constants = {port: self.known.constants[name] for port, name in by_port.items() if port not in moved}
        gemm = Gemm(constants, self._choices(node) | {"epilogue": epilogue}, output, self.weights)
        names = [by_port["a_codes"], None if static else by_port["a_scale"]]
        moving = [by_port[port] for port in operands]
        inputs = (*names, *(self._operand(name, output) for name in moving))
        types = (None, None, *(None if name in self.known.constants else output for name in moving))
        y = str(fused_outputs(node).y.name)
        self.known.types[y] = output
        self.steps.append(Step(str(node.name), gemm, inputs, types, (y,)))

    def _choices(self, node: ir.Node) -> Attributes:
        """Attributes of a node of the dialect, and whether its codes are INT8 integers by choice."""
        return _attributes(node) | {
            "integers": takes_integers(node.metadata_props.get(OPERANDS_KEY), self.prefers_integers)
        }

    def _type(self, name: str) -> torch.dtype:
        constant = self.known.constants.get(name)
        return constant.dtype if constant is not None else self.known.types.get(name, torch.int64)

    def _operand(self, name: str, dtype: torch.dtype | None) -> str:
        """The name under which a step finds a device tensor; a constant is stored once for each type it is read in."""
        if name not in self.known.constants:
            return name
        key = (name, dtype or self.known.constants[name].dtype)
        if key not in self.stored:
            self.stored[key] = f"constant_{len(self.stored)}"
            self.register_buffer(self.stored[key], self.known.constants[name].to(key[1]).contiguous(), persistent=False)
        return self.stored[key]

    def _host(self, name: str) -> str:
        """The name of a number on the host."""
        self.known.host.add(name)
        return name

    def finish(self) -> LoweredModule:
        """Drop what only reading needed; called once, after the graph has been read and its tensors may go."""
        self.known.constants = {
            name: tensor for name, tensor in self.known.constants.items() if name in self.known.host
        }
        return self

    @property
    def expanded(self) -> int:
        """How many GEMMs hold a byte for each weight."""
        return sum(bool(gemm.is_expanded) for gemm in self.gemms)

    def start(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is known by name before the first step; `inputs` lie on the module's device."""
        placed = {name: inputs[name].to(self.known.types[name]) for name in self.inputs}
        return {**self.known.constants, **dict(self.named_buffers(recurse=False)), **placed}

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run every step."""
        tensors = self.start(inputs)
        for step in self.steps:
            step.advance(tensors)
        return {name: tensors[name].float() for name in self.outputs}


def _torch_type(value: ir.Value) -> torch.dtype:
    kind = value.dtype.value if value.dtype is not None else 0
    if kind not in TORCH_TYPES:
        raise ContractError(
            f"input {value.name} is {value.dtype}; the executor takes {', '.join(map(str, TORCH_TYPES.values()))}"
        )
    return TORCH_TYPES[kind]


def _attributes(node: ir.Node) -> Attributes:
    return {key: item.value for key, item in node.attributes.items()}


def _on_host(known: TensorTypes, names: list[str | None]) -> bool:
    """Is something computed from sizes alone?"""
    read = [name for name in names if name is not None]
    computed = [name for name in read if name in known.host and name not in known.constants]
    return bool(computed) and all(name in known.host or name in known.constants for name in read)


def refuse_unknown(graph: ir.Graph) -> None:
    """Raise ContractError for nodes that the tables lack, all of them by name."""
    tables: dict[str, Mapping[str, object]] = {"": ONNX_OPS, DOMAIN: DIALECT_OPS}
    unknown = [node for node in graph if node.op_type not in tables.get(node.domain, ())]
    if unknown:
        kinds = sorted({f"{node.domain}::{node.op_type}".removeprefix("::") for node in unknown})
        first = unknown[0].name
        raise ContractError(
            f"the executor of target cuda does not know {', '.join(kinds)} (first at node {first}); add a row to "
            "pipeline/backends/cuda/torch_onnx.py, or build with --target cpu"
        )


def refuse_proof_outputs(node: ir.Node) -> None:
    """Outputs that only parity gates read are not computed here."""
    row = OPS[node.op_type]
    for key, value in zip(row.outputs, node.outputs, strict=True):
        if key in row.proof and (value.uses() or value.is_graph_output()):
            raise ContractError(f"{node.name}: output {key} is read by the graph; the kernels do not write it")


def _mark_last_uses(steps: list[Step], kept: tuple[str, ...]) -> None:
    """Fill `done`, from the last step to the first."""
    computed = {name for step in steps for name in step.outputs if name is not None}
    seen = set(kept)
    for step in reversed(steps):
        names = {name for name in (*step.inputs, *step.outputs) if name is not None and name in computed}
        step.done = tuple(sorted(names - seen))
        seen |= names
