"""`sweep` in one process, on a model of a moment: what it builds, keeps, refuses and says."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError
from pipeline import compiler
from pipeline.bundle.bundle import load_bundle
from pipeline.files import lock, locked, tree
from pipeline.sweep import results
from pipeline.sweep import work as sweep_work
from pipeline.sweep.__main__ import main as sweep
from pipeline.sweep.plan import read_sweep
from pipeline.sweep.work import Place, check, request
from tests.support import hostile
from tests.support.quick_build import measure_little

pytestmark = pytest.mark.torch
HEAD = 'schema_version = 1\nrecipes = ["recipe.toml"]\ntargets = "cpu"\n'
TWO = "[options.one]\nsampling.n_steps = 1\n[options.two]\nsampling.n_steps = 2\n"
FAILING = "[options.fails]\nbudgets.quant_sqnr_db = 90.0\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    hostile.make_models(folder)
    return folder


@pytest.fixture(autouse=True)
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own folder, with a recipe of the model, and little measured."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(hostile.RECIPE.format(model=models / "model"))
    measure_little(monkeypatch.setattr)


def swept(capsys: pytest.CaptureFixture[str], text: str, *flags: str) -> tuple[int, str]:
    Path("sweep.toml").write_text(HEAD + text)
    capsys.readouterr()
    code = sweep(["sweep.toml", "-o", "out", *flags])
    return code, capsys.readouterr().out


def state() -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(Path("out/sweep.json").read_text())["builds"]}


def test_one_that_fails_ends_no_other_and_resume_does_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = swept(capsys, TWO + FAILING)
    assert code == 7 and "FAILED 1 of the 3 engines in" in text and "fuzzed-fails: parity gate failed" in text
    rows = state()
    assert [row["status"] for row in rows.values()] == ["built", "built", "failed"]
    assert rows["fuzzed-fails"]["exit_code"] == 4
    assert len({row["calibration"] for row in rows.values()}) == len(list(Path("out/calibrations").iterdir())) == 1
    assert sorted(path.name for path in Path("out/bundles").iterdir()) == ["fuzzed-one", "fuzzed-two"]
    assert "report/index.html" in tree(Path("out/rejected/fuzzed-fails"))
    page = Path("out/index.html").read_text()
    for address in (
        "bundles/fuzzed-one/report/index.html",
        "rejected/fuzzed-fails/report/index.html",
        "compare/fuzzed-two.html",
    ):
        assert f"href='{address}'" in page and (Path("out") / address).is_file()
    assert page.count("<img") >= 2 and "quant_sqnr_db = " in page
    assert "amplified" not in page, "differences are on the pages of pairs"
    with Path("out/table.csv").open(newline="") as stream:
        table = {row["name"]: row for row in csv.DictReader(stream)}
    assert float(table["fuzzed-one"]["gates/quant_sqnr_db"]) > 10 and table["fuzzed-fails"]["exit_code"] == "4"
    assert 10 < float(table["fuzzed-fails"]["gates/quant_sqnr_db"]) < 90 and table["fuzzed-two"]["options"] == "two"
    assert "| fuzzed-fails | failed |" in Path("out/table.md").read_text()

    assert swept(capsys, TWO)[0] == 2, "a sweep that is there is touched by --resume or --force alone"
    manifest = Path("out/bundles/fuzzed-one/manifest.json").read_bytes()
    code, text = swept(capsys, TWO + FAILING.replace("90", "1"), "--resume")
    assert code == 0 and text.endswith(f"PASSED {Path('out').absolute()}\n")
    assert [row["status"] for row in state().values()] == ["kept", "kept", "built"]
    assert Path("out/bundles/fuzzed-one/manifest.json").read_bytes() == manifest and not Path("out/rejected").exists()


def test_nothing_is_begun_where_one_cannot_be_built(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    code, text = swept(capsys, TWO + f"[models]\nempty = 'empty'\nhere = '{models / 'model'}'\n")
    assert code == 2 and "2 of 4 engines cannot be built, so nothing was begun: fuzzed-empty-one: " in text
    assert not Path("out").exists()


def test_a_dry_run_checks_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = swept(capsys, TWO, "--dry-run")
    assert code == 0 and "2 engines to build, 1 calibrations; nothing was written" in text
    assert not Path("out").exists()


@pytest.mark.fast
def test_an_interrupted_sweep_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "benched", hostile.stop)
        assert swept(capsys, TWO)[0] == 130
    assert [row["status"] for row in state().values()] == ["waiting", "waiting"]
    code, text = swept(capsys, TWO, "--resume", "--json")
    assert code == 0
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events] == ["job"] * 3 + ["sweep", "result"]
    assert "verify: done before" in Path("out/logs/fuzzed-one.log").read_text()
    assert load_bundle(Path("out/bundles/fuzzed-two")).recipe.sampling.n_steps == 2


def test_calibrations_are_shared_between_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    one = "[options.one]\n"
    assert swept(capsys, one, "--calibrations", "layers")[0] == 0
    [calibration] = Path("layers").iterdir()
    before = {name: (calibration / name).stat().st_mtime_ns for name in tree(calibration)}
    assert swept(capsys, one, "--calibrations", "layers", "--force")[0] == 0
    assert before == {name: (calibration / name).stat().st_mtime_ns for name in tree(calibration)}
    assert state()["fuzzed-one"]["status"] == "built"


def test_what_another_sweep_is_making_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is held until the second try; then the layers are made here."""
    one = "[options.one]\n"
    assert swept(capsys, one, "--calibrations", "layers", "--dry-run")[0] == 0
    held: list[Any] = []
    real = sweep_work.calibrate

    def calibrate(model: Any, recipe: Any, folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        if not held:
            held.append(lock(folder, "calibration"))
        return real(model, recipe, folder)

    monkeypatch.setattr(sweep_work, "calibrate", calibrate)
    monkeypatch.setattr(sweep_work.time, "sleep", lambda _: os.close(held[0]))
    assert swept(capsys, one, "--calibrations", "layers")[0] == 0
    assert "another calibration" in Path("out/logs").glob("calibration-*.log").__next__().read_text()


def test_what_is_refused_touches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(capsys, "[options.one]\n", "--dry-run")[0] == 0
    fragment = Path("out/bundles/fragment")
    fragment.mkdir(parents=True)
    Path("out/sweep.json").write_text("{}")
    assert swept(capsys, TWO, "--resume", "--cpus-per-job", "2")[0] == 2 and fragment.is_dir()
    with locked(Path("out"), "sweep"):
        code, text = swept(capsys, TWO, "--resume")
    assert code == 2 and "another sweep" in text and fragment.is_dir()
    Path("layers").touch()
    code, text = swept(capsys, TWO, "--force", "--calibrations", "layers")
    assert code == 2 and "give --calibrations the name of a folder" in text and fragment.is_dir()


def test_a_bundle_that_was_damaged_meanwhile_ends_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path) -> Any:
        if path.name == "fuzzed-one":
            raise ContractError(f"{path}/manifest.json is damaged")
        return load_bundle(path)

    monkeypatch.setattr(results, "load_bundle", damaged)
    code, text = swept(capsys, TWO)
    assert code == 7 and "fuzzed-one: " in text and "is damaged" in text
    assert [row["status"] for row in state().values()] == ["failed", "built"]
    assert "| fuzzed-two | built |" in Path("out/table.md").read_text()


