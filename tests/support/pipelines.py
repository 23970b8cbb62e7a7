"""True diffusers pipelines of tiny random parts, written as folders: text encoders, tokenizers, VAE, scheduler.

Nothing is downloaded: vocabularies are listed here. The VAE halves three times, as those of all latent families do, so
that 64 pixels are 8 latent cells. HunyuanDiT's pipeline fixes its text lengths, and DiT's its null class.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export import checkpoint as checkpoints
from export.checkpoint import QuantizedLinear
from export.models.load import LoadedModel, load
from export.models.torch_modules import set_resolution
from pipeline import compiler
from pipeline.backends.reference import ReferenceEngine, fake_quant
from pipeline.build import main as build_main
from pipeline.bundle.bundle import Bundle, load_bundle
from pipeline.calibrate.__main__ import main as calibrate_main
from pipeline.distance import psnr_db
from pipeline.generate.diffusers_adapter import EngineTransformer
from pipeline.verify.gates import FACTOR_DB, ROUNDED_DB
from pipeline.verify.reference_hooks import jittered
from pipeline.verify.study import HIT_DB, HIT_SHARE, HITTING_ULPS, QUANTIZER_ULPS
from tests.support import tiny, tiny_text

WORDS = ("a", "the", "red", "blue", "circle", "ring", "on", "white", "of", "photo", "cat", "dog", "and", "with")
LABELS = {"0": "zero, nought", "1": "one", "999": "last"}
TEXT = tiny.HUNYUAN | {"text_len": 77, "text_len_t5": 256}
STYLELESS = {"use_style_cond_and_image_meta_size": False}  # version 1.2
SIGMA = tiny.PIXART | {"sample_size": 128, "use_additional_conditions": False}
HALVINGS = 3
RUNS = 4


def vae() -> Any:
    """Latents of 4 channels, 8 pixels a cell."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    channels = (8,) * (HALVINGS + 1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=channels, latent_channels=4, norm_num_groups=4, **blocks).eval()


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(seed: int = 2) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: rank for rank, word in enumerate(words)})


def bert_encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=77,
    )  # fmt: skip
    return BertModel(config).eval()


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)


def solver() -> Any:
    """The published PixArt pipelines' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")


def ddpm() -> Any:
    """The published HunyuanDiT pipelines' scheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False, prediction_type="epsilon")


def pixart_alpha(transformer: Any) -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(t5_tokenizer(), t5_encoder(), vae(), transformer, solver())


def pixart_sigma(transformer: Any) -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(t5_tokenizer(), t5_encoder(), vae(), transformer, solver())


