"""Bundles on a stand-in of the hub: up, down, and whatever may be wrong on the way, each in one sentence."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError, EnvironmentLacksError, ParityError, RecipeError, ResourceError
from pipeline import load, machine
from pipeline.bundle import hub as client
from pipeline.bundle.contents import PIPELINE_FILE, listed_files
from pipeline.files import MANIFEST_FILE, tree, write_json
from pipeline.generate.__main__ import main as generate
from pipeline.push import main
from pipeline.serve.__main__ import main as serve
from tests.support import hub_server
from tests.support.bundles import make_bundle
from tests.support.hostile import edit, reseal, sentence
from tests.support.hub_server import Hub

ROOT = Path(__file__).parents[2]
NAME = "me/small"
GATE = {"name": "cpu/finite", "value": 0.0, "limit": 0.0, "unit": "values", "passed": True, "at_most": True, "why": "w"}
PARITY = {"schema_version": 1, "passed": True, "gates": [GATE]}


def make(folder: Path, parity: Any = PARITY) -> Path:
    """A bundle with a report."""
    make_bundle(folder)
    (folder / "report").mkdir()
    write_json(folder / "report/parity.json", parity)
    (folder / "recipe.toml").write_text('name = "small"\n')
    (folder / "bench.json").write_text("{}" + " " * hub_server.LARGE_BYTES)
    reseal(folder)
    return folder


def make_pipeline(folder: Path) -> Path:
    """A pipeline of two bundles, with a tokenizer and a scheduler."""
    for name in ("transformer", "text_encoder"):
        make(folder / name)
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    shutil.copytree(folder / "transformer/report", folder / "report")
    document = {
        "schema_version": 1,
        "components": {path.name: {} for path in folder.iterdir() if path.name != "report"},
    }
    write_json(folder / PIPELINE_FILE, document | {"files": {}})
    seal_pipeline(folder)
    return folder


def seal_pipeline(folder: Path) -> None:
    """Have pipeline.json list what lies beside its bundles."""
    names = [name for name in tree(folder) if name.partition("/")[0] not in ("transformer", "text_encoder")]
    rows = {name: {"size": (folder / name).stat().st_size, "sha256": "0" * 64} for name in names if "/" in name}
    edit(folder / PIPELINE_FILE, lambda document: document.update(files=rows))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in to which this process' client is led, with an empty cache."""
    with hub_server.serving() as serving:
        hub_server.lead(monkeypatch, serving.address, tmp_path / "cache")
        yield serving


# --- up and down ------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_loaded(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "small")
    assert main([str(folder), NAME]) == 0
    assert f"hf://{NAME}: 7 files, {hub.address}/{NAME}/commit/" in capsys.readouterr().out
    stored = hub.files(NAME)
    assert set(stored) == {*tree(folder), "README.md", ".gitattributes"}
    assert all(stored[name] == (folder / name).read_bytes() for name in tree(folder))
    assert hub.blobs and not hub.repositories[NAME].private

    hub.repositories[NAME].commit("main", stored | {"model.py": b"print()", "photos/a.png": b""})
    bundle = load(f"hf://{NAME}")
    assert bundle.name == "small" and bundle.path.parent.name == "snapshots"
    assert set(tree(bundle.path)) == set(tree(folder))  # neither the card nor what others have put there
    asked = len(hub.requests)
    assert load(f"hf://{NAME}").path == bundle.path
    assert [row.split()[0] for row in hub.requests[asked:]] == ["HEAD"]  # all is there: which commit is asked for


def test_a_branch_and_a_commit(hub: Hub, tmp_path: Path) -> None:
    folder = make(tmp_path / "small")
    assert main([str(folder), NAME, "--revision", "v1", "--private"]) == 0
    repository = hub.repositories[NAME]
    assert repository.private and set(repository.refs) == {"main", "v1"}
    with pytest.raises(ContractError, match=r"hf://me/small holds no bundle: it has no manifest.json"):
        load(f"hf://{NAME}")
    assert load(Path(f"hf://{NAME}@v1")).name == "small"  # a Path, whose slashes are fewer, means the same
    commit = repository.refs["v1"]
    (hub.read_only, asked) = (True, len(hub.requests))
    assert load(f"hf://{NAME}@{commit}").path.name == commit
    assert len(hub.requests) == asked  # a commit that the cache has is not asked for


def test_a_second_push_leaves_no_file_of_the_first(hub: Hub, tmp_path: Path) -> None:
    folder = make(tmp_path / "small")
    (folder / "rtx").mkdir()
    (folder / "rtx/model.engine").write_bytes(b"engine")
    edit(folder / MANIFEST_FILE, lambda document: document["targets"].update(rtx=document["targets"]["cpu"]))
    reseal(folder)
    assert main([str(folder), NAME]) == 0
    hub.repositories[NAME].commit("main", hub.files(NAME) | {"photos/a.jpg": b"", "model.safetensors": b""})
    shutil.rmtree(folder)
    assert main([str(make(folder)), NAME]) == 0
    assert "rtx/model.engine" not in hub.files(NAME) and {"photos/a.jpg", "model.safetensors"} < set(hub.files(NAME))


