"""What a user would run without us, each prepared for a process of its own; contest.py measures them.

THE table of peers is PEERS, each in the configuration that is best for it. One that is not installed is left out and
named, with the command that installs it; one that fails (is not converted, runs out of memory) is named with its words.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from typing_extensions import TypedDict

from export.errors import EnvironmentLacksError, RecipeError
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.bench.convert import NNCF, ONNX_FP32, ONNX_INT8, ConversionError, FloatModel, prepared
from pipeline.bench.runners import Precision, Spec
from pipeline.bench.worker import Worker, load_arrays

logger = logging.getLogger(__name__)
EXTRA = "peers"


@dataclass(frozen=True)
class Peer:
    """conversion: the file that it runs, a key of convert.CONVERSIONS; None: it loads the float model itself.

    modules: what must be installed beside the compiler. instructions: CPU flags of which it needs one to make sense.
    """

    runtime: str
    words: str
    conversion: str | None = None
    precision: Precision = "float32"
    properties: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()


BF16 = ("avx512_bf16", "amx_int8")


def _dynamic(group_size: int) -> dict[str, str]:
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group_size)}


PEERS = {
    "torch_fp32": Peer("torch", "PyTorch, eager"),
    "torch_bf16": Peer("torch", "PyTorch, eager, autocast to bfloat16", precision="bfloat16", instructions=BF16),
    "torchao_int8": Peer(
        "torch", "torchao, INT8 weights and dynamic INT8 activations, compiled by Inductor", precision="int8",
        modules=("torchao",),
    ),
    "onnxruntime_fp32": Peer("onnxruntime", "ONNX Runtime", ONNX_FP32),
    "onnxruntime_int8": Peer("onnxruntime", "ONNX Runtime, its dynamic INT8 quantization", ONNX_INT8),
    "openvino_int8": Peer(
        "openvino", "OpenVINO, INT8 by NNCF: static, SmoothQuant", "openvino_int8", modules=NNCF
    ),
    "openvino_int8_weights": Peer(
        "openvino", "OpenVINO, INT8 weights, activations quantized dynamically in groups of 128",
        "openvino_int8_weights", properties=_dynamic(128), modules=NNCF,
    ),
    "openvino_int4_weights": Peer(
        "openvino", "OpenVINO, INT4 weights in groups of 64, activations quantized dynamically in groups of 64",
        "openvino_int4_weights", properties=_dynamic(64), modules=NNCF,
    ),
}  # fmt: skip
ALL = "all"


def parse_peers(text: str) -> tuple[str, ...]:
    """Names separated by commas, or "all". Raises RecipeError naming what there is."""
    names = tuple(PEERS) if text == ALL else tuple(filter(None, (name.strip() for name in text.split(","))))
    if unknown := [name for name in names if name not in PEERS] or ([""] if not names else []):
        raise RecipeError(f"peer {unknown[0]!r} is unknown; use {ALL}, or some of {', '.join(PEERS)}")
    return names


def absence(name: str) -> str | None:
    """Why a peer is left out on this machine, with a remedy; None if it is not."""
    peer = PEERS[name]
    try:
        machine.require_compiler(name)
    except EnvironmentLacksError as error:
        return str(error)
    if missing := [module for module in peer.modules if find_spec(module) is None]:
        return f"{name} needs {', '.join(missing)}; install with: pip install 'ditc[{EXTRA}]'"
    if peer.instructions and not set(peer.instructions) & set(machine.cpu_flags()):
        instructions = " or ".join(peer.instructions)
        return f"{name} needs a processor with {instructions}; elsewhere it is emulated, many times slower"
    return None


# --- contestants ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One contestant. is_ours: an engine, which has a row of calls that keep nothing of the condition as well.

    draws: whether the peak memory of drawing a picture is wanted beside that of opening and one call.
    """

    name: str
    spec: Spec
    is_ours: bool = False
    draws: bool = False


class Absences(TypedDict):
    """left_out: peer -> why it was not tried, with a remedy. failed: contestant -> its last words."""

    left_out: dict[str, str]
    failed: dict[str, str]


def entries(
    names: Iterable[str], model: FloatModel, sha256: str, folder: Path, threads: int
) -> tuple[list[Entry], Absences]:
    """The peers called `names`, what they run prepared in `folder`, where a second call finds it.

    sha256: of the model's weights.
    """
    ready: list[Entry] = []
    absences: Absences = {"left_out": {}, "failed": {}}
    for name in names:
        if reason := absence(name):
            absences["left_out"][name] = reason
            continue
        peer = PEERS[name]
        try:
            path = None if peer.conversion is None else prepared(peer.conversion, model, sha256, folder)
        except ConversionError as error:
            absences["failed"][name] = str(error)
            continue
        where = None if path is None else str(path)
        source = model if path is None else None
        spec = Spec(peer.runtime, threads, where, None, source, peer.precision, peer.properties)
        ready.append(Entry(name, spec, draws=name == "onnxruntime_int8"))
    for name, reason in (absences["left_out"] | absences["failed"]).items():
        logger.warning("%s is not measured: %s", name, reason)
    return ready, absences


def reference(model: FloatModel, inputs: Path, output: Path, threads: int) -> Arrays:
    """Outputs of the float model in float32, by PyTorch; in the file `output`, where a second call finds them.

    Raises WorkerError.
    """
    if not output.is_file():
        partial = output.with_suffix(".part.npz")
        worker = Worker(Spec("torch", threads, model=model), inputs, output.with_suffix(".log"))
        worker.call(output=partial)
        worker.close()
        partial.replace(output)
    return load_arrays(output)
