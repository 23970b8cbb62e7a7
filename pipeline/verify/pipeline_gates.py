"""What a whole pipeline must hold beside its components: a picture of the run time is diffusers' on the same parts.

Components are proven by themselves. What lies between them is judged here: token ids, masks, the conditions of the
denoiser, guidance, scheduler, scaling and decoding. Both sides call the same engines from the same noise.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.models.families import FAMILIES
from pipeline.backends.base import Arrays, Engine, only
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.distance import psnr_db
from pipeline.generate.components import Components, PipelineSource
from pipeline.generate.convert_tokenizer import read_tokenizer
from pipeline.generate.example_prompts import drawn_prompts
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.pipeline_classes import DECODER, PIPELINES, TRANSFORMER
from pipeline.generate.pipeline_folder import pipeline_arguments, shared_variant
from pipeline.generate.schedulers.base import SeededNoise
from pipeline.generate.tiles import Tiles
from pipeline.parts import AUTOENCODERS, PipelineFolder
from pipeline.text_to_image import Pipeline
from pipeline.verify.gates import FACTOR, FACTOR_DB, ROUNDED_DB
from pipeline.verify.replayed_calls import ROUNDING, Difference, Record, Recorded, Replayed, ulps
from pipeline.verify.report import Gate, Report

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

logger = logging.getLogger(__name__)
# A first step, two in the middle and a last one: all that the rules of multistep schedulers tell apart.
STEPS = 4
PROMPTS, SEED = 2, 0
RUNS = 3
# NumPy and PyTorch round roots, logarithms and exponentials in a scheduler's tables to neighbours of each other, and a
# step multiplies and adds a handful of such numbers.
SCHEDULER_ULPS = 8.0
# Beside captions, what tokenizers treat in ways of their own: writing systems, composed characters, spaces, length.
TEXTS = (
    "",
    "Ein Fuchs springt über den Zaun",
    "一只猫坐在红色的椅子上",
    "красный круг на белом фоне",
    "cafe\u0301 \u2014 na\u00efve \ufb01ne 1/2 \u00bd",
    "  two  spaces\tand a tab ",
    "a very long prompt, " * 120,
)


def pipeline_report(bundle: PipelineBundle, folder: PipelineFolder) -> Report:
    """The gates of a bundle that was built of `folder`. Its denoiser must run on this machine."""
    report = Report()
    report.gates += token_gates(bundle, folder)
    with bundle.source() as source:
        parts = Components(source.engines, keep_loaded=True)
        try:
            report.gates += picture_gates(source, parts, bundle, folder)
        finally:
            parts.close()
    return report


# --- token ids -------------------------------------------------------------------------------------------------------


def token_gates(bundle: PipelineBundle, folder: PipelineFolder) -> list[Gate]:
    """Ids and masks of every tokenizer against those of transformers."""
    from pipeline.generate.tokenizer import PromptTokenizer

    gates, row = [], PIPELINES[folder.class_name]
    with bundle.source() as source:
        texts = [*drawn_prompts(source.prompts, len(TEXTS), SEED), *TEXTS]
        for encoder in row.encoders:
            own = PromptTokenizer.load(source.tokenizers[encoder.tokenizer], encoder.tokens)(texts)
            theirs = read_tokenizer(folder.root / encoder.tokenizer, folder.tokenizers[encoder.tokenizer])(
                texts, padding="max_length", max_length=encoder.tokens, truncation=True, return_tensors="np"
            )
            differ = int(
                np.sum(own.input_ids != theirs.input_ids) + np.sum(own.attention_mask != theirs.attention_mask)
            )
            why = f"ids and masks of {len(texts)} texts against transformers'; they are whole numbers and must be equal"
            gates.append(Gate(f"{encoder.tokenizer}/ids_differing", float(differ), 0.0, "", why))
    return gates


# --- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A component as an engine that others use too. move: what is done to its inputs."""

    parts: Components
    name: str
    move: Callable[[Arrays], Arrays] = lambda inputs: inputs

    def run(self, inputs: Arrays) -> Arrays:
        return self.parts.run(self.name, self.move(inputs))

    def close(self) -> None:
        """Whoever owns the components closes them."""


