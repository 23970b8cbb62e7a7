"""What is known of each model family: inputs, linears to quantize, layers to keep and why. One row for each family.

Kept layers see each image once (embedders, adaLN of a whole batch row) or feed the output directly: they are a small
share of the time, and an error in them reaches every token. PixArt and DiT follow FP4DiT and Q-DiT (arXiv 2503.15465,
2406.17343); HunyuanDiT quantizes its in-block adaLN shift and long-skip linears as FP4DiT does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.errors import ContractError
from export.models.clip_end import end_token
from export.models.prompt_length import longest_prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from export.models.recorded import Recordings

Config = Mapping[str, Any]  # a configuration: each class has keys and types of its own
Tensors = Mapping[str, "Tensor"]
Attributes = dict[str, int | bool]

# Layer kinds a recipe can give a format of their own.
LAYER_KINDS = ("attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "ff.in", "ff.out", "adaln", "skip", "other")
# Dimensions of inputs that stay dynamic in an exported model; "height" and "width" are resolved per resolution, but
# where an input takes any size.
DYNAMIC = ("batch", "tokens")
SIDES = ("height", "width")
# Inputs that change from step to step; all others are the condition.
STEP_INPUTS = frozenset({"hidden_states", "timestep"})
DENOISER, TEXT_ENCODER = "denoiser", "text encoder"
RECORDED = "recorded"  # the name of a family that is learned from its pipeline
MOST_TOKENS = 1024  # of a prompt, of a family whose tables of positions for text end somewhere unknown
KEPT_BY_RECIPE = "the recipe keeps it"
# Of an autoencoder: latents to pictures, or pictures to latents.
Half = Literal["decoder", "encoder"]
FILLS = (
    "normal", "timestep", "mask", "aspect", "class", "ids", "zeros", "rotary_cos", "rotary_sin", "image_size", "upto",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One model input. `shape` mixes numbers with "batch", "tokens", "height", "width" (cells) and "patches".

    `fill` says what a sample holds; "class:N" draws classes below N, "ids:N" numbers of tokens below N, "upto:N"
    numbers from 0 to N; "timestep" a step of a thousand, "timestep:1" the same as a part of all; "mask:1" a mask of
    prompts that have a token at least, "mask" of any. implied: a caller may leave it away, its value follows from the
    picture's size. least_side: height and width stay dynamic, and this is the least of them that a trace is told of;
    None: they are fixed.
    """

    name: str
    shape: tuple[int | str, ...]
    fill: str = "normal"
    dtype: str = "float32"
    implied: bool = False
    least_side: int | None = None

    def __post_init__(self) -> None:
        if self.fill_kind not in FILLS:
            raise ValueError(f"{self.name}: fill {self.fill!r}; use one of {FILLS}")

    @property
    def fill_kind(self) -> str:
        """The fill without its number."""
        return self.fill.partition(":")[0]

    @property
    def batched(self) -> bool:
        """Whether the first axis counts samples; else one value, such as a table for the picture's size, serves all."""
        return bool(self.shape) and self.shape[0] == "batch"

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis -> name of every dynamic dimension."""
        names = DYNAMIC if self.least_side is None else (*DYNAMIC, *SIDES)
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str) and size in names}


def stated_inputs(family: Family, config: Config, source: Path) -> tuple[Input, ...]:
    """The family's inputs by the configuration in `source`. Raises ContractError naming a key that it lacks."""
    try:
        return family.inputs(config)
    except KeyError as error:
        raise ContractError(
            f"{source} lacks {error}, which family {family.name} needs; build the bundle again"
        ) from error


def shared_names(rows: Iterable[Input]) -> frozenset[str]:
    """Names of the inputs without a batch axis: whoever splits or joins batches leaves them as they are."""
    return frozenset(row.name for row in rows if not row.batched)


