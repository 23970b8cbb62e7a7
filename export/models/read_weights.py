"""From weights files to the tensors of a diffusers class: every tensor of the files is used, or harmless, or refused.

A tensor that the class does not take may change what the model draws (an adapter that was not merged, a norm of
queries, a bias), so that leaving it out would build an engine of another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from export.errors import ModelError
from export.formats.operands import ROUNDING
from export.models import float8, nvfp4
from export.models.families import Config
from export.models.original_layouts import LAYOUTS, MARK, WITHOUT_MARK, plain_names, translated
from export.models.weights import GIVE_ADAPTER, WeightsFiles

if TYPE_CHECKING:
    import torch

TOGETHER = "config.json and the weights must belong together"
OF_TRAINING = "stands for dropped captions while training; a denoiser is given its captions"
OF_A_RANGE = "range of the layer's input in a quantized run; the weight does not depend on it"
# What a weight may be, once float8 and float64 have become one of them.
TYPES = ("torch.float16", "torch.bfloat16", "torch.float32")
# Tensors without an effect on the denoiser: regex of the name -> why.
HARMLESS = (
    # Older diffusers files of PixArt-alpha, and the original ones, keep the embedding that classifier-free training
    # puts in the place of a caption. Neither class reads it in a call that brings its captions.
    (r"(caption_projection|y_embedder)\.y_embedding", OF_TRAINING),
    # BERT's, which the pipelines of diffusers leave alone.
    (r"pooler\.dense\.(weight|bias)", "pools the first token's row, which no pipeline reads"),
    # Of a language model, which is read as a text encoder.
    (r"lm_head\.weight", "makes words of hidden states, which no pipeline reads"),
    # An empty tensor whose type tells ComfyUI that the weights have scales; each scale is read by its own name.
    (r"scaled_fp8", "says only that weights have scales"),
    # x / s * s = x without the quantizer of activations, which belongs to the run and not to the model.
    (r".*\.(input_scale|scale_input|input_global_scale)", OF_A_RANGE),
)
# Another name of a tensor -> its own, in files of transformers' encoders: one of the two stands there, or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
# What stands before every name of a class in files of older versions of transformers, or of the model that it is a part
# of; one after the other.
OUTER_PREFIXES = {"CLIPTextModel": ("text_model.",), "Qwen2_5_VLTextModel": ("model.", "language_model.")}
# The places of tokens from 0 on, which older versions of transformers save.
PLACES = r"(text_model\.)?embeddings\.position_ids"
# The fixed table of positions: harmless where it holds what the class computes by itself.
POSITIONS = r"pos_embed(\.pos_embed)?"
# sin and cos of an angle of at most 256 in float32; rounding to the file's type comes on top.
ANGLE_ERROR = 256 * ROUNDING
# The block that a tensor belongs to, after the name of its list of blocks.
BLOCK = r"(.*?(?:blocks?|layers?)\.)\d+\."
# Keys that say how many of them there are.
LAYER_COUNTS = ("num_layers", "num_hidden_layers")
# Biases of attention; of a model that has them by config.json, such a name is wrong for another reason.
ATTENTION_BIAS = r".*\.(attn\d?|cross_attn|self_attn)\..*\.bias"
# Regex of the name -> what it is, and the remedy. In order: what says most comes first.
REFUSED = (
    (
        r".*((?<!svdquant_)lora|hada_|lokr_|dora_|oft_|base_layer|magnitude_vector|\.alpha$).*",
        "part of an adapter that was not merged",
        GIVE_ADAPTER,
    ),
    (
        r".*(_amax|_quantizer\..*|_zero_point|zeros|g_idx|comfy_quant|absmax|quant_map|quant_state.*|_scale_2|pre_quant_scale|svdquant_lora_[ab])",
        "part of a quantized weight in a form that is not read",
        "give the float model",
    ),
    (
        r".*(_scale|_scale_inv|\.scale_weight)",
        "a scale that no weight of the file goes with",
        "give the float model, or float8 weights with one scale for each tensor or output channel",
    ),
    (
        r".*\.attn1?\.(sr|norm)\..*",
        "a part of key and value compression, which the class does not compute",
        "give a model without it",
    ),
    (
        r".*(norm_[qk]|[qk]_norm)\..*",
        "a norm of queries or keys, which the class does not compute with this config.json",
        "give a model without them, or the class and config.json that have them",
    ),
    (
        ATTENTION_BIAS,
        "a bias of a layer that has none by config.json (attention_bias: false)",
        'set "attention_bias": true in config.json if the model was trained with it',
    ),
)


@dataclass(frozen=True)
class Stored:
    """A tensor with the file and the name that it came under."""

    path: Path
    key: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """Tensors by the names of the diffusers class; `used` and `ignored` (-> why) cover every name in the files."""

    tensors: Mapping[str, torch.Tensor]
    used: tuple[str, ...]
    ignored: Mapping[str, str]

    def __str__(self) -> str:
        count = len(self.used) + len(self.ignored)
        shown = "; ".join(f"{name} ({why})" for name, why in list(self.ignored.items())[:8])
        more = f"; and {len(self.ignored) - 8} more" if len(self.ignored) > 8 else ""
        return f"{len(self.used)} of {count} tensors used" + (
            f", harmless and left out: {shown}{more}" if shown else ""
        )


def read_weights(
    files: WeightsFiles,
    config: Config,
    expected: Mapping[str, tuple[int, ...]],
    positions: torch.Tensor | None = None,
    absent: Collection[str] = (),
    quantized: bool = False,
) -> Weights:
    """Every tensor in `expected` (name -> shape), checked: there, of that shape, floating point and finite.

    config: of the class, with _class_name. positions: the table of positions that the class computes, or None.
    absent: parts of the class that the model does without, whose tensors are ignored. quantized: whether config.json
    says that weights are, so that every float8 one has a scale.
    Tensors keep the file's type and stay mapped, but float8 becomes fp16 (float32 with scales), NVFP4 float32. Names of
    the models' own repositories, and prefixes of wrappers, are understood. Raises ModelError naming file and tensor.
    """
    import torch

    stored, ignored = _unwrapped(files)
    named = _in_diffusers_names(_without_scales(stored, quantized), config)
    keys = {row.key for row in stored.values()}
    for name, row in list(named.items()):
        if (part := name.partition(".")[0]) in absent:
            ignored[row.key] = f"of {part}, which the model does without"
            del named[name]
            continue
        if name not in expected:
            if (owner := TIED.get(name)) in expected and owner not in named:
                named[str(owner)] = named.pop(name)
                continue
            if owner in expected and torch.equal(row.tensor, named[str(owner)].tensor):
                ignored[row.key] = f"the same as {owner}"
                del named[name]
                continue
            if (why := _harmless(name, row, positions, keys)) is None:
                _refuse(name, named, expected, config)
            ignored[row.key] = why
            del named[name]
    _refuse_missing(files, expected, named)
    for name, shape in expected.items():
        _check(named[name], shape)
    tensors = {name: named[name].tensor for name in expected}
    used = tuple(row.key for row in stored.values() if row.key not in ignored)
    return Weights(tensors, used, ignored)


# --- names ---------------------------------------------------------------------------------------------------------


def _unwrapped(files: WeightsFiles) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by name without prefixes, and what belongs to other parts of a pipeline (-> why it is ignored)."""
    held: dict[str, Stored] = {}
    for name, key, tensor in files.tensors():
        if key in held:
            raise ModelError(f"{files.folder / name}: tensor {key} is in {held[key].path.name} too; remove one of them")
        held[key] = Stored(files.folder / name, key, tensor)
    plain = plain_names(held)
    by_name: dict[str, Stored] = {}
    for key, name in plain.items():
        _add(by_name, name, held[key])
    return by_name, {key: "belongs to another part of the pipeline" for key in held if key not in plain}


