"""The kernels as Python plugins of TensorRT-RTX (IPluginV3), registered for the ONNX ops of an engine graph.

One class serves every kernel of PLUGINS: shapes and types follow from the kernel's arguments, the rest from the
payload. Tensors cross as they lie in memory: operand bytes and packed weights as int8, since the builder would widen
uint8 to four bytes. The engine is compiled with them, not run: no machine with an RTX GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from plugins.tensorrt import rtx_loader
from plugins.tensorrt.payload import FIELD, NAMESPACE, PLUGINS, VERSION, Payload, from_text
from plugins.tensorrt.rtx_driver import cuda_driver
from plugins.tensorrt.rtx_launcher import Launcher

# Element type of the kernel table -> name of TensorRT's, where the two differ.
TYPES = {"uint8": "int8"}


@dataclass(frozen=True)
class Ports:
    """Tensors of a plugin in order: element type names of TensorRT, and the last dimension of every output."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    widths: tuple[int, ...]


def ports_of(payload: Payload) -> Ports:
    """What the kernel reads and writes, from its arguments."""
    spec, inputs, outputs = payload.spec, payload.row.inputs(payload.spec), payload.row.outputs(payload.spec)
    kinds = {argument: argument.element_for(spec) for argument in (*inputs, *outputs)}
    read, written = (tuple(TYPES.get(kinds[one], kinds[one]) for one in group) for group in (inputs, outputs))
    # A tensor of one dimension has one element for each row.
    widths = tuple(1 if len(output.shape) == 1 else spec.dims[output.shape[-1]] for output in outputs)
    return Ports(read, written, widths)


def text_of(field: Any) -> str:
    """The text in a plugin field; the parser ends an attribute's with a zero byte."""
    return np.asarray(field.data, np.int8).tobytes().rstrip(b"\0").decode()


class KernelMethods:
    """One kernel of one layer, without TensorRT's base classes. Names of methods and fields are TensorRT's."""

    trt: ModuleType

    def open(self, text: str) -> None:
        """Fill the fields from the payload's text."""
        self.text, self.payload = text, from_text(text)
        self.ports = ports_of(self.payload)
        self.plugin_name, self.plugin_version = PLUGINS[self.payload.kernel], VERSION
        self.plugin_namespace, self.num_outputs = NAMESPACE, len(self.ports.outputs)
        self.fields = fields(self.trt, text)
        self.launcher: Launcher | None = None

    def get_capability_interface(self, type: object) -> KernelMethods:
        return self

    def clone(self) -> KernelMethods:
        return type(self)(self.text)  # type: ignore[call-arg]

    def get_output_data_types(self, input_types: object) -> list[object]:
        return [getattr(self.trt, name) for name in self.ports.outputs]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: object, exprs: Any) -> list[object]:
        return [self._shape(inputs[0], width, exprs) for width in self.ports.widths]

    def _shape(self, first: Any, width: int, exprs: Any) -> object:
        shape = self.trt.DimsExprs(first)
        shape[len(shape) - 1] = exprs.constant(width)
        return shape

    def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
        names = (*self.ports.inputs, *self.ports.outputs)
        desc = in_out[pos].desc
        return bool(desc.format == self.trt.TensorFormat.LINEAR and desc.type == getattr(self.trt, names[pos]))

    def configure_plugin(self, inputs: object, outputs: object) -> None:
        """Nothing depends on the profile: the payload has code for every number of rows."""

    def get_workspace_size(self, inputs: object, outputs: object) -> int:
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def get_fields_to_serialize(self) -> object:
        return self.fields[0]

    def attach_to_context(self, context: object) -> KernelMethods:
        attached = self.clone()
        attached.launcher = Launcher(self.payload.complete(), cuda_driver())
        attached.launcher.load()
        return attached

    def on_shape_change(self, inputs: Sequence[Any], outputs: object) -> None:
        assert self.launcher is not None, "the plugin is not attached to a context"
        self.launcher.prepare([tuple(tensor.dims) for tensor in inputs])

    def enqueue(
        self,
        input_desc: object,
        output_desc: object,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        assert self.launcher is not None, "the plugin is not attached to a context"
        self.launcher.launch(inputs, outputs, stream)


def plugin_class(trt: ModuleType) -> Callable[[str], KernelMethods]:
    """The IPluginV3 class of module tensorrt_rtx."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    def init(self: Any, text: str) -> None:
        for base in bases:
            base.__init__(self)
        self.open(text)

    # Ours first: the bases have methods of these names that only say what is missing.
    return type("KernelPlugin", (KernelMethods, *bases), {"__init__": init, "trt": trt})


def registered() -> tuple[str, ...]:
    """Names of our plugins that TensorRT-RTX's own registry finds. Raises EnvironmentLacksError as `creators`."""
    creators()
    registry = rtx_loader.load().get_plugin_registry()
    return tuple(name for name in PLUGINS.values() if registry.get_creator(name, VERSION, NAMESPACE) is not None)


def fields(trt: ModuleType, text: str) -> tuple[object, ...]:
    """(plugin fields that hold `text`, what must be kept as long as they are used).

    TensorRT's fields point at the bytes and do not own them: it would serialize whatever lies there later.
    """
    kept = np.frombuffer(text.encode(), np.int8)
    field = trt.PluginField(FIELD, kept, trt.PluginFieldType.CHAR)
    return trt.PluginFieldCollection([field]), field, kept


def creator_class(trt: Any) -> Callable[[str], object]:
    """The class of creators; each instance makes the plugins of one kernel."""
    plugin = plugin_class(trt)

    class KernelCreator(trt.IPluginCreatorV3One):
        """Makes a plugin from its field, for building and for running alike."""

        def __init__(self, name: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            self.kept = fields(trt, "")
            self.field_names = self.kept[0]

        def create_plugin(self, name: str, collection: Iterable[Any], phase: object) -> KernelMethods:
            return plugin(next(text_of(field) for field in collection if field.name == FIELD))

    return KernelCreator


@cache
def creators() -> tuple[object, ...]:
    """Creators of all plugins, registered with TensorRT-RTX; a second call changes nothing.

    Raises EnvironmentLacksError where tensorrt_rtx cannot be loaded.
    """
    trt = rtx_loader.load()
    creator, registry = creator_class(trt), trt.get_plugin_registry()
    of_all = tuple(creator(name) for name in PLUGINS.values())
    for one in of_all:
        registry.register_creator(one, NAMESPACE)
    return of_all
