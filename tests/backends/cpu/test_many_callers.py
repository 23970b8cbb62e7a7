"""One engine, many callers: each call gets the result of its own inputs, whenever the others come in between.

Nothing here is left to chance: hooks in the sessions hold a thread at the worst moment until another has gone through.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import RecipeError
from pipeline.backends.base import DATA
from pipeline.backends.cpu import CpuBackend, CpuOptions
from pipeline.backends.cpu.engine import CpuEngine
from pipeline.backends.mapped_pages import MAPS, MappedPages, mapped_pages
from pipeline.backends.sessions import KEPT
from pipeline.recipe import Recipe
from tests.support import native
from tests.support.hooked_sessions import TIMEOUT_S, Worker, hooked, once
from tests.support.portable import portable, random_linear

pytestmark = pytest.mark.kernels

# The mask is read by the part of the condition and by the rest: a call must see one mask in both.
BODY = """
  k = fpq.QuantizedLinear <layer="a"> (text)
  masked = Mul(k, mask)
  h = fpq.QuantizedLinear <layer="b"> (hidden_states)
  seen = Mul(h, mask)
  y = Add(masked, seen)
"""
INPUTS = "float[B,S,64] hidden_states, float[B,S,64] text, float[B,S,1] mask"
Call = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine folders by `cpu.path`; the fused one only where there is a compiler."""
    root = tmp_path_factory.mktemp("callers")
    layers = [random_linear("a"), random_linear("b", seed=1)]
    ir.save(portable(BODY, layers, INPUTS), root / "model.onnx", external_data="model.onnx.data")
    by_path = {}
    for path in ("stock", "fused")[: 1 if native.problem() else 2]:
        recipe = Recipe(name="test", model="zoo:pixart_mini").with_options(CpuOptions(path=path))
        for folder in (root / f"work-{path}", root / path):
            folder.mkdir()
        result = CpuBackend().build(
            CpuBackend().lower(root / "model.onnx", root / f"work-{path}", recipe), root / path, recipe
        )
        assert f"{path}/condition.onnx" in result.files
        by_path[path] = root / path
    return by_path


@pytest.fixture(params=["stock", "fused"])
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[CpuEngine]:
    if request.param not in folders:
        pytest.skip(native.problem())
    opened = CpuEngine(folders[request.param], threads=1)
    yield opened
    opened.close()


def call(seed: int, batch: int = 1, tokens: int = 5) -> Call:
    rng = np.random.default_rng(seed)
    shape = (batch, tokens, 64)
    mask = (rng.random((batch, tokens, 1)) > 0.3).astype(np.float32)
    hidden, text = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return {"hidden_states": hidden, "text": text, "mask": mask}


def alone(engine: CpuEngine, calls: list[Call]) -> list[np.ndarray]:
    """What each call gives in a fresh engine state, nobody else there."""
    outputs = []
    for one in calls:
        engine.forget()
        outputs.append(engine.run(one)["y"])
    engine.forget()
    return outputs


@pytest.mark.parametrize("place", ["condition", "after_condition", "step"])
@pytest.mark.parametrize("others", [1, KEPT + 1])
def test_other_calls_come_in_between(engine: CpuEngine, place: str, others: int) -> None:
    """While a call is about to compute its condition, has just done so, or is about to use it, others run whole."""
    calls = [call(seed) for seed in range(1 + others)]
    expected, sessions = alone(engine, calls), engine.sessions
    assert sessions is not None
    outputs: list[Any] = []

    def go_through() -> None:
        for one in calls[1:]:
            outputs.append(Worker(partial(engine.run, one)).result()["y"])

    engine.sessions = hooked(sessions, **{place: once(go_through)})
    assert np.array_equal(engine.run(calls[0])["y"], expected[0])
    assert len(outputs) == others and all(map(np.array_equal, outputs, expected[1:]))
    for one, output in zip(calls, expected, strict=True):  # nor does anything wrong stay
        assert np.array_equal(engine.run(one)["y"], output)


def test_two_calls_meet_in_every_session(engine: CpuEngine) -> None:
    """Both stand in the condition's session at once, then both in the other: the order of the rest is free."""
    calls = [call(seed, tokens=5 + seed) for seed in range(2)]
    expected, sessions = alone(engine, calls), engine.sessions
    assert sessions is not None
    barrier = threading.Barrier(2, timeout=TIMEOUT_S)
    for _ in range(10):
        engine.forget()
        engine.sessions = hooked(sessions, condition=barrier.wait, after_condition=barrier.wait, step=barrier.wait)
        workers = [Worker(partial(engine.run, one)) for one in calls]
        assert all(np.array_equal(w.result()["y"], output) for w, output in zip(workers, expected, strict=True))


