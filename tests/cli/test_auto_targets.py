"""Which targets `auto` builds of a recipe, what the log says of the others, and that named targets are refused."""

from __future__ import annotations

import sys

import pytest

from export.errors import EnvironmentLacksError
from pipeline import __main__ as cli
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.backends.cpu import CpuOptions
from pipeline.build import make_parser, make_request
from pipeline.command import Answer
from pipeline.compiler import BuildRequest, fitting_targets, refuse_early
from plugins.cpu import library

ALL = ("cpu", "rtx", "cuda")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package and a GPU are here, so that only recipes decide."""
    for name in ALL:
        monkeypatch.setattr(BACKENDS[name], "in_auto", lambda: True)
        monkeypatch.setattr(BACKENDS[name], "package_problems", lambda: [])


def request(*flags: str) -> BuildRequest:
    args = make_parser().parse_args(["--engine", "dit_w4a8", "-o", "no such folder", *flags])
    return make_request(args, Answer(sys.stdout, as_json=False))


SHAPES = {
    "the recipe as it is": ((), ALL, ""),
    "activations by group": (("method=qdit",), ("cpu",), "has no scale per token and group"),
    "per token": (("method=qdit", "calibrate.options.activations=per_token"), ALL, ""),
    "static": (("method=msfp",), ALL, ""),
    "static for plugins": (
        ("method=msfp", "rtx.path=plugin"),
        ("cpu", "cuda"),
        "rtx: calibrate.method msfp scales activations per_tensor",
    ),
    "weights no kernel takes": (("formats.weight=INT6",), ("cpu", "rtx"), "cuda: weights in INT6"),
    "quantized attention": (
        ("attention.qk=INT8", "attention.pv=E2M3"),
        ("cpu",),
        "rtx: target rtx has no quantized attention (the recipe's: INT8/E2M3); --set attention.qk=float",
    ),
    "attention auto": (("attention.qk=auto", "attention.pv=auto"), ALL, ""),
    "a GPU rtx refuses": (("rtx.sm=[90]",), ("cpu", "cuda"), "rtx: target rtx cannot be built for SM 90"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_leaves_out_what_refuses_the_recipe(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, targets, words = SHAPES[shape]
    requested = request(*(part for setting in settings for part in ("--set", setting)))
    assert requested.targets == (*targets, "onnx"), "the portable model is proven in any case"
    refuse_early(requested)
    assert words in caplog.text
    left_out = {record.getMessage().split(",")[1].split(":")[0].strip() for record in caplog.records}
    assert left_out == set(ALL) - set(targets)


ATTENTION = ("--set", "attention.qk=INT8", "--set", "attention.pv=INT8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target", "rtx", "--set", "method=qdit"), "target rtx runs one GEMM for each linear"),
        (("--target", "cpu,cuda", "--set", "method=qdit"), "the GPU kernels have no scale per token and group"),
        (("--target", "rtx", *ATTENTION), "target rtx has no quantized attention .*; --set attention.qk=float"),
        (("--target", "cpu,cuda", *ATTENTION), "target cuda has no quantized attention"),
        (("--target-sm", "90"), "target rtx cannot be built for SM 90"),
    ],
)
def test_what_was_asked_for_is_refused_by_name(flags: tuple[str, ...], words: str) -> None:
    requested = request(*flags)
    assert {"rtx", "cuda"} & set(requested.targets)
    with pytest.raises(EnvironmentLacksError, match=words):
        refuse_early(requested)


def test_if_nothing_is_left_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "cpu.path=fused needs a C compiler")
    recipe = recipes.with_settings(recipes.load("dit_w4a8"), ["method=qdit", "cpu.path=fused"])
    words = r"no target can be built .*; cpu: cpu.path=fused needs a C compiler; rtx: .* has no scale per token"
    with pytest.raises(EnvironmentLacksError, match=words):
        fitting_targets(("cpu", "rtx"), recipe)
    assert fitting_targets(("cpu", "rtx"), recipe.with_options(CpuOptions())) == ("cpu",)


def test_a_method_that_one_target_lacks_builds_with_the_default_target(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--engine", "dit_w4a8", "--set", "method=qdit", "--dry-run", "-o", "no such folder"]
    assert cli.main(["build", *flags]) == 0
    shown = capsys.readouterr()
    assert "targets cpu, onnx; nothing was written" in shown.out and "left out of --target auto, rtx" in shown.err
