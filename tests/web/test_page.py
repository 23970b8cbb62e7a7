"""The page in a browser without a window: its picture is the CPU engine's, but for codes that flip."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import EnvironmentLacksError, RecipeError
from pipeline import compiler
from pipeline.backends.sessions import opened, session_options
from pipeline.build import main as build
from pipeline.distance import PIXEL_RANGE, psnr_db
from pipeline.export import main
from pipeline.files import tree
from pipeline.generate.draw import DrawRequest
from pipeline.generate.pixel_model import PixelModel
from pipeline.text_to_image import Pipeline
from pipeline.web import onnxruntime_web, page_folder
from tests.generate.test_generate import GENERATION, make_bundle
from tests.support import browser

logger = logging.getLogger(__name__)

PROMPT, SEED, STEPS = "a red circle left of a blue ring on white", 7, 10
# A second float32 run of a model is as far from the float64 one as the first; both together at most twice as far.
TWICE_DB = 20 * np.log10(2)


# --- what the page does not take --------------------------------------------------------------------------------------


def test_prompts_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    bundle.manifest.update(targets={"cpu": {}})  # type: ignore[typeddict-item]
    with pytest.raises(RecipeError, match="has no portable model, which the page runs; build it without --drop-port"):
        page_folder.refuse(bundle)
    bundle.manifest.update(targets={"onnx": {}})  # type: ignore[typeddict-item]
    bundle.manifest["files"]["model.onnx"] = {"size": 0, "sha256": ""}
    with pytest.raises(RecipeError, match="its prompts are classes; the page knows those of a vocabulary alone"):
        page_folder.write(bundle, tmp_path / "out", None)
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
    try:
        onnxruntime_web.find(None)
    except EnvironmentLacksError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("exported") / "page"
    assert main([str(bundle), "--web", str(folder)]) == 0
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """What `python -m http.server` runs, without its log."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of static files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def draw(tab: browser.Tab, prompt: str, seed: int, steps: int) -> None:
    """Fill the fields in and press the button."""
    fields = {"prompt": prompt, "seed": seed, "steps": steps}
    tab.run("; ".join(f"document.getElementById('{name}').value = {value!r}" for name, value in fields.items()))
    tab.run("document.getElementById('draw').click()")


def canvas(tab: browser.Tab) -> Any:
    """The picture [H, W, 3] uint8."""
    script = """(() => { const canvas = document.getElementById('picture');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return [canvas.height, canvas.width, Array.from(data)]; })()"""
    height, width, data = tab.run(script)
    return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]


def picture(run: Any, pipeline: Pipeline) -> Any:
    """What another engine draws, [1, 3, H, W] float32."""
    pipeline = Pipeline.load(pipeline.bundle.path)
    assert isinstance(pipeline.model, PixelModel)
    pipeline.model.engine.close()
    pipeline.model.engine = run
    [drawing] = pipeline.drawings(DrawRequest((PROMPT,), SEED, n_steps=STEPS))
    return drawing.latents


class Lowered:
    """The page's own graph in onnxruntime, with all of its optimizations or the basic ones."""

    def __init__(self, path: Path, level: str) -> None:
        import onnxruntime

        options = session_options(1)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        self.session = opened(path, options)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"sample": self.session.run(["sample"], inputs)[0]}

    def close(self) -> None:
        """Nothing to do."""


@pytest.mark.slow
def test_the_page_draws_the_engine_s_picture(bundle: Path, page: Path, tmp_path: Path) -> None:
    executable = browser.browser()
    if executable is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.BROWSERS)}")
    with Pipeline.load(bundle, threads=1) as pipeline:
        [drawing] = pipeline.drawings(DrawRequest((PROMPT,), SEED, n_steps=STEPS))
        expected = drawing.latents
        graph = page / "model/model.onnx"
        runs = [picture(Lowered(graph, level), pipeline) for level in ("ORT_ENABLE_ALL", "ORT_ENABLE_BASIC")]
        runs.append(picture(pipeline.bundle.engine("onnx"), pipeline))
    # Of float32 runs of one quantized model no two are equal; the page's is one more of them.
    limit_db = min(psnr_db(run, expected, PIXEL_RANGE) for run in runs) - TWICE_DB
    shown = np.rint((np.clip(expected[0], -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)

    with serving(page) as address, browser.opened(executable) as tab:
        tab.show(800, 1100)
        tab.open(address)
        tab.wait("document.getElementById('state').textContent === 'ready'")
        assert tab.run("crossOriginIsolated") is False
        draw(tab, PROMPT, SEED, STEPS)
        tab.wait("document.getElementById('picture').dataset.drawn === '1'")
        drawn = canvas(tab)
        tab.screenshot(tmp_path / "page.png")
        error_db = psnr_db(drawn / 127.5 - 1, shown / 127.5 - 1, PIXEL_RANGE)
        assert error_db >= limit_db, f"{error_db:.1f} dB to the engine's picture, limit {limit_db:.1f} dB"
        logger.info("%.1f dB to the engine's picture, limit %.1f dB", error_db, limit_db)

        draw(tab, "a red horse on white", SEED, STEPS)
        tab.wait("document.getElementById('state').classList.contains('error')")
        assert "found 'horse'" in tab.run("document.getElementById('state').textContent")
        draw(tab, PROMPT, SEED, 500)
        tab.wait("document.getElementById('state').textContent.startsWith('step')")
        tab.run("document.getElementById('stop').click()")
        tab.wait("document.getElementById('state').textContent === 'stopped'")
        draw(tab, PROMPT, SEED + 1, 1)
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
