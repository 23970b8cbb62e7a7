"""The attentions of a model: every call of scaled_dot_product_attention by name, computed as somebody else likes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from export.errors import ContractError

if TYPE_CHECKING:
    from export.models.load import LoadedModel

# (name, query, key, value, mask, scale) -> what the attention gives. Tensors are [batch, heads, tokens, channels]; the
# mask is added to the scores, None for none; the scale is a factor of the scores before that.
Replace = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
NOTHING = "leave attention.qk and attention.pv out of the recipe"


@contextmanager
def attention_calls(module: nn.Module, replace: Replace) -> Iterator[None]:
    """Within, calls of scaled_dot_product_attention by `module` in this thread are computed by `replace`.

    An attention is called by the path of the innermost module that runs, `transformer_blocks.0.attn1`; a second call in
    it has the suffix `.1`. What `replace` itself computes is not replaced, nor what other functions of torch do inside
    (multi_head_attention_forward, by which HunyuanDiT pools its text once per caption). Raises ContractError for a call
    that quantized attention has no form for, and on leaving if there was none.
    """
    running: list[str] = []
    calls: dict[str, int] = {}
    thread = threading.get_ident()  # hooks are of a module, whoever calls it

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: running.append(path) if threading.get_ident() == thread else None

    def leave(*_: object) -> None:
        if threading.get_ident() == thread:
            running.pop()

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., object],
            types: object,
            args: Sequence[object] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            if func is not scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            place = running[-1] if running else type(module).__name__
            count = calls[place] = calls.get(place, 0) + 1
            name = place if count == 1 else f"{place}.{count - 1}"
            return replace(name, *_operands(name, *args, **(kwargs or {})))  # type: ignore[arg-type]

    with ExitStack() as stack:
        for path, part in module.named_modules():
            if path:
                stack.callback(part.register_forward_pre_hook(enter(path)).remove)
                stack.callback(part.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(Mode())
        yield
    if not calls:
        raise ContractError(
            f"{type(module).__name__} computes no attention by scaled_dot_product_attention; there is none to "
            f"quantize: {NOTHING}"
        )


def _operands(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Arguments of scaled_dot_product_attention as `replace` takes them. Raises ContractError for other forms of it."""
    if is_causal or enable_gqa or dropout_p or (attn_mask is not None and attn_mask.dtype == torch.bool):
        raise ContractError(f"{name}: causal, boolean or grouped heads are not quantized; {NOTHING}")
    if query.ndim != 4:
        raise ContractError(
            f"{name}: queries of {query.ndim} axes, not [batch, heads, tokens, channels], are not quantized; {NOTHING}"
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return query, key, value, attn_mask, factor


def attention_names(model: LoadedModel) -> tuple[str, ...]:
    """Names of all attentions of a model, in the order in which they run. Nothing is computed: tensors have no values.

    Raises ContractError as `attention_calls` does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from export.models.load import denoiser, sample_inputs
    from export.models.torch_modules import set_resolution

    names: list[str] = []

    def note(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        names.append(name)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    module, arrays = denoiser(model, {}), sample_inputs(model, 1, 0)  # a copy, which may be of another size
    if model.family.recordings is not None:
        set_resolution(module, *model.cells())
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {key: mode.from_tensor(torch.from_numpy(array)) for key, array in arrays.items()}
        with attention_calls(module.transformer, note):
            module(**inputs)
    return tuple(names)
