"""Another epilogue of the GPU GEMM takes the files that docs/adding.md names: no other knows one that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.backends.fused.ops import EPILOGUE_OF, OPS
from plugins.gpu.spec import EPILOGUES, HELD_TILES, Epilogue
from plugins.gpu.table import EPILOGUE_OPERANDS

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/adding.md").read_text(encoding="utf-8").partition("## An epilogue of the GPU GEMM\n")[2]
# Those that do more than nothing, each with the fused op that stands for it in a graph.
NAMED = {epilogue: op for op, epilogue in EPILOGUE_OF.items() if epilogue != "none"}


def words_of(epilogue: Epilogue) -> set[str]:
    """What source calls it: its name, its fused op and suffix, the question of a spec whether it is there."""
    operands = EPILOGUE_OPERANDS[epilogue]
    return {epilogue, NAMED[epilogue], *(one.suffix for one in operands), *(one.when or "" for one in operands)} - {""}


def naming(words: set[str], folder: str) -> set[str]:
    pattern = re.compile("|".join(map(re.escape, sorted(words))))
    paths = (ROOT / folder).rglob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in paths if pattern.search(path.read_text(encoding="utf-8"))}


def linked(text: str, folder: str) -> set[str]:
    """Source files of a folder that the text links."""
    return set(re.findall(rf"\]\(\.\./({folder}/[\w/]+\.py)\)", text))


def test_every_epilogue_but_none_is_looked_for() -> None:
    assert set(NAMED) == set(EPILOGUES) - {"none"} and NAMED
    assert set(HELD_TILES) == set(EPILOGUE_OPERANDS) == set(EPILOGUES)
    assert words_of("gate_residual") == {"gate_residual", "GemmGateResidual", "GateResidual", "has_gate"}
    assert set(EPILOGUE_OF) <= set(OPS)


@pytest.mark.parametrize("epilogue", NAMED)
def test_kernels_know_it_in_the_five_files_of_the_list(epilogue: Epilogue) -> None:
    numbered = "".join(re.findall(r"^\d+\. .*\n", SECTION, re.MULTILINE))
    assert (
        naming(words_of(epilogue), "plugins") == linked(numbered, "plugins") and len(linked(numbered, "plugins")) == 5
    )


@pytest.mark.parametrize("epilogue", NAMED)
def test_graphs_know_it_in_the_three_files_that_the_text_names(epilogue: Epilogue) -> None:
    assert (
        naming(words_of(epilogue), "pipeline") == linked(SECTION, "pipeline") and len(linked(SECTION, "pipeline")) == 3
    )
    assert naming(words_of(epilogue), "export") == set()


def test_a_file_more_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself: whichever way a file names it."""
    monkeypatch.setattr("tests.kernels.test_adding_epilogue.ROOT", tmp_path)
    (tmp_path / "plugins").mkdir()
    texts = {"name": 'if EPILOGUE == "gate_residual":', "op": "GemmGateResidual", "spec": "spec.has_gate", "no": "gate"}
    for name, text in texts.items():
        (tmp_path / f"plugins/{name}.py").write_text(text)
    assert naming(words_of("gate_residual"), "plugins") == {f"plugins/{name}.py" for name in ("name", "op", "spec")}
