"""The trained parts as a folder that diffusers reads, in fp16, with how good it is and a model card."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import save_file

from benchmarks import record
from benchmarks.record import Json
from benchmarks.zoo.pixart_scenes import board, parts, reader
from benchmarks.zoo.pixart_scenes.captions import captions
from benchmarks.zoo.pixart_scenes.picture import GUIDANCE, draw, pipeline_of, save_sheet
from benchmarks.zoo.pixart_scenes.stage import EMA_DECAY, read_state
from benchmarks.zoo.pixart_scenes.train import DROP_SHARE, KL_WEIGHT, Plan, trained
from export.models.description import GENERATION_FILE
from pipeline.files import write_json
from pipeline.generate.example_prompts import PROMPTS_FILE

logger = logging.getLogger(__name__)
NAME = "pixart_scenes"
SIZE_LIMIT_BYTES = 20_000_000
READER_FILE = "reader.safetensors"
PROMPTS = 500  # of scenes that are not held out: what a quantized model is calibrated with
PARTS = ("text_encoder", "transformer", "vae")


def refuse_infinite(pipeline: PixArtAlphaPipeline) -> None:
    """Raise ValueError where a weight is not finite in fp16."""
    for part in PARTS:
        for key, value in getattr(pipeline, part).state_dict().items():
            if not value.half().isfinite().all():
                raise ValueError(f"{part}: {key} is not finite in fp16; train longer or find the broken step")


def size_bytes(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _facts(plan: Plan, work_dir: Path, pipeline: PixArtAlphaPipeline) -> Json:
    rows = {}
    for settings in (plan.reader, plan.autoencoder, plan.text_encoder, plan.denoiser):
        state = read_state(settings.path(work_dir))
        rows[settings.name] = {key: state[key] for key in ("step", "cpu_hours", "loss", "seed")} | {
            "planned_steps": settings.steps, "batch_size": settings.batch_size, "peak_lr": settings.peak_lr
        }  # fmt: skip
    sizes = {part: sum(value.numel() for value in getattr(pipeline, part).parameters()) for part in PARTS}
    return {"stages": rows, "latents": plan.latents, "parameters": sizes}


def measure(
    pipeline: PixArtAlphaPipeline, judge: torch.nn.Module, count: int, n_steps: int, seed: int
) -> tuple[Json, torch.Tensor]:
    """How many of `count` held-out scenes are drawn rightly, and the pictures."""
    labels = board.sample_split(count, torch.Generator().manual_seed(seed), held_out=True)
    real = board.draw(labels, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        decoded = torch.cat([pipeline.vae(part).sample for part in real.split(50)])
    drawn = draw(pipeline, captions(labels), seed, n_steps)
    document = {
        "conditions": "scenes never trained on",
        "count": count,
        "n_steps": n_steps,
        "guidance_scale": GUIDANCE,
        "seed": seed,
        "accuracy": reader.accuracy(labels, judge.read(drawn)),
        "accuracy_of_decoded_scenes": reader.accuracy(labels, judge.read(decoded)),
        "accuracy_of_scenes": reader.accuracy(labels, judge.read(real)),
    }
    return document, drawn


def _open_in_float32(path: Path) -> None:
    """transformers opens a model in the type that its config names, diffusers its parts in float32: all in one."""
    write_json(path, record.read(path) | {"dtype": "float32"})


def publish(plan: Plan, work_dir: Path, folder: Path, seed: int, count: int) -> Json:
    """Write the pipeline of a working folder, the reader, what was measured and the card; return what was measured.

    Raises ValueError for weights that fp16 cannot hold, and for more than 20 MB.
    """
    pipeline = pipeline_of(plan, work_dir, seed)
    refuse_infinite(pipeline)
    facts = _facts(plan, work_dir, pipeline)
    pipeline.to(torch.float16)
    pipeline.vae.to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(folder)
    _open_in_float32(folder / "text_encoder" / "config.json")
    judge = trained(plan.reader, reader.Reader(), work_dir)
    save_file(judge.state_dict(), folder / READER_FILE, metadata={"format": "pt"})
    scenes = board.sample_split(PROMPTS, torch.Generator().manual_seed(seed))
    (folder / PROMPTS_FILE).write_text("\n".join([*dict.fromkeys(captions(scenes)), ""]), encoding="utf-8")
    write_json(folder / GENERATION_FILE, {"n_steps": plan.n_steps, "guidance_scale": GUIDANCE})
    write_json(folder / "training.json", facts)
    pipeline.to(torch.float32)  # the values that fp16 holds
    document, drawn = measure(pipeline, judge, count, plan.n_steps, seed)
    record.write("quality", document, folder)
    save_sheet(drawn, folder / "pictures.png")
    (folder / "README.md").write_text(card(folder), encoding="utf-8")
    size = size_bytes(folder)
    if size > SIZE_LIMIT_BYTES:
        raise ValueError(f"{folder} has {size} bytes; at most {SIZE_LIMIT_BYTES} are published")
    logger.info("%s: %.1f MB", folder, size / 1e6)
    return document


CARD = """# {name}

