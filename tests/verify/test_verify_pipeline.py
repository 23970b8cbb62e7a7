"""What a pipeline bundle holds beside its components is compared with what its folder makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.documents import sha256
from export.errors import ContractError
from export.models.description import GENERATION_FILE
from pipeline import recipe as recipes
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.compile_pipeline import write_others
from pipeline.files import tree
from pipeline.generate.example_prompts import PROMPTS_FILE
from pipeline.parts import read_folder
from pipeline.verify.__main__ import refuse_other_pipeline
from tests.support import pipelines

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.write("alpha", tmp_path_factory.mktemp("verified") / "pipeline")


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A pipeline's folder that a test may change; its weights are the same files."""
    folder = Path(shutil.copytree(written, tmp_path / "pipeline", copy_function=shutil.copyfile))
    (folder / PROMPTS_FILE).write_text("a red ring\n")
    (folder / GENERATION_FILE).write_text('{"guidance_scale": 3.0}')
    return folder


def bundle_of(root: Path, folder: Path) -> PipelineBundle:
    """What a build of it writes beside the components."""
    pipeline = read_folder(recipes.with_model(recipes.load("pixart_w4a6"), str(root), None, None))
    folder.mkdir()
    write_others(pipeline, folder)
    (folder / "report").mkdir()
    (folder / "report/parity.json").write_text("{}")
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in tree(folder)}
    manifest = {"files": files, "class_name": pipeline.class_name, "index": pipeline.index}
    return PipelineBundle(folder, manifest, {})  # type: ignore[arg-type]


def compare(bundle: PipelineBundle, root: Path) -> None:
    refuse_other_pipeline(bundle, read_folder(recipes.with_model(recipes.load("pixart_w4a6"), str(root), None, None)))


def test_the_folder_it_was_made_of_is_its_own_however_it_is_written(root: Path, tmp_path: Path) -> None:
    bundle = bundle_of(root, tmp_path / "bundle")
    compare(bundle, root)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        stated = json.loads((root / name).read_text()) | {"_diffusers_version": "0.0.1"}
        (root / name).write_text(json.dumps(dict(reversed(stated.items()))))
    (root / PROMPTS_FILE).write_bytes(b"\r\n a red ring\r\n")
    compare(bundle, root)


def changed(name: str, key: str, value: object) -> Callable[[Path], object]:
    """A JSON file of the folder states something else."""

    def change(root: Path) -> None:
        (root / name).write_text(json.dumps(json.loads((root / name).read_text()) | {key: value}))

    return change


def another_piece(root: Path) -> None:
    """A piece of the vocabulary that the texts of no gate have."""
    path = root / "tokenizer/tokenizer.json"
    text = path.read_text()
    assert '"▁dog"' in text
    path.write_text(text.replace('"▁dog"', '"▁wolf"'))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "scheduler": (changed("scheduler/scheduler_config.json", "beta_end", 0.03), r"scheduler/scheduler_config\.json"),
    "scheduler's class": (
        changed("model_index.json", "scheduler", ["diffusers", "EulerDiscreteScheduler"]),
        r"pipeline\.json",
    ),
    "tokenizer": (another_piece, r"tokenizer/tokenizer\.json"),
    "prompts": (lambda root: (root / PROMPTS_FILE).write_text("a blue ring\n"), r"prompts\.txt"),
    "no prompts": (lambda root: (root / PROMPTS_FILE).unlink(), r"prompts\.txt"),
    "guidance": (changed(GENERATION_FILE, "guidance_scale", 4.0), r"generation\.json"),
    "no settings": (lambda root: (root / GENERATION_FILE).unlink(), r"generation\.json"),
    "class": (changed("model_index.json", "_class_name", "PixArtSigmaPipeline"), r"pipeline\.json"),
    "index": (changed("model_index.json", "force_zeros", True), r"pipeline\.json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_another_folder_makes_is_refused_by_name(name: str, root: Path, tmp_path: Path) -> None:
    bundle = bundle_of(root, tmp_path / "bundle")
    change, file = OTHERS[name]
    change(root)
    with pytest.raises(ContractError, match=rf"{file} is not what .*pipeline makes; build the bundle again, or name"):
        compare(bundle, root)