def _in_diffusers_names(stored: Mapping[str, Stored], config: Config) -> dict[str, Stored]:
    class_name = str(config["_class_name"])
    if class_name in OUTER_PREFIXES:
        plain: dict[str, Stored] = {}
        for name, row in stored.items():
            _add(plain, reduce(str.removeprefix, OUTER_PREFIXES[class_name], name), row)
        return plain
    if class_name not in LAYOUTS or not (MARK in stored or class_name in WITHOUT_MARK):
        return dict(stored)
    named: dict[str, Stored] = {}
    for key, row in stored.items():
        for name, tensor in translated(class_name, key, row.tensor, int(config.get("num_layers", 0))):
            _add(named, name, Stored(row.path, row.key, tensor))
    return named


def _add(named: dict[str, Stored], name: str, row: Stored) -> None:
    if name in named:
        both = f"tensors {named[name].key} and {row.key} are both {name}"
        raise ModelError(f"{row.path}: {both}; remove one of them")
    named[name] = row


# --- float8 and NVFP4 ----------------------------------------------------------------------------------------------


def _without_blocks(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Codes and scales of NVFP4 weights as one float32 weight."""
    weights = dict(stored)
    for name, row in stored.items():
        if not (parts := nvfp4.stored_parts(name)):
            continue
        weight, *of_block = parts
        codes, blocks = (stored[part].tensor if part in stored else None for part in of_block)
        if problem := nvfp4.problem(codes, blocks, row.tensor):
            raise ModelError(f"{row.path}: tensor {row.key} is a scale of NVFP4 and {problem}; give the float model")
        assert codes is not None and blocks is not None
        for part in (name, *of_block):
            del weights[part]
        _add(weights, weight, Stored(row.path, row.key, nvfp4.dequantized(codes, blocks, row.tensor, name)))
    return weights


def _without_scales(stored: Mapping[str, Stored], quantized: bool) -> dict[str, Stored]:
    """Scales multiplied into their float8 and NVFP4 weights; other float8 weights widened."""
    stored = _without_blocks(stored)
    weights = dict(stored)
    for name, row in stored.items():
        if weight_name := float8.weight_of_scale(name):
            weight = weights.get(weight_name)
            if problem := float8.scale_problem(weight and weight.tensor, row.tensor):
                raise ModelError(
                    f"{row.path}: tensor {row.key} is a scale and {problem}; give the float model, or float8 weights "
                    "with one scale for each tensor or output channel"
                )
            assert weight is not None
            weights[weight_name] = Stored(weight.path, weight.key, float8.scaled(weight.tensor, row.tensor))
            del weights[name]
    _refuse_lost_scales(stored, weights, quantized)
    return {name: Stored(row.path, row.key, float8.widened(row.tensor)) for name, row in weights.items()}


def _refuse_lost_scales(stored: Mapping[str, Stored], weights: Mapping[str, Stored], quantized: bool) -> None:
    """Raise ModelError for a float8 weight without a scale where something says that there is one: config.json, the
    range of the layer's input, which files with scales alone have, ComfyUI's mark, or the scale of another matrix."""
    others = [name for name in stored if name == "scaled_fp8" or float8.weight_of_scale(name)]
    for name, row in weights.items():
        if not float8.is_float8(row.tensor):
            continue
        layer = name.rpartition(".")[0]
        marks = [f"{layer}.input_scale", f"{layer}.scale_input", *(others if row.tensor.ndim == 2 else ())]
        signs = [stored[mark].key for mark in marks if mark in stored] + ["quantization_config"] * quantized
        if signs:
            raise ModelError(
                f"{row.path}: tensor {row.key} is float8 without a scale, though {signs[0]} says that it has one; give "
                "the whole file, or the float model"
            )


# --- what the class does not take ----------------------------------------------------------------------------------


def _harmless(name: str, row: Stored, positions: torch.Tensor | None, keys: Container[str]) -> str | None:
    """Why the tensor does not matter beside the others, `keys`; None if it may. Raises ModelError for a table of
    positions that is another."""
    if re.fullmatch(POSITIONS, name) and positions is not None:
        if not _same_table(row.tensor, positions):
            raise ModelError(
                f"{row.path}: tensor {row.key} of shape {tuple(row.tensor.shape)} is not the table of positions that "
                f"config.json makes, {tuple(positions.shape)}; correct sample_size, patch_size and interpolation_scale "
                "in it, or remove the tensor if the model's own code computes the table anew"
            )
        return "the table of positions that config.json makes"
    if re.fullmatch(PLACES, name) and row.tensor.flatten().tolist() == list(range(row.tensor.numel())):
        return "the places of tokens from 0 on"
    why = next((why for pattern, why in HARMLESS if re.fullmatch(pattern, name)), None)
    layer = row.key.rpartition(".")[0]
    weighs = f"{layer}.weight" in keys or f"{layer}.weight_packed" in keys
    return None if why == OF_A_RANGE and not weighs else why


def _same_table(tensor: torch.Tensor, table: torch.Tensor) -> bool:
    """Equal within the rounding of float32 angles, and of values up to 1 to the tensor's own type."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() != table.numel() or tensor.shape[-1:] != table.shape[-1:]:
        return False
    limit = ANGLE_ERROR + torch.finfo(tensor.dtype).eps / 2
    return bool(((tensor.float().reshape(table.shape) - table).abs() <= limit).all())


def _refuse(
    name: str, named: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], config: Config
) -> NoReturn:
    """Raise ModelError for the tensor of `named` without a use that says most of what is wrong."""
    others = [other for other in named if other not in expected]
    prefixes = _prefixes(others, expected)
    beyond = _beyond(others, expected)
    unclear = [other for other in others if other not in beyond and other not in prefixes]
    for pattern, fault, remedy in REFUSED:
        if pattern == ATTENTION_BIAS and config.get("attention_bias"):
            continue
        if hits := [other for other in unclear if re.fullmatch(pattern, other)]:
            raise ModelError(f"{_place(hits, named)}: {fault}; {remedy}")
    if prefixes:
        prefix = next(iter(prefixes.values()))
        raise ModelError(
            f"{_place(list(prefixes), named)}: a tensor of the model under the prefix {prefix!r}, which not all of its "
            "tensors have, or which no wrapper is known to add; save one model alone, without a prefix"
        )
    if beyond:
        key = next((key for key in LAYER_COUNTS if key in config), LAYER_COUNTS[0])
        remedy = f"correct {key}, or take the config.json that belongs to this file"
        raise ModelError(
            f"{_place(list(beyond), named)}: a layer beyond config.json's {key} of {config.get(key, 'fewer')}; {remedy}"
        )
    raise ModelError(
        f"{_place([name], named)}: {config['_class_name']} of this config.json has no such tensor; {TOGETHER}"
    )


