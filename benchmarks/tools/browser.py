"""Chromium without a window, driven by its devtools protocol through two pipes: no driver, no further package."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAITED_S = 300.0
NO_GPU_FLAGS = ("--disable-gpu",)
# WebGPU without a GPU: by SwiftShader, Chromium's own Vulkan on the CPU.
WEBGPU_FLAGS = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


def browser() -> str | None:
    """The browser of this machine, None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class PageError(Exception):
    """The browser or a page of it does not do what it was told to, or not within WAITED_S."""


class Tab:
    """One page. complaints: what it has logged as errors, and what it raised that nobody caught."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.count, self.buffer, self.session = 0, b"", None
        self.complaints: list[str] = []
        [target] = [row for row in self.call("Target.getTargets")["targetInfos"] if row["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            self._note(answer)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self.buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self.answers, selectors.EVENT_READ)
                if not selector.select(WAITED_S):
                    raise PageError(f"the browser says nothing for {WAITED_S:g} s; {self.complaints}")
            if not (part := os.read(self.answers, 1 << 20)):
                raise PageError(f"the browser has ended; {self.complaints}")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.complaints.append(str(event["params"]["entry"]))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise PageError(f"{script[:200]}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + WAITED_S
        while not self.run(f"!!({script})"):  # elements have no value of their own
            if time.monotonic() > end:
                raise PageError(f"not true within {WAITED_S:g} s: {script}; {self.complaints}")
            time.sleep(0.05)

    def show(self, width: int, height: int, scheme: str = "light") -> None:
        """Give the page this size, and prefer a colour scheme."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def opened(executable: str, gpu_flags: tuple[str, ...] = NO_GPU_FLAGS) -> Iterator[Tab]:
    """A tab of a browser of its own. gpu_flags: WEBGPU_FLAGS where the page asks for a GPU."""
    (their_in, commands), (answers, their_out) = os.pipe(), os.pipe()

    def place() -> None:
        """The browser reads its commands from 3 and answers on 4."""
        ins, outs = os.dup(their_in), os.dup(their_out)
        os.dup2(ins, 3)
        os.dup2(outs, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its last processes may still write
        flags = ["--headless", "--no-sandbox", *gpu_flags, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        nowhere: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [executable, *flags, "--no-first-run", "about:blank"]
        process = subprocess.Popen(command, preexec_fn=place, close_fds=False, **nowhere)  # noqa: PLW1509 - only dup
        os.close(their_in)
        os.close(their_out)
        try:
            yield Tab(commands, answers)
        finally:
            process.terminate()
            process.wait(30)
            os.close(commands)
            os.close(answers)
