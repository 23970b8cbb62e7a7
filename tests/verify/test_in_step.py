"""Passes that go in step give what they give alone, and each weight is asked for once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.models.load import load
from pipeline import recipe as recipes
from pipeline.calibrate import calibrate
from pipeline.verify.in_step import _product, in_step
from pipeline.verify.study import study
from tests.support.tiny_text import t5_folder

pytestmark = pytest.mark.torch


class Counting(nn.Linear):
    """A linear that counts its products and their rows."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.numel() // x.shape[-1])
        return super().forward(x)


class Small(nn.Module):
    """Two linears with what depends on all tokens of a call between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Counting(4, 6), Counting(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        result: Tensor = self.second(hidden - hidden.mean(1, keepdim=True))
        return result


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    return Small().double().eval().requires_grad_(False)


def calls(module: Small, *shapes: tuple[int, int]) -> list[Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [partial(module, torch.randn(*shape, 4, generator=generator, dtype=torch.float64)) for shape in shapes]


@pytest.mark.fast
def test_passes_of_any_lengths_give_what_they_give_alone(module: Small) -> None:
    functions = calls(module, (2, 5), (1, 1), (3, 7))
    alone = [function() for function in functions]
    module.first.rows.clear()
    together = in_step([module.first, module.second], functions)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-13, atol=1e-13)
    assert module.first.rows == [2 * 5 + 1 + 3 * 7]
    assert torch.equal(functions[0](), alone[0])  # the linears are as they were


def test_a_pass_may_call_more_than_once(module: Small) -> None:
    once, other = calls(module, (1, 2), (1, 3))
    results = in_step([module.first, module.second], [lambda: (once(), other())[1], other])
    for result in results:
        np.testing.assert_allclose(result.numpy(), other().numpy(), rtol=1e-13)
    assert module.first.rows[:2] == [5, 3]


def test_hooks_see_the_input_of_their_own_pass(module: Small) -> None:
    seen: list[tuple[int, ...]] = []
    handle = module.first.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    in_step([module.first, module.second], calls(module, (2, 5), (1, 1)))
    handle.remove()
    assert seen == [(2, 5, 4), (1, 1, 4)]


@pytest.mark.fast
def test_an_error_of_one_pass_ends_all_and_leaves_the_module_as_it_was(module: Small) -> None:
    right, _ = calls(module, (1, 2), (1, 2))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        in_step([module.first, module.second], [right, lambda: module.second(torch.ones(1, 1, 5).double())])
    assert "forward" not in vars(module.first) and right().shape == (1, 2, 3)


def test_something_is_done_after_each_product(module: Small) -> None:
    done: list[int] = []
    in_step([module.first, module.second], calls(module, (1, 2), (1, 3)), lambda: done.append(1))
    assert len(done) == 2


def test_a_study_in_step_is_that_of_calls_by_themselves(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(t5_folder(tmp_path_factory.mktemp("t5"))))
    recipe = recipes.load("t5_w4a8")
    layers = calibrate(model, recipe, tmp_path_factory.mktemp("layers"))
    alone = study(model, layers, recipe)
    monkeypatch.setattr("pipeline.backends.reference.MOST_UNPACKED", 0)
    products = []
    monkeypatch.setattr("pipeline.verify.in_step._product", lambda *args: products.append(1) or _product(*args))
    together = study(model, layers, recipe)
    assert len(products) == 3 * len(layers)  # in float64 and in two runs in float32
    for name, output in alone.pool_exact.items():
        np.testing.assert_allclose(together.pool_exact[name], output, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(together.pool_plain[name], alone.pool_plain[name], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(together.exact[0], alone.exact[0], rtol=1e-9, atol=1e-9)
    assert together.layer_inputs.keys() == alone.layer_inputs.keys()
    for name, (rows,) in alone.layer_inputs.items():
        np.testing.assert_allclose(together.layer_inputs[name][0], rows, rtol=1e-5, atol=1e-5)
    assert together.float32["fp32"].layer_db.keys() == alone.float32["fp32"].layer_db.keys()
    assert len(together.float32["fp32"].hit_calls_db) == len(alone.float32["fp32"].hit_calls_db)
