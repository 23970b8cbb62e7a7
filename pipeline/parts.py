"""What a folder of a diffusers pipeline holds, part by part, and what becomes of each when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from export.documents import shown
from export.errors import ModelError, RecipeError
from export.models.description import GENERATION_FILE
from export.models.sources import find
from pipeline.generate.convert_tokenizer import CLASSES as TOKENIZERS
from pipeline.generate.convert_tokenizer import refuse_tokenizer
from pipeline.generate.example_prompts import own_prompts
from pipeline.generate.own_settings import own_settings
from pipeline.generate.pipeline_classes import DECODER, ENCODER, TRANSFORMER, PipelineClass, find_pipeline_class
from pipeline.generate.pipeline_folder import INDEX, REMEDY, listed_parts, read_index
from pipeline.generate.schedulers.base import SchedulerOptions
from pipeline.generate.schedulers.config import (
    CONFIG_FILE,
    SCHEDULER,
    SchedulerConfig,
    read_scheduler_config,
    scheduler_class,
)
from pipeline.recipe import Recipe, component_recipe

# THE table of autoencoders: class in diffusers -> components that it becomes, which are also the recipes that they
# begin with, and whether they are built unless the recipe or --component asks for them.
AUTOENCODERS = {"AutoencoderKL": ((DECODER, True), (ENCODER, False))}
# THE table of text encoders: class in transformers -> the recipe that it begins with.
TEXT_ENCODERS = {
    "T5EncoderModel": "t5_w4a8",
    "MT5EncoderModel": "t5_w4a8",
    "UMT5EncoderModel": "t5_w4a8",
    "CLIPTextModel": "clip_w4a8",
    "CLIPTextModelWithProjection": "clip_w4a8",
    "BertModel": "bert_w4a8",
    **dict.fromkeys(("Gemma2Model", "Gemma2ForCausalLM"), "gemma_w4a8"),
    **dict.fromkeys(("Qwen2Model", "Qwen2ForCausalLM", "Qwen3Model", "Qwen3ForCausalLM"), "qwen_w4a8"),
    **dict.fromkeys(("Qwen2_5_VLTextModel", "Qwen2_5_VLForConditionalGeneration"), "qwen_w4a8"),
}
# Parts that drawing does without, by class, and why.
LEFT_OUT = {
    "StableDiffusionSafetyChecker": "it judges finished pictures; run it on them if you need it",
    "CLIPImageProcessor": "it prepares pictures for a safety checker or an image encoder, which are left out",
    "CLIPFeatureExtractor": "it prepares pictures for a safety checker, which is left out",
    "CLIPVisionModelWithProjection": "it reads pictures as prompts for adapters, which are not built",
}

# Numbers of steps that pipelines are drawn with, of which one is named where the scheduler does not make those stated.
# One step is not among them: schedulers make it by another rule, so that it says nothing of more.
OTHER_STEPS = (20, 30, 10, 50, 4, 2)


@dataclass(frozen=True)
class Part:
    """A component to build: its name in the bundle, and its own recipe."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class PipelineFolder:
    """root: with model_index.json, whose contents are `index`. parts: in the index's order. added: those that are built
    on demand alone. tokenizers: folder to class. left_out: parts that are not built, and why."""

    root: Path
    revision: str
    index: dict[str, object]
    parts: tuple[Part, ...]
    added: tuple[Part, ...]
    tokenizers: dict[str, str]
    left_out: dict[str, str]

    @property
    def classes(self) -> dict[str, str]:
        """Every part that the index lists, and its class."""
        return {name: _class_of(self.index, name, self.root) for name in listed_parts(self.root / INDEX)}

    @property
    def class_name(self) -> str:
        return str(self.index["_class_name"])

    def part(self, name: str) -> Part:
        """Raises RecipeError for a name that no component has."""
        parts = {part.name: part for part in (*self.parts, *self.added)}
        if name not in parts:
            raise RecipeError(f"--component {name}: {self.root} becomes {', '.join(parts)}; use one of these")
        return parts[name]


def is_whole(source: str) -> bool:
    """Is the model `source` a folder of a diffusers pipeline, rather than of one model?"""
    root = find(source)[0]
    return root.is_dir() and (root / INDEX).is_file()


