"""Load a Diffusion Transformer from a folder, the hub's cache or the bundled zoo, and call it by named inputs.

Weights are memory-mapped. Linears to quantize keep the file's type in large models and are upcast at use, so a model
of 611 M parameters in fp16 takes 1.2 GB of evictable page cache and no float32 copy. Kept weights are rounded to fp16,
the type in which an engine stores them, so that the float model, the reference and every engine share their values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import shown
from export.errors import ModelError
from export.formats.operands import HALF_ROUNDING
from export.models.adapters import PEFT_CONFIG, Adapter, merged, merged_sha256
from export.models.config import FILE as CONFIG
from export.models.config import (
    OLDER_CLASS,
    REFUSALS,
    SUCCESSORS,
    defaults_of,
    least_parameters,
    read_config,
    refused,
    unread_keys,
)
from export.models.description import GENERATION_FILE, Description, sample_inputs
from export.models.families import FAMILIES, TEXT_PARTS, WITHOUT_HEAD, Config, Family, Half
from export.models.quantized_files import unread
from export.models.read_weights import Weights, read_weights
from export.models.sources import find
from export.models.transformers_config import completed, config_object, text_part
from export.models.weights import (
    ADAPTER_FILES,
    MERGE,
    WEIGHTS_FILE,
    WeightsFiles,
    find_weights,
    weights_file,
    what_instead,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.models.torch_modules import Denoiser

__all__ = ["LinearRef", "LoadedModel", "denoiser", "float_linears", "load", "sample_inputs", "save_kept"]

logger = logging.getLogger(__name__)
# Kept weights of at least so many numbers stay in fp16: of a table that is only looked up (a vocabulary's) the rows are
# widened that are looked up, and a block's linear (modulation is a quarter of FLUX.1's parameters) while it is used.
LARGE_ELEMENTS = 2**24
ROWS_AT_ONCE = 4096
# Below this many bytes in float32 a model is simply held in float32; above, 16-bit linears are upcast at use.
RESIDENT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LinearRef:
    """One linear to quantize: module path, layer kind, module (weight [N, K], fp32 or the file's type)."""

    name: str
    kind: str
    module: nn.Linear


@dataclass(frozen=True)
class LoadedModel(Description):
    """A denoiser in memory. `module` is in eval mode and computes in float32; `notes` are things a user should know.

    `used` are the names of the tensors in its files that are part of it, `ignored` those that are not, and why.
    `adapters` are merged into it, and `sha256` stands for them, too.
    """

    module: nn.Module
    revision: str
    sha256: str
    files: WeightsFiles
    notes: tuple[str, ...] = field(default=())
    used: tuple[str, ...] = field(default=())
    ignored: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = field(default=())

    @cached_property
    def config_sha256(self) -> str:
        """Hash of the configuration without notes on its origin; the same weights with another are another model."""
        stated = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

    @cached_property
    def parameters(self) -> int:
        """How many numbers the denoiser holds."""
        return sum(tensor.numel() for tensor in self.module.parameters())

    def linears(self) -> list[LinearRef]:
        """The linears to quantize, in module order."""
        paths = ((path, part, self.family.kind_of(path)) for path, part in _linears(self.module))
        return [LinearRef(path, kind, part) for path, part, kind in paths if kind]

    def kept(self) -> list[tuple[str, str]]:
        """(module path, reason) of every linear, convolution and embedding that is not quantized."""
        import torch

        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)
        paths = (path for path, part in self.module.named_modules() if isinstance(part, layers))
        return [(path, self.family.reason_of(path)) for path in paths if not self.family.kind_of(path)]

    def coverage(self) -> str:
        """How much of the model is in the linears to quantize, by its parameters, and what holds the rest, in words."""
        held: dict[str, int] = {}
        for path, reason in self.kept():
            part = self.module.get_submodule(path)
            own = sum(tensor.numel() for tensor in part.parameters(recurse=False))
            held[reason.partition(":")[0]] = held.get(reason.partition(":")[0], 0) + own
        linears = [ref.module for ref in self.linears()]
        quantized = sum(tensor.numel() for part in linears for tensor in part.parameters(recurse=False))
        held["norms and tables"] = self.parameters - quantized - sum(held.values())
        kept = ", ".join(
            f"{reason} {count / self.parameters:.1%}" for reason, count in sorted(held.items(), key=lambda row: -row[1])
        )
        share = quantized / self.parameters
        return f"{len(linears)} linears to quantize hold {share:.1%} of {self.parameters:,} parameters; kept: {kept}"


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    import torch

    return [(path, part) for path, part in module.named_modules() if isinstance(part, torch.nn.Linear)]


