"""THE table of diffusers pipelines: what the class of a pipeline knows, and its components do not.

How prompts are prepared and how long they may be, where the outputs of text encoders go, what else a denoiser is given,
and what a drawing begins with. All of it as diffusers has it, whose pictures these are to be; where a class there is
wrong, the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from export.documents import shown
from export.errors import ModelError, RecipeError
from export.models.families import Config
from export.models.rotary import BASE_PIXELS, rotary_tables
from pipeline.backends.base import Arrays
from pipeline.generate.tokenizer import plain_caption

TRANSFORMER, DECODER, ENCODER = "transformer", "vae_decoder", "vae_encoder"
# Height and width of a picture, in pixels.
Size = tuple[int, int]
# The size that HunyuanDiT is told a picture was made from, unless its caller says another.
HUNYUAN_ORIGINAL = (1024, 1024)
# Pixels of a latent cell that HunyuanDiT's pipeline computes its rotary positions by, whatever the autoencoder.
HUNYUAN_CELL = 8


@dataclass(frozen=True)
class TextEncoder:
    """component, tokenizer: its names in the pipeline. tokens: of a prompt, with special ones and padding. states,
    mask: inputs of the denoiser that take its last hidden states [B, tokens, C] and the mask of its tokens [B, tokens].
    """

    component: str
    tokenizer: str
    tokens: int
    states: str
    mask: str


@dataclass(frozen=True)
class PipelineClass:
    """One row. denoiser: class of the transformer.

    prepare: a prompt as the tokenizers get it. conditions: what else the denoiser is given, by its configuration and
    the size of the picture; [1, ...] for each picture, or as it is what all share. n_steps, guidance_scale: unless the
    caller says others; guidance is on above 1. classes: the denoiser's input for numbers of classes, where prompts are
    names of these; None: they are texts. unit_noise: drawings begin with noise as it is, whatever the scheduler asks.
    """

    name: str
    denoiser: str
    encoders: tuple[TextEncoder, ...]
    n_steps: int
    guidance_scale: float
    prepare: Callable[[str], str] = str
    conditions: Callable[[Config, Size], Arrays] = lambda config, size: {}
    classes: str | None = None
    unit_noise: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the engines that a drawing needs, in the order of their turns."""
        return (*(row.component for row in self.encoders), TRANSFORMER, DECODER)


# --- PixArt ----------------------------------------------------------------------------------------------------------


def _pixart_conditions(config: Config, size: Size) -> Arrays:
    height, width = size
    return {
        "resolution": np.array([[height, width]], np.float32),
        "aspect_ratio": np.array([[height / width]], np.float32),
    }


def _pixart(name: str, tokens: int) -> PipelineClass:
    encoder = TextEncoder("text_encoder", "tokenizer", tokens, "encoder_hidden_states", "encoder_attention_mask")
    return PipelineClass(
        name, "PixArtTransformer2DModel", (encoder,), 20, 4.5, plain_caption, conditions=_pixart_conditions
    )


# --- HunyuanDiT ------------------------------------------------------------------------------------------------------


def _hunyuan_conditions(config: Config, size: Size) -> Arrays:
    """Sizes in pixels of the picture's origin, of the picture, and the corner that it was cut out at; the style, of
    which there is one; rotary positions."""
    patch = config["patch_size"]
    grid = (size[0] // HUNYUAN_CELL // patch, size[1] // HUNYUAN_CELL // patch)
    head_dim = config["attention_head_dim"]
    cosines, sines = rotary_tables(head_dim, grid, BASE_PIXELS // HUNYUAN_CELL // patch)
    return {
        "image_meta_size": np.array([[*HUNYUAN_ORIGINAL, *size, 0, 0]], np.float32),
        "style": np.zeros(1, np.int64),
        "image_rotary_cos": cosines,
        "image_rotary_sin": sines,
    }


HUNYUAN = PipelineClass(
    "HunyuanDiTPipeline",
    "HunyuanDiT2DModel",
    # Of two pictures each of two prompts diffusers gives the denoiser the masks in another order than the states; here
    # both are in the order of the pictures.
    (
        TextEncoder("text_encoder", "tokenizer", 77, "encoder_hidden_states", "text_embedding_mask"),
        TextEncoder("text_encoder_2", "tokenizer_2", 256, "encoder_hidden_states_t5", "text_embedding_mask_t5"),
    ),
    n_steps=50,
    guidance_scale=5.0,
    conditions=_hunyuan_conditions,
)

PIPELINES: dict[str, PipelineClass] = {
    row.name: row
    for row in (
        _pixart("PixArtAlphaPipeline", 120),
        _pixart("PixArtSigmaPipeline", 300),
        HUNYUAN,
        PipelineClass("DiTPipeline", "DiTTransformer2DModel", (), 50, 4.0, classes="class_labels", unit_noise=True),
    )
}


@dataclass(frozen=True)
class EncoderAlone:
    """recipe: of the text encoder. output: which of its outputs the pipeline reads."""

    recipe: str
    output: str


# Pipelines that are not built whole, since nothing draws with their denoisers yet, though their text encoders are.
ENCODERS_ALONE = {
    **dict.fromkeys(
        ("SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline"), EncoderAlone("gemma_w4a8", "last_hidden_state")
    ),
    "Lumina2Pipeline": EncoderAlone("gemma_w4a8", "penultimate_hidden_state"),
    "ZImagePipeline": EncoderAlone("qwen_w4a8", "penultimate_hidden_state"),
    "OvisImagePipeline": EncoderAlone("qwen_w4a8", "last_hidden_state"),
    "QwenImagePipeline": EncoderAlone("qwen_w4a8", "last_hidden_state"),
}


def find_pipeline_class(name: str, source: str) -> PipelineClass:
    """The row of a class. Raises ModelError for one that is not supported. source: whose class it is, for messages."""
    if name in PIPELINES:
        return PIPELINES[name]
    remedy = f"use one of {', '.join(PIPELINES)}"
    if alone := ENCODERS_ALONE.get(name):
        raise ModelError(
            f"{source}: pipeline {shown(name)} is not built whole, as its denoiser is not supported; its text encoder "
            f"alone is, by --engine {alone.recipe} -m FOLDER/text_encoder, and the pipeline reads its {alone.output}; "
            f"else {remedy}"
        )
    raise ModelError(f"{source}: pipeline {shown(name)} is not supported; {remedy}")


# --- classes by name -------------------------------------------------------------------------------------------------


def class_names(index: Mapping[str, object]) -> dict[str, int]:
    """Name -> number of the classes in a model_index.json; a class may have several names, with commas between them."""
    labels = index.get("id2label")
    if not isinstance(labels, dict):
        return {}
    rows = sorted((int(number), str(text)) for number, text in labels.items() if str(number).isdecimal())
    return {name.strip(): number for number, text in rows for name in text.split(",") if name.strip()}


def class_number(prompt: str, names: Mapping[str, int], count: int) -> int:
    """The class that a prompt names, or has the number of. The empty prompt is the null class, `count`. Raises
    RecipeError for any other."""
    if not prompt:
        return count
    if prompt in names:
        return names[prompt]
    if prompt.isdecimal() and int(prompt) < count:
        return int(prompt)
    known = ", ".join(list(names)[:8])
    remedy = f"a number below {count}" + (f", or a name such as {known}" if known else "")
    raise RecipeError(f"prompt {shown(prompt)} is not a class; use {remedy}")
