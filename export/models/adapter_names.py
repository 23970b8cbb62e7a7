"""Which layer, and which part of its low-rank product, every tensor of an adapter's file is.

Names are read in three forms: PEFT's and diffusers' (`transformer.PATH.lora_A.weight`), Kohya's with the paths of the
diffusers class (`lora_unet_PATH.lora_down.weight`, underscores for dots), and whatever else the pipeline of the class
converts in diffusers (names of the models' own repositories). What diffusers would drop there is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Literal

from export.errors import ModelError
from export.models.weights import MERGE

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["down", "up", "bias", "alpha"]
# Endings of names -> what of `weight + alpha / rank * up @ down` they are; `bias` is added to the layer's own. The name
# in the middle is that of the adapter, which PEFT leaves there when a whole model is saved.
ENDINGS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_(A|down)(\.\w+)?\.weight", "down"),
    (r"\.lora_(B|up)(\.\w+)?\.weight", "up"),
    (r"\.lora_(B|up)(\.\w+)?\.bias", "bias"),
    (r"\.alpha", "alpha"),
)
# What PEFT puts in front of every path of the model that it was given.
PEFT_PREFIX = "base_model.model."
JOINED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
OTHER_COMPONENT = re.compile(r"(text_encoders?|lora_te|conditioner|cond_stage_model|transformer_)\d*[._]")
# Adapters of other kinds, by their tensors' names, and what they are.
OTHER_KINDS = (
    (r".*(dora_scale|lora_magnitude_vector).*", "DoRA, which scales the merged rows anew"),
    (r".*\.lokr_.*", "LoKr, a Kronecker product"),
    (r".*\.hada_.*", "LoHa, a product of products"),
    (r".*\.b?oft_.*", "OFT, which rotates weights"),
    (r".*\.(ia3_l|on_input).*", "IA3, which scales activations"),
    (r".*\.vera_(lambda|[AB]).*", "VeRA, whose factors are not in the file"),
    (r".*\.lora_mid\..*", "LoCon with a third factor"),
    (r".*\.lora_embedding_[AB].*", "LoRA of an embedding"),
)
KINDS_REMEDY = "merge it with the program that trained it, and give the merged model's folder"
NAMED = 3
# From here on tensors are numbered: ranks are smaller, and float32 is exact for 15 million more.
FIRST_NUMBER = 2**20


def refuse_other_kinds(names: Collection[str], source: str) -> None:
    """Raise ModelError for an adapter that is no product of two factors, naming its kind."""
    for pattern, kind in OTHER_KINDS:
        if hits := [name for name in names if re.fullmatch(pattern, name)]:
            raise ModelError(f"{source}: {listed(hits)}: {kind}; only LoRA is merged here: {KINDS_REMEDY}")


def by_layer(
    tensors: Mapping[str, Tensor], layers: Collection[str], class_name: str, source: str
) -> dict[str, dict[Part, Tensor]]:
    """The tensors of an adapter by layer and part. layers: paths of the modules of the class that have a weight.

    Every tensor has a place in the result. Raises ModelError, naming the first ones, where some have none: another
    component's, another model's, or of a form that diffusers does not convert for this class.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    named: dict[str, Tensor] = convert_unet_state_dict_to_peft(tensors)  # names of older versions of diffusers
    if len(named) < len(tensors):
        raise ModelError(f"{source}: {len(tensors)} tensors of {len(named)} factors; give one adapter in each file")
    places = _places(named, layers)
    lost = [name for name in named if name not in places]
    _refuse_other_component(lost, source)
    if lost and (convert := _conversion(class_name)):
        named = _converted(tensors, convert, source)
        places = _places(named, layers)
        lost = [name for name in named if name not in places]
        _refuse_other_component(lost, source)
    if lost:
        fault = f"no layer of {class_name} takes that, and nothing of an adapter is left out"
        if not places:
            fault = f"none of its {len(named)} tensors fits a layer of {class_name}, so it is another model's"
        raise ModelError(f"{source}: {listed(lost)}: {fault}; give the adapter with the model that it was trained on")
    result: dict[str, dict[Part, Tensor]] = {}
    for name, (layer, part) in places.items():
        parts = result.setdefault(layer, {})
        if part in parts:
            raise ModelError(f"{source}: tensor {name} is the second {part} of {layer}; give one adapter in each file")
        parts[part] = named[name]
    return result


