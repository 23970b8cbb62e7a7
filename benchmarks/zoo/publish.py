"""Publish trained states as model folders: `python -m benchmarks.zoo.publish pixart_mini --work-dir work/zoo`.

A folder holds what diffusers reads (config.json, fp16 safetensors of the averaged weights), how pictures are made
from it (generation.json), the facts of its training (training.json) and a model card. The card takes every number
from those files and from the judge's JSON; `--cards` writes the cards alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import record
from benchmarks.record import Json
from benchmarks.zoo import scenes
from benchmarks.zoo.tasks import DIGIT_CLASSES, TASKS, Task, token_embedding
from benchmarks.zoo.train import DROP_SHARE, EMA_DECAY
from export.models.weights import WEIGHTS_FILE
from pipeline.files import write_json

logger = logging.getLogger(__name__)
ZOO = Path(__file__).resolve().parents[2] / "export" / "zoo"
EMBEDDING_FILE = "token_embedding.safetensors"
SIZE_LIMIT_BYTES = 12_000_000

VOCABULARY = {
    "kind": "vocabulary",
    "embedding": EMBEDDING_FILE,
    "tensor": "token_embedding.weight",
    "null_token": 0,
    "slots": [{"name": name, "words": list(words)} for name, words in scenes.SLOTS.items()],
    "grammar": "a COLOUR SHAPE [RELATION a COLOUR SHAPE] on BACKGROUND",
    "examples": ["a red circle on white", "a blue ring above a yellow cross on gray"],
}
CLASSES = {
    "kind": "classes",
    "names": [str(digit) for digit in range(DIGIT_CLASSES)],
    "null_class": DIGIT_CLASSES,
    "examples": ["3", "8"],
}
GENERATION: dict[str, Json] = {
    "pixart_mini": {"guidance_scale": 2.0, "conditioning": VOCABULARY},
    "dit_mini": {"guidance_scale": 2.0, "conditioning": CLASSES},
}
COMMON = {"schema_version": 1, "sampler": "flow_euler", "timestep_scale": 1000, "n_steps": 20, "output": "pixels"}

DATA = {
    "pixart_mini": "scenes drawn by `benchmarks/zoo/scenes.py`: one object, or two in a relation, on a plain "
    "background, 32 x 32 RGB. No file is downloaded. One caption in nine is held out and never trained on.",
    "dit_mini": "the 1797 handwritten digits that ship with scikit-learn (`load_digits`; Alpaydin and Kaynak, UCI, "
    "CC BY 4.0), enlarged to 16 x 16 gray pixels. Every fifth digit is held out and never trained on.",
}
LIMITS = {
    "pixart_mini": "It knows only the captions of its grammar. It exists to make quality measurable with no network; "
    "its numbers do not stand for those of PixArt-alpha.",
    "dit_mini": "It draws small digits and nothing else. It exists to make quality measurable with no network; its "
    "numbers do not stand for those of DiT-XL/2.",
}


def generation(name: str) -> Json:
    """The content of generation.json."""
    return {**COMMON, **GENERATION[name]}


def _half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp16 copies, sorted by name. Raises ValueError where a weight is not finite in fp16."""
    halves = {key: weights[key].half().contiguous() for key in sorted(weights)}
    broken = [key for key, value in halves.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{broken[0]} is not finite in fp16; train longer or find the broken step")
    return halves


def publish(task: Task, state: Json, folder: Path) -> None:
    """Write the model folder of a training state (its averaged weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    model = task.build()
    model.load_state_dict(state["ema"])
    model.save_config(folder)
    save_file(_half(model.state_dict()), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if GENERATION[task.name]["conditioning"]["kind"] == "vocabulary":
        save_file({VOCABULARY["tensor"]: token_embedding()}, folder / EMBEDDING_FILE)
    write_json(folder / "generation.json", generation(task.name))
    facts = {key: state[key] for key in ("step", "hours", "loss", "seed")}
    facts |= {"planned_steps": task.steps, "batch_size": task.batch_size, "peak_lr": task.peak_lr}
    facts |= {"parameters": sum(weight.numel() for weight in model.parameters())}
    write_json(folder / "training.json", facts)
    size = (folder / WEIGHTS_FILE).stat().st_size
    if size > SIZE_LIMIT_BYTES:
        raise ValueError(f"{folder / WEIGHTS_FILE} has {size} bytes; at most {SIZE_LIMIT_BYTES} are committed")
    logger.info("%s: step %d, %.1f MB -> %s", task.name, state["step"], size / 1e6, folder)


def _quality(name: str) -> str:
    path = record.RESULTS / f"zoo_{name}.json"
    if not path.is_file():
        return f"Not measured yet: run `python -m benchmarks.zoo.judge {name}`."
    document = record.read(path)
    rows = [f"| {key} | {value:.1%} |" for key, value in document["accuracy"].items()]
    table = "\n".join(["| of the pictures, right in | share |", "|---|---|", *rows])
    judge = ", ".join(f"{key} {value:.1%}" for key, value in document["judge_test_accuracy"].items())
    return (
        f"{document['count']} pictures of {document['conditions']}, {document['n_steps']} Euler steps, guidance "
        f"{document['guidance_scale']}, judged by a classifier trained on the same kind of data (its own accuracy on "
        f"data it was not trained on: {judge}).\n\n{table}\n\nFrom `benchmarks/results/{path.name}`."
    )


CARD = """# {name}

`{class_name}`, {layers} layers, width {width}, {heads} heads, patch {patch} on {size} x {size} x {channels} pixels:
{parameters:.2f} M parameters, stored in fp16.

- **Data**: {data}
- **Conditioning**: {conditioning}
- **Training**: rectified flow (x_t = (1 - t) data + t noise, target noise - data, timestep 1000 t), {step} of
  {planned_steps} steps of {batch_size} pictures, AdamW {peak_lr}, condition dropped with probability {drop},
  bfloat16 autocast, {hours:.2f} hours on two CPU cores shared with other work, seed {seed}; last loss
  (running mean) {loss:.4f}. The weights are the exponential moving average ({ema}).
- **Made by**: `python -m benchmarks.zoo.train {name}`, then `python -m benchmarks.zoo.publish {name}`.
- **Licence**: Apache-2.0, as the rest of the repository.

## Measured quality

{quality}

## Limits

{limits}
"""


def _conditioning_text(name: str) -> str:
    row = GENERATION[name]["conditioning"]
    if row["kind"] == "classes":
        return f"the class, one of {', '.join(row['names'])}; class {row['null_class']} is the dropped condition."
    words = "; ".join(f"{slot['name']}: {', '.join(slot['words'])}" for slot in row["slots"])
    return f"`{row['grammar']}` as {len(row['slots'])} tokens of a frozen random embedding ({words})."


def write_card(name: str, folder: Path) -> None:
    """Write README.md of a published folder from its own files and the judge's JSON."""
    config, facts = record.read(folder / "config.json"), record.read(folder / "training.json")
    text = CARD.format(
        name=name,
        class_name=config["_class_name"],
        layers=config["num_layers"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        heads=config["num_attention_heads"],
        patch=config["patch_size"],
        size=config["sample_size"],
        channels=config["in_channels"],
        data=DATA[name],
        conditioning=_conditioning_text(name),
        drop=DROP_SHARE,
        ema=EMA_DECAY,
        quality=_quality(name),
        limits=LIMITS[name],
        **{**facts, "parameters": facts["parameters"] / 1e6},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = record.parser("benchmarks.zoo.publish", __doc__, TASKS)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work/zoo"), help="states written by benchmarks.zoo.train"
    )
    parser.add_argument("--output-dir", type=Path, default=ZOO)
    parser.add_argument("--cards", action="store_true", help="write the model cards only")
    arguments = record.parsed(parser)
    for name in arguments.names:
        task, folder = TASKS[name], arguments.output_dir / name
        if not arguments.cards:
            publish(task, torch.load(arguments.work_dir / f"{name}.pt", weights_only=True), folder)
        write_card(name, folder)


if __name__ == "__main__":
    main()
