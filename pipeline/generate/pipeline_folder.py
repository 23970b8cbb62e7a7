"""The trajectory of a real model, drawn by the diffusers pipeline it belongs to: its text encoder, its scheduler.

A folder with model_index.json and all that it lists has them; a transformer alone does not, and then calibration sees
random conditioning. The text encoder is loaded in float32, so that latents are float32 as well.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from export.documents import Rules, open_file, read_json, sha256
from export.errors import ModelError, RecipeError, UserError
from export.names import inside
from pipeline import machine
from pipeline.backends.base import Arrays, Engine
from pipeline.files import is_out_of_disk, is_out_of_memory, sha256_json
from pipeline.generate.example_prompts import PROMPTS_FILE, drawn_prompts, own_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from export.models.load import LoadedModel
    from pipeline.recipe import Recipe, Sampling

INDEX = "model_index.json"
REMEDY = "copy or download it again"
# Weights of a part, in one file or in shards, without a variant or with one before or behind the shard's number.
WEIGHTS = re.compile(r"[a-z_]+(\.([\w-]+?))?(-\d+-of-\d+)?(\.([\w-]+))?\.safetensors")
HASHED_BYTES = 2**26  # larger files take longer to read than a build should wait for at every look
Keep = Callable[[int, Arrays], None]


def pipeline_root(model: LoadedModel) -> Path | None:
    """The folder of the model's pipeline if every part that its index lists is there, else None."""
    for folder in (model.folder, model.folder.parent):
        path = folder / INDEX
        if path.is_file() and all((folder / part).is_dir() for part in listed_parts(path)):
            return folder
    return None


def read_index(index: Path) -> dict[str, object]:
    """A pipeline's model_index.json: class names, and [library, class] by part. Raises ModelError."""
    return read_json(index, dict[str, object], Rules(ModelError, REMEDY))


def listed_parts(index: Path) -> list[str]:
    """Names of the parts of a pipeline; `[null, null]` stands for one that it does without."""
    document = read_index(index)
    names = [name for name, value in document.items() if isinstance(value, list) and len(value) == 2 and value[0]]
    for name in names:
        inside(index.parent, name, index, ModelError)
    return names


def shared_variant(root: Path) -> str | None:
    """The variant to open the pipeline's other parts in, None if all have plain weights.

    Raises ModelError if those without plain weights share no variant, or more than one.
    """
    by_part = {part: _variants(root / part) for part in _other_parts(root)}
    lacking = {part: variants for part, variants in by_part.items() if variants and "" not in variants}
    if not lacking:
        return None
    shared = sorted(set.intersection(*lacking.values()))
    if len(shared) != 1:
        held = "; ".join(f"{part}: {', '.join(sorted(variants))}" for part, variants in lacking.items())
        raise ModelError(
            f"{root}: parts without plain weights must share one variant ({held}); download the plain ones"
        )
    return shared[0]


def _other_parts(root: Path) -> list[str]:
    return [part for part in listed_parts(root / INDEX) if part != "transformer"]


def _variants(folder: Path) -> set[str]:
    """Variants of a part's weights, "" for plain ones; none for a part without weights."""
    matches = (WEIGHTS.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {match[2] or match[5] or "" for match in matches if match}


def identity(root: Path) -> str:
    """Hash of what a pipeline draws by: its index, its prompts and the files of its parts, of each its name and its
    content; of large weights the size, which tells one text encoder from another. A card or a picture beside them is no
    part of it."""
    own = [
        root / INDEX,
        root / PROMPTS_FILE,
        *(path for part in listed_parts(root / INDEX) for path in (root / part).rglob("*")),
    ]
    files = sorted(path for path in own if path.is_file())
    facts = (sha256(path) if path.stat().st_size <= HASHED_BYTES else path.stat().st_size for path in files)
    return sha256_json([[str(path.relative_to(root)), fact] for path, fact in zip(files, facts, strict=True)])


def float32_bytes(root: Path) -> int:
    """Size in float32 of the weights of all parts but the transformer, from the heads of their safetensors files."""
    variant, files = shared_variant(root) or "", []
    for folder in (root / part for part in _other_parts(root)):
        own_variant = "" if "" in _variants(folder) else variant
        matches = {path: WEIGHTS.fullmatch(path.name) for path in sorted(folder.iterdir())}
        files += [path for path, match in matches.items() if match and (match[2] or match[5] or "") == own_variant]
    return 4 * sum(_elements(path) for path in files)


def _elements(path: Path) -> int:
    open_file(path, ModelError, REMEDY).close()  # refuses what is no file, for which safe_open would wait
    try:
        with safe_open(path, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); {REMEDY}") from error


# What diffusers and transformers raise for parts that are missing, damaged or of another version.
REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, SafetensorError,
            TypeError, ValueError)  # fmt: skip


@contextmanager
def refused_as_model_error(sentence: str) -> Iterator[None]:
    """Within, what a pipeline's parts raise for their own files or settings becomes a ModelError that begins so.

    What our transformer in it raises stays what it is, and so does a lack of memory or disk.
    """
    try:
        yield
    except UserError:
        raise
    except REFUSALS as error:
        frames = (frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__))
        if is_out_of_memory(error) or is_out_of_disk(error) or "pipeline.generate.diffusers_adapter" in frames:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(f"{sentence} ({reason}); {REMEDY}") from error