@pytest.mark.parametrize("path", ["stock", "fused"])
def test_two_engines_at_once(folders: dict[str, Path], path: str) -> None:
    """Each with threads of its own, more than there may be cores: both end, and with their own results."""
    if path not in folders:
        pytest.skip(native.problem())
    engines = [CpuEngine(folders[path], threads=3) for _ in range(2)]
    calls = [call(seed, batch=2, tokens=64) for seed in range(2)]
    expected = [alone(engine, [one])[0] for engine, one in zip(engines, calls, strict=True)]
    barrier = threading.Barrier(2, timeout=TIMEOUT_S)

    def count_wrong(index: int) -> int:
        barrier.wait()
        return sum(not np.array_equal(engines[index].run(calls[index])["y"], expected[index]) for _ in range(30))

    workers = [Worker(partial(count_wrong, index)) for index in range(2)]
    assert [worker.result() for worker in workers] == [0, 0]
    assert not np.array_equal(*expected)
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("batch", [4, 5, 6, 7, 8])
def test_a_sample_of_a_batch_is_what_it_is_alone(engine: CpuEngine, batch: int) -> None:
    whole = call(7, batch=batch, tokens=5)
    result = engine.run(whole)["y"]
    for i in range(batch):
        single = {name: array[i : i + 1] for name, array in whole.items()}
        assert np.array_equal(engine.run(single)["y"][0], result[i])


@pytest.mark.parametrize("name", ["text", "mask", "hidden_states"])
@pytest.mark.parametrize("place", ["condition", "after_condition", "step"])
def test_an_array_overwritten_during_a_call_makes_no_mixture(engine: CpuEngine, name: str, place: str) -> None:
    """The call computes with the numbers it found, and the next one sees the new numbers."""
    before, after = call(0), call(1)
    expected = alone(engine, [before, before | {name: after[name]}])
    mine = {key: array.copy() for key, array in before.items()}
    sessions = engine.sessions
    assert sessions is not None
    engine.sessions = hooked(sessions, **{place: once(lambda: np.copyto(mine[name], after[name]))})
    assert np.array_equal(engine.run(mine)["y"], expected[0])
    assert np.array_equal(engine.run(mine)["y"], expected[1])
    assert np.array_equal(engine.run(before)["y"], expected[0])


def test_results_belong_to_the_caller(engine: CpuEngine) -> None:
    first = engine.run(call(0))["y"]
    kept = first.copy()
    engine.run(call(1))
    first += 1
    assert np.array_equal(engine.run(call(0))["y"], kept)


def test_the_last_conditions_are_kept_and_no_more(engine: CpuEngine) -> None:
    computed: list[int] = []
    sessions = engine.sessions
    assert sessions is not None
    engine.sessions = hooked(sessions, condition=lambda: computed.append(1))
    for seed in (0, 1, 0, 1, 0):
        engine.run(call(seed))
    assert len(computed) == 2
    for seed in range(2, 2 + KEPT):
        engine.run(call(seed))
    assert len(engine.kept) == KEPT
    engine.run(call(0))
    assert len(computed) == 3 + KEPT


@pytest.mark.parametrize("place", ["condition", "after_condition", "step"])
def test_closing_while_a_call_runs(engine: CpuEngine, place: str) -> None:
    """The call ends as if nothing had happened; the next is refused."""
    expected, sessions = alone(engine, [call(0)])[0], engine.sessions
    assert sessions is not None
    engine.sessions = hooked(sessions, **{place: once(lambda: Worker(engine.close).result())})
    assert np.array_equal(engine.run(call(0))["y"], expected)
    assert not engine.kept
    with pytest.raises(RecipeError, match="the engine is closed; load it again"):
        engine.run(call(0))
    engine.close()  # twice does no harm


def test_an_engine_says_what_does_not_fit(engine: CpuEngine) -> None:
    """Not onnxruntime's words, whether it is seen by the part of the condition or by the rest."""
    rows = {row.name: row.shape for row in engine.declared}
    assert rows == {"hidden_states": ("B", "S", 64), "text": ("B", "S", 64), "mask": ("B", "S", 1)}
    engine.run(call(0))
    for change, words in (
        ({"text": call(1)["text"].astype(np.float64)}, "text is of float64, the engine takes float32"),
        ({"text": call(1, batch=2)["text"]}, "B is 1 in input .*, but 2 in input|B is 2 in input .*, but 1 in input"),
        ({"hidden_states": call(1, batch=0)["hidden_states"]}, r"\(0, 5, 64\).*give at least one of each"),
        ({"hidden_states": call(0)["hidden_states"] * np.float32(1e30)}, "magnitude up to"),
        ({"more": np.ones(1, np.float32)}, "missing or unknown"),
    ):
        with pytest.raises(RecipeError, match=words):
            engine.run(call(0) | change)
    # Equal numbers of another type are not taken for the condition that is kept.
    with pytest.raises(RecipeError, match="mask is of float64"):
        engine.run(call(0) | {"mask": call(0)["mask"].astype(np.float64)})


