"""Which commands a target has, of manifests alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from export.errors import ContractError, RecipeError
from pipeline import __main__ as cli
from pipeline.backends import BACKENDS
from pipeline.backends.base import CONDITION, MODEL, TIMESTEP, Backend
from pipeline.bundle.bundle import Bundle
from pipeline.polygraphy.commands import NEEDS, WAYS, Command, Target, commands_of, script

SHAPES = {"x": [[1, 3], [2, 3], [8, 3]]}
METADATA = {"shapes": SHAPES, "compute_capabilities": [89, 120], "tensorrt_rtx": "1.7.1"}


def target(name: str, files: tuple[str, ...] = (), layers: tuple[str, ...] = (), **metadata: object) -> Target:
    row = {"files": [], "metadata": METADATA | metadata, "choices": {}}
    manifest: Any = {"targets": {name: row}, "files": {f"{name}/{file}": {} for file in files}}
    bundle = Bundle(Path("a b/c's"), manifest)
    return Target(name, bundle, lambda file: (f"of {file}",), {"y": 31.5}, {"y": 40.25}, dict.fromkeys(layers, 50.0))


def texts(commands: list[Command]) -> list[str]:
    return [command.lines()[-1].strip() for command in commands]


def test_targets_have_commands_of_their_own_and_another_its_engine() -> None:
    assert {backend.polygraphy for backend in BACKENDS.values()} == WAYS.keys() - {Backend.polygraphy}
    cpu = target("cpu", (MODEL,))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(type(BACKENDS["cpu"]), "polygraphy")
        (engine,), feeds = commands_of(cpu)
    assert "--ditc-target cpu" in texts([engine])[0] and not feeds


@pytest.mark.parametrize("name", ["cpu", "cuda", "ort_cuda"])
def test_graphs_run_in_their_order_and_the_last_reads_what_all_gave(name: str) -> None:
    commands, feeds = commands_of(target(name, (MODEL, TIMESTEP, CONDITION)))
    graphs = [text.split('.onnx"')[0].rpartition("/")[2] for text in texts(commands) if '.onnx"' in text]
    assert graphs == ["condition", "timestep", "model"]
    assert [feed.before for feed in feeds] == [
        (),
        (f"{name}.condition.json",),
        (f"{name}.condition.json", f"{name}.timestep.json"),
    ]
    assert [feed.names for feed in feeds] == [(f"of {name}/{graph}.onnx",) for graph in graphs]
    assert [command.makes for command in commands if command.makes] == list(feeds[-1].before)


def test_a_graph_alone_needs_nothing_before_it() -> None:
    commands, (feed,) = commands_of(target("cpu", (MODEL,)))
    assert len(commands) == 2 and feed.before == ()
    assert "above" not in commands[-1].why


def test_engines_and_graphs_have_limits_of_their_own() -> None:
    commands, _ = commands_of(target("cuda", (MODEL,)))
    graph, engine = texts(commands)
    assert "--ditc-target cuda" in engine and "y:31.50" in engine and "y:40.25" in graph


def test_layers_are_compared_where_they_were_written() -> None:
    assert len(commands_of(target("onnx"))[0]) == 2
    of_layers = texts(commands_of(target("onnx", layers=("a/output", "b/output")))[0])[-1]
    assert "--onnx-outputs a/output b/output" in of_layers and "a/output:50.00 b/output:50.00" in of_layers


def test_polygraphy_builds_what_was_kept_and_no_plugins() -> None:
    kept, without = commands_of(target("rtx", (MODEL,)))[0], commands_of(target("rtx"))[0]
    assert [command.needs for command in kept] == ["", "RTX", "GPU", "GPU", "GPU"]
    assert "--compute-capabilities 8.9 12.0" in texts(kept)[1]
    assert "--trt-opt-shapes 'x:[2,3]' --trt-max-shapes 'x:[8,3]'" in texts(kept)[1]
    assert [command.needs for command in without] == ["GPU"] * 3
    (alone,) = commands_of(target("rtx", (MODEL,), plugins={"packed_gemm": 4}))[0]
    assert "--ditc-target rtx" in texts([alone])[0]


def test_trt_is_all_for_a_gpu() -> None:
    commands, _ = commands_of(target("trt", (MODEL,)))
    assert {command.needs for command in commands} == {"GPU"} and "--shapes=x:2x3" in texts(commands)[-1]


def test_a_name_that_would_be_a_flag_is_refused() -> None:
    flag = "--compare-func-script=x"
    with pytest.raises(ContractError, match=f"'{flag}', as no build calls one"):
        target("onnx", layers=("a/output", flag))
    with pytest.raises(ContractError, match=f"'{flag}', as no build calls one"):
        commands_of(target("rtx", (MODEL,), shapes={"x": SHAPES["x"], flag: SHAPES["x"]}))


@pytest.mark.process
def test_no_name_of_a_bundle_is_more_than_a_word(tmp_path: Path) -> None:
    names = ("$bundle$(touch made)", "`touch made`", "a b", "'; touch made; '", '"', "a\nb")
    hostile = target("onnx", layers=names)
    (tmp_path / "onnx.sh").write_text(script(hostile, commands_of(hostile)[0]))
    (tmp_path / "tool").write_text('#!/bin/sh\nprintf "%s\\000" "$@" > words\n')
    (tmp_path / "tool").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POLYGRAPHY": "tool"}
    subprocess.run(["sh", str(tmp_path / "onnx.sh"), str(tmp_path)], env=environment, check=True)
    words = (tmp_path / "words").read_text().split("\0")
    assert set(names) < set(words) and not (tmp_path / "made").exists()


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_scripts_are_shell_and_run_what_their_variables_ask_for(name: str, tmp_path: Path) -> None:
    """With a stand-in for all tools, from another folder, the bundle's name one that a shell would take apart."""
    place = tmp_path / "a b/c's"
    place.mkdir(parents=True)
    chosen = target(name, (MODEL, CONDITION))
    commands, _ = commands_of(chosen)
    (tmp_path / f"{name}.sh").write_text(script(chosen, commands))
    for tool in ("tool", "trtexec", "tensorrt_rtx"):
        (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> calls\n')
        (tmp_path / tool).chmod(0o755)
    for given in ((), *((needs,) for needs in NEEDS), tuple(NEEDS)):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POLYGRAPHY": "tool", **dict.fromkeys(given, "1")}
        subprocess.run(["sh", str(tmp_path / f"{name}.sh"), str(place)], env=environment, check=True, cwd="/")
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        assert len(calls) == sum(command.needs in ("", *given) for command in commands)
        assert all(str(place) in call for call in calls)


def test_a_quick_verification_writes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install '.[polygraphy]'")
    code = cli.main(["verify", str(tmp_path), "--quick", "--polygraphy", str(tmp_path / "out")])
    assert code == RecipeError.exit_code and "--quick leaves some out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