@dataclass(frozen=True)
class Family:
    """One row. `quantized`: (regex of the module path, layer kind); `kept`: (regex, reason); first match wins.

    `matches` tells whether a configuration of class `class_name` is of this family; `call` runs the diffusers module
    on named inputs and returns the outputs; `conditioning` says in words how conditions enter. `attributes` are
    the plain attributes of an instance, which pipelines read beside its configuration. `ignored` names inputs that the
    class accepts and does not read in this configuration. binned: the family's pipelines choose among sizes of their
    own unless they are called with use_resolution_binning=False.

    A denoiser is called step by step by a sampler and makes pictures; `steps` is False for a text encoder, which is
    called once for a prompt. library: that has the class. streamed: the input of which every sample has its own.
    outputs: names of what `call` returns, one tensor or a tuple. counted: the mask input that says which rows of an
    output [batch, tokens, C] are of a prompt; those of padding are nobody's. None: all count.

    Of a text encoder, exportable: puts parts that export in the places of others, in a module without memory.
    longest: how many tokens it has positions for, None for any number. hidden_states: which output has which place,
    from the end, in what transformers calls so; none where no pipeline asks an engine for it. end: the id that ends a
    prompt where an output is its row, None where none is.

    held: whether the linear at a path is kept though the family quantizes it, as the recipe of one build may say.

    half: of an autoencoder, which is called once for a picture, and of which no layer is quantized; its class has a row
    for each. absent: parts of the model that the family does without, and with them their tensors.

    recordings: of its pipeline, where the row was learned from them.
    """

    name: str
    class_name: str
    matches: Callable[[Config], bool]
    quantized: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    inputs: Callable[[Config], tuple[Input, ...]]
    call: Callable[[nn.Module, Tensors], Tensor | tuple[Tensor, ...]]
    conditioning: str
    tokens: int = 0
    square: bool = False
    binned: bool = True
    attributes: Callable[[Config], Attributes] = lambda config: {}
    ignored: Callable[[Config], frozenset[str]] = lambda config: frozenset()
    library: Literal["diffusers", "transformers"] = "diffusers"
    steps: bool = True
    streamed: str = "hidden_states"
    outputs: tuple[str, ...] = ("sample",)
    counted: str | None = None
    exportable: Callable[[nn.Module], nn.Module] = lambda module: module
    longest: Callable[[Config], int | None] = lambda config: None
    hidden_states: Mapping[int, str] = field(default_factory=dict)
    end: Callable[[Config], int | None] = lambda config: None
    half: Half | None = None
    held: Callable[[str], bool] = lambda path: False
    absent: tuple[str, ...] = ()
    recordings: Recordings | None = None

    @property
    def noun(self) -> str:
        """What a model of the family is."""
        if self.half is not None:
            return f"picture {self.half}"
        return DENOISER if self.steps else TEXT_ENCODER

    @property
    def quantizes(self) -> bool:
        """Whether it has layers to quantize."""
        return bool(self.quantized)

    def kind_of(self, path: str) -> str | None:
        """Layer kind of a linear to quantize; None if it is kept."""
        if self.held(path):
            return None
        return next((kind for pattern, kind in self.quantized if re.fullmatch(pattern, path)), None)

    def reason_of(self, path: str) -> str:
        """Why the layer at `path` is kept."""
        if self.held(path) and replace(self, held=Family.held).kind_of(path):
            return KEPT_BY_RECIPE
        known = (reason for pattern, reason in self.kept if re.fullmatch(pattern, path))
        return next(known, "not one of the linears that this family quantizes")


def _block_linears(block: str) -> tuple[tuple[str, str], ...]:
    """Attention and feed-forward linears as diffusers names them, inside blocks at the path regex `block`."""
    return (
        (rf"{block}\.attn1\.to_[qkv]", "attn.qkv"),
        (rf"{block}\.attn1\.to_out\.0", "attn.out"),
        (rf"{block}\.attn2\.to_q", "cross.q"),
        (rf"{block}\.attn2\.to_[kv]", "cross.kv"),
        (rf"{block}\.attn2\.to_out\.0", "cross.out"),
        (rf"{block}\.ff\.net\.0\.proj", "ff.in"),
        (rf"{block}\.ff\.net\.2", "ff.out"),
    )


PATCH_EMBED = (r"pos_embed\.proj", "patch embedding: few input channels, and its error reaches every token")
OUTPUT = (r"proj_out(_[12])?|norm_out\.linear", "last layers: their error is the output's error")


def _image(config: Config) -> Input:
    return Input("hidden_states", ("batch", config["in_channels"], "height", "width"))


def _widths(config: Config) -> Attributes:
    """Of a whole configuration, the class's defaults included."""
    return {
        "attention_head_dim": config["attention_head_dim"],
        "inner_dim": config["num_attention_heads"] * config["attention_head_dim"],
        "out_channels": config["in_channels"] if config["out_channels"] is None else config["out_channels"],
        "height": config["sample_size"],
        "width": config["sample_size"],
        "gradient_checkpointing": False,
    }