# --- where a model comes from --------------------------------------------------------------------------------------


def load(
    source: str,
    kept_only: bool = False,
    variant: str = "",
    config: str = "",
    half: Half | None = None,
    keep: Callable[[str], bool] | None = None,
    adapters: Sequence[Adapter] = (),
) -> LoadedModel:
    """Load a denoiser from a diffusers folder (a transformer or a pipeline) or a .safetensors file, `zoo:NAME`, or a
    hub id (OWNER/NAME or OWNER/NAME@REVISION) in the cache.

    variant: which of a folder's weights, as in diffusers ("fp16", "ema"), "" for the plain ones, or the only ones.
    config: the model's config.json, a folder that has it, `zoo:NAME` or a hub id; "" for the one beside the weights.
    half: which of an autoencoder, whose folder may be a pipeline's as well; None for other models.
    keep: whether the linear at a path stays as it is, beside those that the family keeps; None: no other does.
    adapters: merged into a denoiser.
    kept_only: the folder is one of `save_kept`; the linears to quantize are NaN: the model can be exported, not run.
    Raises ModelError if the folder, configuration or weights cannot be used, EnvironmentLacksError for a hub id that
    has not been downloaded.
    """
    root, revision = find(source)
    part = "transformer" if half is None else "vae"
    folder = _model_folder(root, part)
    config_path, remedy = _config_file(config, folder, part)
    values, quantized = _read_config(config_path, remedy)
    family = _family_of(values, config_path, half)
    family = family if keep is None else replace(family, held=keep)
    files = _weights(root, folder, variant)
    files.refuse_damaged()
    if not kept_only:
        _refuse_too_few_bytes(least_parameters(values), files, config_path)
    if adapters and (half is not None or family.library == "transformers"):
        raise ModelError(f"{folder}: {family.class_name} is no denoiser, and only those take --lora; leave it away")
    values = _completed(values, family, config_path)
    module = _build(family, values, config_path, None if kept_only else files)
    if family.quantizes and not any(replace(family, held=Family.held).kind_of(path) for path, _ in _linears(module)):
        raise ModelError(
            f"{folder}: {family.class_name} has no linear in repeated blocks; there is nothing to quantize"
        )
    absent = _quantized_tensors(module, family) if kept_only else set()
    weights = _read(files, values, module, absent, family, quantized)
    tensors = merged(weights.tensors, adapters, module, family.class_name)
    _assign(module, family, tensors | _nan(module, absent))
    logger.info("%s: %s", source, weights)
    for name in weights.used:
        logger.debug("%s: uses %s", source, name)
    notes = _adapters_beside(root, folder, adapters)
    for note in notes:
        logger.warning("%s: %s", source, note)
    digest = merged_sha256(files.sha256(), adapters)
    return LoadedModel(
        family, values, folder, source, module, revision, digest, files, notes, weights.used, weights.ignored,
        tuple(adapters),
    )  # fmt: skip


