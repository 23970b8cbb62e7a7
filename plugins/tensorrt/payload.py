"""What a plugin carries through the engine file: its spec and the machine code for each GPU, as text.

The same text is the attribute of the ONNX node, the field that the builder serializes and the field that the runtime
hands back; the edge machine needs neither Triton nor a compiler. Layers of equal sizes share machine code: the first
of them carries it, the others name it by its hash. All plugins of an engine are made before any is used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from export.errors import ContractError, EnvironmentLacksError
from plugins.gpu import compile
from plugins.gpu.compile import SHARED_KIB, TARGETS, Compiled, Request, compile_kernels
from plugins.gpu.table import KERNELS, Kernel, Spec, Tile, kernel
from plugins.gpu.tiles import WARP

logger = logging.getLogger(__name__)
Form = Literal["cubin", "ptx"]
SCHEMA_VERSION = 1
# What one plugin's text may unpack to: a damaged or hostile one must not fill the memory.
LARGEST_BYTES = 2**28
# Kernel of the table -> name of its plugin. Namespace and version are part of an engine: change them only together
# with what the fields mean.
PLUGINS = {row.name: row.plugin for row in KERNELS if row.plugin is not None}
NAMESPACE, VERSION, FIELD = "fpq", "1", "payload"


@dataclass(frozen=True)
class Variant:
    """Machine code of a kernel for one GPU and tile.

    sm: compute capability. rows: the most rows for which the tile is the choice; the largest variant takes any more.
    tile: fields of the kernel's tile. types: Triton's type of every argument of `entry`, those that Triton appends
    included. threads, shared_bytes: of a launch.
    """

    sm: int
    rows: int
    tile: Mapping[str, int]
    entry: str
    types: tuple[str, ...]
    threads: int
    shared_bytes: int
    code: bytes


# Machine code that plugins of this process carry, by its hash.
_CARRIED: dict[str, tuple[Variant, ...]] = {}


@dataclass(frozen=True)
class Payload:
    """kernel: name in the table of kernels; spec: of that row's type; variants: for each GPU, by rows.

    code: hash of the variants that another plugin carries; '' where they are here (as the text has it).
    """

    kernel: str
    spec: Spec
    variants: tuple[Variant, ...]
    code: str = ""

    def shared(self) -> Payload:
        """The same without its machine code, which a plugin that has it must carry."""
        text = json.dumps([_plain(variant) for variant in self.variants], sort_keys=True)
        return Payload(self.kernel, self.spec, (), hashlib.sha256(text.encode()).hexdigest())

    def complete(self) -> Payload:
        """The same with its machine code. Raises ContractError if no plugin has brought it."""
        if not self.code:
            return self
        if self.code not in _CARRIED:
            raise ContractError(
                f"{self.kernel}: no plugin of the engine carries the code {self.code[:12]}; build the engine again"
            )
        return Payload(self.kernel, self.spec, _CARRIED[self.code])

    @property
    def row(self) -> Kernel:
        return kernel(self.kernel)

    @property
    def sms(self) -> tuple[int, ...]:
        return tuple(sorted({variant.sm for variant in self.variants}))

    def variant(self, sm: int, rows: int) -> Variant:
        """The machine code for `rows` rows on GPU `sm`. Raises EnvironmentLacksError for another GPU."""
        fitting = sorted((v for v in self.variants if v.sm == sm), key=lambda v: v.rows)
        if not fitting:
            remedy = f"build the engine again with --target-sm {sm}"
            raise EnvironmentLacksError(
                f"{self.kernel} holds code for SM {list(self.sms)}, this GPU is SM {sm}; {remedy}"
            )
        return next((v for v in fitting if rows <= v.rows), fitting[-1])

    def tile(self, variant: Variant) -> Tile:
        """The tile of a variant as the kernel's own type."""
        return type(self.row.tile(self.spec, variant.rows, variant.sm))(**variant.tile)

    def to_text(self) -> str:
        """Plain ASCII."""
        document = {"schema": SCHEMA_VERSION, "kernel": self.kernel, "spec": asdict(self.spec), "code": self.code}
        document["variants"] = [_plain(variant) for variant in self.variants]
        return base64.b64encode(zlib.compress(json.dumps(document, sort_keys=True).encode(), 9)).decode()


