"""The page in a browser without a window: its picture is the CPU engine's, but for codes that flip."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tools import browser
from benchmarks.tools.web import serving
from export.errors import RecipeError
from pipeline import compiler
from pipeline.build import main as build
from pipeline.distance import PIXEL_RANGE, psnr_db
from pipeline.export import main
from pipeline.files import tree
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.generate.draw import DrawRequest
from pipeline.generate.pixel_model import PixelModel
from pipeline.recipe import MOST_STEPS
from pipeline.text_to_image import Pipeline
from pipeline.web import onnxruntime_web, page_folder
from tests.generate.test_generate import GENERATION, make_bundle
from tests.support.web_page import LEVELS, TWICE_DB, Lowered, canvas, exported, fill_in

logger = logging.getLogger(__name__)

PROMPT, SEED, STEPS = "a red circle left of a blue ring on white", 7, 10


# --- what the page does not take --------------------------------------------------------------------------------------


def test_prompts_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    bundle.manifest.update(targets={"cpu": {}})  # type: ignore[typeddict-item]
    with pytest.raises(RecipeError, match="has no portable model, which the page runs; build it without --drop-port"):
        page_folder.refuse(bundle)
    bundle.manifest.update(targets={"onnx": {}}, layers=[])  # type: ignore[typeddict-item]
    bundle.manifest["files"]["model.onnx"] = {"size": 0, "sha256": ""}
    with pytest.raises(RecipeError, match="its prompts are classes; the page knows those of a vocabulary alone"):
        page_folder.refuse(bundle)
    bundle = make_bundle(tmp_path, GENERATION | {"output": "latents"})
    with pytest.raises(RecipeError, match="draws no pixels by itself"):
        page_folder.refuse(bundle)


def test_the_page_s_files_are_known() -> None:
    own = {path.name for path in Path(page_folder.__file__).with_name("page").iterdir()}
    assert own == set(page_folder.PAGE)


# --- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model, its gates and measurement left out."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("verified", "benched"):
            patch.setattr(compiler, stage, lambda *_: None)
        flags = ["--engine", "pixart_w4a6", "--set", "method=rtn", "--target", "cpu", "-o", str(folder / "engine")]
        assert build(flags) == 0
    return folder / "engine"


@pytest.fixture(scope="module")
def page(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported page."""
    return exported(bundle, tmp_path_factory.mktemp("exported") / "page")


def picture(run: Any, pipeline: Pipeline) -> Any:
    """What another engine draws, [1, 3, H, W] float32."""
    pipeline = Pipeline.load(pipeline.bundle.path)
    assert isinstance(pipeline.model, PixelModel)
    pipeline.model.engine.close()
    pipeline.model.engine = run
    [drawing] = pipeline.drawings(DrawRequest((PROMPT,), SEED, n_steps=STEPS))
    return drawing.latents


@pytest.mark.slow
def test_the_page_draws_the_engine_s_picture(bundle: Path, page: Path, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.BROWSERS)}")
    with Pipeline.load(bundle, threads=1) as pipeline:
        [drawing] = pipeline.drawings(DrawRequest((PROMPT,), SEED, n_steps=STEPS))
        expected = drawing.latents
        graph = page / "model/model.onnx"
        runs = [picture(Lowered(graph, level), pipeline) for level in LEVELS]
        runs.append(picture(pipeline.bundle.engine("onnx"), pipeline))
    # Of float32 runs of one quantized model no two are equal; the page's is one more of them.
    limit_db = min(psnr_db(run, expected, PIXEL_RANGE) for run in runs) - TWICE_DB
    shown = np.rint((np.clip(expected[0], -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)

    with serving(page) as address, browser.opened(executable) as tab:
        tab.show(800, 1100)
        tab.open(address)
        tab.wait("document.getElementById('state').textContent === 'ready'")
        assert tab.run("crossOriginIsolated") is False
        bounds = [tab.run(f"document.getElementById('{name}').max") for name in ("steps", "guidance")]
        assert bounds == [str(MOST_STEPS), f"{MOST_GUIDANCE:g}"]
        fill_in(tab, prompt=PROMPT, seed=SEED, steps=STEPS)
        tab.wait("document.getElementById('picture').dataset.drawn === '1'")
        drawn = canvas(tab)
        tab.screenshot(tmp_path / "page.png")
        error_db = psnr_db(drawn / 127.5 - 1, shown / 127.5 - 1, PIXEL_RANGE)
        assert error_db >= limit_db, f"{error_db:.1f} dB to the engine's picture, limit {limit_db:.1f} dB"
        logger.info("%.1f dB to the engine's picture, limit %.1f dB", error_db, limit_db)

        fill_in(tab, prompt="a red horse on white", seed=SEED, steps=STEPS)
        tab.wait("document.getElementById('state').classList.contains('error')")
        assert "found 'horse'" in tab.run("document.getElementById('state').textContent")
        fill_in(tab, prompt=PROMPT, seed=SEED, steps=500)
        tab.wait("document.getElementById('state').textContent.startsWith('step')")
        tab.run("document.getElementById('stop').click()")
        tab.wait("document.getElementById('state').textContent === 'stopped'")
        fill_in(tab, prompt=PROMPT, seed=SEED + 1, steps=1)
        tab.wait("document.getElementById('picture').dataset.drawn === '4'")
        assert (canvas(tab) != drawn).any() and not tab.complaints


@pytest.mark.slow
def test_the_export_is_whole(page: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = set(tree(page))
    model = {f"model/{name}" for name in ("model.onnx", "model.onnx.data", "settings.json", "embedding.bin")}
    runtime = {f"ort/{Path(name).name}" for name in onnxruntime_web.FILES}
    assert names == {*page_folder.PAGE, *model, *runtime}
    text = "".join((page / name).read_text() for name in page_folder.PAGE)
    assert "http://" not in text and "https://" not in text
    assert main([str(bundle), "--web", str(page)]) == 2
    assert "exists; add --force to replace it, or choose another --web" in capsys.readouterr().err
    assert main([str(bundle), "--web", str(page), "--force"]) == 0