def open_pipeline(root: Path, transformer: ModelMixin) -> DiffusionPipeline:
    """The diffusers pipeline in the folder `root` with this transformer. Raises ModelError for what cannot be read."""
    from diffusers import DiffusionPipeline

    settings = {"variant": shared_variant(root), "local_files_only": True}
    for path in (path for part in _other_parts(root) for path in (root / part).rglob("*") if not path.is_dir()):
        open_file(path, ModelError, REMEDY).close()  # refuses what is no file, for which diffusers would wait
    with refused_as_model_error(f"{root}: diffusers cannot open this pipeline"):
        return DiffusionPipeline.from_pretrained(root, transformer=transformer, **settings)


def drawing(root: Path) -> AbstractContextManager[None]:
    """Within, the pipeline in `root` is called: what its parts raise for their own settings becomes a ModelError."""
    return refused_as_model_error(f"{root}: its pipeline cannot draw with these settings")


def refuse_too_large(root: Path) -> None:
    """Raise ResourceError if the pipeline's other parts do not fit into the memory that is free."""
    remedy = (
        "calibrate where there is more memory and build from its checkpoint, or copy the "
        "transformer's folder out of the pipeline, which then calibrates on random conditioning"
    )
    machine.refuse_too_large(float32_bytes(root), f"{root}: text encoder and other parts take in float32", remedy)


def example_prompts(model: LoadedModel, root: Path, count: int, seed: int) -> list[str]:
    """Prompts of the pipeline in `root`, or for a model of classes the numbers of some, the same for the same seed."""
    rng = np.random.default_rng(seed)
    for kind, _, classes in (row.fill.partition(":") for row in model.inputs):
        if kind == "class":
            return [str(number) for number in rng.integers(int(classes), size=count)]
    return drawn_prompts(own_prompts(root), count, seed)


def pipeline_arguments(pipeline: DiffusionPipeline, sampling: Sampling, prompts: Sequence[str]) -> dict[str, object]:
    """What the pipeline calls `prompts`: ImageNet classes by number or name where it has their labels, else texts, and
    the one size that the engine was made for (the pipeline's own where the recipe states none)."""
    names = getattr(pipeline, "labels", None)
    if names is None:
        stated = {key: value for key, value in (("height", sampling.height), ("width", sampling.width)) if value}
        known = inspect.signature(type(pipeline).__call__).parameters
        plain = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
        return {"prompt": list(prompts), **plain, **stated}
    for prompt in prompts:
        if not prompt.isdecimal() and prompt not in names:
            shown = ", ".join(list(names)[:8])
            raise RecipeError(f"prompt {prompt!r} is not a class; use a number or a name such as {shown}")
    return {"class_labels": [int(prompt) if prompt.isdecimal() else names[prompt] for prompt in prompts]}


@dataclass
class _Recorder:
    """An engine that shows each step's inputs before it computes: of a pipeline that calls it with prompts and again
    without, those of both as one. shared: names of inputs without a batch axis."""

    engine: Engine
    keep: Keep
    shared: frozenset[str]
    step: int = -1
    shown: Arrays = field(default_factory=dict)

    def run(self, inputs: Arrays) -> Arrays:
        again = bool(self.shown) and self.shown["timestep"][0] == inputs["timestep"][0]
        self.step += not again
        before = self.shown if again else {}
        self.shown = {
            key: np.concatenate([before[key], value]) if again and key not in self.shared else value
            for key, value in inputs.items()
        }
        self.keep(self.step, self.shown)
        return self.engine.run(inputs)

    def close(self) -> None:
        self.engine.close()


class PipelineSampler:
    """The model's pipeline with the float model's engine in the transformer's place, opened once for all batches."""

    def __init__(self, root: Path, model: LoadedModel, recipe: Recipe, engine: Engine) -> None:
        """Raises ResourceError for parts too large, and ModelError for one that cannot be read."""
        from pipeline.generate.diffusers_adapter import DrawnSize, EngineTransformer

        refuse_too_large(root)
        self.root, self.model, self.recipe, self.engine = root, model, recipe, engine
        cells = model.cells(recipe.sampling.height, recipe.sampling.width)
        size = None if model.family.recordings is None else DrawnSize(cells, model.pixels_per_cell)
        transformer = EngineTransformer(engine, model.family, model.config, size)
        self.pipe = open_pipeline(root, transformer)
        self.pipe.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], seed: int, keep: Keep) -> None:
        """Sample `prompts` by the recipe's steps and guidance; `keep` gets (step, inputs of both halves)."""
        import torch

        self.pipe.transformer.engine = _Recorder(self.engine, keep, self.model.shared)
        size = self.recipe.sampling
        recordings = self.model.family.recordings
        guided: dict[str, object] = {"guidance_scale": size.guidance_scale}
        if recordings is not None:  # scales count from another number in some, or stand under another name
            guided = recordings.recorder.guided(size.guidance_scale, len(prompts))
        settings = {"num_inference_steps": size.n_steps, **guided}
        named = pipeline_arguments(self.pipe, size, prompts)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        with drawing(self.root):
            self.pipe(**named, **settings, generator=generators, output_type="latent")
