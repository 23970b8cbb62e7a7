"""Forms that a graph has, beside what they stand for: complex numbers, masks of truth values, tables cut to tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from export.errors import ModelError
from export.models.traceable_forms import (
    ComplexPair,
    Prefix,
    joined,
    traceable_forms,
    use_forms_in_blocks,
    use_prefix,
    use_real_tables,
)

pytestmark = pytest.mark.torch


def _complex(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def _pair(tensor: torch.Tensor) -> ComplexPair:
    return ComplexPair(tensor.real.clone(), tensor.imag.clone())


def test_a_pair_is_moved_and_multiplied_as_the_complex_tensor() -> None:
    x, table = _complex(2, 5, 3), _complex(7, 3, seed=1)
    moved = torch.cat([table[1:4], table[:2]]).unsqueeze(0)
    of_pair = joined([_pair(table)[1:4], _pair(table)[:2]]).unsqueeze(0)
    assert of_pair.shape == moved.shape and torch.equal(of_pair.complex(), moved)
    torch.testing.assert_close((_pair(x) * of_pair).complex(), x * moved)
    for part, expected in zip(_pair(x).split([2, 3], dim=1), x.split([2, 3], dim=1), strict=True):
        assert torch.equal(part.complex(), expected)
    with pytest.raises(AttributeError, match="abs of complex numbers"):
        _pair(x).abs()


def test_within_code_turns_heads_by_a_table_of_pairs_and_without_by_the_complex_one() -> None:
    heads, table = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), _complex(4, 3)

    def turned(by: object) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(heads.unflatten(-1, (3, 2))) * by).flatten(-2)

    expected = turned(table)
    with traceable_forms():
        torch.testing.assert_close(turned(_pair(table)), expected)
    torch.testing.assert_close(turned(_pair(table)), expected)


def test_a_mask_of_truth_values_leaves_out_what_it_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 4, 8, generator=generator) for _ in range(3))
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])[:, None, None]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with traceable_forms():
        result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        there = torch.ones(2, 4, dtype=torch.bool).masked_fill(~mask[:, 0, 0], False)
    torch.testing.assert_close(result, expected)
    assert torch.equal(there, mask[:, 0, 0])
    assert not torch.equal(expected, scaled_dot_product_attention(query, key, value))


def test_blocks_that_run_alone_compute_in_these_forms_and_keep_their_kind() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return torch.view_as_complex(x)

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block(), nn.Linear(2, 2)])})
    use_forms_in_blocks(model)
    one, other, linear = model["blocks"]
    assert type(one) is type(other) and type(one).__name__ == "Block" and type(linear) is nn.Linear
    pair = one(torch.ones(3, 2))
    assert isinstance(pair, ComplexPair)
    assert [part.shape for part in tree_leaves({"table": pair})] == [(3,), (3,)]


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = _complex(3000, 2)

    def forward(self, cells: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[:cells], self.table[cells : cells + tokens]


def test_a_table_is_cut_to_the_tokens_and_others_are_left() -> None:
    model, plain = nn.ModuleDict({"positions": _Positions()}), _Positions()
    use_real_tables(model)
    use_prefix(model, Prefix("positions", "tokens", table=1))
    of_cells, of_tokens = model["positions"](1024, tokens=5)
    expected = plain(1024, 5)
    assert torch.equal(of_cells.complex(), expected[0]) and torch.equal(of_tokens.complex(), expected[1])
    assert not model.state_dict()


def test_a_part_that_is_not_told_how_many_tokens_is_refused() -> None:
    class Positions(_Positions):
        def forward(self, cells: int, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(cells, tokens or 1)

    model = nn.ModuleDict({"positions": Positions()})
    use_prefix(model, Prefix("positions", "tokens", table=1))
    for given in ((), (None,)):
        with pytest.raises(ModelError, match="Positions: its argument tokens is None"):
            model["positions"](1024, *given)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int64])
def test_a_number_of_tokens_is_made_a_tensor_of_the_type_that_is_asked_for(dtype: torch.dtype | None) -> None:
    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with traceable_forms():
                return x.sum() + torch.as_tensor(x.shape[0], dtype=dtype)

    size = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Counted(), (torch.ones(3),), dynamic_shapes=({0: size},))
    [made] = [node for node in program.graph.nodes if node.target is torch.ops.aten.scalar_tensor.default]
    assert made.kwargs["dtype"] == (dtype or torch.int64)
    assert program.module()(torch.ones(5)) == 10
