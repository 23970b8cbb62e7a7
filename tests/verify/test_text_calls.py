"""Calls of a text encoder: right ones pass, and what is wrong with masks, lengths and padding is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from export.models.load import LoadedModel, denoiser, load
from pipeline import recipe as recipes
from pipeline.backends.base import Arrays, only
from pipeline.backends.reference import ReferenceEngine
from pipeline.distance import Array
from pipeline.generate.case import Run, TextCase, make_case
from pipeline.verify.call_patterns import Setting
from pipeline.verify.calls import (
    LONGEST,
    ODD,
    ONE,
    Call,
    StateResult,
    call_errors,
    make_calls,
    make_pools,
    state_result,
)
from pipeline.verify.study import Study
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch


@dataclass(frozen=True)
class Subject:
    """A tiny encoder with its calls, and what they give."""

    model: LoadedModel
    study: Study
    pools: dict[str, Arrays]
    calls: list[Call]
    exact: dict[str, Array]
    run: Run

    def state(self, change: Callable[[Run], Run]) -> StateResult:
        """Of an engine that computes as `change` makes of the right one."""
        run = self.study.judged(change(self.run))
        return state_result(self.calls, self.pools, self.model, self.exact, run, 40, np.ones(0, bool))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = load(str(t5_folder(tmp_path_factory.mktemp("t5"))))
    case = make_case(model, recipes.load("t5_w4a8"))
    assert isinstance(case, TextCase)
    study, run = Study(case, model.family.counted), ReferenceEngine(denoiser(model)).run
    pools = make_pools(model, case)
    exact = {name: only(study.judged(run)(pool)) for name, pool in pools.items()}
    return Subject(model, study, pools, make_calls(model, pools), exact, run)


def test_prompts_have_every_length_and_a_token_at_least(subject: Subject) -> None:
    lengths = {name: pool["attention_mask"].sum(1) for name, pool in subject.pools.items()}
    assert all(length.min() >= 1 for length in lengths.values())
    assert subject.pools[ONE]["input_ids"].shape[1] == 1
    assert subject.pools[LONGEST]["input_ids"].shape[1] > subject.model.config["relative_attention_max_distance"]
    assert set(lengths[LONGEST]) >= {1, subject.pools[LONGEST]["input_ids"].shape[1]}
    assert [len(call.inputs["input_ids"]) for call in subject.calls] == [1, 2, 3, 9]


def test_a_large_encoder_has_every_size_length_and_mask_in_few_tokens(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.generate.case.SMALL_PARAMETERS", 0)
    pools = make_pools(subject.model, subject.study.case)
    calls = make_calls(subject.model, pools)
    assert {len(call.rows) for call in calls} == {1, 2, 3, 9}
    masks = {name: pool["attention_mask"].sum(1) for name, pool in pools.items()}
    longest = pools[LONGEST]["input_ids"].shape[1]
    assert longest > subject.model.config["relative_attention_max_distance"] and set(masks[LONGEST]) == {1, longest}
    assert len(set(masks[ODD])) == 3 and masks[ONE].tolist() == [1]
    assert sum(call.inputs["input_ids"].size for call in calls) < 3 * longest
    exact = {name: only(subject.study.judged(subject.run)(pool)) for name, pool in pools.items()}
    large = replace(subject, pools=pools, calls=calls, exact=exact)
    state = large.state(lambda run: run)
    assert not state.unequal and min(error.sqnr_db for error in state.errors) > 100

    def unmasked(run: Run) -> Run:
        return lambda inputs: run(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})

    def first_of_batch(run: Run) -> Run:
        return lambda inputs: {name: np.repeat(out[:1], len(out), 0) for name, out in run(inputs).items()}

    for fault in (unmasked, first_of_batch):
        wrong = large.state(fault)
        assert wrong.unequal or min(error.sqnr_db for error in wrong.errors) < 20
        errors = call_errors(calls, exact, subject.study.judged(fault(subject.run)))
        assert min(error.sqnr_db for error in errors) < 20


def test_rows_of_padding_are_nobodys(subject: Subject) -> None:
    def strange(inputs: Arrays) -> Arrays:
        mask = inputs["attention_mask"].astype(bool)[..., None]
        return {name: np.where(mask, output, np.nan) for name, output in subject.run(inputs).items()}

    errors = call_errors(subject.calls, subject.exact, subject.study.judged(strange))
    assert min(error.sqnr_db for error in errors) > 100


def test_a_right_encoder_passes(subject: Subject) -> None:
    state = subject.state(lambda run: run)
    assert not state.unequal and min(error.sqnr_db for error in state.errors) > 100


def test_a_mask_that_is_not_applied_is_told(subject: Subject) -> None:
    def unmasked(run: Run) -> Run:
        return lambda inputs: run(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})

    state = subject.state(unmasked)
    assert min(error.sqnr_db for error in state.errors) < 20
    assert state.unequal and state.first is not None and state.first.setting == Setting.PADDING


def test_an_output_of_another_shape_fails(subject: Subject) -> None:
    def shorter(inputs: Arrays) -> Arrays:
        return {name: output[:, :-1] for name, output in subject.run(inputs).items()}

    errors = call_errors(subject.calls, subject.exact, subject.study.judged(shorter))
    assert all(np.isnan(error.sqnr_db) and error.sign and error.sign.kind == "shape" for error in errors)
