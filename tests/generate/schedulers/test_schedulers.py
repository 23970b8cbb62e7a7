"""What schedulers do, without diffusers beside them: where they lead, what they refuse, how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ContractError, ModelError, RecipeError
from pipeline.generate.schedulers.base import FloatArray, Scheduler, SchedulerOptions, SeededNoise
from pipeline.generate.schedulers.config import SCHEDULERS, parse_scheduler_config, read_scheduler_config
from pipeline.generate.schedulers.dpmsolver import signal
from pipeline.generate.schedulers.euler import EulerAncestral
from pipeline.generate.schedulers.flow import FlowEuler, FlowEulerConfig
from pipeline.generate.schedulers.predictions import thresholded
from pipeline.generate.schedulers.tables import beta_quantile, linspace, times_of

SHAPE = (2, 3, 4, 4)
FLOW = "FlowMatchEulerDiscreteScheduler"
VP = sorted(
    set(SCHEDULERS) - {FLOW, "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"}
)


def scheduler(name: str, n_steps: int = 12, keys: dict[str, Any] | None = None, **options: Any) -> Scheduler:
    document = {"_class_name": name, **({} if keys is None else keys)}
    return parse_scheduler_config(document, "test").scheduler(SchedulerOptions(n_steps, **options))


def picture() -> FloatArray:
    return np.clip(np.random.default_rng(5).standard_normal(SHAPE), -1, 1).astype(np.float32)


def drawn(made: Scheduler, knows: FloatArray, begin: FloatArray | None = None) -> FloatArray:
    """The loop of base.py, with a model that predicts the picture itself, or what leads to it."""
    noise = SeededNoise([1, 2])
    x = made.start(noise(SHAPE), begin)
    for i in made.steps:
        assert made.scale_model_input(x, i).dtype == np.float32
        along = isinstance(made, FlowEuler | EulerAncestral)  # these take no predicted picture
        x = made.step((x - knows) / made.sigmas[i] if along else knows, x, i, noise)
    return x


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_model_that_knows_the_picture_draws_it(strength: float) -> None:
    """Half the strength is half the steps, but for LCM, which has its steps below; Heun takes two for each but one."""
    n_steps = int(12 * strength)
    calls = {"HeunDiscreteScheduler": 2 * n_steps - 1, "LCMScheduler": 12}
    for name in SCHEDULERS:
        keys = {} if name in (FLOW, "EulerAncestralDiscreteScheduler") else {"prediction_type": "sample"}
        made = scheduler(name, 12, keys, strength=strength)
        wrong = np.abs(drawn(made, picture(), None if strength == 1.0 else picture()) - picture()).max()
        assert wrong < 1e-5, (name, wrong)
        assert len(made.steps) == calls.get(name, n_steps), name


def test_the_shift_of_a_flow_grows_with_the_picture() -> None:
    config = FlowEulerConfig()
    assert [round(config.exponent(tokens), 9) for tokens in (256, 1024, 4096)] == [0.5, 0.63, 1.15]
    with pytest.raises(RecipeError, match="no base_shift and max_shift"):
        FlowEulerConfig(base_shift=None).exponent(256)


def test_steps_come_in_order_and_once() -> None:
    made, x = scheduler("DDIMScheduler"), picture()
    made.step(x, x, 0, SeededNoise([0, 1]))
    for i in (0, 2):
        with pytest.raises(AssertionError, match="is due"):
            made.step(x, x, i, SeededNoise([0, 1]))


def test_a_prediction_of_another_shape_is_refused() -> None:
    x = picture()
    for keys, channels in (({}, 6), ({"variance_type": "learned_range"}, 3), ({}, 4)):
        made = scheduler("DDPMScheduler", keys=keys)
        with pytest.raises(ContractError, match=rf"predicts \(2, {channels}, 4, 4\) for \(2, 3, 4, 4\)"):
            made.step(np.zeros((2, channels, 4, 4), np.float32), x, 0, SeededNoise([0, 1]))


def test_noise_of_a_picture_is_its_seed_s() -> None:
    both, alone = SeededNoise([3, 4]), SeededNoise([4])
    for _ in range(2):
        np.testing.assert_array_equal(both(SHAPE)[1], alone((1, *SHAPE[1:]))[0])
    with pytest.raises(RecipeError, match="2 seeds for a batch of 3"):
        both((3, 1))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("DDIMScheduler", {"n_steps": 1001}, "n_steps 1001 must be 1 to 1000"),
        ("DDIMScheduler", {"n_steps": 0}, "n_steps 0 must be at least 1"),
        ("DPMSolverMultistepScheduler", {"n_steps": 10, "strength": 0.05}, "leaves no step to do"),
        ("DPMSolverMultistepScheduler", {"n_steps": 10, "strength": 1.5}, "strength 1.5 must be above 0"),
        ("DPMSolverMultistepScheduler", {"n_steps": 10, "eta": 0.5}, r"eta 0.5: DPM-Solver\+\+ takes no eta"),
        ("UniPCMultistepScheduler", {"n_steps": 10, "mu": 1.0}, "has no use for one"),
        ("UniPCMultistepScheduler", {"n_steps": 2, "sigmas": (1.0, 0.5)}, "use_flow_sigmas off"),
        (FLOW, {"n_steps": 3, "sigmas": (1.0, 0.5)}, "2 sigmas for 3 steps"),
        (FLOW, {"n_steps": 2, "sigmas": (1.0, float("nan"))}, "sigmas are not finite"),
        (FLOW, {"n_steps": 2, "strength": float("nan")}, "strength nan must be"),
        ("LCMScheduler", {"n_steps": 51}, "distilled on 50 timesteps"),
        ("LCMScheduler", {"n_steps": 30, "strength": 0.5}, "strength 0.5 leaves 25"),
    ],
)
def test_an_option_that_makes_no_sense(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        scheduler(name, **options)


@pytest.mark.parametrize(
    "name, keys, n_steps, why",
    [
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, 1000, "spaces at most 999"),
        ("DDIMScheduler", {"steps_offset": 1}, 1000, "first timestep at 1000"),
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            9,
            "nothing of the picture",
        ),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, 9, "no finite coefficients"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, 9, "step 8 has no finite coefficients"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, 9, "step 8 has no finite coefficients"),
        (
            "EulerAncestralDiscreteScheduler",
            {"beta_end": 0.03, "rescale_betas_zero_snr": True},
            50,
            "sigma rises from 4096 to 5560.14 at step 0, .* rescale_betas_zero_snr puts 4096 at the last timestep",
        ),
        ("EulerDiscreteScheduler", {"beta_end": 0.99}, 9, r"sigmas are not finite \(inf at the first step\)"),
        (FLOW, {"shift_terminal": 0.1}, 1, "sigmas are not finite"),
        (FLOW, {"use_dynamic_shifting": True}, 4, "needs one"),
    ],
)
def test_steps_that_would_be_nan(name: str, keys: dict[str, Any], n_steps: int, why: str) -> None:
    """In diffusers they are, or raise an IndexError."""
    with pytest.raises(RecipeError, match=why):
        scheduler(name, n_steps, keys)


RISING: dict[str, Any] = {"beta_end": 0.03, "rescale_betas_zero_snr": True, "algorithm_type": "sde-dpmsolver++"}
ENDING: dict[str, Any] = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}


@pytest.mark.parametrize(
    "keys, remedy, mended, mended_steps",
    [
        (RISING, "from sigma 4096 to .*; use fewer steps, or another scheduler$", RISING, 30),
        (ENDING, "use final_sigmas_type 'zero'$", ENDING | {"final_sigmas_type": "zero"}, 50),
    ],
)
def test_dpm_solver_names_what_helps(
    keys: dict[str, Any], remedy: str, mended: dict[str, Any], mended_steps: int
) -> None:
    with pytest.raises(RecipeError, match=remedy):
        scheduler("DPMSolverMultistepScheduler", 50, keys)
    assert len(scheduler("DPMSolverMultistepScheduler", mended_steps, mended).steps) == mended_steps


UNIPC_REASONS: list[tuple[dict[str, Any], str]] = [
    ({"solver_type": "bh1"}, "step 8 has no finite coefficients, as it ends at sigma 0; use solver_type 'bh2'$"),
    (
        {"solver_type": "bh1", "lower_order_final": False, "predict_x0": False},
        "as it ends at sigma 0; use solver_type 'bh2', lower_order_final, predict_x0$",
    ),
    ({"predict_x0": False}, "as it ends at sigma 0; use predict_x0$"),
    (
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3},
        r"step 8 .*, as it stays at sigma 0\.01\d*; use lower_order_final, or a solver_order of at most 2$",
    ),
    (
        {"use_exponential_sigmas": True, "use_flow_sigmas": True},
        "step 0 .*, as a flow's sigmas must be below 1 and they begin at 157.407; change use_exponential_sigmas",
    ),
]


@pytest.mark.parametrize("keys, why", UNIPC_REASONS)
def test_unipc_says_why_a_step_is_none(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        scheduler("UniPCMultistepScheduler", 9, keys)


def test_a_last_step_of_second_order_that_stays_at_its_sigma_is_one() -> None:
    keys = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_type": "bh1"}
    made = scheduler(
        "UniPCMultistepScheduler", 15, keys | {"final_sigmas_type": "sigma_min", "lower_order_final": False}
    )
    x = picture()
    for i in made.steps:
        before, x = x, made.step(x, x, i, SeededNoise([0, 1]))
    assert made.sigmas[-1] == made.sigmas[-2] and np.isfinite(x).all() and np.abs(x - before).max() < 0.1  # type: ignore[attr-defined]


def test_euler_ancestral_may_begin_below_a_sigma_that_rises() -> None:
    keys = {"beta_end": 0.03, "rescale_betas_zero_snr": True}
    made = scheduler("EulerAncestralDiscreteScheduler", 50, keys, strength=0.9)
    assert made.first == 5 and np.isfinite(drawn(made, picture(), picture())).all()


@pytest.mark.parametrize(
    "document, why",
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name 'PNDMScheduler' is not supported; use one of DPMSolver"),
        ({}, "_class_name None is not supported"),
        ({"_class_name": ["DDIMScheduler"]}, "is not supported"),
        ({"_class_name": "DDIMScheduler", "beta_shedule": "linear"}, "key 'beta_shedule' is unknown"),
        (
            {"_class_name": "DDIMScheduler", "beta_schedule": "laplace"},
            "beta_schedule is 'laplace'; it should be 'linear'",
        ),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "algorithm_type is 'dpmsolver'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order is 4"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {"a": 1}}, "solver_p is"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train_timesteps 0 must be 2 to"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9}, "num_train_timesteps 1000000000 must be"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2.0}, "beta 2.0 must lie between 0 and 1"),
        ({"_class_name": "DDIMScheduler", "beta_end": float("inf")}, "beta inf must lie"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas has 1 values for 1000"),
        ({"_class_name": "DDIMScheduler", "clip_sample": "yes"}, "clip_sample is 'yes'"),
        ({"_class_name": "DDIMScheduler", "steps_offset": -1}, "steps_offset -1 must be"),
        ({"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample_range": -1.0}, "clip_sample_range -1.0 must be above 0"),
        ({"_class_name": "LCMScheduler", "clip_sample_range": 0.0}, "clip_sample_range 0.0 must be above 0"),
        ({"_class_name": "LCMScheduler", "sample_max_value": 0.5}, "and sample_max_value 0.5 at least 1"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 0}, "original_inference_steps 0 must be"),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, "with use_flow_sigmas"),
        (
            {"_class_name": "UniPCMultistepScheduler", "thresholding": True, "predict_x0": False},
            "predict_x0 false goes",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.0}, "sigma_min 0.0 must be above 0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 1.0}, "lambda_min_clipped 1.0 must be"),
        ({"_class_name": FLOW, "shift": 0.0}, "shift 0.0 must be above 0"),
        ({"_class_name": FLOW, "shift": 1e999}, "shift inf must be above 0"),
    ],
)
def test_a_file_that_is_not_understood(document: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=why) as refusal:
        read_scheduler_config(path)
    assert str(path) in str(refusal.value)


def test_files_as_they_are_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """-Infinity, which Python writes and JSON lacks; whole numbers for others; keys of the class trained with."""
    path = tmp_path / "scheduler_config.json"
    path.write_text("""{
      "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0", "lambda_min_clipped": -Infinity,
      "sample_max_value": 1, "skip_prk_steps": true, "trained_betas": null
    }""")
    with caplog.at_level("INFO"):
        config = read_scheduler_config(path)
    assert config.lambda_min_clipped == -np.inf  # type: ignore[attr-defined]
    assert "DPMSolverMultistepScheduler has no skip_prk_steps, as in diffusers" in caplog.text
    path.write_text('{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": NaN}')
    with pytest.raises(ModelError, match="NaN is not a number"):
        read_scheduler_config(path)


# --- tables --------------------------------------------------------------------------------------------------------


def test_trailing_steps_are_as_many_as_were_asked_for() -> None:
    """61 is the first number of steps for which diffusers has one more, at timestep -1."""
    for n_steps in range(1, 1001):
        made = scheduler("DDIMScheduler", n_steps, {"timestep_spacing": "trailing"})
        assert len(made.timesteps) == n_steps and made.timesteps[-1] >= 0 and made.timesteps[0] == 999


def test_a_drawing_begins_at_the_last_timestep_where_the_sigma_of_it_is_not_the_largest() -> None:
    """Of linear betas the last sigmas of training fall to that of ZERO_SNR: diffusers looks for the last step whose
    sigma is not above, as the definition below."""
    log_sigmas = np.float32([-3, -1, 0, 2, 5, 4])
    for wanted, time in ((-4, 0.0), (-2, 0.5), (1, 2.5), (3, 3 + 1 / 3), (4, 5.0), (4.5, 4.5), (6, 4.0)):
        assert times_of(np.exp([wanted]), log_sigmas) == pytest.approx(time, abs=1e-12), wanted
    keys = {"use_lu_lambdas": True, "rescale_betas_zero_snr": True}
    for ends in ({}, {"beta_start": 0.00085, "beta_end": 0.03}):
        for n_steps in range(1, 51):
            made = scheduler("DPMSolverMultistepScheduler", n_steps, keys | ends)
            assert made.timesteps[0] == 999, (ends, n_steps)


def test_quantiles_of_the_beta_distribution_are_their_inverse() -> None:
    """The distribution of 1/2 and 1/2 is the arcsine law; of 1 and 1 the uniform one."""
    p = np.linspace(0, 1, 41)
    np.testing.assert_allclose(beta_quantile(p, 0.5), np.sin(np.pi * p / 2) ** 2, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(beta_quantile(p, 1.0), p, rtol=1e-13)


def test_float32_numbers_between_two_ends() -> None:
    np.testing.assert_array_equal(linspace(0.5, 2.0, 4), np.float32([0.5, 1.0, 1.5, 2.0]))
    np.testing.assert_array_equal(linspace(0.5, 2.0, 1), np.float32([0.5]))


def test_a_picture_is_thresholded_by_its_own_quantile() -> None:
    data = np.concatenate([np.linspace(-4, 4, 9), np.linspace(-0.5, 0.5, 9)]).reshape(2, 1, 9).astype(np.float32)
    done = thresholded(data, 1.0, 3.0)
    np.testing.assert_allclose(done[0, 0], np.clip(np.linspace(-4, 4, 9), -3, 3) / 3, rtol=1e-6)
    np.testing.assert_array_equal(done[1], data[1])  # never below 1


def test_alpha_and_sigma_belong_together() -> None:
    for sigma in (0.0, 0.02, 1.0, 150.0):
        alpha, own, lam = signal(np.float32(sigma), flow=False)
        assert abs(alpha**2 + own**2 - 1) < 1e-6 and np.isclose(own, alpha * sigma)
        assert np.isclose(lam, -np.log(sigma)) if sigma else np.isinf(lam)