def hunyuan(transformer: Any) -> Any:
    from diffusers import HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae(), bert_encoder(), bert_tokenizer(), transformer, ddpm(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=t5_encoder(4), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def dit(transformer: Any) -> Any:
    from diffusers import DiTPipeline

    return DiTPipeline(transformer, vae(), ddim(), id2label={int(key): value for key, value in LABELS.items()})


@dataclass(frozen=True)
class Row:
    """One family's pipeline: the class and configuration of its transformer, and what makes the pipeline around it."""

    class_name: str
    config: dict[str, Any]
    pipeline: Callable[[Any], Any]
    recipe: str


ROWS = {
    "alpha": Row("PixArtTransformer2DModel", tiny.PIXART, pixart_alpha, "pixart_w4a6"),
    "sigma": Row("PixArtTransformer2DModel", SIGMA, pixart_sigma, "pixart_sigma_w4a6"),
    "hunyuan11": Row("HunyuanDiT2DModel", TEXT, hunyuan, "hunyuan_w4a6"),
    "hunyuan12": Row("HunyuanDiT2DModel", TEXT | STYLELESS, hunyuan, "hunyuan_w4a6"),
    "dit": Row("DiTTransformer2DModel", tiny.DIT | {"num_embeds_ada_norm": 1000}, dit, "dit_w4a8"),
}


def write(name: str, folder: Path, **config: Any) -> Path:
    """Save the pipeline `name` into `folder` as diffusers does; `config` changes its transformer's configuration."""
    row = ROWS[name]
    row.pipeline(tiny.random_module(row.class_name, row.config | config)).save_pretrained(folder)
    if name == "dit":  # as the hub's DiT has it
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    return folder


def write_wide(folder: Path, **config: Any) -> Path:
    """Save PixArt-alpha's with a text encoder whose linears have groups of 64, as recipes have them; of pictures of 64
    pixels. config: as of `write`."""
    write("alpha", folder, **config | {"caption_channels": tiny_text.T5["d_model"]})
    shutil.rmtree(folder / "text_encoder")
    tiny_text.t5_folder(folder)
    return folder


# --- built and drawn -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A pipeline's folder, the bundle built of its transformer, and the quantized layers that both share."""

    root: Path
    bundle: Bundle
    model: LoadedModel
    layers: Sequence[QuantizedLinear]

    def pipeline(self, transformer: Any = None) -> Any:
        """The pipeline as diffusers loads it, the float model's own transformer in it where none is given."""
        from diffusers import DiffusionPipeline

        named = {} if transformer is None else {"transformer": transformer}
        pipe = DiffusionPipeline.from_pretrained(self.root, local_files_only=True, **named)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def float(self) -> Any:
        """The pipeline of the float model whose kept weights are rounded as an engine stores them."""
        return self.pipeline(self.model.module)

    @cached_property
    def engine(self) -> Any:
        return self.pipeline(self.bundle.as_diffusers("cpu"))

    @cached_property
    def quantized(self) -> nn.Module:
        """The fake-quantized denoiser; its `transformer` is the true diffusers class with other linears."""
        return fake_quant(self.model, self.layers, torch.float32)

    @cached_property
    def fake(self) -> Any:
        """The pipeline of the fake-quantized model in float32, without our stand-in."""
        return self.pipeline(self.quantized.transformer)

    @cached_property
    def exact(self) -> Any:
        """The pipeline of the fake-quantized model in float64."""
        module = fake_quant(self.model, self.layers, torch.float64)
        set_resolution(module, *self.model.cells(self.bundle.recipe.sampling.height, self.bundle.recipe.sampling.width))
        engine = ReferenceEngine(module.to(torch.float64), torch.float64)
        return self.pipeline(EngineTransformer(engine, self.model.family, self.model.config))

    def refuse_wrong_picture(self, **call: Any) -> None:
        """Assert that the engine's pipeline draws what the fake-quantized and the float one draw.

        The limits are the gates': for the first, float32 runs of the reference with flips in most samples, less
        FACTOR_DB, or quantization's own error; for the second, the recipe's budget. In latents, by their range. A call
        has few samples and one flip can cost 20 dB, so that the worst of several runs is taken.
        """
        expected, drawn, unquantized = (latents(pipe, **call) for pipe in (self.exact, self.engine, self.float))
        cost, reached = decibels(expected, unquantized), min(decibels(expected, drawn))
        limit, runs = max(ROUNDED_DB, min(cost)), list[float]()
        for seed in range(RUNS):
            if reached >= limit:  # another run can only lower it
                break
            runs += self._hit_run(seed, expected, call)
            limit = max(min(min(runs) - FACTOR_DB, ROUNDED_DB), min(cost))
        assert reached >= limit, (decibels(expected, drawn), runs, cost)
        assert np.median(decibels(unquantized, drawn)) >= self.bundle.recipe.budgets.final_psnr_fp_db

    def _hit_run(self, seed: int, expected: NDArray[np.float64], call: Mapping[str, Any]) -> list[float]:
        """A float32 run with the least jitter that makes flips in most samples."""
        for ulps in (QUANTIZER_ULPS, *HITTING_ULPS):
            with jittered(self.quantized, seed, ulps):
                values = decibels(expected, latents(self.fake, **call))
            if np.mean(np.array(values) < HIT_DB) >= HIT_SHARE:
                break
        return values


def latents(pipe: Any, seed: int = 3, n_steps: int = 3, **call: Any) -> NDArray[np.float64]:
    """What the pipeline gives its VAE for these arguments: the last latents, [B, C, H, W]."""
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def watched(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z)
        return decode(z, *args, **kwargs)

    pipe.vae.decode = watched
    try:
        generator = torch.Generator().manual_seed(seed)
        pipe(**call, generator=generator, num_inference_steps=n_steps, output_type="np")
    finally:
        pipe.vae.decode = decode
    return np.concatenate([z.double().numpy() for z in seen])


def refuse_change_by_offloading(built: Built, **call: Any) -> None:
    """AssertionError where offloading changes the engine's latents: by the calls that a machine without an accelerator
    can make; both are refused by diffusers without a device."""
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    expected = latents(built.engine, **call)
    pipe = built.pipeline(copy.copy(built.engine.transformer))
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(latents(pipe, **call), expected)
    pipe = built.pipeline(copy.copy(built.engine.transformer))
    for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        accelerate.cpu_offload(part, "cpu", offload_buffers=True)  # as enable_sequential_cpu_offload does
    assert pipe.transformer.device.type == "meta"
    np.testing.assert_array_equal(latents(pipe, **call), expected)


def decibels(reference: NDArray[np.float64], others: NDArray[np.float64]) -> list[float]:
    """PSNR of each sample, the peak being the reference's range."""
    peak = float(np.ptp(reference))
    return [psnr_db(one, other, peak) for one, other in zip(reference, others, strict=True)]


def build(name: str, folder: Path, method: str, *flags: str) -> Built:
    """Write the pipeline `name`, calibrate it by `method` on its own trajectories and build the `cpu` engine of that,
    with attention in float as the true diffusers class computes it.

    flags: more of `build` and `calibrate`. Measuring is left out, which takes longer than all the rest.
    """
    root, checkpoint = write(name, folder / "pipeline"), folder / "checkpoint"
    settings = [f"method={method}", "weights.group_size=32", "calibrate.timesteps=2", "sampling.n_steps=3"]
    settings += ["attention.qk=float", "attention.pv=float", *flags]
    common = ["--engine", ROWS[name].recipe, "-m", str(root / "transformer"), "--calib-size", "2"]
    common += [part for setting in settings for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITC_CACHE", str(folder / "cache"))
        patch.setattr(compiler, "benched", lambda *_: None)
        assert calibrate_main([*common, "-o", str(checkpoint)]) == 0
        bundle = ["--target", "cpu", "--checkpoint", str(checkpoint), "-o", str(folder / "bundle")]
        assert build_main([*common, *bundle]) == 0
    return Built(root, load_bundle(folder / "bundle"), load(str(root)), checkpoints.load(checkpoint))