def _plain(variant: Variant) -> dict[str, object]:
    return {**asdict(variant), "code": base64.b64encode(variant.code).decode()}


def from_text(text: str) -> Payload:
    """Inverse of `Payload.to_text`; code that the text carries is there for others from now on.

    Raises ContractError for anything else.
    """
    try:
        packed = zlib.decompressobj()
        plain = packed.decompress(base64.b64decode(text, validate=True), LARGEST_BYTES)
        if not packed.eof:
            raise ValueError(f"more than {LARGEST_BYTES} bytes, or cut short")
        document = json.loads(plain)
        if document["schema"] != SCHEMA_VERSION:
            raise ValueError(f"schema {document['schema']}, this version reads {SCHEMA_VERSION}")
        spec = kernel(document["kernel"]).spec(**_tuples(document["spec"]))
        payload = Payload(
            document["kernel"], spec, tuple(_variant(row) for row in document["variants"]), document["code"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ContractError(f"a plugin's payload cannot be read ({error}); build the engine again") from error
    if payload.variants:
        _CARRIED[payload.shared().code] = payload.variants
    return payload


def _variant(row: dict[str, Any]) -> Variant:
    return Variant(**{**row, "types": tuple(row["types"]), "code": base64.b64decode(row["code"], validate=True)})


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


# --- compiling ------------------------------------------------------------------------------------------------------


def compile_problems(sms: Sequence[int]) -> list[str]:
    """Why the kernels cannot be compiled here for these GPUs, with the remedy."""
    unknown = [sm for sm in sms if sm not in TARGETS]
    problems = [f"the kernels are not compiled for SM {sm}, only for {', '.join(map(str, TARGETS))}" for sm in unknown]
    return [*problems, *compile.problems()]


def compile_payload(name: str, spec: Spec, rows: Sequence[int], sms: Sequence[int], form: Form = "cubin") -> Payload:
    """The kernel for every GPU of `sms` and every tile that its heuristics choose for `rows`.

    form: machine code, which runs on that very GPU, or PTX. Raises EnvironmentLacksError without a usable triton,
    ContractError where a spec fits no kernel or the machine code cannot run.
    """
    row = kernel(name)
    chosen = [(sm, most, tile) for sm in sms for most, tile in _tiles(row, spec, rows, sm)]
    codes = compile_kernels([Request(row, spec, sm, tile) for sm, _, tile in chosen])
    variants = (
        _compiled_variant(sm, most, tile, code, form) for (sm, most, tile), code in zip(chosen, codes, strict=True)
    )
    return Payload(name, spec, tuple(variants))


def _tiles(row: Kernel, spec: Spec, rows: Sequence[int], sm: int) -> list[tuple[int, Tile]]:
    """(most rows, tile) with neighbours of the same tile as one."""
    tiles: list[tuple[int, Tile]] = []
    for most in sorted(set(rows)):
        tile = row.tile(spec, most, sm)
        if tiles and tiles[-1][1] == tile:
            tiles.pop()
        tiles.append((most, tile))
    return tiles


def _compiled_variant(sm: int, rows: int, tile: Tile, code: Compiled, form: Form) -> Variant:
    lacking = SHARED_KIB[sm] * 1024 - code.shared_bytes
    if lacking < 0:
        raise ContractError(f"{code.name} needs {-lacking} bytes of shared memory more than SM {sm} has; tile {tile}")
    for problem in code.problems():
        logger.warning("%s", problem)
    types = tuple(kind for _, kind in code.arguments) + ("*i8",) * code.unused_parameters
    text = code.cubin if form == "cubin" else code.ptx.encode()
    return Variant(sm, rows, vars(tile), code.name, types, code.num_warps * WARP, code.shared_bytes, text)
