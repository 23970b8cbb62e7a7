"""Which texts a pipeline is calibrated, verified and shown with."""

from pathlib import Path

import pytest

from export.errors import ModelError, RecipeError
from pipeline.calibrate.data import PROMPTS_RULES
from pipeline.compile_pipeline import write_others
from pipeline.generate.example_prompts import PROMPTS_FILE, captions, drawn_prompts, own_prompts, prompt_lines
from pipeline.generate.schedulers.config import CONFIG_FILE, SCHEDULER
from pipeline.parts import PipelineFolder


def test_a_pipeline_has_the_prompts_of_its_file_else_captions(tmp_path: Path) -> None:
    assert own_prompts(tmp_path) == captions() and len(set(captions())) > 30
    (tmp_path / PROMPTS_FILE).write_bytes("\ufeff a ring \r\n\r\n  \nzwölf Kreise\n".encode())
    assert own_prompts(tmp_path) == ("a ring", "zwölf Kreise")


@pytest.mark.parametrize("content, reason", [(b"\n \n", "has no prompt"), (b"\xff\xfe\xff", "is not in UTF-8")])
def test_a_file_without_a_prompt_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / PROMPTS_FILE
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=f"{PROMPTS_FILE} {reason}.*; write one prompt on each line, or remove the file"
    ):
        own_prompts(tmp_path)
    with pytest.raises(RecipeError, match="one prompt per line"):
        prompt_lines(path, PROMPTS_RULES)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / PROMPTS_FILE).mkdir()
    with pytest.raises(ModelError, match="folder"):
        own_prompts(tmp_path)


def test_prompts_are_drawn_alike_for_a_seed_and_repeated_where_there_are_few() -> None:
    few = ("a", "b", "c")
    drawn = drawn_prompts(few, 7, 1)
    assert drawn == drawn_prompts(few, 7, 1) and drawn[:3] == drawn[3:6] and set(drawn) == set(few)
    assert drawn_prompts(captions(), 9, 1) != drawn_prompts(captions(), 9, 2)


def test_a_resumed_build_has_no_prompts_that_the_pipeline_has_no_longer(tmp_path: Path) -> None:
    root, bundle = tmp_path / "pipeline", tmp_path / "bundle"
    for folder in (root / SCHEDULER, bundle):
        folder.mkdir(parents=True)
    (root / SCHEDULER / CONFIG_FILE).write_text("{}")
    (root / PROMPTS_FILE).write_text("a ring\n")
    pipeline = PipelineFolder(root, "", {}, (), (), {}, {})
    write_others(pipeline, bundle)
    assert own_prompts(bundle) == ("a ring",)
    (root / PROMPTS_FILE).unlink()
    write_others(pipeline, bundle)
    assert not (bundle / PROMPTS_FILE).exists()
