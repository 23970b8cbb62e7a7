"""A diffusers pipeline, and the parts of it as engines that this project's own run time draws with.

Both call the same torch modules, one sample at a time: what a matrix product rounds differently in another batch is no
difference then, so that pictures can be compared bit by bit.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.models.families import FAMILIES
from pipeline.backends.base import Arrays
from pipeline.generate import latent_model
from pipeline.generate.components import PipelineSource
from pipeline.generate.convert_tokenizer import convert_tokenizer
from tests.generate.schedulers.cases import MODULES


def one_by_one(call: Callable[..., Any], batch: Callable[..., int]) -> Callable[..., Any]:
    """A call of a batch as calls of its samples. batch: how many there are, of the call's arguments."""

    @functools.wraps(call)
    def calls(*args: Any, **kwargs: Any) -> Any:
        count = batch(*args, **kwargs)

        def row(value: Any, i: int) -> Any:
            if isinstance(value, torch.Tensor):
                return value[i : i + 1] if value.ndim and len(value) == count else value
            return {key: row(part, i) for key, part in value.items()} if isinstance(value, dict) else value

        outputs = [call(*(row(a, i) for a in args), **{k: row(a, i) for k, a in kwargs.items()}) for i in range(count)]
        if isinstance(outputs[0], tuple):
            return (torch.cat([output[0] for output in outputs]),)
        first = outputs[0]
        key = next(iter(first))  # of diffusers' and transformers' outputs, which are dictionaries
        return type(first)(**{key: torch.cat([output[key] for output in outputs])})

    return calls


def split(module: Any, name: str = "forward") -> None:
    """Have a module compute its samples one by one."""
    call = getattr(module, name)

    def count(*args: Any, **kwargs: Any) -> int:
        return len(args[0] if args else next(iter(kwargs.values())))

    setattr(module, name, one_by_one(call, count))


def split_parts(pipe: Any) -> Any:
    """Of a whole pipeline."""
    pipe.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        if getattr(pipe, name, None) is not None:
            split(getattr(pipe, name))
    split(pipe.vae, "decode")
    return pipe


@dataclass
class TorchEngine:
    """A torch module as an engine. calls: sizes of the batches it was called with."""

    call: Callable[[dict[str, torch.Tensor]], Arrays]
    calls: list[int] = field(default_factory=list)
    closed: bool = False

    def run(self, inputs: Arrays) -> Arrays:
        assert not self.closed
        self.calls.append(len(next(iter(inputs.values()))))
        with torch.no_grad():
            return self.call({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()})

    def close(self) -> None:
        self.closed = True


@dataclass
class Loads:
    """Which parts were loaded, in order, and the engines that came of it."""

    names: list[str] = field(default_factory=list)
    engines: list[TorchEngine] = field(default_factory=list)
    keep: bool = False

    def loader(self, name: str, call: Callable[[dict[str, torch.Tensor]], Arrays]) -> Callable[[], TorchEngine]:
        def load() -> TorchEngine:
            assert all(engine.closed for engine in self.engines) or self.keep, "one part at a time"
            self.names.append(name)
            self.engines.append(TorchEngine(call))
            return self.engines[-1]

        return load


def source_of(pipe: Any, folder: Path, loads: Loads | None = None, encoder: bool = False) -> PipelineSource:
    """The pipeline as a bundle of its parts would state it, with files in `folder`."""
    loads = Loads() if loads is None else loads
    engines, tokenizers = {}, {}
    for suffix in ("", "_2"):
        text = getattr(pipe, f"text_encoder{suffix}", None)
        if text is not None:
            name, own = f"tokenizer{suffix}", getattr(pipe, f"tokenizer{suffix}")
            own.save_pretrained(folder / "saved" / name)
            convert_tokenizer(folder / "saved" / name, type(own).__name__, folder / name)
            tokenizers[name] = folder / name / "tokenizer.json"
            engines[f"text_encoder{suffix}"] = loads.loader(
                f"text_encoder{suffix}", lambda t, text=text: {"last_hidden_state": text(**t)[0].numpy()}
            )
    class_name = type(pipe.transformer).__name__
    family = next(row for row in FAMILIES.values() if row.class_name == class_name)

    def denoise(tensors: dict[str, torch.Tensor]) -> Arrays:
        return {"sample": family.call(pipe.transformer, tensors).numpy()}

    engines["transformer"] = loads.loader("transformer", denoise)
    engines["vae_decoder"] = loads.loader(
        "vae_decoder", lambda tensors: {"sample": pipe.vae.decode(tensors["latents"]).sample.numpy()}
    )
    if encoder:
        engines["vae_encoder"] = loads.loader(
            "vae_encoder", lambda t: {"moments": pipe.vae.encode(t["sample"]).latent_dist.parameters.numpy()}
        )
    pipe.scheduler.save_config(folder / "scheduler")
    index = dict(pipe.config)
    return PipelineSource(
        "tiny", type(pipe).__name__, index, engines, dict(pipe.transformer.config), dict(pipe.vae.config), tokenizers,
        folder / "scheduler/scheduler_config.json",
    )  # fmt: skip


def numbers(shape: tuple[int, ...], *seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class GivenNoise:
    """In the place of SeededNoise: the first draw is what latents replace, the others are `numbers`."""

    def __init__(self, seeds: Any) -> None:
        self.draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Any:
        self.draws += 1
        return numbers(shape, self.draws - 1)

    def keep(self, rows: Any) -> None:
        raise AssertionError("no picture leaves")


def equal_noise(patch: pytest.MonkeyPatch, pictures: int) -> None:
    """Have schedulers of both draw the same numbers, step by step, from now on."""
    patch.setattr(latent_model, "SeededNoise", GivenNoise)
    state = types.SimpleNamespace(draws=0)

    def draw(shape: Any, **_: Any) -> torch.Tensor:
        state.draws += 1
        drawn = numbers((pictures, *shape[1:]), state.draws)
        return torch.from_numpy(np.concatenate([drawn] * (shape[0] // pictures)))

    for name in MODULES.values():
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", draw)
