"""What a pipeline is drawn with where its caller says nothing: what its folder states, else what its class has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.errors import ModelError
from export.models.description import GENERATION_FILE
from export.models.sources import find
from pipeline.compile_pipeline import write_others
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.generate.latent_model import LatentModel
from pipeline.generate.own_settings import OwnSettings, own_settings
from pipeline.generate.pipeline_classes import PIPELINES, find_pipeline_class
from pipeline.generate.schedulers.config import CONFIG_FILE, SCHEDULER
from pipeline.parts import PipelineFolder, refuse_scheduler
from pipeline.recipe import MOST_STEPS
from pipeline.text_to_image import Pipeline
from pipeline.web import pipeline_page
from tests.support import numpy_pipeline

pytestmark = pytest.mark.fast
CLASS = PIPELINES["PixArtAlphaPipeline"]


@pytest.mark.parametrize(
    "text, settings",
    [
        (None, OwnSettings()),
        ("{}", OwnSettings()),
        ('{"n_steps": 7}', OwnSettings(n_steps=7)),
        ('{"guidance_scale": 2}', OwnSettings(guidance_scale=2)),
        ('{"n_steps": 7, "guidance_scale": 2.5}', OwnSettings(7, 2.5)),
    ],
)
def test_a_pipeline_states_what_it_is_drawn_with(text: str | None, settings: OwnSettings, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / GENERATION_FILE).write_text(text)
    assert own_settings(tmp_path) == settings


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"guidance": 2.0}', "guidance"),
        ('{"n_steps": 0}', "n_steps is 0"),
        ('{"guidance_scale": NaN}', "NaN is not a number"),
        ('{"guidance_scale": "much"}', "guidance_scale is 'much'"),
        ('{"guidance_scale": 500}', "guidance_scale is 500"),
        ("[2.0]", GENERATION_FILE),
    ],
)
def test_what_it_cannot_state_is_refused_with_the_remedy(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / GENERATION_FILE).write_text(text)
    with pytest.raises(ModelError, match=f"{reason}.*; state n_steps, guidance_scale or both, or remove the file"):
        own_settings(tmp_path)


def test_a_link_that_leads_nowhere_is_no_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / GENERATION_FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=GENERATION_FILE):
        own_settings(tmp_path)


@pytest.mark.parametrize("stated", [None, 30])
def test_steps_that_the_scheduler_does_not_have_are_refused_before_work(stated: int | None, tmp_path: Path) -> None:
    (tmp_path / SCHEDULER).mkdir()
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10, "clip_sample": False}
    (tmp_path / SCHEDULER / CONFIG_FILE).write_text(json.dumps(config))
    if stated is not None:
        (tmp_path / GENERATION_FILE).write_text(json.dumps({"n_steps": stated}))
    steps = stated or CLASS.n_steps
    with pytest.raises(
        ModelError, match=f"does not make {steps} steps .*; state others in .*{GENERATION_FILE}, as n_steps 10$"
    ):
        refuse_scheduler(tmp_path, CLASS, "DDIMScheduler")
    (tmp_path / GENERATION_FILE).write_text(json.dumps({"n_steps": 10}))
    refuse_scheduler(tmp_path, CLASS, "DDIMScheduler")


@pytest.mark.parametrize(
    "class_name, keys, reason",
    [
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "ends at sigma 0; use solver_type 'bh2'$"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, "ends at sigma 0; use lower_order_final$"),
        ("EulerDiscreteScheduler", {"beta_end": 0.99}, "sigmas are not finite"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "give one, or change that key$"),
    ],
)
def test_what_no_number_of_steps_mends_is_refused_in_its_own_words(
    class_name: str, keys: dict[str, object], reason: str, tmp_path: Path
) -> None:
    (tmp_path / SCHEDULER).mkdir()
    (tmp_path / SCHEDULER / CONFIG_FILE).write_text(json.dumps({"_class_name": class_name, **keys}))
    with pytest.raises(ModelError, match=rf"{CONFIG_FILE}: .*{reason}") as caught:
        refuse_scheduler(tmp_path, CLASS, class_name)
    assert GENERATION_FILE not in str(caught.value)


@pytest.mark.parametrize(
    "settings, steps, scale",
    [
        (OwnSettings(), CLASS.n_steps, CLASS.guidance_scale),
        (OwnSettings(n_steps=3), 3, CLASS.guidance_scale),
        (OwnSettings(3, 0.0), 3, 0.0),
    ],
)
def test_it_is_drawn_so_unless_the_caller_says_otherwise(
    settings: OwnSettings, steps: int, scale: float, tmp_path: Path
) -> None:
    log = numpy_pipeline.Log()
    pipeline = Pipeline(LatentModel(numpy_pipeline.make_source(tmp_path, log, settings=settings)))
    assert (pipeline.n_steps, pipeline.guidance_scale) == (steps, scale)
    pipeline("a red ring")
    calls = log.last("transformer").calls
    assert len(calls) == steps and len(calls[0]["hidden_states"]) == (2 if scale > 1 else 1)
    pipeline("a red ring", num_inference_steps=2, guidance_scale=7.0)
    calls = log.last("transformer").calls
    assert len(calls) == 2 and len(calls[0]["hidden_states"]) == 2


def test_the_browser_is_told(tmp_path: Path) -> None:
    source = numpy_pipeline.make_source(tmp_path, numpy_pipeline.Log(), settings=OwnSettings(9, 3.25))
    row = find_pipeline_class(source.class_name, "it")
    document = pipeline_page.settings(source, row, dict.fromkeys(row.components, 1))
    assert (document["n_steps"], document["guidance_scale"]) == (9, 3.25)
    assert document["most"] == {"n_steps": MOST_STEPS, "guidance_scale": MOST_GUIDANCE}


def test_a_bundle_has_the_file_of_its_folder_and_a_resumed_build_no_older_one(tmp_path: Path) -> None:
    root, bundle = tmp_path / "pipeline", tmp_path / "bundle"
    for folder in (root / SCHEDULER, bundle):
        folder.mkdir(parents=True)
    (root / SCHEDULER / CONFIG_FILE).write_text("{}")
    (root / GENERATION_FILE).write_text('{"n_steps": 5}')
    pipeline = PipelineFolder(root, "", {}, (), (), {}, {})
    write_others(pipeline, bundle)
    assert own_settings(bundle) == OwnSettings(n_steps=5)
    (root / GENERATION_FILE).unlink()
    write_others(pipeline, bundle)
    assert not (bundle / GENERATION_FILE).exists()


def test_the_bundled_pipeline_is_drawn_as_it_was_measured() -> None:
    folder, _ = find("zoo:pixart_scenes")
    measured = json.loads((folder / "quality.json").read_text())
    assert own_settings(folder) == OwnSettings(measured["n_steps"], measured["guidance_scale"])
