"""The bundled pipeline, built and proven: drawn by the run time alone and by a server, as its folder says.

In a browser it is drawn by tests/web/test_pipeline_page.py, on 64-bit Arm by tests/test_arm.py; what it takes of memory
is in tests/bundle/test_pipeline_memory.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.models.sources import find
from pipeline.generate.own_settings import own_settings
from pipeline.text_to_image import Pipeline
from tests.serve.test_server import started
from tests.support.scenes_bundle import PROMPT, SOURCE, STEPS
from tests.support.serving import pixels_of

pytestmark = [pytest.mark.slow, pytest.mark.process]
ROOT = Path(__file__).parents[1]
SEED = 3
GATES = {"tokenizer/ids_differing", "picture_psnr_db", "calls_ulps"}


@pytest.fixture(scope="module")
def expected(scenes_bundle: Path) -> Any:
    """The picture [64, 64, 3] uint8 that this process draws."""
    return drawn(scenes_bundle)


def drawn(bundle: Path, **settings: Any) -> Any:
    with Pipeline.load(bundle, threads=1) as pipeline:
        output = pipeline(PROMPT, seed=SEED, **{"num_inference_steps": STEPS} | settings)
    return np.asarray(output.images[0])


def test_its_gates_hold_with_the_guidance_that_its_folder_states(scenes_bundle: Path) -> None:
    report = json.loads((scenes_bundle / "report/parity.json").read_text())
    assert report["passed"] and {gate["name"] for gate in report["gates"]} == GATES
    stated = own_settings(find(SOURCE)[0])
    with Pipeline.load(scenes_bundle) as pipeline:
        assert (pipeline.n_steps, pipeline.guidance_scale) == (stated.n_steps, stated.guidance_scale)


def test_it_is_drawn_by_the_run_time_alone(scenes_bundle: Path, expected: Any, tmp_path: Path) -> None:
    """Where torch, diffusers and all of the compiler are nowhere, the same picture to the bit; and no flat one."""
    command = [sys.executable, "-m", "tests.support.absent", "generate", str(scenes_bundle), "--prompt", PROMPT]
    flags = ["--n-steps", str(STEPS), "--seed", str(SEED), "--threads", "1", "--scale", "1"]
    subprocess.run([*command, *flags, "-o", str(tmp_path / "it.png")], cwd=ROOT, check=True, timeout=600)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "it.png")), expected)
    assert expected.shape == (64, 64, 3) and np.ptp(expected) > 100


def test_it_is_drawn_with_its_own_guidance_and_not_its_class_s(scenes_bundle: Path, expected: Any) -> None:
    own = own_settings(scenes_bundle).guidance_scale
    np.testing.assert_array_equal(drawn(scenes_bundle, guidance_scale=own), expected)
    assert np.any(drawn(scenes_bundle, guidance_scale=4.5) != expected)


def test_a_server_draws_it_and_says_what_it_leaves_out(scenes_bundle: Path, expected: Any) -> None:
    with started(scenes_bundle) as server:
        client = server.client()
        (model,) = client.models.list()
        facts, stated = model.model_dump()["ditc"], own_settings(scenes_bundle)
        assert (facts["steps"], facts["guidance"]) == (stated.n_steps, stated.guidance_scale)
        extra = {"seed": SEED, "steps": STEPS}
        (row,) = client.images.generate(prompt=PROMPT, extra_body=extra).data
        np.testing.assert_array_equal(pixels_of({"b64_json": row.b64_json}), expected)
        assert row.model_dump()["warnings"] == []
        (row,) = client.images.generate(prompt=" ".join([PROMPT] * 12), extra_body=extra).data
        (warning,) = row.model_dump()["warnings"]
        assert "tokens more than the 120 that fit" in warning