def _prefixes(others: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Those of `others` (-> the prefix) that are names of the class behind one more prefix."""
    known = set(expected)
    tails = ((name, name[place + 1 :]) for name in others for place in range(len(name)) if name[place] == ".")
    return {name: name.removesuffix(tail) for name, tail in tails if tail in known}


def _place(hits: list[str], named: Mapping[str, Stored]) -> str:
    row = named[hits[0]]
    return f"{row.path}: tensor {row.key}" + (f" (and {len(hits) - 1} more)" if len(hits) > 1 else "")


def _beyond(others: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Those of `others` (-> their block) whose block the class lacks, though it has others of its kind."""
    known = {match[0]: match[1] for name in expected if (match := re.match(BLOCK, name))}
    kinds = set(known.values())
    matches = {name: match for name in others if (match := re.match(BLOCK, name))}
    return {name: match[0] for name, match in matches.items() if match[1] in kinds and match[0] not in known}


def _refuse_missing(files: WeightsFiles, expected: Mapping[str, tuple[int, ...]], named: Mapping[str, Stored]) -> None:
    missing = sorted(set(expected) - set(named))
    if missing:
        raise ModelError(
            f"{files.folder / files.names[0]}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
            f"{TOGETHER}, copy or download the file again"
        )


def _check(row: Stored, shape: tuple[int, ...]) -> None:
    path, key, tensor = row.path, row.key, row.tensor
    if str(tensor.dtype) not in TYPES:
        raise ModelError(
            f"{path}: tensor {key} is {tensor.dtype}; weights must be fp16, bf16 or fp32 (or float8), export them again"
        )
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{path}: tensor {key} has shape {tuple(tensor.shape)}, config.json asks for {shape}; {TOGETHER}"
        )
    if not is_finite(tensor):
        raise ModelError(
            f"{path}: tensor {key} holds NaN or Inf; the training run or the file is broken, use another one"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Has a floating-point tensor neither NaN nor Inf? It is read once, and no memory is taken."""
    # aminmax passes both on; two float32 numbers never differ by Inf in Python's float64.
    low, high = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return float(high) - float(low) < float("inf")
