"""Train the pipeline from nothing and publish it: `python -m benchmarks.zoo.pixart_scenes --work-dir work/scenes`.

Five stages: the reader that judges pictures, the autoencoder, its latents of 40,000 scenes, the text encoder, and the
denoiser. Stopped anywhere, the same command with --resume goes on where the last state was written (every three
minutes), to the very weights of a run that was never stopped, with as many threads. `progress.jsonl` and `sheets/` in
the working folder tell how far it is. `--publish` writes the pipeline as it is, trained to the end or not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import record
from benchmarks.zoo.pixart_scenes.picture import looks_of
from benchmarks.zoo.pixart_scenes.publish import publish
from benchmarks.zoo.pixart_scenes.train import PLAN, refuse_other_plan, train


def main() -> None:
    parser = record.parser("benchmarks.zoo.pixart_scenes", __doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("work/scenes"), help="states, latents, sheets")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the working folder")
    parser.add_argument("--publish", action="store_true", help="train no further: write the pipeline as it is")
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("work/scenes/pipeline"))
    parser.add_argument("--count", type=int, default=500, help="held-out scenes that the published pipeline draws")
    parser.add_argument("--seed", type=int, default=0)
    arguments = record.parsed(parser)
    refuse_other_run(parser, arguments)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    if not arguments.publish:
        train(PLAN, arguments.work_dir, arguments.seed, looks_of(PLAN, arguments.work_dir, arguments.seed))
    document = publish(PLAN, arguments.work_dir, arguments.output_dir, arguments.seed, arguments.count)
    print(arguments.output_dir, document["accuracy"])


def refuse_other_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A run is gone on with only where that is asked for and the plan is its own; one is published only where there is
    one."""
    holds_run = any(arguments.work_dir.glob("*.pt"))
    if holds_run and not (arguments.resume or arguments.publish):
        parser.error(f"{arguments.work_dir} holds a run; add --resume to go on with it, or name another folder")
    if arguments.publish and not PLAN.denoiser.path(arguments.work_dir).is_file():
        parser.error(f"{arguments.work_dir} holds no denoiser yet; leave --publish away to train one")
    try:
        refuse_other_plan(PLAN, arguments.work_dir)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