# --- PixArt --------------------------------------------------------------------------------------------------------


def uses_size_conditions(config: Config) -> bool:
    """Whether a PixArt takes resolution and aspect ratio (diffusers' rule where the configuration is silent)."""
    stated = config.get("use_additional_conditions")
    return config.get("sample_size", 128) == 128 if stated is None else bool(stated)


def is_sigma(config: Config) -> bool:
    """PixArt-Sigma shares alpha's class. Its name says so; else 1024 pixels without size conditions is Sigma."""
    name = str(config.get("_name_or_path", "")).lower()
    if "sigma" in name or "alpha" in name:
        return "sigma" in name
    return config.get("sample_size", 128) >= 128 and not uses_size_conditions(config)


def _pixart_inputs(config: Config) -> tuple[Input, ...]:
    width = config.get("caption_channels") or config["cross_attention_dim"]
    rows = [
        _image(config),
        Input("encoder_hidden_states", ("batch", "tokens", width)),
        Input("timestep", ("batch",), "timestep"),
        Input("encoder_attention_mask", ("batch", "tokens"), "mask"),
    ]
    if uses_size_conditions(config):
        rows.append(Input("resolution", ("batch", 2), "image_size", implied=True))
        rows.append(Input("aspect_ratio", ("batch", 1), "aspect", implied=True))
    return tuple(rows)


def _pixart_ignored(config: Config) -> frozenset[str]:
    return frozenset() if uses_size_conditions(config) else frozenset({"resolution", "aspect_ratio"})


def _pixart_attributes(config: Config) -> Attributes:
    return {**_widths(config), "use_additional_conditions": uses_size_conditions(config)}


def _call_pixart(module: nn.Module, inputs: Tensors) -> Tensor:
    sizes = {"resolution": inputs.get("resolution"), "aspect_ratio": inputs.get("aspect_ratio")}
    plain = {key: value for key, value in inputs.items() if key not in sizes}
    return module(**plain, added_cond_kwargs=sizes, return_dict=False)[0]


PIXART_KEPT = (
    PATCH_EMBED,
    OUTPUT,
    (r"adaln_single\..*", "timestep embedding and adaLN: runs once per image, modulates every token of every block"),
    (r"caption_projection\..*", "caption embedding: runs once per caption, feeds every cross-attention"),
)
PIXART_CONDITIONING = (
    "caption embeddings through cross-attention with a mask; timestep (and size conditions) through adaLN-single"
)


def _pixart(name: str, matches: Callable[[Config], bool], tokens: int) -> Family:
    quantized = _block_linears(r"transformer_blocks\.\d+")
    return Family(
        name, "PixArtTransformer2DModel", matches, quantized, PIXART_KEPT, _pixart_inputs, _call_pixart,
        PIXART_CONDITIONING, tokens, attributes=_pixart_attributes, ignored=_pixart_ignored,
    )  # fmt: skip


# --- DiT -----------------------------------------------------------------------------------------------------------


def _dit_inputs(config: Config) -> tuple[Input, ...]:
    classes = config.get("num_embeds_ada_norm", 1000)
    return (
        _image(config),
        Input("timestep", ("batch",), "timestep"),
        Input("class_labels", ("batch",), f"class:{classes}", "int64"),
    )


def call_plain(module: nn.Module, inputs: Tensors) -> Tensor:
    """A class whose forward takes the inputs by their names."""
    return module(**inputs, return_dict=False)[0]


DIT = Family(
    name="dit",
    class_name="DiTTransformer2DModel",
    matches=lambda config: True,
    quantized=_block_linears(r"transformer_blocks\.\d+"),
    kept=(
        PATCH_EMBED,
        OUTPUT,
        (r".*\.norm1\.emb\..*", "timestep and class embedding: runs once per image"),
        (r".*\.norm1\.linear", "adaLN: runs once per image and block, modulates every token (Q-DiT keeps it too)"),
    ),
    inputs=_dit_inputs,
    call=call_plain,
    conditioning="class label and timestep embeddings through adaLN-zero in every block; the null class is the last",
    square=True,
    binned=False,
    attributes=lambda config: {**_widths(config), "patch_size": config["patch_size"]},
)


# --- HunyuanDiT ----------------------------------------------------------------------------------------------------