def picture_gates(
    source: PipelineSource, parts: Components, bundle: PipelineBundle, folder: PipelineFolder
) -> list[Gate]:
    """Pictures of `PROMPTS` prompts by STEPS steps, by our run time and by diffusers' pipeline on the same engines."""
    engines: dict[str, Engine] = {name: Shared(parts, name) for name in source.engines}
    shared = {TRANSFORMER: LatentModel(source).shared}
    records = {name: Record(name, shared.get(name, frozenset())) for name in engines}
    prompts = _prompts(source)
    recorded = {name: Recorded(engine, records[name]) for name, engine in engines.items()}
    theirs = _diffusers_pictures(source, recorded, bundle, folder, prompts)
    return [picture_gate(source, parts, theirs, prompts), calls_gate(source, engines, records, bundle, folder, prompts)]


def picture_gate(
    source: PipelineSource, parts: Components, theirs: NDArray[np.floating], prompts: Sequence[str]
) -> Gate:
    """PSNR of our pictures to diffusers', the worst.

    The limit: what the least roundings do. Runs of our own whose latents are moved by up to SCHEDULER_ULPS units of
    2^-24 before every call of the denoiser are equally right; where a code flips they part, and the worst of them less
    FACTOR_DB is allowed. Where none flips, ROUNDED_DB is asked for. This limit has no floor: where flips make runs part
    widely it lets anything pass, and `calls_gate` judges alone.
    """
    engines: dict[str, Engine] = {name: Shared(parts, name) for name in source.engines}
    own = _drawn(source, engines, prompts)
    limit = ROUNDED_DB
    for run in range(RUNS):
        moved = Shared(parts, TRANSFORMER, _mover(run))
        again = _drawn(source, engines | {TRANSFORMER: moved}, prompts)
        limit = min(limit, _worst_db(own, again) - FACTOR_DB)
    why = (
        f"worst of {PROMPTS} pictures of {STEPS} steps against diffusers' pipeline on the same engines; limit: of our "
        f"own with latents moved by roundings, less {FACTOR_DB:.0f} dB"
    )
    return Gate("picture_psnr_db", _worst_db(theirs, own), limit, "dB", why, at_most=False)


def calls_gate(
    source: PipelineSource,
    engines: Mapping[str, Engine],
    records: Mapping[str, Record],
    bundle: PipelineBundle,
    folder: PipelineFolder,
    prompts: Sequence[str],
) -> Gate:
    """Everything that our run time gives an engine, and its pictures, against what diffusers' pipeline does, where both
    get the same answers, so that no code flips and nothing piles up (pipeline/verify/replayed_calls.py).

    records: of diffusers' run, but for the decoder, which it then calls in its own tiles. The limit: a step of a
    scheduler rounds by SCHEDULER_ULPS at most, what STEPS of them do adds up, and numbers may become smaller by FACTOR
    from the noise to the decoder's latents while their errors stay.
    """
    replayed = {name: Replayed(engine, records[name]) for name, engine in engines.items()}
    decoder = Recorded(engines[DECODER], records[DECODER])
    theirs = _diffusers_pictures(source, replayed, bundle, folder, prompts, decoder)
    for record in records.values():
        record.differences.clear()  # of diffusers' own calls
    own = _drawn(source, replayed, prompts)
    differences = [row for record in records.values() for row in record.differences]
    differences += [Difference(ulps(one, other), "the picture") for one, other in zip(own, theirs, strict=True)]
    worst = max(differences, key=lambda row: row.ulps)
    seen = f"the worst is {worst.where}" if worst.ulps else "all are equal to the bit"
    why = (
        f"what engines are given for {len(differences) - PROMPTS} samples, and {PROMPTS} pictures, against diffusers' "
        f"pipeline, with equal answers of the engines: {seen}; limit: {STEPS} steps that round by "
        f"{SCHEDULER_ULPS:g} units of 2^-24 of the largest number, times {FACTOR:g}"
    )
    return Gate("calls_ulps", worst.ulps, FACTOR * STEPS * SCHEDULER_ULPS, "ulp", why)