def read_folder(recipe: Recipe) -> PipelineFolder:
    """The parts of the pipeline that is the recipe's model, each with its recipe.

    Raises ModelError, naming it, for a part that is missing or that nothing is known of, and RecipeError for a table of
    the recipe that belongs to no part, or makes no recipe.
    """
    root, revision = find(recipe.model)
    index = read_index(root / INDEX)
    row = find_pipeline_class(str(index.get("_class_name")), str(root / INDEX))
    parts, added, tokenizers, left_out = list[Part](), list[Part](), dict[str, str](), dict[str, str]()
    for name in listed_parts(root / INDEX):
        class_name, folder = _class_of(index, name, root), root / name
        if class_name in LEFT_OUT:
            left_out[name] = LEFT_OUT[class_name]
        elif not folder.is_dir():
            raise ModelError(
                f"{folder} is missing, which {root / INDEX} lists; download it too, or build one model alone with "
                f"-m {root / TRANSFORMER}"
            )
        elif name == TRANSFORMER:
            parts.append(Part(name, replace(recipe, model=str(folder), components={})))
        elif class_name in AUTOENCODERS:
            for component, by_default in AUTOENCODERS[class_name]:
                part = Part(component, _recipe(recipe, component, component, folder))
                (parts if by_default or component in recipe.components else added).append(part)
        elif class_name in TEXT_ENCODERS:
            parts.append(Part(name, _recipe(recipe, name, TEXT_ENCODERS[class_name], folder)))
        elif class_name.removesuffix("Fast") in TOKENIZERS:
            refuse_tokenizer(folder, class_name)
            tokenizers[name] = class_name
        elif name == SCHEDULER:
            refuse_scheduler(root, row, class_name)
        else:
            known = ", ".join((*TEXT_ENCODERS, *AUTOENCODERS, *TOKENIZERS))
            raise ModelError(f"{root}: part {name} is of class {class_name}, which cannot be built; known are {known}")
    own_prompts(root)  # refuses a file that cannot be used
    pipeline = PipelineFolder(root, revision, index, tuple(parts), tuple(added), tokenizers, left_out)
    listed = {*(part.name for part in parts), *((SCHEDULER,) if scheduler_class(index) else ())}
    if missing := [name for name in (*row.components, SCHEDULER) if name not in listed]:
        raise ModelError(f"{root / INDEX}: {row.name} draws with {missing[0]}, of which it lists no part; {REMEDY}")
    for name in recipe.components:
        if name == TRANSFORMER:
            raise RecipeError(f"{recipe.name}: components.{name} is the recipe itself; put its keys outside of a table")
        pipeline.part(name)
    return pipeline


def refuse_scheduler(root: Path, row: PipelineClass, class_name: str) -> None:
    """Raise ModelError for a scheduler that is not supported, or that does not have the steps that the pipeline is
    drawn with by default. class_name: that its index states."""
    stated = own_settings(root).n_steps
    n_steps, path = row.n_steps if stated is None else stated, root / SCHEDULER / CONFIG_FILE
    config = read_scheduler_config(path, class_name)
    try:
        config.scheduler(SchedulerOptions(n_steps))
    except RecipeError as error:
        other = next((other for other in OTHER_STEPS if _makes_steps(config, other)), None)
        if other is None:
            raise ModelError(f"{path}: {error}") from error
        source = f"the default of {row.name}" if stated is None else "n_steps there"
        raise ModelError(
            f"{path} does not make {n_steps} steps ({error}), {source}; state others in {root / GENERATION_FILE}, as "
            f"n_steps {other}"
        ) from error


def _makes_steps(config: SchedulerConfig, n_steps: int) -> bool:
    try:
        config.scheduler(SchedulerOptions(n_steps))
    except RecipeError:
        return False
    return True


def _class_of(index: Mapping[str, object], name: str, root: Path) -> str:
    """The class of a part, which the index states as [library, class]."""
    stated = index[name]
    class_name = stated[1] if isinstance(stated, list) else None
    if not isinstance(class_name, str):
        raise ModelError(f"{root / INDEX}: part {name} is {shown(stated)}; expected a library and a class; {REMEDY}")
    return class_name


def _recipe(recipe: Recipe, name: str, base: str, folder: Path) -> Recipe:
    """Of a part other than the denoiser; the variant of the weights is the pipeline's."""
    own = component_recipe(recipe, name, base, str(folder))
    return own if own.model_variant else replace(own, model_variant=recipe.model_variant)
