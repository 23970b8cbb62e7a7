"""Time and memory of a whole pipeline's run time on this CPU: `python -m benchmarks.whole_pipeline BUNDLE`.

BUNDLE is what `build -m FOLDER` of a diffusers pipeline wrote. One picture is drawn in a fresh process, once with parts
loaded and let go in turn and once with all of them kept: seconds of each part, peak memory, bytes on the disk. Writes
benchmarks/results/whole_pipeline_MACHINE.json.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import record
from benchmarks.record import Json
from pipeline import machine
from pipeline.bundle.pipeline_bundle import load_pipeline
from pipeline.files import tree

PROMPT = "a fox in the snow under a red umbrella, in the light of the evening"
WAYS = {"in turn": False, "kept loaded": True}


def drawn(bundle: str, n_steps: int, keep_loaded: bool, threads: int | None) -> Json:
    """One picture, in this process."""
    from ditc import Pipeline

    started = time.perf_counter()
    with Pipeline.load(bundle, threads=threads, keep_loaded=keep_loaded) as pipeline:
        loaded = time.perf_counter()
        output = pipeline(PROMPT, num_inference_steps=n_steps, output_type="np")
        ended = time.perf_counter()
        size = [pipeline.height, pipeline.width]
    assert np.asarray(output.images).shape[1:3] == tuple(size)
    return {
        "pixels": size,
        "open_s": loaded - started,
        "picture_s": ended - loaded,
        "parts_s": dict(output.seconds),
        "peak_memory_bytes": machine.peak_memory_bytes(),
    }


def measured(bundle: Path, n_steps: int, threads: int | None) -> Json:
    """Every way of WAYS, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    rows = {}
    for way, keep_loaded in WAYS.items():
        with context.Pool(1) as pool:
            rows[way] = pool.apply(drawn, (str(bundle), n_steps, keep_loaded, threads))
    return rows


def disk_bytes(bundle: Path) -> dict[str, int]:
    """Of every component, and of all files."""
    sizes = {name: sum((bundle / name / file).stat().st_size for file in tree(bundle / name))
             for name in load_pipeline(bundle).components}  # fmt: skip
    return sizes | {"all": sum((bundle / file).stat().st_size for file in tree(bundle))}


def summary(document: Json) -> str:
    """As a Markdown table."""
    header = ["", "picture, s", *document["ways"]["in turn"]["parts_s"], "peak, MB"]
    rows = [
        [way, f"{row['picture_s']:.1f}", *(f"{s:.1f}" for s in row["parts_s"].values()),
         f"{row['peak_memory_bytes'] / 1e6:.0f}"]
        for way, row in document["ways"].items()
    ]  # fmt: skip
    return record.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.parser("benchmarks.whole_pipeline", __doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    args = record.parsed(parser, argv)
    whole = load_pipeline(args.bundle)
    document: Json = {
        "class_name": whole.class_name,
        "recipes": {name: bundle.name for name, bundle in whole.components.items()},
        "n_steps": args.n_steps,
        "threads": machine.threads(args.threads),
        "load_average": round(os.getloadavg()[0], 2),
        "disk_bytes": disk_bytes(args.bundle),
        "ways": measured(args.bundle, args.n_steps, args.threads),
    }
    print(summary(document))
    print(record.write(f"whole_pipeline_{record.slug(f'{machine.cpu_name()} {machine.cpu_count()}cpu')}", document,
                       args.output_dir))  # fmt: skip


if __name__ == "__main__":
    main()