def test_what_is_kept_in_float_decides_which_layers_are_shared() -> None:
    keep = "[options.keeps]\nkeep = ['transformer_blocks.0.attn1.to_q']\n"
    Path("sweep.toml").write_text(HEAD + TWO + keep)
    place = Place(Path("out").absolute(), Path("layers").absolute())
    one, two, kept = (check(build, place).calibration for build in read_sweep(Path("sweep.toml")))
    assert one == two and one != kept and not place.folder.exists()


def test_files_that_have_changed_make_another_bundle(models: Path) -> None:
    """Else it would be kept, and stages of an interrupted one taken up, with what they said before."""
    shutil.copytree(models / "words", "words")
    prompts, generation = Path("prompts.txt"), Path("words/generation.json")
    settings = f"[set]\ncalibrate.prompts = '{prompts}'\n"
    Path("sweep.toml").write_text(HEAD + f"methods = ['awq']\n[models]\nwords = 'words'\n{settings}")
    place = Place(Path("out").absolute(), Path("layers").absolute())

    def key() -> str:
        [build] = read_sweep(Path("sweep.toml"))
        return compiler.prepare(request(build, place)).key

    prompts.write_text("red\n")
    first = key()
    assert key() == first
    prompts.write_text("blue\n")
    second = key()
    hostile.edit(generation, lambda document: document.update(guidance_scale=3.0))
    third = key()
    Path("words/README.md").write_text("---\nlicense: mit\n---\n")  # which every graph states
    assert len({first, second, third, key()}) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpus-per-job", "2"], "--cpus-per-job without --ray"),
        (["--calibrations", "recipe.toml"], "recipe.toml is a file; give --calibrations the name of a folder"),
        (["--calibrations", "out/bundles"], "out/bundles is in the sweep's own folder; leave it out for its own"),
        (["--ray", "here", "--cpus-per-job", "0"], "--cpus-per-job 0; use 1 to 1000"),
        (["--ray", "here", "--gpus-per-job", "-1"], "--gpus-per-job -1; use 0, a part of one"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = swept(capsys, TWO, *flags)
    assert code == 2 and message in text


def test_a_bundle_of_another_recipe_does_not_outlive_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(capsys, "[options.one]\n")[0] == 0
    assert swept(capsys, FAILING.replace("fails", "one"), "--resume")[0] == 7
    assert not Path("out/bundles/fuzzed-one").exists() and Path("out/rejected/fuzzed-one/report").is_dir()
    numbers = state()["fuzzed-one"]["numbers"]
    assert {name.partition("/")[0] for name in numbers} == {"gates"}, "what the gates that failed it measured"


def test_a_folder_that_is_no_sweep_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("x")
    for flag in ("--force", "--resume"):
        code, text = swept(capsys, TWO, flag)
        assert code == 2 and "is not a sweep and is not touched" in text
    assert Path("out/mine").read_text() == "x"
