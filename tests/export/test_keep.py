"""Linears that a recipe keeps: they are no longer to be quantized, in the model, its plan and its reasons."""

from __future__ import annotations

import pytest

from export.errors import RecipeError
from export.models.families import KEPT_BY_RECIPE
from pipeline import recipe as recipes

pytestmark = pytest.mark.torch
FIRST = r"transformer_blocks\.0\..*"


def keeping(*patterns: str) -> recipes.Recipe:
    return recipes.from_dict({**recipes.load("pixart_w4a6").document(), "keep": list(patterns)}, "here")


def test_a_kept_linear_is_not_quantized_and_says_who_keeps_it() -> None:
    whole = recipes.load_float_model(recipes.load("pixart_w4a6"))
    model = recipes.load_float_model(keeping(FIRST, r".*\.attn2\.to_q"))
    quantized, before = {ref.name for ref in model.linears()}, {ref.name for ref in whole.linears()}
    gone = {name for name in before if name.startswith("transformer_blocks.0.") or name.endswith("attn2.to_q")}
    assert quantized == before - gone and gone
    reasons = dict(model.kept())
    assert {name for name, reason in reasons.items() if reason == KEPT_BY_RECIPE} == gone
    assert reasons["proj_out"] != KEPT_BY_RECIPE, "the family kept it before"


@pytest.mark.parametrize("pattern", [r"transformer_blocks\.99\..*", "proj_out"])
def test_a_pattern_that_keeps_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"keep: no linear that would be quantized is called .*transformer_blocks"):
        recipes.load_float_model(keeping(pattern))


def test_something_must_be_left_to_quantize() -> None:
    with pytest.raises(RecipeError, match="leaves nothing to quantize"):
        recipes.load_float_model(keeping(".*"))
