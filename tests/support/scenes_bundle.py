"""The bundle of the bundled pipeline, built and proven once for all tests that draw with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import compiler

SOURCE = "zoo:pixart_scenes"
# A prompt of its kind; and the steps of a drawing, of which a build proves as many.
PROMPT, STEPS = "two small red circles left of a large blue letter k on white", 4
SETTINGS = ("method=rtn", "calibrate.size=2")


def build(output: Path) -> Path:
    """By rounding to nearest, every gate held; nothing is measured beside others."""
    settings = [flag for setting in SETTINGS for flag in ("--set", setting)]
    flags = ["--engine", "pixart_w4a6", "-m", SOURCE, "--target", "cpu", "--n-steps", str(STEPS), *settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "benched", lambda *_: None)
        assert cli.main(["build", *flags, "-o", str(output)]) == 0
    return output