A whole `PixArtAlphaPipeline` of {size} x {size} pixels, small and trained: {parameters:.2f} M parameters in fp16.

| part | class | parameters | |
|---|---|---|---|
{parts}

    from diffusers import PixArtAlphaPipeline
    pipe = PixArtAlphaPipeline.from_pretrained(FOLDER)
    pipe("{example}", num_inference_steps={n_steps}, guidance_scale={guidance}, use_resolution_binning=False).images[0]

A bundle of it is drawn with these steps and this guidance unless its caller says otherwise (`{settings}`);
diffusers has to be told, as above.

- **Data**: scenes drawn by `benchmarks/zoo/pixart_scenes/board.py`, told by `captions.py`. No file is downloaded. One
  scene in nine is held out and never trained on.
- **Captions**: {example!r} and the like: one to three items in an arrangement, each {counts} equal things;
  {sizes}; {colours}; {kinds}; on {grounds}.
- **Training**: the autoencoder by pixels' errors and {kl} of the KL divergence; the text encoder by telling, of each
  square of the picture, what stands there; the denoiser, with that text encoder, as a rectified flow (x_t = (1 - t)
  data + t noise, target noise - data, timestep 1000 t) on latents of {latents} scenes, captions dropped with
  probability {drop}. AdamW, float32; averaged weights ({ema}); seed {seed}.

{stages}

- **Made by**: `python -m benchmarks.zoo.pixart_scenes`.
- **Licence**: Apache-2.0, as the rest of the repository.

## Measured quality

{count} pictures of {conditions}, {n_steps} steps of DPM-Solver++, guidance {guidance}, read by `{reader}`, a network
that was trained on the same kind of scenes. Beside it what it reads in such scenes as they are drawn, and after the
autoencoder.

{quality}

"everything": pictures in which all that the caption says is right. From `quality.json`.

## Limits

It knows only scenes of its kind, told in lower case. It exists to make quality measurable with no network; its numbers
do not stand for those of PixArt-alpha.
"""
WHAT = {
    "text_encoder": "T5 v1.1, {layers} layers, width {width}",
    "transformer": "{layers} layers, width {width}, patch {patch}, on latents of {size} x {size} x {channels}",
    "vae": "{factor} pixels to one of {channels} channels",
}


def card(folder: Path) -> str:
    """README.md of a published folder, from its own files."""
    facts, document = record.read(folder / "training.json"), record.read(folder / "quality.json")
    index = record.read(folder / "model_index.json")
    described = {
        "text_encoder": dict(layers=parts.TEXT_LAYERS, width=parts.TEXT_WIDTH),
        "transformer": dict(layers=parts.LAYERS, width=parts.WIDTH, patch=parts.PATCH, size=parts.LATENT_SIZE,
                            channels=parts.LATENT_CHANNELS),
        "vae": dict(factor=parts.FACTOR, channels=parts.LATENT_CHANNELS),
    }  # fmt: skip
    rows = [
        f"| {part} | `{index[part][1]}` | {facts['parameters'][part]:,} | {WHAT[part].format(**described[part])} |"
        for part in PARTS
    ]
    pieces = len(json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    rows.append(f"| tokenizer | `{index['tokenizer'][1]}` | | Unigram, {pieces} pieces |")
    stages = record.markdown(
        ("stage", "steps", "of", "batch", "peak learning rate", "loss (running mean)", "hours of one core"),
        ((name, row["step"], row["planned_steps"], row["batch_size"], row["peak_lr"], f"{row['loss']:.4f}",
          f"{row['cpu_hours']:.2f}") for name, row in facts["stages"].items()),
    )  # fmt: skip
    read = ("accuracy", "accuracy_of_scenes", "accuracy_of_decoded_scenes")
    quality = record.markdown(
        ("right in", "drawn by the pipeline", "scenes", "scenes after the autoencoder"),
        ((slot, *(f"{document[key][slot]:.1%}" for key in read)) for slot in document["accuracy"]),
    )
    return CARD.format(
        name=NAME,
        size=board.RESOLUTION,
        parameters=sum(facts["parameters"].values()) / 1e6,
        parts="\n".join(rows),
        example="two small red circles left of a large blue letter k on white",
        counts=f"one to {board.MOST_COPIES}",
        sizes=" or ".join(board.SIZES),
        colours=", ".join(board.COLOURS),
        kinds=", ".join(board.KINDS),
        grounds=", ".join(board.BACKGROUNDS),
        kl=KL_WEIGHT,
        drop=DROP_SHARE,
        ema=EMA_DECAY,
        seed=facts["stages"]["denoiser"]["seed"],
        latents=facts["latents"],
        stages=stages,
        reader=READER_FILE,
        settings=GENERATION_FILE,
        quality=quality,
        count=document["count"],
        conditions=document["conditions"],
        n_steps=document["n_steps"],
        guidance=document["guidance_scale"],
    )
