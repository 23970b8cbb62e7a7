"""Texts that a pipeline is calibrated, verified and shown with: those of its own prompts.txt, else captions of everyday
pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from export.documents import Rules, read_text
from export.errors import ModelError

CAPTIONS = "captions.txt"
# In a pipeline's folder, beside model_index.json, and in its bundle: what it was trained to draw, one on each line.
PROMPTS_FILE = "prompts.txt"
RULES = Rules(ModelError, "write one prompt on each line, or remove the file")


def captions() -> tuple[str, ...]:
    """Of everyday pictures."""
    text = (resources.files("pipeline.generate") / CAPTIONS).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def prompt_lines(path: Path, rules: Rules = RULES) -> tuple[str, ...]:
    """The prompts of a text file, one on each line that is not empty. Raises the rules' error for none."""
    prompts = tuple(filter(None, (line.strip() for line in read_text(path, rules).splitlines())))
    if not prompts:
        raise rules.error(f"{path} has no prompt; {rules.remedy}")
    return prompts


def own_prompts(folder: Path) -> tuple[str, ...]:
    """Of the pipeline in `folder`, in its file's order; captions of everyday pictures where it has no file. Raises
    ModelError for a file without a prompt."""
    path = folder / PROMPTS_FILE
    return prompt_lines(path) if os.path.lexists(path) else captions()


def drawn_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of them, the same for the same seed; repeated where there are fewer."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[order[i % len(prompts)]] for i in range(count)]