def _loader(engine: Engine) -> Callable[[], Engine]:
    return lambda: engine


def _worst_db(reference: NDArray[np.floating], value: NDArray[np.floating]) -> float:
    return min(psnr_db(one, other, 1.0) for one, other in zip(reference, value, strict=True))


def _mover(seed: int) -> Callable[[Arrays], Arrays]:
    """Latents moved by up to SCHEDULER_ULPS."""
    rng = np.random.default_rng([SEED, seed])

    def moved(inputs: Arrays) -> Arrays:
        latents = inputs["hidden_states"]
        by = rng.uniform(-SCHEDULER_ULPS, SCHEDULER_ULPS, latents.shape) * ROUNDING
        return {**inputs, "hidden_states": (latents * (1 + by)).astype(latents.dtype)}

    return moved


def _prompts(source: PipelineSource) -> list[str]:
    """Those that the bundle holds, whatever its model's folder has by now, or of a model of classes their numbers."""
    if PIPELINES[source.class_name].classes:
        return [str(number) for number in range(PROMPTS)]
    return drawn_prompts(source.prompts, PROMPTS, SEED)


def _drawn(source: PipelineSource, engines: Mapping[str, Engine], prompts: Sequence[str]) -> NDArray[np.float32]:
    """Ours, [B, H, W, 3] from 0 to 1; the picture of each prompt has a seed of its own."""
    loaders = {name: _loader(engine) for name, engine in engines.items()}
    model = LatentModel(replace(source, engines=loaders), keep_loaded=True)
    outputs = [
        Pipeline(model)(prompt, num_inference_steps=STEPS, seed=SEED + i, output_type="np")
        for i, prompt in enumerate(prompts)
    ]
    return np.concatenate([np.asarray(output.images, np.float32) for output in outputs])


def _diffusers_pictures(
    source: PipelineSource,
    engines: Mapping[str, Engine],
    bundle: PipelineBundle,
    folder: PipelineFolder,
    prompts: Sequence[str],
    decoder: Engine | None = None,
) -> NDArray[np.floating]:
    """Theirs, as of `_drawn`, with the same engines in it. Guidance is not said unless the bundle states its
    own: the default of ours is compared with theirs, too. decoder: as of `diffusers_pipeline`."""
    import torch

    model = LatentModel(source)
    pipe = diffusers_pipeline(engines, bundle, folder, decoder)
    own = source.settings.guidance_scale
    said = {} if own is None else {"guidance_scale": own}
    pictures = []
    for seed, prompt in enumerate(prompts, SEED):
        noise = SeededNoise([seed])
        latents = torch.from_numpy(noise((1, *model.latent_shape)))
        named = pipeline_arguments(pipe, bundle.components[TRANSFORMER].recipe.sampling, [prompt])
        if "latents" in inspect.signature(type(pipe).__call__).parameters:
            named["latents"] = latents
        with _noise_of(pipe.scheduler, noise, latents, pipe):
            pictures.append(pipe(**named, **said, num_inference_steps=STEPS, output_type="np").images)
    return np.concatenate(pictures)


