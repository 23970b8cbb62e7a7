"""Schedulers and their keys that tests compare with diffusers, and one drawing of each kind."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.generate.schedulers import float32
from pipeline.generate.schedulers.base import FloatArray, Scheduler, SchedulerOptions
from pipeline.generate.schedulers.config import parse_scheduler_config

SHAPE = (2, 3, 5, 4)
MODULES = {
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "UniPCMultistepScheduler": "unipc_multistep",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "LCMScheduler": "lcm",
}
Keys = dict[str, Any]
FUNCTIONS = ("root", "log", "exp", "expm1")


@dataclass(frozen=True)
class Case:
    """A scheduler of diffusers, its keys, and how it is called."""

    name: str
    keys: Keys
    options: SchedulerOptions

    @property
    def learned(self) -> bool:
        """Whether the model predicts a variance too."""
        return self.keys.get("variance_type", "").startswith("learned")

    def ours(self) -> Scheduler:
        return parse_scheduler_config({"_class_name": self.name, **self.keys}, "test").scheduler(self.options)

    def theirs(self) -> Any:
        """With its timesteps set and its steps numbered from the first."""
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[self.name]}")
        options = self.options
        call: Keys = {"num_inference_steps": options.n_steps}
        call |= {} if options.mu is None else {"mu": options.mu}
        call |= {} if options.sigmas is None else {"sigmas": np.array(options.sigmas)}
        call |= {"strength": options.strength} if self.name == "LCMScheduler" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about logarithms of 0 and the like
            scheduler = getattr(module, self.name)(**self.keys)
            scheduler.set_timesteps(**call)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.ours().first)
        return scheduler


def numbers(*seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def model(x: FloatArray, timestep: float, learned: bool) -> FloatArray:
    """A prediction, of what a model is given: bounded, and of every bit of `x`."""
    predicted = np.cos(3 * x + np.float32(timestep / 100)).astype(np.float32)
    spread = np.sin(5 * x).astype(np.float32)
    return np.concatenate([predicted, np.abs(spread)], axis=1) if learned else predicted


@pytest.fixture
def equal_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Call it with the number of a step: both draw the noise of that step from now on."""
    now = [0]
    for name in MODULES.values():
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(numbers(7, now[0])))

    def at(i: int) -> None:
        now[0] = i

    yield at


def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's functions in the place of ours."""
    for own, name in zip(FUNCTIONS, ("sqrt", "log", "exp", "expm1"), strict=True):
        function = getattr(torch, name)
        monkeypatch.setattr(float32, own, lambda x, f=function: f(torch.as_tensor(x)).numpy()[()])

    def solve(matrix: FloatArray, side: FloatArray) -> FloatArray:
        return np.asarray(torch.linalg.solve(torch.as_tensor(matrix), torch.as_tensor(side)))

    monkeypatch.setattr(np.linalg, "solve", solve)


def steps(count: int, **more: Any) -> SchedulerOptions:
    return SchedulerOptions(count, **more)


