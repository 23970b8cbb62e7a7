"""Memory and time of an autoencoder's engine, whole and in tiles: `python -m benchmarks.autoencoder BUNDLE ...`.

BUNDLE is what `build` made of either half. Each case runs in a process of its own, which opens the engine and computes
one picture: the peak of its memory is that of the process, with Python and ONNX Runtime in it, the time that of the
picture, processor_s that of all its threads. Writes benchmarks/results/autoencoder_MACHINE.json, a row for each half,
size and way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import record
from export.models.description import sample_inputs
from pipeline import load, machine
from pipeline.bench.__main__ import description
from pipeline.generate.tiles import TILE_PIXELS, Tiles

SIZES = (512, 1024)
Way = Literal["whole", "tiles"]


@dataclass(frozen=True)
class Row:
    """What a picture took. way: whole, or in tiles of TILE_PIXELS. processor_s: of all threads, which other work beside
    it hardly changes."""

    engine: str
    pixels: int
    way: Way
    seconds: float
    processor_s: float
    peak_rss_bytes: int


def measured(bundle_path: Path, pixels: int, way: Way, threads: int) -> Row:
    """One picture of `pixels` on each side, in this process."""
    bundle = load(bundle_path, threads)
    model, engine = description(bundle), bundle.engine("cpu")
    (array,) = sample_inputs(model, 1, 0, pixels, pixels).values()
    picture = np.tanh(array) if model.family.half == "encoder" else array
    tiles = Tiles.of_pixels(model.config, TILE_PIXELS if way == "tiles" else pixels)
    convert = tiles.decode if model.family.half == "decoder" else tiles.encode
    started, processor_s = time.perf_counter(), time.process_time()
    convert(engine.run, picture)
    seconds, processor_s = time.perf_counter() - started, time.process_time() - processor_s
    engine.close()
    return Row(bundle.name, pixels, way, round(seconds, 3), round(processor_s, 3), machine.peak_memory_bytes())


def apart(bundle: Path, pixels: int, way: Way, threads: int) -> Row:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.autoencoder", str(bundle), "--one", str(pixels), way]
    done = subprocess.run([*command, "--threads", str(threads)], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = record.parser("benchmarks.autoencoder", __doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pixels of a side")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--one", nargs=2, metavar=("PIXELS", "WAY"), help="one case in this process, printed as JSON")
    arguments = record.parsed(parser)
    if arguments.one:
        row = measured(arguments.bundles[0], int(arguments.one[0]), arguments.one[1], arguments.threads)
        print(json.dumps(asdict(row)))
        return
    ways: tuple[Way, ...] = ("whole", "tiles")
    rows, load = [], round(os.getloadavg()[0], 2)
    for bundle in arguments.bundles:
        for pixels in map(int, arguments.sizes.split(",")):
            for way in ways[: 1 + (pixels > TILE_PIXELS)]:
                rows.append(apart(bundle, pixels, way, arguments.threads))
                print(f"{rows[-1]}", flush=True)
    document = {"threads": arguments.threads, "load_average": load, "rows": [asdict(row) for row in rows]}
    print(record.write(f"autoencoder_{record.slug(f'{machine.cpu_name()} {machine.cpu_count()}cpu')}", document))


if __name__ == "__main__":
    main()
