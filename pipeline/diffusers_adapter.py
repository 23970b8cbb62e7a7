"""An engine in the place of a diffusers pipeline's `transformer`.

pipe.transformer = load("engines/pixart_w4a6").as_diffusers()
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from export.errors import ContractError, RecipeError
from export.families import FAMILIES, Family, Input
from pipeline.backends.base import Engine

if TYPE_CHECKING:
    from pipeline.bundle import Bundle


def as_diffusers(bundle: Bundle, target: str = "auto") -> EngineTransformer:
    """The engine of `target` with the call, configuration and output of the diffusers class it was made from."""
    family = FAMILIES.get(bundle.manifest["model"]["family"])
    if family is None:
        known = ", ".join(FAMILIES)
        raise ContractError(
            f"{bundle.path}: no diffusers form for family {bundle.manifest['model']['family']}, only {known}"
        )
    config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    return EngineTransformer(bundle.engine(target), family, config)


class EngineTransformer(ModelMixin, ConfigMixin):
    """Looks like the family's diffusers transformer: `config`, `dtype`, `device`, and `forward` with its arguments.

    An engine with `run_tensors` gets the caller's tensors, another one float32 arrays on the host; the result has the
    type and device of `hidden_states`.
    """

    config_name = "config.json"

    def __init__(self, engine: Engine, family: Family, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.engine, self.family = engine, family
        self.signature = inspect.signature(getattr(diffusers, family.class_name).forward)
        self.register_to_config(**_defaults(family) | {key: config[key] for key in config if key[0] != "_"})
        self.rows = family.inputs(config)
        # Follows pipe.to(...), so that the pipeline prepares its tensors in the type and place it was asked for.
        self.register_buffer("place", torch.zeros(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("place").dtype

    @property
    def device(self) -> torch.device:
        return self.get_buffer("place").device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the diffusers class: Transformer2DModelOutput, or a tuple with `return_dict=False`."""
        given = self.signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        as_dict, hidden = given.pop("return_dict", True), given["hidden_states"]
        named = {key: value for key, value in _flattened(given).items() if value is not None}
        self._refuse_unknown(named)
        inputs = {row.name: self._tensor(row, named, hidden) for row in self.rows}
        sample = self._run(inputs).to(hidden.device, hidden.dtype)
        return Transformer2DModelOutput(sample=sample) if as_dict else (sample,)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        run_tensors = getattr(self.engine, "run_tensors", None)
        if run_tensors is not None:
            found: torch.Tensor = run_tensors(inputs)["sample"]
            return found
        arrays = {row.name: _array(row, inputs[row.name]) for row in self.rows}
        return torch.from_numpy(np.ascontiguousarray(self.engine.run(arrays)["sample"]))

    def _refuse_unknown(self, named: Mapping[str, Any]) -> None:
        unknown = sorted(set(named) - {row.name for row in self.rows})
        if unknown:
            raise RecipeError(f"the engine has no input {unknown[0]}; leave it away, or use the float transformer")

    def _tensor(self, row: Input, named: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        """One engine input; a missing mask keeps every token, a single timestep serves the whole batch.

        A tensor that fits is passed as it is, so that an engine may know it again.
        """
        value = named.get(row.name)
        tensor = torch.from_numpy(_filled(row, named, len(hidden))) if value is None else torch.as_tensor(value)
        if tensor.ndim == 0 or (row.shape == ("batch",) and len(tensor) == 1):
            tensor = tensor.expand(len(hidden))
        return tensor


TORCH_TYPES = {"float32": torch.float32, "int64": torch.int64}


def _array(row: Input, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The input in the engine's type, on the host."""
    return tensor.detach().cpu().to(TORCH_TYPES[row.dtype]).contiguous().numpy()


def _filled(row: Input, named: Mapping[str, Any], batch_size: int) -> np.ndarray[Any, Any]:
    """What stands for an input that the caller left away."""
    sizes = {"batch": batch_size}
    if "encoder_hidden_states" in named:
        sizes["tokens"] = named["encoder_hidden_states"].shape[1]
    values: dict[str, Callable[..., Any]] = {"mask": np.ones, "zeros": np.zeros}
    if row.fill not in values:
        raise RecipeError(f"the transformer's input {row.name} is missing")
    shape = [size if isinstance(size, int) else sizes[size] for size in row.shape]
    return values[row.fill](shape, row.dtype)


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the engine's inputs."""
    named = dict(given)
    named |= named.pop("added_cond_kwargs", None) or {}
    rotary = named.pop("image_rotary_emb", None)
    if rotary is not None:
        named |= {"image_rotary_cos": rotary[0], "image_rotary_sin": rotary[1]}
    return named


def _defaults(family: Family) -> dict[str, Any]:
    """The class's own value of every configuration key."""
    parameters = inspect.signature(getattr(diffusers, family.class_name).__init__).parameters.values()
    return {row.name: row.default for row in parameters if row.default is not inspect.Parameter.empty}
