"""An engine in the place of a diffusers pipeline's `transformer`.

pipe.transformer = load("engines/pixart_w4a6").as_diffusers()
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray

from export.errors import ContractError, RecipeError
from export.models.config import FILE as CONFIG
from export.models.description import GENERATION_FILE, pixels_per_cell
from export.models.families import FAMILIES, MOST_TOKENS, RECORDED, Config, Family, Input
from pipeline.backends.base import Engine
from pipeline.generate.diffusers_refusals import SAVED, TRAINED, lacking, refuse_methods

if TYPE_CHECKING:
    from export.models.recorded import Call
    from pipeline.bundle.bundle import Bundle

logger = logging.getLogger(__name__)
TORCH_TYPES = {"float32": torch.float32, "int64": torch.int64}


def as_diffusers(bundle: Bundle, target: str = "auto") -> EngineTransformer:
    """The engine of `target` with the call, configuration and output of the diffusers class it was made from."""
    config = bundle.config()
    family = _family(bundle, config)
    size = DrawnSize.of_bundle(bundle, family, config)
    if family.binned and size.cells != (config["sample_size"],) * 2:
        logger.warning("%s: call its pipeline with %s", size.sentence, size.arguments)
    return EngineTransformer(bundle.engine(target), family, config, size)


def _family(bundle: Bundle, config: Config) -> Family:
    """The row of the model's family, which may have to be learned again. Raises ContractError where it has no form."""
    name = bundle.manifest["model"]["family"]
    if name == RECORDED:
        from export.models.recorded import recorded_family

        return recorded_family(str(config["_class_name"]), config, bundle.path / CONFIG)
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ContractError(f"{bundle.path}: no diffusers form for family {name}, only {known} and those of a pipeline")
    return FAMILIES[name]