def _adapters_beside(root: Path, folder: Path, given: Sequence[Adapter]) -> tuple[str, ...]:
    """A note for each adapter that lies beside the model: nothing says whether it is meant to be part of it."""
    paths = {place / name for place in {root, folder} for name in ADAPTER_FILES if (place / name).is_file()}
    own = {file.resolve() for each in given for file in (each.path, each.path.with_name(PEFT_CONFIG))}
    others = sorted(path for path in paths if path.resolve() not in own)
    remedy = f"give its file with --lora, or {MERGE}"
    return tuple(f"{path} is an adapter and is not part of this model; if it should be, {remedy}" for path in others)


def _model_folder(root: Path, part: str) -> Path:
    """part: the folder that the model has in a whole pipeline."""
    if root.is_file():
        return root.parent
    return root / part if (root / part / CONFIG).is_file() else root


def _config_file(config: str, folder: Path, part: str) -> tuple[Path, str]:
    """The file to read the configuration from, and what to do if there is none."""
    if not config:
        remedy = f"give a diffusers {part} folder, or a pipeline with {part}/"
        return folder / CONFIG, f"{remedy}; for a weights file also --config with the model's config.json"
    path, rule = Path(config).expanduser(), "--config takes a config.json, the folder of one, a hub id or zoo:NAME"
    if not path.is_file():
        try:
            path = _model_folder(find(config)[0], part) / CONFIG
        except ModelError as error:
            raise ModelError(f"--config {config!r}: {rule}, and this is none of them ({error})") from error
    return path, rule


def _weights(root: Path, folder: Path, variant: str) -> WeightsFiles:
    if root.is_dir():
        return find_weights(folder, variant)
    if variant:
        raise ModelError(f"{root} is one file, and --variant {variant} chooses between files; give only one of them")
    return weights_file(root)


def _read(
    files: WeightsFiles,
    config: Config,
    module: nn.Module,
    absent: set[str],
    family: Family,
    quantized: bool = False,
) -> Weights:
    """The tensors of `module` but for those in `absent`, with every tensor of the files accounted for. quantized: by
    config.json."""
    shapes = {name: shape for name, shape in _shapes(module).items() if name not in absent}
    positions = getattr(getattr(module, "pos_embed", None), "pos_embed", None)
    return read_weights(files, config, shapes, positions, family.absent, quantized)


def _read_config(path: Path, remedy: str) -> tuple[Config, bool]:
    """The configuration of the float model, and whether it says that the weights are quantized."""
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}; {what_instead(path.parent) or remedy}")
    config = read_config(path)
    if "_class_name" not in config:
        config |= {"_class_name": _transformers_class(config, path)}
    quantization = config.get("quantization_config")
    if quantization:
        if what := unread(quantization):
            fault = f"quantization_config says that the weights are quantized already ({what})"
            raise ModelError(f"{path}: {fault}; give the float model")
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    name = str(config["_class_name"])
    if name in TEXT_PARTS:
        config = dict(text_part(config, name, path))
    if name == OLDER_CLASS:
        name = SUCCESSORS.get(config.get("norm_type", ""), name)
    return {**config, "_class_name": name}, bool(quantization)


def _transformers_class(config: Config, path: Path) -> str:
    """The class that config.json of a transformers model names, or which it has below a head. Raises ModelError where
    it names none."""
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ModelError(
            f"{path}: no _class_name in it, and no one name in architectures; give the folder of a diffusers model or "
            "of a transformers text encoder"
        )
    return WITHOUT_HEAD.get(names[0], names[0])


def _refuse_too_few_bytes(parameters: int, files: WeightsFiles, config: Path) -> None:
    """A parameter takes a byte at least: a file too small for what config.json asks for is another model's."""
    if parameters > files.size_bytes:
        raise ModelError(
            f"{config} asks for {parameters:,} parameters or more, its weights have {files.size_bytes:,} bytes; "
            "config.json and the weights must belong together"
        )


