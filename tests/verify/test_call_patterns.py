"""What a failed gate over calls says: which samples are wrong, what they have in common, and how they look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.verify.call_patterns import (
    CALL_TRAITS,
    PICTURE_TRAITS,
    SETTING_CAUSES,
    STEP_TRAITS,
    Setting,
    Sign,
    Traits,
    diagnose,
    sign_of,
    traits_of,
)
from pipeline.verify.calls import Call, SampleError, StateResult, sample_errors
from pipeline.verify.gates import repeats_gate

LIMIT, RIGHT, WRONG = 30.0, 50.0, 20.0


def _error(sqnr_db: float, sign: Sign | None = None, call: str = "a call", **traits: Any) -> SampleError:
    known = {"batch": 2, "place": 0, "timestep": 500.0, "latent": 3.0} | traits
    return SampleError(call, known["place"], sqnr_db, "pool", known["place"], Traits(**known), sign)


# (traits of the wrong samples, those of the right ones, what is said)
ALIKE: list[tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = [
    ([{"batch": 1}], [{"batch": 2}, {"batch": 3}], "those of batch 1 (a buffer"),
    ([{"batch": 3}, {"batch": 9}], [{"batch": 1}, {"batch": 2}], "those of batch 3 and above (a buffer"),
    ([{"batch": 3, "place": 2}, {"batch": 9, "place": 8}],
     [{"batch": 9, "place": 2}, {"batch": 9, "place": 3}, {"batch": 2, "place": 1}], "the last place of an odd batch"),
    ([{"timestep": 0.0}, {"timestep": 10.0}], [{"timestep": 20.0}], "timestep 10 and below"),
    ([{"other_timestep": True}], [{"other_timestep": False}], "one timestep is taken for all samples"),
    ([{"other_condition": True}], [{"other_condition": False}], "one condition is taken for all samples"),
    ([{"tokens": 7}, {"tokens": 1}, {"tokens": 121}], [{"tokens": 8}, {"tokens": 200}], "1, 7, 121, the odd ones"),
    ([{"mask": "partial"}], [{"mask": "full"}, {"mask": "empty"}], "those of partial masks"),
    ([{"mask": "partial"}], [{"mask": "partial", "batch": 3}, {"mask": "full", "batch": 3}], "some of partial masks"),
    ([{"mask": "full", "other_mask": True}], [{"mask": "full"}], "one mask is taken for all samples"),
    ([{"label": 10}], [{"label": 3}], "class 10 (rows of the class table"),
    ([{"latent": 9.0}, {"latent": 9.5}], [{"latent": 4.0}], "latents that reach 9 and above"),
    ([{"setting": Setting.CHANGED}], [{"setting": None}], SETTING_CAUSES[Setting.CHANGED]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "right", "words"), ALIKE)
def test_what_the_wrong_samples_alone_have_is_named(wrong: Any, right: Any, words: str) -> None:
    errors = [_error(WRONG, **traits) for traits in wrong] + [_error(RIGHT, **traits) for traits in right]
    said = diagnose(errors, LIMIT)
    assert said.startswith(f"{len(wrong)} of {len(errors)} samples are wrong") and words in said


def test_a_latent_in_the_middle_is_no_threshold() -> None:
    errors = [_error(WRONG, latent=4.0), _error(RIGHT, latent=3.0), _error(RIGHT, latent=5.0)]
    assert "latents" not in diagnose(errors, LIMIT)


def test_equal_calls_with_unequal_errors_are_a_matter_of_what_is_kept() -> None:
    first = _error(RIGHT, rows=(0, 1), batch=1)
    later = _error(WRONG, call="call 50", rows=(0, 1), setting=Setting.STEADY, batch=1)
    said = diagnose([first, later], LIMIT)
    assert "sample 0 has 50.0 dB in 'a call' and 20.0 dB in 'call 50': what an earlier call left is used" in said
    assert SETTING_CAUSES[Setting.STEADY] in said and "batch" not in said
    assert "earlier call" not in diagnose([first, _error(WRONG, rows=(0, 2), batch=3)], LIMIT)


def test_samples_wrong_in_the_worst_one_s_way_are_wrong_too() -> None:
    sign = Sign("factor", "all numbers times 1.1: a factor is wrong")
    said = diagnose([_error(WRONG, sign), _error(31.0, sign), _error(RIGHT, batch=3)], LIMIT)
    assert said.startswith("2 of 3 samples are wrong: those of batch 2") and said.endswith(f"the worst: {sign.text}")


def test_when_all_are_wrong_nothing_in_calls_is_blamed() -> None:
    assert diagnose([_error(WRONG), _error(WRONG, batch=3)], LIMIT).startswith(
        "2 of 2 samples are wrong, so it is nothing that calls differ in"
    )


def test_a_small_excess_is_called_that() -> None:
    assert "none by more than 6 dB" in diagnose([_error(25.0), _error(RIGHT, batch=3)], LIMIT)
    assert "6 dB" not in diagnose([_error(23.0), _error(RIGHT, batch=3)], LIMIT)


def test_steps_and_pictures_have_traits_of_their_own() -> None:
    errors = [
        _error(WRONG, call="step 3", setting=Setting.PROMPTED),
        _error(RIGHT, call="step 1", setting=Setting.UNPROMPTED),
    ]
    said = diagnose(errors, LIMIT, STEP_TRAITS)
    assert "step 3" in said and "samples with a prompt" in said
    pictures = [SampleError("pictures", i, value, "pictures", i) for i, value in enumerate((WRONG, RIGHT))]
    assert "picture 0" in diagnose(pictures, LIMIT, PICTURE_TRAITS)


def test_not_a_number_is_the_worst() -> None:
    sign = Sign("not finite", "NaN or Inf")
    assert diagnose([_error(WRONG), _error(np.nan, sign, batch=3)], LIMIT, CALL_TRAITS).endswith("NaN or Inf")


@pytest.mark.parametrize("setting", SETTING_CAUSES)
def test_every_call_that_is_repeated_has_a_cause(setting: Setting) -> None:
    gate = repeats_gate("cpu", StateResult([], 3, Call("batch 2", "pool", (0, 1), {}, setting)))
    assert not gate.passed and gate.why.endswith(f"; first other in batch 2: {SETTING_CAUSES[setting]}")


# --- signs ----------------------------------------------------------------------------------------------------------


def _exact() -> Any:
    return np.random.default_rng(0).standard_normal((4, 3, 8, 8))


def _noise(exact: Any, db: float) -> Any:
    noise = np.random.default_rng(1).standard_normal(exact.shape)
    return noise * np.linalg.norm(exact) / np.linalg.norm(noise) * 10 ** (-db / 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda exact: exact[0] * 1.1, "all numbers times 1.1: a factor is wrong"),
        (lambda exact: exact[0] * 0.998 + _noise(exact[0], 60), "all numbers times 0.998"),
        (lambda exact: -exact[0], "all numbers times -1"),
        (lambda exact: exact[2], "sample 1 of the call is given: rows are exchanged or repeated"),
        (lambda exact: exact[3], "the result of another call is given"),
        (lambda exact: 0 * exact[0], "all numbers are zero"),
        (lambda exact: np.where(exact[0] > 2, np.inf, exact[0]), "NaN or Inf where the reference is finite"),
        (lambda exact: exact[0] + np.array([0, 0, 0.5])[:, None, None], "only channels 2 of the output"),
    ],
)
def test_signs(change: Any, words: str) -> None:
    exact = _exact()
    sign = sign_of(change(exact), 0, exact, (0, 2))
    assert sign is not None and words in sign.text


def test_right_and_noisy_results_and_other_pictures_have_no_sign() -> None:
    exact = _exact()
    assert sign_of(exact[0], 0, exact, (0, 2)) is None
    assert sign_of(exact[0] + _noise(exact[0], 30), 0, exact, (0, 2)) is None
    assert sign_of(np.random.default_rng(5).standard_normal(exact[0].shape), 0, exact, (0, 2)) is None


# --- what samples are told by ---------------------------------------------------------------------------------------


def test_traits_are_read_from_the_inputs() -> None:
    inputs = {
        "hidden_states": np.array([1.0, -4.0, 2.0], np.float32).reshape(3, 1, 1, 1),
        "timestep": np.array([5.0, 7.0, 5.0], np.float32),
        "encoder_hidden_states": np.ones((3, 6, 2), np.float32),
        "encoder_attention_mask": np.array([[1] * 6, [1] * 3 + [0] * 3, [0] * 6], np.float32),
        "image_rotary_emb": np.zeros((16, 4), np.float32),
    }
    traits = [traits_of(inputs, place, Setting.CHANGED, (4, 5, 6)) for place in range(3)]
    assert [row.mask for row in traits] == ["full", "partial", "empty"]
    assert [row.tokens for row in traits] == [6] * 3 and [row.batch for row in traits] == [3] * 3
    assert [row.latent for row in traits] == [1, 4, 2]
    assert [row.other_timestep for row in traits] == [False, True, False]
    assert [row.other_condition for row in traits] == [False, True, True]
    assert [row.other_mask for row in traits] == [False, True, True]
    assert traits[0].label is None and traits[0].setting == Setting.CHANGED and traits[0].rows == (4, 5, 6)
    assert traits_of({**inputs, "class_labels": np.array([3, 4, 5])}, 1).label == 4


def test_a_result_of_another_shape_is_called_that() -> None:
    call = Call("batch 2", "pool", (0, 1), {"hidden_states": _exact()[:2], "timestep": np.zeros(2)})
    errors = sample_errors(call, {"pool": _exact()}, np.zeros((2, 3, 4, 4)))
    assert all(np.isnan(error.sqnr_db) for error in errors)
    assert "the shape is (2, 3, 4, 4) in place of (2, 3, 8, 8)" in diagnose(errors, LIMIT)
