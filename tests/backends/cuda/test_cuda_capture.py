"""How the `cuda` engine captures: order of streams, arithmetic of float32, and what a failed capture leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.backends.cuda.engine import WARM_UPS, Captured
from tests.support.fake_cuda import FakeCuda

SWITCHES: Any = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.fixture
def switches() -> Iterator[Any]:
    """Put back afterwards."""
    before = precisions()
    yield SWITCHES
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


class Doubling:
    """y = 2 x by a launch; notes the arithmetic that each call is made in."""

    def __init__(self, cuda: FakeCuda, fails: bool = False) -> None:
        self.cuda, self.fails = cuda, fails
        self.arithmetic: list[tuple[str, ...]] = []

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.arithmetic.append(precisions())
        if self.fails and self.cuda.capturing:
            raise ValueError("not allowed in a capture")
        y = torch.zeros_like(inputs["x"])
        self.cuda.launch("module", lambda: y.copy_(2 * inputs["x"]))
        return {"y": y}


def precisions() -> tuple[str, ...]:
    return tuple(switch.fp32_precision for switch in SWITCHES)


def test_the_order_of_a_capture(cuda: FakeCuda) -> None:
    module, x = Doubling(cuda), torch.ones(3)
    captured = Captured.make(module, {"x": x})
    warm_ups = ["module on side 1"] * WARM_UPS
    assert cuda.events == ["side 1 waits for main", *warm_ups, "main waits for side 1", "capture on capture"]
    assert cuda.current.name == "main" and captured.inputs["x"] is x
    kept = captured.outputs["y"]
    assert not kept.any()  # a capture computes nothing
    for value in (3.0, 5.0):
        assert captured.run({"x": torch.full((3,), value)})["y"] is kept and torch.equal(
            kept, torch.full((3,), 2 * value)
        )
    assert cuda.events[-2:] == ["replay", "replay"]


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_float32_is_not_rounded_to_tf32(before: str, cuda: FakeCuda, switches: Any) -> None:
    for switch in switches:
        switch.fp32_precision = before
    module = Doubling(cuda)
    Captured.make(module, {"x": torch.ones(3)})
    assert module.arithmetic == [("ieee", "ieee")] * (WARM_UPS + 1)
    assert precisions() == (before, before)


def test_a_capture_that_fails_leaves_stream_and_arithmetic_as_they_were(cuda: FakeCuda) -> None:
    before: Any = precisions()
    with pytest.raises(RuntimeError, match="invalidated"):
        Captured.make(Doubling(cuda, fails=True), {"x": torch.ones(3)})
    assert cuda.current.name == "main" and precisions() == before