def _family_of(config: Config, path: Path, half: Half | None = None) -> Family:
    """The row of the class, which may have to be learned. Raises ModelError where it cannot be, or not by its half."""
    name = config["_class_name"]
    rows = [family for family in FAMILIES.values() if family.class_name == name and family.matches(config)]
    if family := next((family for family in rows if family.half == half), None):
        return family
    if half is not None:
        known = ", ".join(dict.fromkeys(row.class_name for row in FAMILIES.values() if row.half is not None))
        raise ModelError(f"{path}: {name} is not an autoencoder that is known here, which are {known}")
    if rows:
        recipes = " or ".join(f"--engine {row.name}" for row in rows)
        raise ModelError(f"{path}: {name} is an autoencoder, of which each half is built by itself; use {recipes}")
    from export.models.recorded import recorded_family

    if "architectures" in config:
        rows = [row for row in FAMILIES.values() if row.library == "transformers"]
        encoders = ", ".join((*(row.class_name for row in rows), *WITHOUT_HEAD))
        raise ModelError(
            f"{path}: {name} of transformers is not a text encoder that is known here, which are {encoders}"
        )
    return recorded_family(name, config, path)


# --- module and weights --------------------------------------------------------------------------------------------


# Numbers that are read of every configuration, beside what the constructor reads.
NUMBERS = ("in_channels", "patch_size", "sample_size")


def _completed(config: Config, family: Family, path: Path) -> Config:
    """The configuration with the numbers that it leaves to the class, which must read all of its keys."""
    if family.library == "transformers":
        return completed(config, family.class_name, path)
    unread_keys(config, family.class_name, path, NUMBERS)
    defaults = defaults_of(family.class_name)
    if family.half is not None:
        return _completed_autoencoder({**defaults, **config}, path)
    if family.recordings is not None:
        return {**defaults, **config}
    numbers = {key: config.get(key, defaults.get(key)) for key in NUMBERS}
    for key, value in numbers.items():
        if type(value) is not int:
            raise ModelError(f"{path}: {key} is {value!r}; {family.class_name} needs a number")
    return {**config, **numbers}


# Kinds of block of an autoencoder, by the key that lists them.
KNOWN_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def _completed_autoencoder(config: Config, path: Path) -> Config:
    """The configuration, whose blocks are of the kind that is compiled. Raises ModelError naming another."""
    levels = len(config["block_out_channels"])
    for key, known in KNOWN_BLOCKS.items():
        if list(config[key]) != [known] * levels:
            raise ModelError(
                f"{path}: {key} is {shown(config[key])}; an autoencoder of {levels} levels is compiled with {known} in "
                "each"
            )
    return config


def _build(family: Family, config: Config, path: Path, files: WeightsFiles | None) -> nn.Module:
    """The module without memory for its parameters (on torch's meta device), with its position tables filled in.

    files: the weights, which must be large enough."""
    import diffusers
    import torch

    from export.models.autoencoder_modules import exportable_half
    from export.models.torch_modules import set_resolution, use_masked_attention

    if family.library == "transformers":
        return _build_text_encoder(family, config, path, files)
    cls = getattr(diffusers, family.class_name)
    parameters = defaults_of(family.class_name)
    known = {key: value for key, value in config.items() if key in parameters}
    try:
        with torch.device("meta"):
            module = cls(**known)
    except REFUSALS as error:
        raise refused(error, family.class_name, path) from error
    if files is not None:
        _refuse_too_few_bytes(sum(tensor.numel() for tensor in module.parameters()), files, path)
    if family.half is not None:
        return exportable_half(module, family.absent)
    sides = (config["sample_size"],) * 2 if family.recordings is None else family.recordings.own_cells
    set_resolution(module, *sides)
    use_masked_attention(module)
    module = _with_tables(module, cls, known)
    if family.recordings is not None:
        family.recordings.make_traceable(module)
    return module


def _build_text_encoder(family: Family, config: Config, path: Path, files: WeightsFiles | None) -> nn.Module:
    import torch
    import transformers

    stated = config_object(config, family.class_name, path)
    try:
        with torch.device("meta"):
            module = getattr(transformers, family.class_name)(stated)
    except REFUSALS as error:
        raise refused(error, family.class_name, path) from error
    if files is not None:
        _refuse_too_few_bytes(sum(tensor.numel() for tensor in module.parameters()), files, path)
    return family.exportable(module)