WIDE = 4096, 120  # channels and tokens of a T5-XXL caption: copying and comparing one takes as long as a small step


def test_two_threads_with_wide_captions_get_their_own_results(tmp_path: Path) -> None:
    """Nobody is held anywhere here: the threads meet where they happen to."""
    channels, tokens = WIDE
    layers = [random_linear("a", k=channels), random_linear("b", seed=1)]
    inputs = f"float[B,S,64] hidden_states, float[B,S,{channels}] text, float[B,S,1] mask"
    ir.save(portable(BODY, layers, inputs), tmp_path / "model.onnx", external_data="model.onnx.data")
    (tmp_path / "work").mkdir()
    recipe = Recipe(name="test", model="zoo:pixart_mini").with_options(CpuOptions(path="stock"))
    lowered = CpuBackend().lower(tmp_path / "model.onnx", tmp_path / "work", recipe)
    (tmp_path / "engine").mkdir()
    CpuBackend().build(lowered, tmp_path / "engine", recipe)
    engine = CpuEngine(tmp_path / "engine", threads=1)
    text = [np.random.default_rng(seed).standard_normal((2, tokens, channels)).astype(np.float32) for seed in (0, 1)]
    calls = [call(0, batch=2, tokens=tokens) | {"text": caption} for caption in text]
    expected = alone(engine, calls)

    def count_wrong(index: int) -> int:
        return sum(not np.array_equal(engine.run(calls[index])["y"], expected[index]) for _ in range(50))

    workers = [Worker(partial(count_wrong, index)) for index in (0, 1)]
    assert [worker.result() for worker in workers] == [0, 0]
    assert not np.array_equal(*expected)
    engine.close()


def test_weights_of_the_condition_leave_memory_and_come_again(tmp_path: Path) -> None:
    """They are given back after each new condition, and a later one is computed with the same numbers. Weights as small
    as those of the other tests are in the graph's own file, which is read as a whole."""
    native.need_compiler()
    if not MAPS.exists():
        pytest.skip(f"the system has no {MAPS}")
    body = BODY.replace("masked = Mul(k, mask)", "w = ReduceSum <keepdims = 1> (k, axis) masked = Mul(w, mask)")
    body = "axis = Constant <value_ints = [-1]> ()\n" + body
    ir.save(portable(body, [random_linear("a", n=256), random_linear("b", n=64)], INPUTS), tmp_path / "model.onnx")
    for name in ("work", "cpu"):
        (tmp_path / name).mkdir()
    recipe = Recipe(name="test", model="zoo:pixart_mini").with_options(CpuOptions(path="fused"))
    lowered = CpuBackend().lower(tmp_path / "model.onnx", tmp_path / "work", recipe)
    CpuBackend().build(lowered, tmp_path / "cpu", recipe)
    engine = CpuEngine(tmp_path / "cpu", threads=1)
    assert engine.sessions is not None and engine.sessions.condition is not None
    pages, room = engine.sessions.condition.pages, engine.sessions.condition.room
    assert room.ranges and room.ranges.isdisjoint(pages.ranges)
    assert pages.ranges and not pages.ranges & (mapped_pages(tmp_path / "cpu" / DATA) - pages).ranges
    first = engine.run(call(0))["y"]
    assert resident_kib(pages) == 0 < resident_kib(room)
    sessions, during = engine.sessions, list[int]()
    engine.sessions = hooked(sessions, condition=lambda: during.append(resident_kib(room)))
    engine.run(call(1))
    assert during == [0]
    engine.sessions = sessions
    engine.forget()
    assert np.array_equal(engine.run(call(0))["y"], first)
    # Another engine of the same file has pages of its own: these may belong to anybody once this one is closed.
    other = CpuEngine(tmp_path / "cpu", threads=1)
    assert other.sessions is not None and other.sessions.condition is not None
    own, of_other = (
        row.condition.pages.ranges | row.condition.room.ranges
        for row in (sessions, other.sessions)
        if row.condition is not None
    )
    assert of_other and own.isdisjoint(of_other)
    engine.close()
    other.close()


def resident_kib(pages: MappedPages) -> int:
    """Of these ranges, as the system counts it."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    rows = re.finditer(r"^([0-9a-f]+)-[0-9a-f]+ .*?^Rss:\s+(\d+) kB", text, re.MULTILINE | re.DOTALL)
    first = {begin for begin, _ in pages.ranges}
    return sum(int(row[2]) for row in rows if int(row[1], 16) in first)