@contextmanager
def _noise_of(scheduler: object, noise: SeededNoise, latents: torch.Tensor, pipe: object) -> Iterator[None]:
    """Within, what a scheduler of diffusers draws is `noise`, and what its pipeline begins with is `latents`."""
    import torch

    def draw(shape: Sequence[int], **_: object) -> torch.Tensor:
        return torch.from_numpy(noise(tuple(shape)))

    def begin(shape: Sequence[int], **_: object) -> torch.Tensor:
        assert tuple(shape) == tuple(latents.shape)
        return latents

    modules = {
        importlib.import_module(type(scheduler).__module__): draw,
        importlib.import_module(type(pipe).__module__): begin,
    }
    before = {module: module.randn_tensor for module in modules if hasattr(module, "randn_tensor")}
    try:
        for module in before:
            module.randn_tensor = modules[module]  # type: ignore[attr-defined]
        yield
    finally:
        for module, function in before.items():
            module.randn_tensor = function  # type: ignore[attr-defined]


def diffusers_pipeline(
    engines: Mapping[str, Engine], bundle: PipelineBundle, folder: PipelineFolder, decoder: Engine | None = None
) -> DiffusionPipeline:
    """The diffusers pipeline of a folder with `engines` in the place of its denoiser and text encoders. Its autoencoder
    is its own, with the weights that engines store: no part of that is quantized. decoder: in the place of the half of
    the autoencoder that decodes a tile."""
    import diffusers

    from export.models.load import stored_value
    from pipeline.generate.diffusers_adapter import DrawnSize, EngineTransformer
    from pipeline.generate.text_stand_in import EngineTextEncoder

    cls, named = getattr(diffusers, folder.class_name), dict[str, object]()
    for name, class_name in folder.classes.items():
        if name == TRANSFORMER:
            denoiser = bundle.components[name]
            config = denoiser.config()
            family = FAMILIES[denoiser.manifest["model"]["family"]]
            named[name] = EngineTransformer(
                engines[name], family, config, DrawnSize.of_bundle(denoiser, family, config)
            )
        elif name in bundle.components:
            component = bundle.components[name]
            states = FAMILIES[component.manifest["model"]["family"]].hidden_states
            named[name] = EngineTextEncoder(engines[name], component.config(), states)
        elif class_name in AUTOENCODERS:
            autoencoder = getattr(diffusers, class_name).from_pretrained(
                folder.root / name, variant=shared_variant(folder.root), local_files_only=True
            )
            stored = {key: stored_value(key, tensor) for key, tensor in autoencoder.state_dict().items()}
            autoencoder.load_state_dict(stored)
            tiles = Tiles.of_pixels(autoencoder.config)
            autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = tiles.pixels, tiles.latents
            autoencoder.enable_tiling()
            if decoder is not None:
                _replace_decoder(autoencoder, decoder)
            named[name] = autoencoder
        elif name in folder.tokenizers:
            named[name] = read_tokenizer(folder.root / name, class_name)
        elif name in folder.left_out:
            named[name] = None
        else:
            named[name] = getattr(diffusers, class_name).from_pretrained(folder.root / name, local_files_only=True)
    taken = inspect.signature(cls.__init__).parameters
    for name, value in folder.index.items():  # plain values, as requires_safety_checker
        if name in taken and name not in named and not isinstance(value, list):
            named[name] = _of_index(name, value)
    named["requires_safety_checker"] = False
    absent = {name: None for name, value in folder.index.items() if isinstance(value, list)}  # or left out
    pipe = cls(**{name: value for name, value in (absent | named).items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _replace_decoder(autoencoder: AutoencoderKL, engine: Engine) -> None:
    """Have an engine decode its tiles; cutting and blending them stays diffusers'."""
    import torch

    def decode(latents: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.from_numpy(only(engine.run({"latents": latents.contiguous().numpy()})))

    autoencoder.post_quant_conv = torch.nn.Identity()  # it is the engine's first layer
    autoencoder.decoder.forward = decode


def _of_index(name: str, value: object) -> object:
    """A plain value of model_index.json as constructors take it: JSON has no numbers as keys."""
    if name == "id2label" and isinstance(value, Mapping):
        return {int(key): text for key, text in value.items()}
    return value