def _hunyuan_inputs(config: Config) -> tuple[Input, ...]:
    head_dim = config.get("attention_head_dim", 88)
    rows = [
        _image(config),
        Input("timestep", ("batch",), "timestep"),
        Input("encoder_hidden_states", ("batch", config["text_len"], config["cross_attention_dim"])),
        Input("text_embedding_mask", ("batch", config["text_len"]), "mask"),
        Input("encoder_hidden_states_t5", ("batch", config["text_len_t5"], config["cross_attention_dim_t5"])),
        Input("text_embedding_mask_t5", ("batch", config["text_len_t5"]), "mask"),
    ]
    if config.get("use_style_cond_and_image_meta_size", True):
        rows.append(Input("image_meta_size", ("batch", 6), "image_size"))
        rows.append(Input("style", ("batch",), "zeros", "int64"))
    rows.append(Input("image_rotary_cos", ("patches", head_dim), "rotary_cos"))
    rows.append(Input("image_rotary_sin", ("patches", head_dim), "rotary_sin"))
    return tuple(rows)


def _call_hunyuan(module: nn.Module, inputs: Tensors) -> Tensor:
    plain = {key: value for key, value in inputs.items() if not key.startswith("image_rotary")}
    rotary = (inputs["image_rotary_cos"], inputs["image_rotary_sin"])
    return module(**plain, image_rotary_emb=rotary, return_dict=False)[0]


def _hunyuan_ignored(config: Config) -> frozenset[str]:
    used = config.get("use_style_cond_and_image_meta_size", True)
    return frozenset() if used else frozenset({"image_meta_size", "style"})


def _hunyuan_attributes(config: Config) -> Attributes:
    """Of a whole configuration, the class's defaults included."""
    heads, channels = config["num_attention_heads"], config["in_channels"]
    return {
        "num_heads": heads,
        "inner_dim": heads * config["attention_head_dim"],
        "out_channels": 2 * channels if config["learn_sigma"] else channels,
    }


HUNYUAN = Family(
    name="hunyuan",
    class_name="HunyuanDiT2DModel",
    matches=lambda config: True,
    quantized=(
        *_block_linears(r"blocks\.\d+"),
        (r"blocks\.\d+\.norm1\.linear", "adaln"),
        (r"blocks\.\d+\.skip_linear", "skip"),
    ),
    kept=(
        PATCH_EMBED,
        OUTPUT,
        (r"time_extra_emb\..*", "timestep, pooled text, size and style embedding: runs once per image"),
        (r"text_embedder\..*", "text embedding: runs once per caption, feeds every cross-attention"),
    ),
    inputs=_hunyuan_inputs,
    call=_call_hunyuan,
    conditioning="CLIP and T5 embeddings through cross-attention (masked tokens replaced by learned padding); "
    "timestep, pooled text, size and style through an adaLN shift; rotary position embedding as inputs",
    attributes=_hunyuan_attributes,
    ignored=_hunyuan_ignored,
)


# --- text encoders -------------------------------------------------------------------------------------------------

IDS, MASK = "input_ids", "attention_mask"


def _text_inputs(config: Config) -> tuple[Input, ...]:
    return (
        Input(IDS, ("batch", "tokens"), f"ids:{config['vocab_size']}", "int64"),
        Input(MASK, ("batch", "tokens"), "mask", "int64"),
    )


def _call_t5(module: nn.Module, inputs: Tensors) -> Tensor:
    from export.models.t5_modules import encode

    return encode(module, inputs[IDS], inputs[MASK])


def _exportable_t5(module: nn.Module) -> nn.Module:
    from export.models.t5_modules import exportable

    return exportable(module)


T5_BLOCK = r"encoder\.block\.\d+\.layer"
T5_QUANTIZED = (
    (rf"{T5_BLOCK}\.0\.SelfAttention\.[qkv]", "attn.qkv"),
    (rf"{T5_BLOCK}\.0\.SelfAttention\.o", "attn.out"),
    (rf"{T5_BLOCK}\.1\.DenseReluDense\.wi(_[01])?", "ff.in"),
    (rf"{T5_BLOCK}\.1\.DenseReluDense\.wo", "ff.out"),
)
T5_KEPT = (
    (r"shared", "token embedding: a row is looked up for each token, nothing is multiplied"),
    (r".*\.relative_attention_bias", "position bias: a table of some numbers, looked up by distance"),
)


