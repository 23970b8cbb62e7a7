"""An engine of sessions: a timestep's part runs once for all that share it; what is kept lies in one block."""

import numpy as np
import onnx
import onnxruntime
import pytest

from export.errors import RecipeError
from pipeline.backends import sessions
from pipeline.backends.sessions import KEPT_TIMESTEPS, Part, SessionEngine, Sessions, run_session, run_to_keep
from tests.support.hooked_sessions import Hooked

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
STEP = f"""{HEADER} g (float[batch,2] hidden_states, float[batch,1] wave) => (float[batch,2] y)
{{ y = Mul(hidden_states, wave) }}"""
TIMESTEP = f"""{HEADER} g (float[batch] timestep) => (float[batch,1] wave)
{{ axis = Constant <value_ints = [1]> () column = Unsqueeze(timestep, axis) wave = Sin(column) }}"""
CONDITION = f"""{HEADER} g (int64[batch] label, float[batch,3] mask) =>
(float[batch,2] row, float[batch,1,3] seen, bool[batch,3] there)
<float[2,2] table = {{1.0, 2.0, 3.0, 4.0}}> {{
  row = Gather(table, label)
  axis = Constant <value_ints = [1]> ()
  seen = Unsqueeze(mask, axis)
  there = Cast <to = 9> (mask)
}}"""
MASK = np.array([[1, 0, 2], [0, 3, 0]], np.float32)


def session(text):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # of failures that are wanted here
    model = onnx.parser.parse_model(text) if isinstance(text, str) else text
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Engine(SessionEngine):
    """With the timesteps that its part was run for."""

    def __init__(self):
        self.times, own = [], session(TIMESTEP)
        hooked = Hooked(own, lambda: None, lambda: None)

        def run(names, fed, options):
            self.times.append(fed["timestep"].tolist())
            return own.run(names, fed, options)

        hooked.run = run
        super().__init__(Sessions(session(STEP), timestep=Part(hooked)))


def call(*times):
    return {"hidden_states": np.ones((len(times), 2), np.float32), "timestep": np.array(times, np.float32)}


def test_the_timestep_is_an_input_of_the_engine_and_its_results_are_not():
    assert {row.name for row in Engine().declared} == {"hidden_states", "timestep"}


def test_what_depends_on_the_timestep_is_computed_once_for_each():
    engine = Engine()
    for times in ((7, 7, 7), (7, 5), (5, 7), (3, 7, 3)):
        expected = np.sin(np.array(times, np.float32))[:, None].repeat(2, axis=1)
        np.testing.assert_allclose(engine.run(call(*times))["y"], expected, rtol=1e-6)
    assert engine.times == [[7], [5], [3]]
    engine.forget()
    engine.run(call(7))
    assert engine.times[3:] == [[7]]


def test_a_call_that_the_engine_is_closed_under_leaves_nothing():
    engine = Engine()
    assert engine.sessions is not None and engine.sessions.timestep is not None
    hooked = engine.sessions.timestep.session
    own = hooked.run
    hooked.run = lambda *call: (engine.close(), own(*call))[1]
    np.testing.assert_allclose(engine.run(call(7))["y"], np.sin(np.full((1, 2), 7, np.float32)), rtol=1e-6)
    assert not engine.kept_timesteps


def test_timesteps_are_told_apart_by_their_bits():
    engine = Engine()
    results = engine.run(call(np.nan, 0.0, -0.0, np.nan))["y"][:, 0]
    assert np.isnan(results[[0, 3]]).all() and np.signbit(results[1:3]).tolist() == [False, True]
    assert [len(times) for times in engine.times] == [3]


def test_more_timesteps_than_are_kept():
    engine, times = Engine(), np.arange(KEPT_TIMESTEPS + 2)
    assert np.array_equal(engine.run(call(*times))["y"][:, 0], engine.run(call(*times))["y"][:, 0])
    assert engine.times == [times.tolist(), [0, 1]] and len(engine.kept_timesteps) == KEPT_TIMESTEPS


def test_what_a_caller_holds_is_no_part_of_the_arena():
    """Its regions go back to the system only as a whole."""
    own, fed = session(STEP), {"hidden_states": np.ones((2, 2), np.float32), "wave": np.ones((2, 1), np.float32)}
    assert own.get_session_options().enable_cpu_mem_arena
    first = run_session(own, ["y"], fed)["y"]
    assert first.flags.owndata
    run_session(own, ["y"], fed | {"wave": np.zeros((2, 1), np.float32)})
    np.testing.assert_array_equal(first, np.ones((2, 2)))


def test_what_is_kept_lies_in_one_block():
    own = session(CONDITION)
    fed = {"label": np.array([1, 0]), "mask": MASK}
    kept, plain = run_to_keep(own, fed), own.run(None, fed)
    for array, expected in zip(kept.values(), plain, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
    starts = [array.ctypes.data for array in kept.values()]
    assert np.diff(starts).tolist() == [sessions.ALIGNMENT] * 2


def test_sizes_that_are_made_of_those_of_inputs_are_known():
    """As those of bytes made of a caption's keys."""
    text = f"""{HEADER} g (float[batch,tokens] mask) => (float[batch,wide] twice, float[batch,tokens] less)
{{ twice = Concat <axis = 1> (mask, mask) less = Neg(mask) }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "(tokens + tokens * 3) // 2 + 0"
    own = session(model)
    kept = run_to_keep(own, {"mask": MASK})
    np.testing.assert_array_equal(kept["twice"], np.hstack([MASK, MASK]))
    assert kept["less"].ctypes.data - kept["twice"].ctypes.data == sessions.ALIGNMENT, "one block"


def test_numbers_that_are_refused_are_refused_in_the_same_words():
    fed = {"label": np.array([1, 9]), "mask": MASK}
    with pytest.raises(RecipeError, match="give numbers that the model knows"):
        run_to_keep(session(CONDITION), fed)


@pytest.mark.parametrize("shape", ["", "[batch,rows]", "[3,2]"], ids=["unknown", "in part", "wrong"])
def test_results_of_a_size_that_the_graph_does_not_say(shape):
    own = session(CONDITION.replace("float[batch,2] row", f"float{shape} row"))
    fed = {"label": np.array([1, 0]), "mask": MASK}
    np.testing.assert_array_equal(run_to_keep(own, fed)["row"], [[3, 4], [1, 2]])
