"""Score pictures in a folder by a published reward model: `python scorer.py image_reward FOLDER`.

Stands alone, without imports of this project: ImageReward and HPSv2 ask for releases of transformers, protobuf and
pytest that do not go together with the compiler's, so they run in a Python of their own (`--scorer-python`).
FOLDER/prompts.json is a list of the texts, FOLDER/0000.png and so on are their pictures; prints one JSON list.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path


def image_reward(pictures: list[str], prompts: list[str]) -> list[float]:
    """ImageReward-v1.0 (arXiv 2304.05977), package image-reward."""
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0")
    return [float(model.score(prompt, [picture])) for picture, prompt in zip(pictures, prompts, strict=True)]


def hpsv2(pictures: list[str], prompts: list[str]) -> list[float]:
    """Human preference score v2.1 (arXiv 2306.09341), package hpsv2."""
    import hpsv2 as package

    return [
        float(package.score(picture, prompt, hps_version="v2.1")[0])
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


SCORERS: dict[str, Callable[[list[str], list[str]], list[float]]] = {"image_reward": image_reward, "hpsv2": hpsv2}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    pictures = [str(folder / f"{index:04d}.png") for index in range(len(prompts))]
    with contextlib.redirect_stdout(sys.stderr):  # the packages print
        scores = SCORERS[name](pictures, prompts)
    json.dump(scores, sys.stdout)


if __name__ == "__main__":
    main()
