"""The ONNX that a builder got, kept beside its engine for trtexec, Polygraphy, Netron; no engine is loaded from it."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from export.documents import sha256
from export.onnx_files import read_graph
from pipeline.backends.base import DATA, MODEL, LoweredGraph
from pipeline.backends.graph_files import link_or_copy
from pipeline.backends.tensorrt.build import shape_bounds
from pipeline.backends.tensorrt.engine import KeepOnnx
from pipeline.backends.tensorrt.plugin_graph import plugin_graph
from plugins.gpu.tiles import prefers_integers
from plugins.tensorrt.payload import FIELD

logger = logging.getLogger(__name__)
# A graph has all weights as the engine has them, and so about the engine's size: kept, it doubles what the target
# weighs on the disk, on the hub and in every check of hashes. Up to 64 MiB, from where on bundles count as large
# (bundle/in_place.py), that is a second of a download and a tenth of one of hashing, and all bundled models are below.
# PixArt-XL's engine has 657 MiB: nobody should have to fetch as much again in order to draw.
SMALL_BYTES = 64 * 2**20


def keep(graph: Path, folder: Path, wanted: KeepOnnx) -> None:
    """Keep the builder's graph, and the weights beside it, as model.onnx and model.onnx.data in the engine's folder.

    wanted: "auto" keeps a graph of at most SMALL_BYTES, and the log says so of a larger one.
    """
    data = graph.with_name(DATA)
    size = sum(path.stat().st_size for path in (graph, data))
    if wanted == "auto" and size > SMALL_BYTES:
        told = "the builder's ONNX has %.0f MiB and is not kept, above %.0f MiB; --set %s.keep_onnx=yes keeps it"
        logger.info(told, size / 2**20, SMALL_BYTES / 2**20, folder.name)
    elif wanted != "no":
        link_or_copy(graph, folder / MODEL)
        link_or_copy(data, folder / DATA)


def kept_names(folder: Path) -> tuple[str, ...]:
    """Names of what `keep` left in the engine's folder."""
    return tuple(name for name in (MODEL, DATA) if (folder / name).is_file())


def other_graph(folder: Path, lowered: LoweredGraph) -> str | None:
    """Why the graph in the engine's folder is not `lowered`, to the bit; None where it is, or where none is kept."""
    names = kept_names(folder)
    other = [name for name in names if sha256(folder / name) != sha256(lowered.path.with_name(name))]
    return f"{folder / other[0]} is not what the portable model lowers to" if other else _half_kept(folder, names)


def other_plugins(folder: Path, lowered: LoweredGraph, batch_size: int, sms: tuple[int, ...]) -> str | None:
    """As `other_graph`, where the builder got the graph of fused ops with plugins in their places, for GPUs `sms`.

    What its plugins carry, specifications and machine code, is not compared: that is compiled, here perhaps by another
    release of the compiler.
    """
    names = kept_names(folder)
    if len(names) < 2:
        return _half_kept(folder, names)
    if sha256(folder / DATA) != sha256(lowered.path.with_name(DATA)):
        return f"{folder / DATA} is not what the portable model lowers to"
    expected, found = read_graph(lowered.path), read_graph(folder / MODEL)
    kernels = plugin_graph(
        expected, shape_bounds(expected, batch_size), lambda node: (node.kernel, {}), prefers_integers(sms)
    )
    plugins = {kernel.name for kernel in kernels}
    for graph in (expected, found):
        for node in graph.graph.node:
            if node.name in plugins:
                _strip(node)
    if expected.SerializeToString(deterministic=True) != found.SerializeToString(deterministic=True):
        return f"{folder / MODEL} is not the graph of plugins that the portable model lowers to"
    return None


def _strip(node: onnx.NodeProto) -> None:
    """Leave of a plugin its name and what it reads and gives."""
    node.op_type = FIELD
    del node.attribute[:]


def _half_kept(folder: Path, names: tuple[str, ...]) -> str | None:
    return f"{folder} has {names[0]} alone, without its other half" if len(names) == 1 else None
