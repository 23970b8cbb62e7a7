"""The page's schedulers in node are those of the run time, bit by bit; and what they do not know is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ModelError, RecipeError
from pipeline.generate.schedulers.base import SchedulerOptions, SeededNoise
from pipeline.generate.schedulers.config import SCHEDULERS, parse_scheduler_config
from pipeline.web.page_schedulers import KNOWN, scheduler_settings
from tests.support.node import NEEDS_NODE, node

SOLVER, DDIM, FLOW = KNOWN
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
V_COSINE = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# The first is of the published PixArt pipelines, the second of benchmarks/zoo/pixart_scenes.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    (SOLVER, {"beta_schedule": "linear"}),
    (SOLVER, FLOW_SIGMAS),
    (SOLVER, FLOW_SIGMAS | {"flow_shift": 3.0}),
    (SOLVER, {"solver_order": 3}),
    (SOLVER, {"solver_order": 3, "solver_type": "heun", "beta_schedule": "scaled_linear"}),
    (SOLVER, {"solver_type": "heun", "timestep_spacing": "trailing"}),
    (SOLVER, {"solver_order": 1, "timestep_spacing": "leading", "steps_offset": 1}),
    (SOLVER, KARRAS),
    (SOLVER, V_COSINE),
    (SOLVER, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (SOLVER, {"lower_order_final": False, "prediction_type": "sample"}),
    (DDIM, {}),
    (DDIM, {"clip_sample": False, "timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"}),
    (DDIM, {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}),
    (DDIM, {"timestep_spacing": "trailing", "prediction_type": "sample"}),
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),
]
STEPS = (1, 2, 5, 14, 15, 20, 33, 50, 333, 1001)
SCRIPT = """
import { makeScheduler } from "./schedulers.js";
const f32 = Math.fround;
const drawn = ([config, steps]) => {
  const scheduler = makeScheduler(config, steps), seen = [];
  let x = Float32Array.from(given.noise);
  scheduler.timesteps.forEach((time, i) => {
    x = scheduler.advance(x, x.map((value) => f32(f32(value * 0.5) + f32(f32(time) / 1024))), i);
    seen.push([Array.from(x), Array.from(scheduler.data)]);
  });
  return [Array.from(scheduler.timesteps), seen];
};
const tried = (row) => { try { return drawn(row); } catch (error) { return error.message; } };
console.log(JSON.stringify(given.cases.map(tried)));
"""


@pytest.mark.process
@NEEDS_NODE
def test_every_step_is_the_run_time_s(tmp_path: Path) -> None:
    noise = SeededNoise([0])((1, 2, 2, 2))
    cases = [(parse_scheduler_config({"_class_name": name} | keys, "it"), n) for name, keys in CONFIGS for n in STEPS]
    given = {"cases": [[scheduler_settings(config, "it"), n] for config, n in cases], "noise": noise.ravel().tolist()}
    refused = 0
    for (config, n), row in zip(cases, node(tmp_path / "s", SCRIPT, given), strict=True):
        try:
            scheduler = config.scheduler(SchedulerOptions(n))
        except RecipeError:
            assert isinstance(row, str) and f"{n} steps" in row, (config, n, row)
            refused += 1
            continue
        timesteps, seen = row
        assert timesteps == scheduler.timesteps.tolist(), (config, n)
        x = scheduler.start(noise)
        for i in scheduler.steps:
            prediction = x * np.float32(0.5) + scheduler.timesteps[i] / np.float32(1024)
            x = scheduler.step(prediction, x, i, SeededNoise([0]))
            expected = np.stack([x.ravel(), scheduler.data.ravel()])
            np.testing.assert_array_equal(np.float32(seen[i]), expected, f"{config}, step {i} of {n}")
    assert len(CONFIGS) - 3 < refused < len(cases) / 5


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - KNOWN))
def test_another_class_is_refused_by_name(name: str) -> None:
    config = parse_scheduler_config({"_class_name": name}, "it")
    with pytest.raises(ModelError, match=f"^it: the page does not know {name}; it draws with {SOLVER}, {DDIM}, {FLOW}"):
        scheduler_settings(config, "it")


OTHERS: list[tuple[str, str, Any]] = [
    (SOLVER, "algorithm_type", "sde-dpmsolver++"), (SOLVER, "thresholding", True), (SOLVER, "use_lu_lambdas", True),
    (SOLVER, "trained_betas", [0.1] * 1000), (SOLVER, "use_beta_sigmas", True), (DDIM, "rescale_betas_zero_snr", True),
    (FLOW, "use_dynamic_shifting", True), (FLOW, "shift_terminal", 0.1), (FLOW, "stochastic_sampling", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), OTHERS)
def test_another_value_of_a_key_is_refused_by_name(name: str, key: str, value: Any) -> None:
    config = parse_scheduler_config({"_class_name": name, key: value}, "it")
    with pytest.raises(ModelError, match=f"^it: the page's {name} has no {key} .*; it draws with"):
        scheduler_settings(config, "it")
