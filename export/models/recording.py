"""What a diffusers pipeline calls its transformer with, recorded from the pipeline itself.

The pipeline runs without text encoders and autoencoder, on random embeddings of prompts, and its transformer is made of
fake tensors, which have sizes alone: no weight takes memory, and no layer computes. What the transformer would give is
zeros of the right shape.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from export.errors import ModelError
from export.models.batches import PATCH, Z_IMAGE, Batches
from export.models.config import REFUSALS
from export.models.families import Config
from export.models.traceable_forms import Prefix

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

N_STEPS = 2  # of a drawing: inputs that change from step to step are those that differ between the calls
Place = tuple[str | int, ...]
# Arguments of pipelines for encoded prompts, and keys of configurations for their widths, of which the first counts.
EMBEDDED = re.compile(r"(pooled_)?prompt_(embeds|embeds_mask|attention_mask|embeds_attention_mask)")
WIDTHS = (
    "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim", "cross_attention_dim",
)  # fmt: skip
POOLED_WIDTHS = ("pooled_projection_dim",)
NUMBERS_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)
PIPELINE = re.compile(r"^class (\w+Pipeline)\b", re.MULTILINE)
BLOCK = re.compile(r"(^|.*\.)[A-Za-z_]+\.\d+\..*")  # of the path of what is in a repeated block
USUAL_TOKENS = 120
FAKE_LOGGER = "torch._subclasses.fake_tensor"
# What a pipeline does beside drawing; the name of the plain one has none of them.
OTHER_USES = re.compile(
    "Img2Img|Inpaint|Control|PAG|Edit|Kontext|Fill|Redux|Video2Video|VideoToVideo|ImageToVideo|Upscal|Layered|Modular|"
    "Condition|Fun|Prior|Framepack|Outpaint|Depth|VACE|Semantic|Perturbed|KV|Klein"
)


@dataclass(frozen=True)
class Row:
    """What of a class cannot be learned. arguments: of its pipeline, by the configuration. single: arguments of the
    transformer that hold one equal item for each picture, of which its code reads the first. listed: whether the
    pipeline takes embedded prompts as a list. flows: whether it is a rectified flow, whatever its scheduler's class.
    prefixes: parts of it whose code would fix the number of tokens. prompted: whether a prompt must have a token, as
    its code divides by their number, or fails; attention to none would give zeros there, and a mean here. batches: how
    it is called with tensors where it takes lists. unguided: the guidance scale at which its pipeline draws without
    guidance, and above which every scale is as much larger as of others. side: pixels of a picture's
    side where a caller names none, and patch: cells of a token's side, where neither its pipeline nor its configuration
    says them."""

    arguments: Callable[[Config], Mapping[str, object]] = lambda config: {}
    single: tuple[str, ...] = ()
    listed: bool = False
    flows: bool = False
    prefixes: tuple[Prefix, ...] = ()
    prompted: bool = False
    batches: Batches | None = None
    unguided: float = 1.0
    side: int | None = None
    patch: int | None = None


ROWS: Mapping[str, Row] = {
    # Its pipeline fails on embedded prompts without guidance unless it is told not to cut their padding off.
    "LatteTransformer3DModel": Row(
        lambda config: {"video_length": config.get("video_length", 16), "mask_feature": False}
    ),
    "SanaTransformer2DModel": Row(flows=True),
    "HunyuanVideoTransformer3DModel": Row(prompted=True),
    "QwenImageTransformer2DModel": Row(
        single=("img_shapes",), prefixes=(Prefix("pos_embed", "max_txt_seq_len", table=1),)
    ),
    "ZImageTransformer2DModel": Row(listed=True, prompted=True, batches=Z_IMAGE, unguided=0.0, side=1024, patch=PATCH),
}


@dataclass(frozen=True)
class Drawing:
    """What is drawn: sizes, and seeds of latents and of prompts. height, width: in pixels, 0 for the pipeline's own.
    guidance_scale: 1 for none. ragged: whether the second half of the first prompt is left out, by masks or where
    prompts are a list."""

    pictures: int = 2
    tokens: int = 10
    height: int = 0
    width: int = 0
    noise_seed: int = 0
    prompt_seed: int = 0
    guidance_scale: float = 1.0
    ragged: bool = True


def leaves(tree: object, path: Place = ()) -> Iterator[tuple[Place, object]]:
    """Whatever is in a tree of dictionaries, lists and tuples and is none of these, with its place."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def mapped(tree: Any, change: Any, path: Place = ()) -> Any:
    """The tree with `change(path, leaf)` in the place of each leaf."""
    if isinstance(tree, Mapping):
        return {key: mapped(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, change, (*path, index)) for index, value in enumerate(tree))
    return change(path, tree)


