"""The row made up for a class without one: inputs of its `forward`, kinds of its linears, and what it cannot guess."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.errors import ModelError
from export.models.generic import TOKENS, generic_family

CONFIG = {"in_channels": 4, "sample_size": 8, "patch_size": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
WHERE = Path("folder")


class MadeUp:
    """What diffusers would have: `hidden_states` is needed, the others a denoiser is called with all the same."""

    def forward(
        self, hidden_states: Any, encoder_hidden_states: Any = None, timestep: Any = None, return_dict: bool = True
    ) -> Any:
        return (hidden_states,)


class NeedsMore:
    def forward(self, hidden_states: Any, original_size: Any) -> Any: ...


@pytest.fixture(autouse=True)
def diffusers_of_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = SimpleNamespace(__version__="0", MadeUp=MadeUp, NeedsMore=NeedsMore)
    monkeypatch.setitem(sys.modules, "diffusers", classes)


def test_inputs_are_those_of_forward_with_sizes_of_the_configuration() -> None:
    family = generic_family("MadeUp", CONFIG, WHERE)
    rows = {row.name: row.shape for row in family.inputs(CONFIG)}
    assert rows == {
        "hidden_states": ("batch", 4, "height", "width"),
        "encoder_hidden_states": ("batch", "tokens", 32),
        "timestep": ("batch",),
    }
    assert family.tokens == TOKENS and family.matches({})
    without = CONFIG | {"joint_attention_dim": None}
    assert "encoder_hidden_states" not in {row.name for row in generic_family("MadeUp", without, WHERE).inputs({})}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("transformer_blocks.3.attn.to_q", "attn.qkv"),
        ("single_transformer_blocks.0.attn.to_out.0", "attn.out"),
        ("blocks.1.cross_attn.to_v", "cross.kv"),
        ("transformer_blocks.0.ff_context.net.2", "ff.out"),
        ("blocks.1.mlp.fc1", "ff.in"),
        ("blocks.1.extra", "other"),
        ("transformer_blocks.0.norm1.linear", None),
        ("proj_out", None),
    ],
)
def test_linears_of_blocks_have_kinds_and_the_rest_is_kept(path: str, kind: str | None) -> None:
    family = generic_family("MadeUp", CONFIG, WHERE)
    assert family.kind_of(path) == kind and family.reason_of(path)


def test_the_output_is_the_first_of_what_forward_returns() -> None:
    def module(hidden_states: str, return_dict: bool) -> tuple[str, bool]:
        return hidden_states, return_dict

    assert generic_family("MadeUp", CONFIG, WHERE).call(module, {"hidden_states": "x"}) == "x"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Gone", {}, "diffusers 0 has no model 'Gone'; check the name"),
        ("MadeUp", {"patch_size": "2"}, "MadeUp has no number 'patch_size'; add a row for this class"),
        ("NeedsMore", {}, "NeedsMore.forward needs 'original_size', which the generic rule cannot make; add a row"),
    ],
)
def test_what_cannot_be_guessed_is_refused_by_name(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        generic_family(name, CONFIG | changes, WHERE)