def _with_tables(module: nn.Module, cls: type[nn.Module], known: Config) -> nn.Module:
    """Tables that no file holds must be computed, be they buffers or plain attributes: where any is left without values
    the model is built a second time, with values in all but its parameters."""
    from export.models.torch_modules import parameters_on_meta

    saved = set(module.state_dict())
    buffers = {path for path, buffer in module.named_buffers() if buffer.is_meta} - saved
    plain = _plain_tensors(module)
    if buffers or plain:
        with parameters_on_meta():
            whole = cls(**known)
        values = dict(whole.named_buffers())
        for path in buffers:
            parent, _, name = path.rpartition(".")
            module.get_submodule(parent).register_buffer(name, values[path], persistent=False)
        for path, name in plain:
            setattr(module.get_submodule(path), name, getattr(whole.get_submodule(path), name))
    return module


def _plain_tensors(module: nn.Module) -> list[tuple[str, str]]:
    """(module path, name) of attributes that are tensors without values, and neither parameters nor buffers."""
    import torch

    return [
        (path, name)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _quantized_tensors(module: nn.Module, family: Family) -> set[str]:
    """Names of the tensors of all linears to quantize."""
    linears = (path for path, _ in _linears(module) if family.kind_of(path))
    return {f"{path}.{name}" for path in linears for name, _ in module.get_submodule(path).named_parameters()}


def _nan(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """Tensors of NaN that take no memory, in the shapes of those of `module`."""
    import torch

    return {name: torch.full((), torch.nan).expand(shape) for name, shape in _shapes(module).items() if name in names}


def save_kept(model: LoadedModel, folder: Path) -> None:
    """Write what the model holds beside the linears to quantize, as in its files: with a checkpoint, all of an export.

    The folder is there only when it is whole. Raises ModelError where the files are others than the model was loaded
    from.
    """
    from safetensors.torch import save_file

    _refuse_changed(model)
    stored = _read(model.files, model.config, model.module, set(), model.family).tensors
    absent = _quantized_tensors(model.module, model.family)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kept = {key: tensor for key, tensor in stored.items() if key not in absent}
    tensors = merged(kept, model.adapters, model.module, model.family.class_name)
    # One tensor of a file may be several of the model (DiT's own files have one embedder for all blocks).
    firsts = {tensor.data_ptr(): key for key, tensor in reversed(tensors.items())}
    own = {key: t.contiguous() if firsts[t.data_ptr()] == key else t.clone() for key, t in tensors.items()}
    save_file(own, partial / WEIGHTS_FILE)
    (partial / CONFIG).write_text(json.dumps(dict(model.config), indent=1), encoding="utf-8")
    if (model.folder / GENERATION_FILE).is_file():  # says what a cell of the image is
        shutil.copyfile(model.folder / GENERATION_FILE, partial / GENERATION_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _refuse_changed(model: LoadedModel) -> None:
    """Raise ModelError, naming it, for a file that is no longer what the model was loaded from."""
    for adapter in model.adapters:
        if replace(adapter).sha256 != adapter.sha256:  # of a new one, as each remembers its own
            raise ModelError(f"adapter {adapter.path} has changed since the model was loaded with it; start again")
    if merged_sha256(model.files.sha256(), model.adapters) != model.sha256:
        named = ", ".join(str(model.files.folder / name) for name in model.files.names)
        raise ModelError(f"{named}: changed since the model was loaded; start again")


def _assign(module: nn.Module, family: Family, tensors: dict[str, torch.Tensor]) -> None:
    """Put checked tensors into the module, each in the type it is used in, and make it ready to run."""
    import torch

    from export.models.torch_modules import UpcastEmbedding, UpcastLinear, linear_like

    linears = {path: part for path, part in _linears(module) if family.kind_of(path)}
    resident = 4 * sum(tensor.numel() for tensor in tensors.values()) <= RESIDENT_BYTES
    for path, part in linears.items():
        if not resident and tensors[f"{path}.weight"].itemsize < 4:
            module.set_submodule(path, linear_like(part, part.weight, UpcastLinear))
    halves: dict[str, torch.Tensor] = {}
    for path, part in _large_kept(module, linears):
        if (stored := half_weight(tensors[f"{path}.weight"])) is not None:
            halves[f"{path}.weight"] = stored
            is_table = isinstance(part, torch.nn.Embedding)
            module.set_submodule(
                path,
                UpcastEmbedding(*part.weight.shape, device="meta") if is_table
                else linear_like(part, part.weight, UpcastLinear),
            )  # fmt: skip
    typed = {key: _typed(key, value, linears, resident) for key, value in tensors.items() if key not in halves}
    module.load_state_dict(typed | halves, assign=True)
    module.requires_grad_(False).eval()


def _large_kept(module: nn.Module, quantized: Mapping[str, nn.Linear]) -> list[tuple[str, nn.Embedding | nn.Linear]]:
    """Tables, and linears of repeated blocks; of one outside of them, code may ask for its type and compute in that."""
    import torch

    parts = [
        (path, part) for path, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding)
        or (isinstance(part, torch.nn.Linear) and path not in quantized and re.search(r"\.\d+\.", path))
    ]  # fmt: skip
    return [(path, part) for path, part in parts if part.weight.numel() >= LARGE_ELEMENTS]


def half_weight(tensor: torch.Tensor) -> torch.Tensor | None:
    """A weight [rows, C] in fp16, the file's own where it is of that type; None by the rule of `stored_value`. It is
    not copied to float32."""
    import torch

    if tensor.dtype == torch.float16:
        return tensor
    halves, error, power = tensor.half(), 0.0, 0.0
    for half, part in zip(halves.split(ROWS_AT_ONCE), tensor.split(ROWS_AT_ONCE), strict=True):
        error += float((half.float() - part.float()).double().square().sum())
        power += float(part.double().square().sum())
    return halves if error**0.5 <= HALF_ROUNDING * power**0.5 else None


def _typed(key: str, tensor: torch.Tensor, linears: Mapping[str, nn.Linear], resident: bool) -> torch.Tensor:
    path, _, name = key.rpartition(".")
    if path not in linears:
        return stored_value(key, tensor)
    return tensor if name == "weight" and not resident else tensor.float()


def stored_value(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A kept weight as float32 with the values an engine stores: rounded to fp16 where fp16 can hold it.

    The rule: no overflow, and the rounding error within half a unit of fp16's 11 significant bits (2^-11 of the norm),
    which fails when values fall under fp16's range.
    """
    exact = tensor.float()
    rounded = exact.half().float()
    if bool((rounded - exact).norm() <= HALF_ROUNDING * exact.norm()):
        return rounded
    logger.info("%s: does not fit into fp16, kept in fp32", key)
    return exact


# --- running -------------------------------------------------------------------------------------------------------


def denoiser(model: LoadedModel, replacements: Mapping[str, nn.Module] | None = None) -> Denoiser:
    """torch module that takes the family's inputs, by name or in table order, and returns the output tensor.

    `replacements` puts other modules at given paths, in a copy that shares all other tensors with `model`.
    """
    from export.models.torch_modules import Denoiser, with_modules

    module = model.module if replacements is None else with_modules(model.module, replacements)
    return Denoiser(module, model.family, tuple(row.name for row in model.inputs)).eval()


def float_linears(model: LoadedModel) -> dict[str, nn.Linear]:
    """float32 copies of the linears that are upcast at use, as `replacements`: more memory, but no upcast per call."""
    from export.models.torch_modules import UpcastLinear, linear_like

    upcast = [(path, part) for path, part in _linears(model.module) if isinstance(part, UpcastLinear)]
    return {path: linear_like(part, part.weight.float()) for path, part in upcast}
