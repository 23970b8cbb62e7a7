"""A contestant in a process of its own: what it is asked, what it answers, how it fails."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.backends.base import Arrays
from pipeline.bench.runners import Runner, Spec
from pipeline.bench.worker import (
    Server,
    Worker,
    WorkerError,
    load_arrays,
    load_case,
    save_arrays,
    save_case,
    serve,
)
from pipeline.generate.case import Case

INPUTS: Arrays = {
    "hidden_states": np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2),
    "timestep": np.ones(1, np.float32),
    "encoder_hidden_states": np.full((1, 1), 3, np.float32),
}


def spec(folder: Path) -> Spec:
    """onnxruntime on a graph that gives half of its hidden states."""
    shapes = {"hidden_states": ["b", 2, 2, 2], "timestep": ["b"], "encoder_hidden_states": ["b", 1]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    node = helper.make_node("Mul", ["hidden_states", "half"], ["sample"])
    outputs = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shapes["hidden_states"])]
    graph = helper.make_graph([node], "half", inputs, outputs, [half])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "model.onnx")
    return Spec("onnxruntime", 1, str(folder / "model.onnx"))


def case() -> Case:
    condition = {"encoder_hidden_states": INPUTS["encoder_hidden_states"]}
    noise = np.asarray(INPUTS["hidden_states"], np.float32)
    return Case(("a",), (condition, condition), noise, "ddim", 1000.0, 2, 4.5, "latents", frozenset({"x"}))


def test_every_command_has_one_line_of_answer(tmp_path: Path) -> None:
    fed = save_arrays(tmp_path / "inputs.npz", INPUTS)
    drawn = save_case(tmp_path / "case.npz", case())
    commands = [
        {"do": "open", "spec": asdict(spec(tmp_path)), "inputs": str(fed)},
        {"do": "call", "forget": True, "output": str(tmp_path / "out.npz")},
        {"do": "draw", "case": str(drawn)},
        {"do": "feed", "inputs": str(save_arrays(tmp_path / "others.npz", {"hidden_states": np.zeros(1)}))},
        {"do": "call", "forget": False, "output": None},
    ]
    answers = io.StringIO()
    with pytest.raises(Exception, match="Required inputs"):
        serve(io.StringIO("\n".join(map(json.dumps, commands))), answers)
    rows = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert len(rows) == 4 and all(row.keys() == {"s", "peak_rss_bytes"} for row in rows)
    assert rows[0]["peak_rss_bytes"] <= rows[2]["peak_rss_bytes"] and rows[1]["s"] > 0
    assert np.array_equal(load_arrays(tmp_path / "out.npz")["sample"], INPUTS["hidden_states"] / 2)


def test_no_two_timed_calls_are_of_one_timestep(tmp_path: Path) -> None:
    """An engine keeps what it computed for a timestep, and a picture has another in each step."""
    seen: list[float] = []

    class Watcher(Runner):
        def run(self, inputs: Arrays) -> Arrays:
            seen.append(float(inputs["timestep"][0]))
            return {"sample": inputs["hidden_states"]}

        def forget(self) -> None:
            return None

        def close(self) -> None:
            return None

    server = Server()
    server.runner, server.inputs = Watcher(), INPUTS
    for output in (None, None, str(tmp_path / "out.npz"), None):
        server.answer({"do": "call", "forget": False, "output": output})
    assert len(set(seen)) == 4 and seen[2] == 1 and np.allclose(seen, 1, rtol=1e-6)


def test_what_the_user_can_mend_is_answered_in_words(tmp_path: Path) -> None:
    fed, missing = save_arrays(tmp_path / "inputs.npz", INPUTS), Spec("onnxruntime", 1, str(tmp_path / "none.onnx"))
    answers = io.StringIO()
    serve(io.StringIO(json.dumps({"do": "open", "spec": asdict(missing), "inputs": str(fed)})), answers)
    assert "none.onnx" in json.loads(answers.getvalue())["failed"]


def test_a_case_comes_back_as_it_was(tmp_path: Path) -> None:
    stored, back = case(), load_case(save_case(tmp_path / "case.npz", case()))
    assert np.array_equal(back.noise, stored.noise)
    assert all(
        np.array_equal(value, other[name])
        for part, other in zip(stored.conditioning, back.conditioning, strict=True)
        for name, value in part.items()
    )
    for name in ("prompts", "sampler", "timestep_scale", "n_steps", "guidance_scale", "output", "shared"):
        assert getattr(back, name) == getattr(stored, name)


@pytest.mark.process
def test_a_process_answers_until_it_is_closed(tmp_path: Path) -> None:
    worker = Worker(spec(tmp_path), save_arrays(tmp_path / "inputs.npz", INPUTS), tmp_path / "log")
    assert worker.opened["s"] > 0 and worker.call(output=tmp_path / "out.npz")["peak_rss_bytes"] > 0
    assert np.array_equal(load_arrays(tmp_path / "out.npz")["sample"], INPUTS["hidden_states"] / 2)
    assert worker.draw(save_case(tmp_path / "case.npz", case()))["s"] > 0
    worker.close()
    assert worker.process.returncode == 0
    with pytest.raises(ValueError, match="closed file"):
        worker.call()


@pytest.mark.process
def test_a_process_that_dies_says_its_last_words(tmp_path: Path) -> None:
    worker = Worker(spec(tmp_path), save_arrays(tmp_path / "inputs.npz", INPUTS), tmp_path / "log")
    wrong = save_arrays(tmp_path / "wrong.npz", {"hidden_states": np.zeros(1)})
    worker.feed(wrong)
    with pytest.raises(WorkerError, match=r"Required inputs.*\(exit 1; all of it: .*log\)"):
        worker.call()


@pytest.mark.process
def test_a_process_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    inputs = save_arrays(tmp_path / "inputs.npz", INPUTS)
    with pytest.raises(WorkerError, match=r"it took more than 0\.01 s; no message \(ended by signal 9, memory may"):
        Worker(spec(tmp_path), inputs, tmp_path / "log", timeout_s=0.01)