def is_pefts_own(names: Collection[str], layers: Collection[str]) -> bool:
    """Did PEFT itself name the tensors, which writes the scale beside them? Not where diffusers converts the names."""
    return any(name.startswith(PEFT_PREFIX) for name in _places(names, layers))


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a"]), listed(["a", "b", "c", "d", "e"])
    ('tensor a', 'tensors a, b, c (and 2 more)')
    """
    more = f" (and {len(names) - NAMED} more)" if len(names) > NAMED else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(list(names)[:NAMED])}{more}"


# --- names of the class ----------------------------------------------------------------------------------------------


def _places(names: Collection[str], layers: Collection[str]) -> dict[str, tuple[str, Part]]:
    """(layer, part) of each name that has them."""
    joined: dict[str, list[str]] = {}
    for path in layers:
        joined.setdefault(path.replace(".", "_"), []).append(path)
    single = {name: paths[0] for name, paths in joined.items() if len(paths) == 1}
    found = {}
    for name in names:
        for pattern, part in ENDINGS:
            match = re.fullmatch(f"(.+?){pattern}", name)
            if match and (layer := _layer(match[1], layers, single)):
                found[name] = (layer, part)
    return found


def _layer(head: str, layers: Collection[str], joined: Mapping[str, str]) -> str | None:
    """The layer that a name without its ending stands for."""
    path = head.removeprefix(PEFT_PREFIX).removeprefix("transformer.")
    if path in layers:
        return path
    prefix = next((prefix for prefix in JOINED_PREFIXES if head.startswith(prefix)), None)
    return None if prefix is None else joined.get(head.removeprefix(prefix))


def _refuse_other_component(names: Collection[str], source: str) -> None:
    if hits := [name for name in names if OTHER_COMPONENT.match(name)]:
        raise ModelError(
            f"{source}: {listed(hits)}: of another component than the denoiser, into which alone adapters are merged "
            f"here; {MERGE}"
        )


# --- names that diffusers converts -----------------------------------------------------------------------------------

Conversion = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]


def _conversion(class_name: str) -> Conversion | None:
    """What the pipeline of a transformer's class makes of an adapter's tensors in diffusers; None where it reads none.

    The alphas of layers, which some classes give apart, are among them.
    """
    from export.models.recording import pipeline_class

    try:
        convert = getattr(pipeline_class(class_name), "lora_state_dict", None)
    except ModelError:  # no pipeline draws with the class
        return None
    if convert is None:
        return None
    apart = {"return_alphas": True} if "return_alphas" in inspect.signature(convert).parameters else {}

    def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = convert(tensors, **apart)
        first, *others = result if isinstance(result, tuple) else (result,)
        return dict(first) | {name: value for other in others for name, value in (other or {}).items()}

    return converted


def _converted(tensors: Mapping[str, Tensor], convert: Conversion, source: str) -> dict[str, Tensor]:
    """Raises ModelError where diffusers cannot convert the tensors, or drops some that are not zero (of alphas, not the
    rank)."""
    try:
        named = convert(dict(tensors))
        kept = _kept(tensors, convert)
    except Exception as error:  # of code that was not made for this file: whatever it raises means the same
        raise ModelError(
            f"{source}: {listed(list(tensors))}: neither names of this model's layers, nor can diffusers convert them "
            f"({type(error).__name__}: {error}); check that the adapter was trained on this model"
        ) from error
    nothing = _ranks(tensors)  # the value of an alpha that says no more than its absence
    dropped = [name for name in tensors if name not in kept and bool((tensors[name] != nothing.get(name, 0.0)).any())]
    if dropped:
        _refuse_other_component(dropped, source)
        raise ModelError(
            f"{source}: {listed(dropped)}: diffusers leaves them out for this model, and nothing of an adapter is left "
            f"out here; {KINDS_REMEDY}"
        )
    return named


def _kept(tensors: Mapping[str, Tensor], convert: Conversion) -> set[str]:
    """Names of the tensors whose numbers come out of a conversion.

    Conversions rename, split and join tensors, and multiply them by alpha / rank. So each is put in once more with a
    number of its own in all of its elements, and alphas as ranks. With alphas as numbers of their own, too, each must
    come out as it is, or change what comes out of its factors.
    """
    import torch

    ranks = _ranks(tensors)
    numbers = {name: float(i) for i, name in enumerate(tensors, FIRST_NUMBER)}

    def comes_out(values: Mapping[str, float]) -> dict[str, set[float]]:
        """The numbers in each tensor of the conversion's result."""
        filled = {
            name: torch.full((), values[name], dtype=torch.float32).expand(tensor.shape)
            for name, tensor in tensors.items()
        }
        return {name: set(torch.as_tensor(tensor).unique().tolist()) for name, tensor in convert(filled).items()}

    plain, scaled = comes_out(numbers | ranks), comes_out(numbers)
    kept = {name for name, number in numbers.items() if any(number in out for out in plain.values())}
    changed = {value for name, out in plain.items() for value in out - scaled.get(name, set())}
    heads = {_head(name) for name in kept if numbers[name] in changed}
    handed_on = {value for out in scaled.values() for value in out}
    return kept | {name for name in ranks if numbers[name] in handed_on or _head(name) in heads}


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each alpha, the number that it is divided by: with that as its value it says nothing."""
    down = ENDINGS[0][0]
    rows = {_head(name): tensor.shape[0] for name, tensor in tensors.items() if re.search(f"{down}$", name)}
    return {name: float(rows.get(_head(name), 1)) for name in tensors if name.endswith(".alpha")}


def _head(name: str) -> str:
    """What the names of a layer's tensors have in common.

    >>> _head("a.b.lora_A.weight"), _head("a.b.alpha")
    ('a.b', 'a.b')
    """
    return next((match[1] for pattern, _ in ENDINGS if (match := re.fullmatch(f"(.+?){pattern}", name))), name)
