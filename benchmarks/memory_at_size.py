"""Memory that a build of FLUX.1's 12 B parameters takes: `python -m benchmarks.memory_at_size --work-dir work/at_size`.

Models of FLUX.1's widths with few blocks and random bfloat16 weights are written and built, with the rules for models
of the true size, and the peak memory of each stage is what the build itself reports. A stage's peak is a constant and
something for each block of the two kinds, which three models tell; the fourth is predicted by them, and measured. What
follows for all blocks is extrapolated, and said to be. Writes benchmarks/results/memory_at_size.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch

from benchmarks import record
from benchmarks.record import Json
from benchmarks.zoo.make_vae import tensor
from benchmarks.zoo.make_xl import SHARD_BYTES, write_shards
from export.models.config import FILE as CONFIG
from export.models.weights import STEM

# Blocks of both streams, and of one; the true model, those that tell the slopes, and the one that checks them.
WHOLE, TELLING, CHECK = (19, 38), ((1, 1), (3, 1), (1, 4)), (3, 4)
LIMIT_GIB = 20.0
# A reference of a model of the true size unpacks weights at every call; one of few blocks would keep them.
AS_LARGE = "from pipeline.backends import reference; reference.MOST_UNPACKED = 0; from pipeline.build import main; "
Blocks = tuple[int, int]


def write(folder: Path, blocks: Blocks) -> int:
    """Write the diffusers folder and return the number of parameters."""
    double, single = blocks
    folder.mkdir(parents=True)
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    config |= {"_class_name": type(module).__name__, "_diffusers_version": diffusers.__version__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def make(name: str) -> torch.Tensor:
        return torch.from_numpy(tensor(name, shapes[name], 0)).bfloat16()

    return write_shards(shapes, make, folder, STEM, SHARD_BYTES)


def built(engine: str, work_dir: Path, blocks: Blocks, flags: Sequence[str]) -> Json:
    """Seconds and peak memory of each stage of a build in a process of its own; what was written is removed."""
    model, output = work_dir / "model", work_dir / "engine"
    shutil.rmtree(work_dir, ignore_errors=True)
    parameters = write(model, blocks)
    words = ["--engine", engine, "-m", str(model), "-o", str(output), "--json", *flags]
    command = [sys.executable, "-c", f"{AS_LARGE}raise SystemExit(main({words!r}))"]
    environment = os.environ | {"DITC_CACHE": str(work_dir / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as process:
        assert process.stdout is not None
        events = [json.loads(line) for line in process.stdout]
    if process.returncode:
        raise SystemExit(f"the build of {blocks} blocks failed: {events[-1]}")
    shutil.rmtree(work_dir)
    stages = [event for event in events if event["event"] == "stage" and event["status"] == "finished"]
    peaks = {stage["name"]: {key: stage[key] for key in ("seconds", "peak_memory_bytes")} for stage in stages}
    return {"blocks": list(blocks), "parameters": parameters, "stages": peaks}


def predicted(rows: Sequence[Json], blocks: Blocks) -> dict[str, float]:
    """Peak bytes of each stage for so many blocks: constant + slope * blocks of either kind, through three rows.

    >>> rows = [{"blocks": [a, b], "stages": {"x": {"peak_memory_bytes": 5 + 2 * a + b}}} for a, b in TELLING]
    >>> round(predicted(rows, (10, 20))["x"], 9)
    45.0
    """
    matrix = np.array([[1, *row["blocks"]] for row in rows], float)
    peaks = {name: [row["stages"][name]["peak_memory_bytes"] for row in rows] for name in rows[0]["stages"]}
    return {name: float(np.linalg.solve(matrix, values) @ [1, *blocks]) for name, values in peaks.items()}


def summary(document: Json) -> str:
    """As a Markdown table, in GiB."""
    rows = [*document["telling"], document["check"]]
    header = ["stage", *(f"{double} + {single}" for double, single in (row["blocks"] for row in rows)),
              "the last, predicted", f"{WHOLE[0]} + {WHOLE[1]}, extrapolated"]  # fmt: skip
    lines = [
        [name, *(f"{row['stages'][name]['peak_memory_bytes'] / 2**30:.2f}" for row in rows),
         f"{document['check_predicted'][name] / 2**30:.2f}", f"{document['whole'][name] / 2**30:.1f}"]
        for name in document["whole"]
    ]  # fmt: skip
    return record.markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.parser("benchmarks.memory_at_size", __doc__)
    parser.add_argument("--work-dir", type=Path, required=True, help="for models and engines, about 6 GB; removed")
    parser.add_argument("--engine", default="pixart_w4a6")
    parser.add_argument("--side", type=int, default=256, help="pixels of a picture's side")
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    args = record.parsed(parser, argv)
    flags = ["--height", str(args.side), "--width", str(args.side), "--n-steps", "2"]
    rows = [built(args.engine, args.work_dir / "build", blocks, flags) for blocks in (*TELLING, CHECK)]
    telling, check = rows[:-1], rows[-1]
    document: Json = {
        "engine": args.engine,
        "flags": flags,
        "limit_gib": LIMIT_GIB,
        "telling": telling,
        "check": check,
        "check_predicted": predicted(telling, CHECK),
        "whole": predicted(telling, WHOLE),
    }
    print(summary(document))
    print(record.write("memory_at_size", document, args.output_dir))


if __name__ == "__main__":
    main()