@dataclass(frozen=True)
class DrawnSize:
    """The one size that an engine draws. cells: height and width of `hidden_states`; pixels_per_cell: of its side."""

    cells: tuple[int, int]
    pixels_per_cell: int

    @classmethod
    def of_bundle(cls, bundle: Bundle, family: Family, config: Config) -> DrawnSize:
        """The size that the recipe states, the model's own where it states none."""
        if family.recordings is not None:
            stated = bundle.recipe.sampling
            return cls(family.recordings.cells(stated.height, stated.width), family.recordings.pixels)
        with bundle.copied({GENERATION_FILE}.__contains__) as private:
            scale, size = pixels_per_cell(private.path, config), bundle.recipe.sampling
        own = config["sample_size"]
        return cls((size.height // scale or own, size.width // scale or own), scale)

    @property
    def pixels(self) -> tuple[int, int]:
        return self.cells[0] * self.pixels_per_cell, self.cells[1] * self.pixels_per_cell

    @property
    def sentence(self) -> str:
        return f"this engine draws {self.pixels[0]} x {self.pixels[1]}"

    @property
    def arguments(self) -> str:
        """What makes a pipeline that bins resolutions ask for this size."""
        height, width = self.pixels
        return f"height={height}, width={width}, use_resolution_binning=False (binning picks a size of its own list)"

    def refuse(self, cells: tuple[int, int], family: Family) -> None:
        """Raise RecipeError if latents of `cells` are not of this size."""
        if cells == self.cells:
            return
        height, width = cells[0] * self.pixels_per_cell, cells[1] * self.pixels_per_cell
        call = f" call the pipeline with {self.arguments}, or" if family.binned else ""
        raise RecipeError(
            f"{self.sentence}, the latents are for {height} x {width};{call} build another with "
            f"--height {height} --width {width}"
        )


@refuse_methods
class EngineTransformer(ModelMixin, ConfigMixin):
    """Looks like the family's diffusers transformer: `config`, `dtype`, `device`, and `forward` with its arguments.

    An engine with `run_tensors` gets the caller's tensors, another one float32 arrays on the host; the result has the
    type and device of `hidden_states`. The one torch parameter is empty, of the type and place that the pipeline was
    asked for. `config.sample_size` is the engine's where it draws squares. Copies share the engine. What an engine
    cannot do is refused in words (`pipeline/generate/diffusers_refusals.py`).
    """

    config_name = "config.json"

    def __init__(self, engine: Engine, family: Family, config: Config, size: DrawnSize | None = None) -> None:
        """size: what the engine draws; None for one that draws every size, as a torch module does."""
        super().__init__()
        self.engine, self.family, self.size = engine, family, size
        self.float_class: type = getattr(diffusers, family.class_name)
        self.signature = inspect.signature(self.float_class.forward)
        whole = _defaults(self.float_class) | {key: config[key] for key in config if key[0] != "_"}
        self.own_config = whole
        self.rows, self.ignored = family.inputs(whole), family.ignored(whole)
        self.call = None
        if family.recordings is not None:
            self.call = family.recordings.call(family.recordings.own_cells if size is None else size.cells)
        self.attributes = dict(family.attributes(whole))
        if size is not None:
            self.attributes |= {key: cells for key, cells in zip(("height", "width"), size.cells, strict=True)
                                if key in self.attributes}  # fmt: skip
        self.register_to_config(**self._shown_config(whole))
        # Follows pipe.to(...) and offloading, so that the pipeline prepares its tensors in the type and place it was
        # asked for. A parameter, since offloading hooks and callers look at the first one of a module.
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
        self.eval()

    def _shown_config(self, whole: Config) -> dict[str, object]:
        """What pipelines read: `sample_size` is that of an engine for squares.

        What the class derives from the model's own `sample_size` where the configuration is silent is stated then.
        """
        square = self.size is not None and self.size.cells[0] == self.size.cells[1]
        if self.size is None or not square or not isinstance(whole.get("sample_size"), int):
            return dict(whole)
        changed = self.size.cells[0] != whole["sample_size"]
        silent = {key: value for key, value in self.attributes.items() if key in whole and whole[key] is None}
        return dict(whole) | (silent if changed else {}) | {"sample_size": self.size.cells[0]}

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        return self.place.device

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        if name in attributes:
            return attributes[name]
        error = lacking(name, self.float_class) if "float_class" in self.__dict__ else None
        if error is not None:
            raise error
        return super().__getattr__(name)

    def forward(self, *args: object, **kwargs: object) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """As the diffusers class: Transformer2DModelOutput, or a tuple with `return_dict=False`."""
        arguments = self.signature.bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        as_dict = arguments.pop("return_dict", True)
        flat = _flattened(arguments) if self.call is None else self.call.named(arguments)
        named = {name: value for name, value in flat.items() if not _says_nothing(value)}
        if unknown := sorted(set(named) - {row.name for row in self.rows} - self.ignored):
            raise RecipeError(f"the engine has no input {unknown[0]}; leave it away, or use the float transformer")
        hidden = torch.as_tensor(named["hidden_states"])
        inputs = {row.name: self._tensor(row, named, hidden) for row in self.rows}
        self._refuse_shapes(inputs)
        sample = self._run(inputs).to(hidden.device, hidden.dtype)
        result: Any = list(sample) if self.call is not None and self.call.listed else sample
        return Transformer2DModelOutput(sample=result) if as_dict else (result,)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        run_tensors = getattr(self.engine, "run_tensors", None)
        if run_tensors is not None:
            output: torch.Tensor = run_tensors(inputs)["sample"]
            return output
        arrays = {row.name: _array(row, inputs[row.name]) for row in self.rows}
        return torch.from_numpy(np.ascontiguousarray(self.engine.run(arrays)["sample"]))

    def _tensor(self, row: Input, named: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """One engine input; a missing mask keeps every token, a single timestep serves the whole batch.

        A tensor that fits is passed as it is, so that an engine may know it again.
        """
        value = named.get(row.name)
        tensor = self._filled(row, named, hidden) if value is None else torch.as_tensor(value)
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RecipeError(f"{row.name} asks for its gradient: {TRAINED}; or call it under torch.no_grad()")
        if tensor.ndim == 0 or (row.shape == ("batch",) and len(tensor) == 1):
            tensor = tensor.expand(len(hidden))
        return tensor

    def _filled(self, row: Input, named: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """What stands for an input that the caller left away."""
        if row.fill_kind == "mask":
            tokens = named["encoder_hidden_states"].shape[1] if row.shape[1] == "tokens" else row.shape[1]
            return torch.ones(len(hidden), int(tokens))
        if row.fill == "zeros":
            return torch.zeros(len(hidden), dtype=TORCH_TYPES[row.dtype])
        if row.implied and self.size is not None:
            height, width = self.size.pixels
            values = {"image_size": [float(height), float(width)], "aspect": [height / width]}
            return torch.tensor([values[row.fill]]).expand(len(hidden), -1)
        shape = ", ".join(map(str, row.shape))
        raise RecipeError(f"the transformer's input {row.name} is missing; pass it, with shape [{shape}]")

    def _refuse_shapes(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Raise RecipeError for the first input that does not fit the engine or the other inputs."""
        hidden = inputs["hidden_states"]
        if self.call is not None:
            self._refuse_other_sizes(inputs, self.call)
            return
        patch = self.own_config["patch_size"]
        if self.size is not None and hidden.ndim == 4:
            self.size.refuse((hidden.shape[2], hidden.shape[3]), self.family)
        sizes: dict[str, int] = {}
        if hidden.ndim == 4:
            height, width = hidden.shape[2:]
            sizes = {"batch": len(hidden), "patches": (height // patch) * (width // patch)}
        for row in self.rows:
            _refuse_shape(row, inputs[row.name], sizes)

    def _refuse_other_sizes(self, inputs: Mapping[str, torch.Tensor], call: Call) -> None:
        """As `_refuse_shapes`, where the inputs are learned from a pipeline."""
        hidden = inputs["hidden_states"]
        if self.size is not None and {"height", "width"} <= call.sizes.keys() and hidden.ndim > 3:
            self.size.refuse((hidden.shape[-2], hidden.shape[-1]), self.family)
        sizes = {"batch": len(hidden), **call.sizes}
        for row in self.rows:
            _refuse_shape(row, inputs[row.name], sizes)
        if sizes.get("tokens", 0) > MOST_TOKENS:
            raise RecipeError(f"a prompt of {sizes['tokens']} tokens; an engine takes {MOST_TOKENS}, shorten it")

    def cache_context(self, name: str, **facts: object) -> AbstractContextManager[None]:
        """As torch's: by it pipelines say which call is which to caches of activations, of which an engine has none."""
        return nullcontext()

    # --- what a torch module can be asked for beside a call ------------------------------------------------------

    def train(self, mode: bool = True) -> EngineTransformer:
        """As torch's, for evaluation only. Raises RecipeError for mode=True."""
        if mode:
            raise RecipeError(f"train: {TRAINED}")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> EngineTransformer:
        """As torch's, to switch gradients off. Raises RecipeError for requires_grad=True."""
        if requires_grad:
            raise RecipeError(f"requires_grad_: {TRAINED}")
        return self

    def __copy__(self) -> EngineTransformer:
        """A stand-in of its own type and place for the same engine, which is closed for both at once."""
        twin = EngineTransformer(self.engine, self.family, self.own_config, self.size)
        twin.place = torch.nn.Parameter(self.place.clone(), requires_grad=False)
        return twin

    def __deepcopy__(self, memo: dict[int, EngineTransformer]) -> EngineTransformer:
        return memo.setdefault(id(self), self.__copy__())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RecipeError(f"pickle: {SAVED}; another process loads the bundle itself")


def _refuse_shape(row: Input, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    """Compare a tensor's shape with its row; sizes that are seen for the first time are noted in `sizes`."""
    fits = tensor.ndim == len(row.shape)
    for expected, size in zip(row.shape, tensor.shape, strict=False):
        fits &= size == (expected if isinstance(expected, int) else sizes.setdefault(expected, size))
    if not fits:
        expected_shape = ", ".join(f"{sizes[size]} ({size})" if size in sizes else str(size) for size in row.shape)
        shape = tuple(tensor.shape)
        raise RecipeError(f"{row.name} has shape {shape}, the engine takes [{expected_shape}]; pass that shape")
    last = _last_index(row)
    if last is not None and tensor.numel() and not bool(((tensor >= 0) & (tensor <= last)).all()):
        raise RecipeError(f"{row.name} holds {tensor.tolist()}; the model knows 0 to {last}, pass one of them")


def _last_index(row: Input) -> int | None:
    """The largest row of the embedding that an input of whole numbers chooses from; None for any other input."""
    kind, _, count = row.fill.partition(":")
    if kind == "class":
        return int(count)  # the null class stands behind the last one
    return 0 if kind == "zeros" else None


def _array(row: Input, tensor: torch.Tensor) -> NDArray[np.generic]:
    """The input in the engine's type, on the host."""
    return tensor.detach().cpu().to(TORCH_TYPES[row.dtype]).contiguous().numpy()


def _says_nothing(value: object) -> bool:
    """None, or keyword arguments without any."""
    return value is None or (isinstance(value, Mapping) and not value)


def _flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the engine's inputs."""
    named = dict(arguments)
    named |= named.pop("added_cond_kwargs", None) or {}
    rotary = named.pop("image_rotary_emb", None)
    if rotary is not None:
        named |= {"image_rotary_cos": rotary[0], "image_rotary_sin": rotary[1]}
    return named


def _defaults(float_class: type) -> dict[str, object]:
    """The class's own value of every configuration key."""
    parameters = inspect.signature(float_class.__init__).parameters.values()  # type: ignore[misc]
    return {row.name: row.default for row in parameters if row.default is not inspect.Parameter.empty}
