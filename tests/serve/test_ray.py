"""`serve --ray` on a cluster of two nodes: replicas by load, and one that is killed while it draws."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.distance import psnr_db
from pipeline.text_to_image import Pipeline
from tests.serve.test_server import ROOT, bundle, started  # noqa: F401
from tests.support.ray_started import cluster, python, until  # noqa: F401
from tests.support.serving import pixels, pixels_of

pytestmark = [pytest.mark.slow, pytest.mark.process]
CLIENTS, PICTURES, STEPS = 4, 5, 30
COMPARED = 20  # requests at most, of all that were answered
REPLICA = "ray::ServeReplica"


def replicas(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of the cluster that have an engine."""
    found = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith(REPLICA):
                found.append(process)
    return found


def test_replicas_come_by_load_and_one_that_is_killed_loses_nothing(bundle: Path, python: str) -> None:  # noqa: F811
    def ask(number: int) -> Any:
        """Every picture of a request, some of them by url."""
        kind: Any = "url" if number % 4 == 0 else "b64_json"
        extra = {"seed": 100 * number, "steps": STEPS}
        answer = server.client().images.generate(
            prompt=str(number % 10), n=PICTURES, response_format=kind, extra_body=extra
        )
        if kind == "b64_json":
            return [pixels_of({"b64_json": row.b64_json}) for row in answer.data]
        return [pixels(urllib.request.urlopen(row.url).read()) for row in answer.data]

    with cluster(python) as (address, parent):
        flags = ["--ray", "--ray-address", address, "--replicas", "1:2"]
        with started(bundle, [python, "-m", "pipeline"], flags) as server:
            assert len(replicas(parent)) == 1
            enough, numbers = threading.Event(), itertools.count()

            def client() -> dict[int, Any]:
                """Asks for one after the other."""
                own = {}
                while not enough.is_set():
                    number = next(numbers)
                    own[number] = ask(number)
                return own

            with ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(client) for _ in range(CLIENTS)]
                try:
                    until(lambda: len(replicas(parent)) == 2)
                    assert len({process.ppid() for process in replicas(parent)}) == 2, "both are on one node"
                    while server.metrics()["ditc_batches_again_total"] == 0:  # one may be killed between two batches
                        for process in replicas(parent)[:1]:
                            process.kill()
                        time.sleep(3)
                    until(lambda: len(replicas(parent)) == 2)  # another one in its place
                finally:
                    enough.set()
                drawn = {number: pictures for one in clients for number, pictures in one.result().items()}
            assert server.outcomes() == {"ok": len(drawn)} and sorted(drawn) == list(range(len(drawn)))
            assert server.metrics()["ditc_pictures_total"] == len(drawn) * PICTURES
            assert json.loads(server.get("/health"))["status"] == "ready"
            code, log = server.end()
        # No trace of this package; Ray's own tasks may tell of the one that was asked how it is when it was killed.
        assert code == 0 and f'File "{ROOT}' not in log and "a replica has ended after step" in log, log
        until(lambda: not replicas(parent))
    gates = json.loads((bundle / "report/parity.json").read_text())["gates"]
    [limit] = [gate["limit"] for gate in gates if gate["name"] == "cpu/final_psnr_db"]
    with Pipeline.load(bundle, threads=1) as pipeline:
        for number in list(drawn)[:: max(1, len(drawn) // COMPARED)]:
            own = pipeline(
                str(number % 10), num_images_per_prompt=PICTURES, seed=100 * number, num_inference_steps=STEPS
            )
            for image, picture in zip(own.images, drawn[number], strict=True):
                assert psnr_db(np.asarray(image) / 255, picture / 255, 1.0) >= limit, number
