"""onnxruntime-web on one model: in Node, and in Chromium without a window."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from benchmarks.record import Json
from benchmarks.tools import browser
from benchmarks.tools.environments import CannotBeHadError
from benchmarks.tools.limit import Arrays
from pipeline.web.onnxruntime_web import PACKAGE, VERSION

__all__ = ["PACKAGE", "VERSION", "find", "ran"]
NODE = "node"
# Of a run in the browser: the file of the package, and the browser's flags.
IN_BROWSER = {
    "wasm": ("ort.wasm.min.mjs", browser.NO_GPU_FLAGS),
    "webgpu": ("ort.webgpu.min.mjs", browser.WEBGPU_FLAGS),
}
SCRIPT = Path(__file__).with_name("web.mjs")
WAITED_S = 600


def find(run: str) -> str:
    """The program for a run. Raises CannotBeHadError where there is none here."""
    program = shutil.which(NODE) if run == NODE else browser.browser()
    if program is None:
        raise CannotBeHadError(f"none of {', '.join((NODE,) if run == NODE else browser.BROWSERS)} is installed")
    return program


def ran(run: str, modules: Path, folder: Path, feeds: Arrays) -> tuple[Json, Arrays | None]:
    """The model in `folder` on `feeds`: the row of the results so far, and outputs, None where it refuses."""
    rows = {name: {"type": x.dtype.name, "dims": x.shape, "data": x.ravel().tolist()} for name, x in feeds.items()}
    (folder / "feeds.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    (folder / "node_modules").symlink_to(modules)
    made = in_node(folder) if run == NODE else in_browser(run, folder)
    row: Json = {"versions": {PACKAGE: VERSION}}
    if isinstance(made, str):
        return row | {"refuses": " ".join(made.split())}, None
    return row, {name: np.array(data, np.float32).reshape(dims) for name, (dims, data) in made.items()}


def in_node(folder: Path) -> Json | str:
    """Outputs by name as [dims, data], or what is said of why not."""
    words = [find(NODE), SCRIPT.name, "."]
    done = subprocess.run(words, cwd=folder, capture_output=True, encoding="utf-8", timeout=WAITED_S, check=False)
    if done.returncode:
        return (done.stderr or done.stdout)[-600:]
    document: Json = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
    return document


def in_browser(run: str, folder: Path) -> Json | str:
    """As `in_node`."""
    file, flags = IN_BROWSER[run]
    (folder / "index.html").write_text("<!doctype html><title>onnxruntime-web</title>", encoding="utf-8")
    script = f"""import("/{SCRIPT.name}").then((web) => web.fetched("/node_modules/{PACKAGE}/dist/", "{file}", "{run}"))
        .catch(String)"""
    with serving(folder) as address, browser.opened(find(run), flags) as tab:
        tab.open(address)
        made: Json | str = tab.run(script)
    return made


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
