"""What `attention auto` becomes before work starts, and that all who come later see what it became."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from export.errors import ContractError
from export.models import attention_calls
from pipeline import __main__ as cli
from pipeline import compiler
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from pipeline.compiler import BuildRequest, Prepared, prepare
from plugins.cpu import library
from tests.support import pipelines, tiny
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch
SETTINGS = ["method=rtn", "weights.group_size=32", "sampling.n_steps=1"]
FLOAT, NAMED = ([f"attention.{key}={word}" for key in ("qk", "pv")] for word in ("float", "E2M3"))
MADE_OF = (
    "attention auto: E2M3/E2M3 for 4 attentions, which every target (cpu, onnx) computes; --set attention.qk=float"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder("pixart", tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package and the kernel library are here, so that the recipe alone decides."""
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "package_problems", lambda: [])
    monkeypatch.setattr(library, "problem", lambda: None)


def prepared(model: Path, output: Path, targets: tuple[str, ...], *settings: str) -> Prepared:
    recipe = recipes.with_settings(recipes.load("pixart_w4a6"), [*SETTINGS, *settings])
    return prepare(BuildRequest(recipes.with_model(recipe, str(model), None, None), targets, output))


def flags(verb: str, model: Path, output: Path, *more: str) -> list[str]:
    settings = [flag for setting in SETTINGS for flag in ("--set", setting)]
    return [verb, "--engine", "pixart_w4a6", "-m", str(model), *settings, "-o", str(output), *more]


def test_the_key_of_a_build_is_that_of_what_auto_became(model: Path, tmp_path: Path) -> None:
    """So that a resumed build, and a component that is taken over, are those of the same formats."""
    output = tmp_path / "e"
    for targets, same, other in ((("cpu",), NAMED, FLOAT), (("cpu", "cuda"), FLOAT, ())):
        automatic = prepared(model, output, targets)
        assert automatic.recipe == prepared(model, output, targets, *same).recipe
        assert automatic.key == prepared(model, output, targets, *same).key
        if other:
            assert automatic.key != prepared(model, output, targets, *other).key


@pytest.mark.parametrize(
    ("target", "attention", "words"),
    [
        ("cpu", {"qk": "E2M3", "pv": "E2M3"}, MADE_OF),
        ("onnx", {"qk": "E2M3", "pv": "E2M3"}, "every target (onnx) computes"),
        ("cpu,cuda", {}, "attention auto: float, for want of a kernel for quantized attention in target cuda"),
        ("rtx,cuda", {}, "attention auto: float, for want of a kernel for quantized attention in target rtx and cuda"),
    ],
)
def test_a_dry_run_says_what_auto_means(
    target: str,
    attention: dict[str, str],
    words: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(flags("build", model, tmp_path / "e", "--target", target, "--dry-run", "--json")) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["recipe"]["attention"] == attention
    assert words in shown.err and shown.err.count("attention auto") == 1 and "attentions to quantize" not in shown.err


def test_stock_ops_have_attention_in_float_unless_formats_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There QuantizedAttention takes several times as long."""
    with caplog.at_level("INFO"):
        assert prepared(model, tmp_path / "e", ("cpu",), "cpu.path=stock").recipe.attention.formats is None
    assert "attention auto: float, for want of a kernel for quantized attention in target cpu" in caplog.text
    assert prepared(model, tmp_path / "e", ("cpu",), "cpu.path=stock", *NAMED).recipe.attention.text() == "E2M3/E2M3"
    monkeypatch.setattr(library, "problem", lambda: "no compiler")
    assert prepared(model, tmp_path / "e", ("cpu",)).recipe.attention.formats is None


def test_a_model_whose_attention_cannot_be_quantized_has_it_in_float(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: object) -> None:
        raise ContractError("attn1: causal heads are not quantized")

    monkeypatch.setattr(attention_calls, "attention_names", refuse)
    with caplog.at_level("INFO"):
        assert prepared(model, tmp_path / "e", ("cpu",)).recipe.attention.formats is None
    assert "attention auto: float, since the model's cannot be quantized: attn1: causal heads" in caplog.text


def test_calibration_says_how_its_checkpoint_is_exported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any runtime runs the portable model's attention."""
    assert cli.main(flags("calibrate", model, tmp_path / "checkpoint")) == 0
    assert "export it with --attention E2M3/E2M3" in capsys.readouterr().err
    settings = [flag for setting in FLOAT for flag in ("--set", setting)]
    assert cli.main(flags("calibrate", model, tmp_path / "float", *settings)) == 0
    assert "--attention" not in capsys.readouterr().err


def test_a_stopped_build_goes_on_as_what_auto_became_and_its_bundle_never_says_auto(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "verified", stop)
    assert cli.main(flags("build", model, tmp_path / "e", "--target", "onnx")) == 130
    monkeypatch.setattr(compiler, "verified", lambda *_: None)
    monkeypatch.setattr(compiler, "benched", lambda *_: None)
    monkeypatch.setattr("pipeline.calibrate.calibrate", lambda *_: pytest.fail("it was calibrated"))
    capsys.readouterr()
    named = [flag for setting in NAMED for flag in ("--set", setting)]
    assert cli.main(flags("build", model, tmp_path / "e", "--target", "onnx", "--resume", *named)) == 0
    assert "4 attentions to quantize at E2M3/E2M3" in capsys.readouterr().err
    assert json.loads((tmp_path / "e/manifest.json").read_text())["recipe"]["attention"] == {"qk": "E2M3", "pv": "E2M3"}
    assert recipes.load(str(tmp_path / "e/recipe.toml")).attention.text() == "E2M3/E2M3"
    assert cli.main(["inspect", str(tmp_path / "e")]) == 0 and "; attention E2M3/E2M3; " in capsys.readouterr().out


def test_each_part_of_a_pipeline_has_what_its_own_targets_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The denoiser is for a GPU, too; the others are for the CPU whatever it is for."""
    folder = pipelines.write("alpha", tmp_path / "pixart", caption_channels=64)
    shutil.rmtree(folder / "text_encoder")
    t5_folder(folder)
    own = [f"components.text_encoder.attention.{key}=auto" for key in ("qk", "pv")]
    more = [flag for setting in own for flag in ("--set", setting)]
    for target, of_denoiser in (("cpu", {"qk": "E2M3", "pv": "E2M3"}), ("cpu,cuda", {})):
        assert cli.main(flags("build", folder, tmp_path / "e", "--target", target, "--dry-run", "--json", *more)) == 0
        shown = capsys.readouterr()
        plans = [json.loads(line) for line in shown.out.splitlines()]
        attention = {plan["family"]: plan["recipe"]["attention"] for plan in plans if plan["event"] == "plan"}
        assert attention == {"t5": {"qk": "E2M3", "pv": "E2M3"}, "pixart": of_denoiser, "vae_decoder": {}}