def cases() -> Iterator[Case]:
    """Each kind of each solver at 20 steps, or how else it is called."""
    dpm, unipc, flow = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
    spacings = ("linspace", "leading", "trailing")
    for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        for order in (1, 2, 3):
            yield Case(dpm, {"algorithm_type": algorithm, "solver_order": order}, steps(20))
            yield Case(dpm, {"algorithm_type": algorithm, "solver_order": order, "lower_order_final": False}, steps(8))
        yield Case(dpm, {"algorithm_type": algorithm, "solver_type": "heun"}, steps(20))
        yield Case(dpm, {"algorithm_type": algorithm, "use_karras_sigmas": True}, steps(20))
    for spacing in spacings:
        yield Case(dpm, {"timestep_spacing": spacing, "steps_offset": 1}, steps(20))
        yield Case(dpm, {"timestep_spacing": spacing, "final_sigmas_type": "sigma_min"}, steps(10))
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        flows = kind == "flow_prediction"
        yield Case(dpm, {"prediction_type": kind, "use_flow_sigmas": flows, "flow_shift": 3.0}, steps(20))
        yield Case(unipc, {"prediction_type": kind, "use_flow_sigmas": flows, "flow_shift": 3.0}, steps(20))
    for schedule in ("scaled_linear", "squaredcos_cap_v2"):
        yield Case(dpm, {"beta_schedule": schedule, "lambda_min_clipped": -5.1}, steps(20))
        yield Case(dpm, {"beta_schedule": schedule, "use_karras_sigmas": True}, steps(20))
        yield Case(dpm, {"beta_schedule": schedule, "use_lu_lambdas": True}, steps(20))
    for sigmas in ("use_exponential_sigmas", "use_beta_sigmas"):
        for name in (dpm, unipc, "EulerDiscreteScheduler", "HeunDiscreteScheduler"):
            yield Case(name, {sigmas: True}, steps(20))
        yield Case(flow, {sigmas: True}, steps(20))
    yield Case(dpm, {"euler_at_final": True, "final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, steps(20))
    yield Case(dpm, {"thresholding": True, "sample_max_value": 2.0, "rescale_betas_zero_snr": True}, steps(20))
    for betas in ({}, {"beta_start": 0.00085, "beta_end": 0.03}):
        yield Case(dpm, {"use_lu_lambdas": True, "rescale_betas_zero_snr": True, **betas}, steps(20))
    yield Case(dpm, {"use_flow_sigmas": True, "use_dynamic_shifting": True}, steps(20, mu=0.9))
    yield Case(dpm, {"variance_type": "learned_range"}, steps(20))
    yield Case(dpm, {"trained_betas": [i / 60000 + 1e-4 for i in range(1000)]}, steps(20))
    for count in (1, 2, 4, 5, 50):
        yield Case(dpm, {"solver_order": 3, "use_karras_sigmas": True}, steps(count))
        yield Case(dpm, {"solver_order": 2}, steps(count))
        yield Case(unipc, {"solver_order": 3}, steps(count))
    yield Case(dpm, {}, steps(20, strength=0.6))

    for eta in (0.0, 0.5, 1.0):
        yield Case("DDIMScheduler", {}, steps(20, eta=eta))
    for spacing in spacings:
        more = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "set_alpha_to_one": False}
        for name in ("DDIMScheduler", "DDPMScheduler"):
            yield Case(name, {"timestep_spacing": spacing, "steps_offset": 1, "clip_sample": False}, steps(20))
        yield Case("DDIMScheduler", {"timestep_spacing": spacing, **more}, steps(20, eta=0.3))
        yield Case("EulerDiscreteScheduler", {"timestep_spacing": spacing, "steps_offset": 1}, steps(20))
        yield Case("EulerAncestralDiscreteScheduler", {"timestep_spacing": spacing}, steps(20))
        yield Case("HeunDiscreteScheduler", {"timestep_spacing": spacing, "clip_sample": True}, steps(20))
        yield Case(unipc, {"timestep_spacing": spacing, "steps_offset": 1}, steps(20))
    for kind in ("epsilon", "sample", "v_prediction"):
        for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"):
            yield Case(name, {"prediction_type": kind, "beta_schedule": "squaredcos_cap_v2"}, steps(20))
        yield Case("LCMScheduler", {"prediction_type": kind}, steps(8))
    for variance in ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"):
        yield Case("DDPMScheduler", {"variance_type": variance}, steps(20))
    for name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler"):
        yield Case(name, {"thresholding": True, "sample_max_value": 3.0}, steps(20))
        yield Case(name, {"clip_sample": True, "clip_sample_range": 0.7}, steps(20))
    for count in (1, 2, 4, 5, 50):
        for name in MODULES:
            yield Case(name, {}, steps(count))
    for name in sorted(set(MODULES) - {flow, dpm}):
        yield Case(name, {}, steps(10, strength=0.55))
    for more in ({"interpolation_type": "log_linear"}, {"use_karras_sigmas": True}):
        yield Case("EulerDiscreteScheduler", more | {"final_sigmas_type": "sigma_min"}, steps(20))
    edm = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0}
    yield Case("EulerDiscreteScheduler", edm | {"use_karras_sigmas": True, "timestep_spacing": "leading"}, steps(20))
    yield Case("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, steps(20))
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield Case("EulerAncestralDiscreteScheduler", zero, steps(20))
    yield Case("HeunDiscreteScheduler", {"use_karras_sigmas": True}, steps(20))

    yield Case(unipc, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, steps(20))
    yield Case(unipc, {"solver_type": "midpoint"}, steps(10))
    yield Case(unipc, {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3}, steps(20))
    stays = {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "bh1"}
    yield Case(unipc, stays | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, steps(15))
    yield Case(unipc, {"disable_corrector": [0, 1], "solver_order": 3}, steps(20))
    yield Case(unipc, {"use_karras_sigmas": True, "thresholding": True}, steps(20))
    yield Case(unipc, {"use_karras_sigmas": True, "use_flow_sigmas": True}, steps(20))
    moved = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    yield Case(unipc, moved | {"shift_terminal": 0.1}, steps(20, mu=1.1))
    yield Case(unipc, {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}, steps(3, sigmas=(1.0, 0.6, 0.2)))

    yield Case(flow, {"shift": 3.0}, steps(20))
    yield Case(flow, {"shift": 3.0}, steps(10, strength=0.55))
    for shift in ("exponential", "linear"):
        yield Case(flow, {"use_dynamic_shifting": True, "time_shift_type": shift}, steps(20, mu=0.8))
    yield Case(flow, {"use_dynamic_shifting": True}, steps(4, mu=1.15, sigmas=(1.0, 0.75, 0.5, 0.25)))
    yield Case(flow, {"shift_terminal": 0.1, "shift": 2.0}, steps(20))
    yield Case(flow, {"use_karras_sigmas": True, "stochastic_sampling": True}, steps(20))
    yield Case(flow, {"invert_sigmas": True}, steps(20))


def title(case: Case) -> str:
    """Of a case, for pytest."""
    keys = [f"{key}={value}" for key, value in case.keys.items() if key != "trained_betas"]
    more = [
        f"{key}={getattr(case.options, key)}"
        for key in ("strength", "eta", "mu")
        if getattr(case.options, key) not in (None, 0, 1)
    ]
    return ",".join([case.name, str(case.options.n_steps), *keys, *more])