def test_a_pipeline_goes_the_same_way(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pipeline(tmp_path / "whole")
    assert main([str(folder), NAME]) == 0
    assert set(hub.files(NAME)) == {*tree(folder), "README.md", ".gitattributes"}
    assert "## text_encoder" in hub.files(NAME)["README.md"].decode()
    hub.repositories[NAME].commit("main", hub.files(NAME) | {"transformer/run.py": b""})
    with client.located(f"hf://{NAME}") as copy:
        assert set(tree(copy)) == set(tree(folder))
        assert load(copy / "transformer").name == "small"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with client.located(f"hf://{NAME}") as copy:
        assert set(tree(copy)) == set(tree(folder))


def test_a_pipeline_lists_data_alone(tmp_path: Path) -> None:
    folder = make_pipeline(tmp_path / "whole")
    (folder / "tokenizer/run.py").touch()
    seal_pipeline(folder)
    with pytest.raises(ContractError, match=r"tokenizer/run.py is not a file that build makes"):
        listed_files(folder, lambda name: (folder / name).is_file())


@pytest.mark.process
def test_verbs_in_a_process_of_their_own(tmp_path: Path) -> None:
    """The client reads HF_ENDPOINT, HF_HOME and HF_TOKEN when it is imported."""
    with hub_server.serving() as serving:

        def verb(*args: str, token: str | None = hub_server.TOKEN) -> Any:
            environment = {"PATH": "/usr/bin", **hub_server.environment(serving, tmp_path / "home", token)}
            command = [sys.executable, "-m", "pipeline", *args]
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

        folder = str(make(tmp_path / "small"))
        done = verb("push", folder, NAME, token=None)
        assert done.returncode == 3 and "needs a token of the hub; log in with: hf auth login" in sentence(done.stderr)
        assert verb("push", folder, NAME).returncode == 0
        done = verb("inspect", f"hf://{NAME}", "--json", token=None)
        assert done.returncode == 0 and json.loads(done.stdout)["engine"] == "small", done.stderr
        done = verb("generate", "hf://me/none", "--prompt", "a", token=None)
        assert done.returncode == 2 and "hf://me/none is not on the hub" in sentence(done.stderr)


# --- what may be wrong ------------------------------------------------------------------------------------------------


def test_every_verb_that_draws_takes_such_a_source(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, flags in ((generate, ("--prompt", "a")), (serve, ("--port", "0"))):
        assert verb(["hf://me/none", *flags]) == 2
        assert "hf://me/none is not on the hub" in sentence(capsys.readouterr().err)


def test_sources_that_name_no_repository() -> None:
    for wrong in ("hf://", "hf://me", "hf://me/a/b", "hf://me/a@", "hf:/me"):
        with pytest.raises(RecipeError, match="names no repository of the hub; give hf://OWNER/NAME"):
            load(wrong)
    with pytest.raises(RecipeError, match=r"hf://me/a\.\.b is no name that a repository can have"):
        load("hf://me/a..b")


def test_repositories_and_revisions_that_are_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, make(tmp_path / "small"), private=True)
    with pytest.raises(RecipeError, match="hf://me/other is not on the hub, or is private"):
        load("hf://me/other")
    with pytest.raises(RecipeError, match="hf://me/small@v9: the hub has no such revision"):
        load(f"hf://{NAME}@v9")
    hub.gated = True
    with pytest.raises(EnvironmentLacksError, match="is gated; ask for access on its page"):
        load(f"hf://{NAME}")


def test_private_repositories_are_for_those_who_are_logged_in(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, make(tmp_path / "small"), private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RecipeError, match="log in with: hf auth login"):
        load(f"hf://{NAME}")


def test_a_repository_that_holds_code_is_not_even_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = make(tmp_path / "small")
    (folder / "cpu/run.py").write_text("print()")
    reseal(folder)
    hub.add(NAME, folder)
    with pytest.raises(ContractError, match=r"cpu/run\.py is not a file that build makes"):
        load(f"hf://{NAME}")
    assert not [row for row in hub.requests if row.startswith("GET") and row.endswith((".py", ".onnx"))]


def test_a_damaged_download_is_not_used(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, make(tmp_path / "small"))
    hub.damaged = {"cpu/model.onnx"}
    with pytest.raises(ContractError, match=r"cpu/model.onnx differs from the manifest \(sha256\)") as raised:
        load(f"hf://{NAME}")
    cache = tmp_path / "cache/hub/models--me--small"
    assert raised.value.__notes__ == [f"it came from hf://{NAME}; to have it downloaded again, remove {cache}"]
    shutil.rmtree(cache)
    hub.damaged = set()
    assert load(f"hf://{NAME}").name == "small"


def test_a_download_that_ends_too_early(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again, after seconds
    hub.add(NAME, make(tmp_path / "small"))
    hub.short = {"bench.json"}
    with pytest.raises((EnvironmentLacksError, ContractError), match=r"hf://me/small: "):
        load(f"hf://{NAME}")
    hub.short = set()
    assert load(f"hf://{NAME}").name == "small"


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_without_a_connection_the_cache_is_enough(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add(NAME, make(tmp_path / "small"))
    path = load(f"hf://{NAME}").path
    hub_server.lead(monkeypatch, f"http://127.0.0.1:{closed_port()}", tmp_path / "cache")
    assert load(f"hf://{NAME}").path == path
    with pytest.raises(EnvironmentLacksError, match="hf://me/other: the hub cannot be reached, and the cache does not"):
        load("hf://me/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(f"hf://{NAME}").path == path
    (path / "recipe.toml").unlink()
    with pytest.raises(EnvironmentLacksError, match="hf://me/small: the hub cannot be reached, and the cache does not"):
        load(f"hf://{NAME}")


def test_a_disk_that_is_too_full_is_told_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, make(tmp_path / "small"))
    monkeypatch.setattr(client.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 8, 2))
    with pytest.raises(
        ResourceError, match=r"hf://me/small takes 0.0 GB, 0.0 GB are free at .*; free some space, or set"
    ):
        load(f"hf://{NAME}")


def test_the_extra_is_named_where_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "huggingface_hub" else object())
    with pytest.raises(EnvironmentLacksError, match=r"opening hf://me/small needs huggingface_hub.*'ditc\[hub\]'"):
        load(f"hf://{NAME}")
    assert main([str(tmp_path), NAME]) == 3
    assert "uploading a bundle needs huggingface_hub; install with: pip install 'ditc[hub]'" in capsys.readouterr().err


WRONG_PUSHES = {
    "no folder": (shutil.rmtree, ContractError, "is not a folder; give the folder that build"),
    "no bundle": (lambda folder: (folder / MANIFEST_FILE).unlink(), ContractError, "is not a bundle: it has no"),
    "damaged": (lambda folder: (folder / "config.json").write_text("{}"), ContractError, "config.json has 2 bytes"),
    "a gate": (
        lambda folder: edit(folder / "report/parity.json", lambda row: row["gates"][0].update(passed=False)),
        ParityError,
        "cpu/finite did not pass, see report/parity.json; build it again",
    ),
    "verdict": (
        lambda folder: edit(folder / "report/parity.json", lambda row: row.update(passed=False)),
        ParityError,
        "its gates did not pass",
    ),
    "no report": (
        lambda folder: (folder / "report/parity.json").unlink(),
        ContractError,
        "has no report/parity.json, so nothing says that its gates passed",
    ),
}


@pytest.mark.parametrize("case", WRONG_PUSHES)
def test_what_is_not_proven_is_not_pushed(
    case: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (damage, error, words) = make(tmp_path / "small"), WRONG_PUSHES[case]
    damage(folder)
    if error is ParityError or case == "no report":
        reseal(folder)
    assert main([str(folder), NAME]) == error.exit_code
    assert words in sentence(capsys.readouterr().err)
    assert not hub.requests


def test_a_push_without_the_right_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(tmp_path / "small"))
    assert main([folder, NAME]) == 0
    hub.read_only = True
    assert main([folder, NAME]) == 3
    assert "hf://me/small: this login may not write to it (HTTP 403)" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert main([folder, "you/small"]) == 3
    assert "hf://you/small: this login may not write to it (HTTP 401)" in sentence(capsys.readouterr().err)
    monkeypatch.delenv("HF_TOKEN")
    assert main([folder, NAME]) == 3
    assert "uploading to hf://me/small needs a token of the hub" in sentence(capsys.readouterr().err)


def test_a_push_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub_server.lead(monkeypatch, f"http://127.0.0.1:{closed_port()}", tmp_path / "cache")
    assert main([str(make(tmp_path / "small")), NAME]) == 3
    assert "hf://me/small: the hub cannot be reached; check the connection" in sentence(capsys.readouterr().err)


def test_a_licence_that_the_hub_does_not_know(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make(tmp_path / "small"))
    assert main([folder, NAME, "--license", "MIT License"]) == 2
    assert "--license 'MIT License'; use an identifier of the hub" in sentence(capsys.readouterr().err)
    assert main([folder, NAME, "--license", "gpl-99"]) == 2
    assert "hf://me/small: the hub refuses it" in sentence(capsys.readouterr().err)
    assert hub.files(NAME) == {".gitattributes": b"*.onnx filter=lfs\n"}