@dataclass(frozen=True)
class Recorded:
    """The calls of one drawing, as arguments by name, and the shape of what each gave."""

    calls: tuple[Mapping[str, object], ...]
    output: tuple[int, ...]


class Recorder:
    """The pipeline of a transformer's class, ready to be called.

    rows: path of every linear -> whether its input has rows of tokens, which the first recording finds out. repeated:
    paths of those that run several times in a call. reaching: of those whose results reach the output.
    """

    def __init__(self, class_name: str, config: Config) -> None:
        """Raises ModelError where no pipeline of diffusers has this class, or the configuration makes no model."""
        import diffusers

        self.float_class = getattr(diffusers, class_name)
        self.pipeline_class = pipeline_class(class_name)
        self.row = ROWS.get(class_name, Row())
        self.config, self.rows = config, dict[str, bool]()
        self.repeated, self.reaching = set[str](), set[str]()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._calls: list[Mapping[str, object]] = []
        self._output: tuple[int, ...] = ()
        self._runs: Counter[str] = Counter()
        known = inspect.signature(self.float_class.__init__).parameters
        stated = {key: value for key, value in config.items() if key in known}
        try:
            with self.fake:
                self.module: nn.Module = self.float_class(**stated)
        except REFUSALS as error:
            raise ModelError(
                f"{class_name} cannot be made of its configuration ({type(error).__name__}: {error}); correct it"
            ) from error
        self._watch_linears()
        self.pipe = self._pipeline()
        self.arguments = inspect.signature(self.pipeline_class.__call__).parameters

    # --- the pipeline ------------------------------------------------------------------------------------------------

    def _pipeline(self) -> DiffusionPipeline:
        parts: dict[str, object] = {}
        for name, parameter in inspect.signature(self.pipeline_class).parameters.items():
            if name == "transformer":
                parts[name] = self._stand_in()
            elif name == "scheduler":
                parts[name] = _scheduler(parameter.annotation)
            elif parameter.default is inspect.Parameter.empty:
                parts[name] = None
        pipe: DiffusionPipeline = self.pipeline_class(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _stand_in(self) -> nn.Module:
        """The module, which notes down what it is called with and gives zeros."""
        recorder, signature = self, inspect.signature(self.float_class.forward)

        class StandIn(self.float_class):  # type: ignore[name-defined]
            device = property(lambda _: torch.device("cpu"))
            dtype = property(lambda _: torch.float32)

            def forward(self, *args: object, **kwargs: object) -> tuple[object]:
                bound = signature.bind(self, *args, **kwargs).arguments
                arguments = {name: value for name, value in bound.items() if name not in ("self", "return_dict")}
                recorder._calls.append(mapped(arguments, _copied))
                if not recorder._output:
                    recorder._output = recorder._shape(arguments)
                zeros = torch.zeros(recorder._output)
                return (zeros if recorder.row.batches is None else list(zeros),)

        StandIn.__name__ = self.float_class.__name__
        self.module.__class__ = StandIn
        return self.module.eval()

    def _shape(self, arguments: Mapping[str, object]) -> tuple[int, ...]:
        """Of what the module gives. Raises ModelError where that hangs on the numbers in its inputs."""

        def fake(_: Place, leaf: object) -> object:
            return self.fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

        self._runs.clear()
        try:
            with torch.enable_grad(), self.fake, _silent(FAKE_LOGGER):
                output = self.float_class.forward(self.module, **mapped(arguments, fake), return_dict=False)
                first = output[0] if isinstance(output, list | tuple) else output
                if self.row.batches is not None:
                    first = torch.stack(first)
        except NUMBERS_NEEDED as error:
            raise ModelError(
                f"{self.float_class.__name__}: its forward reads sizes from the numbers in its inputs ({error}), so no "
                "graph of it serves all; such models are not compiled"
            ) from error
        except Exception as error:  # whatever the code of a model raises
            raise ModelError(
                f"{self.float_class.__name__} cannot be called as {self.pipeline_class.__name__} calls it "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error
        self.repeated |= {path for path, runs in self._runs.items() if runs > 1}
        if not isinstance(first, torch.Tensor):
            raise ModelError(
                f"{self.float_class.__name__} gives a {type(first).__name__} of tensors, one for each picture; only "
                "models that give one tensor of all pictures are compiled"
            )
        reached = _reached(first)
        self.reaching |= {path for path, part in _linears(self.module) if id(part.weight) in reached}
        return tuple(first.shape)

    def _watch_linears(self) -> None:
        for path, part in _linears(self.module):

            def see(_: nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
                rows = args[0].ndim > 2 and args[0].shape[1:-1].numel() > 1
                self.rows[path] = self.rows.get(path, False) or rows
                self._runs[path] += 1

            part.register_forward_pre_hook(see)

    @property
    def not_run(self) -> list[str]:
        """Paths of the linears in repeated blocks that no recording has come through."""
        return [path for path, _ in _linears(self.module) if path not in self.rows and BLOCK.fullmatch(path)]

    @property
    def idle(self) -> list[str]:
        """Paths of those that run for nothing: no output hangs on what they give."""
        return [path for path in self.rows if path not in self.reaching]

    # --- what it is called with --------------------------------------------------------------------------------------

    @property
    def pixels_per_cell(self) -> int:
        """Of a side of a latent's cell."""
        for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
            if isinstance(value := getattr(self.pipe, name, None), int):
                return value
        raise ModelError(f"{self.pipeline_class.__name__} does not say how many pixels a latent's cell has")

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels where a caller names none."""
        sides = tuple(self.arguments[name].default for name in ("height", "width"))
        if all(isinstance(side, int) for side in sides):
            return sides[0], sides[1]
        if self.row.side is not None:
            return self.row.side, self.row.side
        cells = getattr(self.pipe, "default_sample_size", None) or self.config.get("sample_size")
        if isinstance(cells, int):
            return cells * self.pixels_per_cell, cells * self.pixels_per_cell
        raise ModelError(f"{self.pipeline_class.__name__} does not say what size it draws; no engine is built of it")

    @property
    def most_tokens(self) -> int:
        """Of a prompt, where a caller names no other number."""
        parameter = self.arguments.get("max_sequence_length")
        return parameter.default if parameter is not None and isinstance(parameter.default, int) else USUAL_TOKENS

    def guided(self, scale: float, pictures: int) -> dict[str, object]:
        """Arguments by which the pipeline, given texts, draws so many pictures at a scale of guidance, 1 for none."""
        stated: dict[str, object] = {}
        if "guidance_scale" in self.arguments:
            stated["guidance_scale"] = scale - 1 + self.row.unguided
        other = self.arguments.get("true_cfg_scale")  # above 1 by default where a class is meant to be guided by it
        if other is not None and isinstance(other.default, int | float) and other.default > 1:
            # Without a negative prompt it is not guided, and " " is what its own examples have for none.
            stated |= {"true_cfg_scale": scale, "negative_prompt": [" "] * pictures if scale > 1 else None}
        return stated

    def settings(self, drawing: Drawing) -> dict[str, object]:
        """Arguments of the pipeline for a drawing of embedded prompts."""
        wanted: dict[str, object] = {
            "height": drawing.height or self.own_size[0],
            "width": drawing.width or self.own_size[1],
            **self.guided(drawing.guidance_scale, drawing.pictures),
            "num_inference_steps": N_STEPS,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(drawing.noise_seed),
            "negative_prompt": None,  # some have a text by default
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        known = {name: value for name, value in wanted.items() if name in self.arguments}
        return {**known, **self.row.arguments(self.config), **self._prompts(drawing)}

    def record(self, drawing: Drawing) -> Recorded:
        """The calls of a drawing. Raises ModelError for what the pipeline does not draw, in its own words."""
        self._calls, self._output = [], ()
        settings = self.settings(drawing)
        try:
            self.pipe(**settings)
        except ModelError:
            raise
        except Exception as error:  # whatever the code of a pipeline raises
            raise ModelError(
                f"{self.pipeline_class.__name__} cannot be called for {self.float_class.__name__} alone "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error
        return Recorded(tuple(self._calls), self._output)

    def _prompts(self, drawing: Drawing) -> dict[str, object]:
        """Random embeddings of prompts, and masks, for each argument of the pipeline that takes one."""
        generator = torch.Generator().manual_seed(drawing.prompt_seed)
        given: dict[str, object] = {}
        for name in self.arguments:
            own = name.removeprefix("negative_")
            if not EMBEDDED.fullmatch(own) or (own != name and drawing.guidance_scale == 1):
                continue
            if "mask" in own:
                mask = torch.ones(drawing.pictures, drawing.tokens, dtype=torch.int64)
                mask[0, drawing.tokens // 2 :] = 0 if drawing.ragged else 1
                given[name] = mask
                continue
            keys = POOLED_WIDTHS if own.startswith("pooled") else WIDTHS
            width = next((self.config[key] for key in keys if self.config.get(key)), None)
            if not isinstance(width, int):
                raise ModelError(
                    f"{self.float_class.__name__}: no width of {name} in its configuration; known keys are "
                    f"{', '.join(keys)}"
                )
            rows = () if own.startswith("pooled") else (drawing.tokens,)
            embedded = torch.randn(drawing.pictures, *rows, width, generator=generator)
            if self.row.listed:
                lengths = [drawing.tokens] * drawing.pictures
                lengths[0] = drawing.tokens // 2 if drawing.ragged else drawing.tokens
                given[name] = [prompt[:length] for prompt, length in zip(embedded, lengths, strict=True)]
            else:
                given[name] = embedded
        return given


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear)]


def _reached(output: torch.Tensor) -> set[int]:
    """Identities of the parameters that a tensor hangs on, by its graph of derivatives."""
    nodes, seen, found = [output.grad_fn], set[object](), set[int]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        nodes += [following for following, _ in node.next_functions]
    return found


def _copied(_: Place, leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


@cache
def _pipelines(class_name: str) -> list[str]:
    """Names of the plain pipelines of diffusers whose transformer is of the class.

    Their sources are searched for its name first: importing all pipelines takes half a minute.
    """
    import diffusers

    word = re.compile(rf"\b{class_name}\b")
    names = []
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        text = path.read_text(encoding="utf-8")
        if word.search(text):
            names += [name for name in PIPELINE.findall(text) if not OTHER_USES.search(name)]
    found = {name: getattr(diffusers, name, None) for name in names}
    return [
        name for name, cls in found.items() if cls is not None and word.search(str(_annotation(cls, "transformer")))
    ]


def pipeline_class(class_name: str) -> type:
    """The plain pipeline of diffusers whose transformer is of a class: of several the one with the shortest name.
    Raises ModelError where there is none."""
    import diffusers

    own = _pipelines(class_name)
    if not own:
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline that draws with {class_name} alone")
    cls: type = getattr(diffusers, min(own, key=lambda name: (len(name), name)))
    return cls


def _annotation(cls: type, parameter: str) -> object:
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    annotation = parameters[parameter].annotation if parameter in parameters else None
    return getattr(annotation, "__name__", annotation)


def _scheduler(annotation: object) -> object:
    """One of the class that a pipeline asks for, of several the first, as it is made; of a pipeline that takes any,
    DDIM."""
    import diffusers

    for cls in (annotation, *get_args(annotation)):
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
            return cls()
    return diffusers.DDIMScheduler() if "Karras" in str(annotation) else diffusers.FlowMatchEulerDiscreteScheduler()


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Within, a logger says nothing: what it has to say comes as an error, too."""
    logger = logging.getLogger(name)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


@lru_cache(maxsize=8)
def _recorder(class_name: str, config: str) -> Recorder:
    return Recorder(class_name, json.loads(config))


def recorder_of(class_name: str, config: Config) -> Recorder:
    """The recorder of a class and a configuration, made once."""
    stated = {key: value for key, value in config.items() if not key.startswith("_")}
    return _recorder(class_name, json.dumps(stated, sort_keys=True))