def _t5(name: str, class_name: str, tokens: int) -> Family:
    return Family(
        name, class_name, lambda config: True, T5_QUANTIZED, T5_KEPT, _text_inputs, _call_t5,
        "token ids and their mask; positions enter as a bias of attention by distance", tokens,
        library="transformers", steps=False, streamed=IDS, outputs=("last_hidden_state",), counted=MASK,
        exportable=_exportable_t5,
    )  # fmt: skip


def _call_clip(module: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
    from export.models.clip_modules import encode

    return encode(module, inputs[IDS], inputs[MASK])


def _exportable_clip(module: nn.Module) -> nn.Module:
    from export.models.clip_modules import exportable

    return exportable(module)


CLIP_LAYER = r"(text_model\.)?encoder\.layers\.\d+"
CLIP_QUANTIZED = (
    (rf"{CLIP_LAYER}\.self_attn\.[qkv]_proj", "attn.qkv"),
    (rf"{CLIP_LAYER}\.self_attn\.out_proj", "attn.out"),
    (rf"{CLIP_LAYER}\.mlp\.fc1", "ff.in"),
    (rf"{CLIP_LAYER}\.mlp\.fc2", "ff.out"),
)
CLIP_KEPT = (
    (r".*token_embedding", "token embedding: a row is looked up for each token, nothing is multiplied"),
    (r".*position_embedding", "position embedding: a row is looked up for each place, nothing is multiplied"),
    (r"text_projection", "projection of the pooled row: one row for each prompt, and its error is the output's error"),
)


def _clip(name: str, class_name: str) -> Family:
    return Family(
        name, class_name, lambda config: True, CLIP_QUANTIZED, CLIP_KEPT, _text_inputs, _call_clip,
        "token ids and their mask, of ones where pipelines pass none; attention is causal", 77,
        library="transformers", steps=False, streamed=IDS, counted=MASK, exportable=_exportable_clip,
        outputs=("last_hidden_state", "pooled", "penultimate_hidden_state"),
        longest=lambda config: config["max_position_embeddings"], end=end_token,
    )  # fmt: skip


def _call_bert(module: nn.Module, inputs: Tensors) -> Tensor:
    from export.models.bert_modules import encode

    return encode(module, inputs[IDS], inputs[MASK])


def _exportable_bert(module: nn.Module) -> nn.Module:
    from export.models.bert_modules import exportable

    return exportable(module)


BERT_LAYER = r"encoder\.layer\.\d+"
BERT = Family(
    name="bert",
    class_name="BertModel",
    matches=lambda config: True,
    quantized=(
        (rf"{BERT_LAYER}\.attention\.self\.(query|key|value)", "attn.qkv"),
        (rf"{BERT_LAYER}\.attention\.output\.dense", "attn.out"),
        (rf"{BERT_LAYER}\.intermediate\.dense", "ff.in"),
        (rf"{BERT_LAYER}\.output\.dense", "ff.out"),
    ),
    kept=(
        (r"embeddings\.word_embeddings", "token embedding: a row is looked up for each token, nothing is multiplied"),
        (r"embeddings\.(position|token_type)_embeddings", "position and type embeddings: rows that are looked up"),
    ),
    inputs=_text_inputs,
    call=_call_bert,
    conditioning="token ids and their mask; positions are embedded, and all tokens are of the first type",
    tokens=77,
    library="transformers",
    steps=False,
    streamed=IDS,
    outputs=("last_hidden_state",),
    counted=MASK,
    exportable=_exportable_bert,
    longest=lambda config: config["max_position_embeddings"],
)


def _call_causal(module: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
    from export.models.causal_modules import encode

    return encode(module, inputs[IDS], inputs[MASK])


def _exportable_causal(module: nn.Module) -> nn.Module:
    from export.models.causal_modules import exportable

    return exportable(module)


# Language models, and the class below the head that makes words of hidden states, which alone is compiled.
WITHOUT_HEAD = {
    "Gemma2ForCausalLM": "Gemma2Model",
    "Qwen2ForCausalLM": "Qwen2Model",
    "Qwen3ForCausalLM": "Qwen3Model",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLTextModel",
}
# Those of them that are what reads text in a model that reads pictures, too. Given text alone, such a model counts
# positions as one without pictures does: its three positions of a token are one.
TEXT_PARTS = ("Qwen2_5_VLTextModel",)
CAUSAL_QUANTIZED = (
    (r"layers\.\d+\.self_attn\.[qkv]_proj", "attn.qkv"),
    (r"layers\.\d+\.self_attn\.o_proj", "attn.out"),
    (r"layers\.\d+\.mlp\.(gate|up)_proj", "ff.in"),
    (r"layers\.\d+\.mlp\.down_proj", "ff.out"),
)
CAUSAL_KEPT = ((r"embed_tokens", "token embedding: a row is looked up for each token, nothing is multiplied"),)


def _causal(name: str, class_name: str, tokens: int, absent: tuple[str, ...] = ()) -> Family:
    return Family(
        name, class_name, lambda config: True, CAUSAL_QUANTIZED, CAUSAL_KEPT, _text_inputs, _call_causal,
        "token ids and their mask; attention is causal, with rotary positions", tokens,
        library="transformers", steps=False, streamed=IDS, counted=MASK, exportable=_exportable_causal,
        outputs=("last_hidden_state", "penultimate_hidden_state"), longest=longest_prompt,
        hidden_states={-1: "last_hidden_state", -2: "penultimate_hidden_state"}, absent=absent,
    )  # fmt: skip


# --- autoencoders --------------------------------------------------------------------------------------------------

LATENTS, PICTURE = "latents", "sample"
NOT_QUANTIZED = ((r".*", "a picture is decoded or encoded once, and an error in it is seen: fp16 weights, float32"),)


# The scaling_factor of an AutoencoderKL whose configuration states none.
OWN_SCALE = 0.18215


def pixels_per_latent(config: Config) -> int:
    """Pixels of a side of a latent's cell: each level of an AutoencoderKL but one halves the picture."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def scale_and_shift(config: Config) -> tuple[float, float]:
    """Of an AutoencoderKL: latents of the denoiser are its own, less the shift, times the scale."""
    return config.get("scaling_factor", OWN_SCALE), config.get("shift_factor") or 0.0


def _latents(config: Config) -> tuple[Input, ...]:
    return (Input(LATENTS, ("batch", config["latent_channels"], *SIDES), least_side=2),)


def _picture(config: Config) -> tuple[Input, ...]:
    least = 2 * pixels_per_latent(config)  # two cells: a trace takes an axis of one for one that broadcasts
    return (Input(PICTURE, ("batch", config["in_channels"], *SIDES), least_side=least),)


def _call_decoder(module: nn.Module, inputs: Tensors) -> Tensor:
    from export.models.autoencoder_modules import decode

    return decode(module, inputs[LATENTS])


def _call_encoder(module: nn.Module, inputs: Tensors) -> Tensor:
    from export.models.autoencoder_modules import encode

    return encode(module, inputs[PICTURE])


VAE_DECODER = Family(
    "vae_decoder", "AutoencoderKL", lambda config: True, (), NOT_QUANTIZED, _latents, _call_decoder,
    "latents, divided by scaling_factor and shifted as AutoencoderKL.decode takes them",
    steps=False, streamed=LATENTS, outputs=(PICTURE,), half="decoder", absent=("encoder", "quant_conv"),
)  # fmt: skip
VAE_ENCODER = Family(
    "vae_encoder", "AutoencoderKL", lambda config: True, (), NOT_QUANTIZED, _picture, _call_encoder,
    "pictures from -1 to 1; the result is mean and logarithm of the variance of the latents",
    steps=False, streamed=PICTURE, outputs=("moments",), half="encoder", absent=("decoder", "post_quant_conv"),
)  # fmt: skip


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        _pixart("pixart", lambda config: not is_sigma(config), 120),
        _pixart("pixart_sigma", is_sigma, 300),
        HUNYUAN,
        DIT,
        _t5("t5", "T5EncoderModel", 120),
        _t5("mt5", "MT5EncoderModel", 256),
        _t5("umt5", "UMT5EncoderModel", 256),
        _clip("clip", "CLIPTextModel"),
        _clip("clip_projection", "CLIPTextModelWithProjection"),
        BERT,
        _causal("gemma2", "Gemma2Model", 300),
        _causal("qwen2", "Qwen2Model", 512),
        _causal("qwen3", "Qwen3Model", 512),
        _causal("qwen2_5_vl", "Qwen2_5_VLTextModel", 512, absent=("visual",)),
        VAE_DECODER,
        VAE_ENCODER,
    )
}
