"""Fine-tuning of TALoRA's branches and router: data-free distillation along the float model's own trajectory.

Inputs are the calibration calls, x_t of the float model's sampling; targets its predictions for them. Only branches
and router learn; codes, scales and zero points stay. AdamW with a linearly falling learning rate, as EfficientDM (arXiv
2310.03270), whose scheme MSFP builds on, has it; batches mix timesteps. The state is written every minute, and a
resumed run ends with the same bytes.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export.checkpoint import QuantizedLinear
from export.documents import whole_file
from export.errors import RecipeError
from export.models.load import LoadedModel, denoiser
from export.models.torch_modules import set_resolution
from pipeline import machine
from pipeline.calibrate.blocks import tensors
from pipeline.calibrate.data import Call
from pipeline.calibrate.learn.dfa import dfa_loss
from pipeline.calibrate.learn.talora import BranchedLinear, Branches, Gates, TimestepRouter
from pipeline.calibrate.memory import kept_bytes, kept_for_gradients
from pipeline.progress import track

logger = logging.getLogger(__name__)
STATE_FILE = "talora.safetensors"
SAVE_EVERY_S = 60.0
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of one sample of each input, by name


@dataclass(frozen=True)
class TuningSettings:
    """How to tune. learning_rate: of the branches; router_rate: of the router; batch: samples per iteration."""

    iterations: int
    learning_rate: float = 1e-3
    router_rate: float = 1e-3
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch < 1:
            raise RecipeError(
                f"calibrate.options: iterations {self.iterations} must not be negative, batch {self.batch} at least 1"
            )


class Tuner:
    """The model with branched linears, its optimiser, and the float model's predictions.

    weights: of the loss, for each call that of its samples, or of its halves (conditional and unconditional). Raises
    ResourceError where the memory that is free is too little.
    """

    def __init__(
        self,
        model: LoadedModel,
        layers: Sequence[QuantizedLinear],
        calls: Sequence[Call],
        weights: Sequence[Sequence[float]],
        branches: Branches,
        settings: TuningSettings,
    ) -> None:
        _refuse_too_large(sum(4 * layer.out_features * layer.in_features for layer in layers), "weights in float32")
        self.settings, self.gates = settings, Gates()
        self.batches = TuningBatches(model, calls, weights, settings)
        floats = {ref.name: ref.module.weight.detach() for ref in model.linears()}
        self.parts = [
            BranchedLinear(layer, floats[layer.name].float(), branches, self.gates, _seed(settings.seed, layer.name))
            for layer in layers
        ]
        self.router = _router(calls, branches, settings.seed)
        self.module = _network(model, {part.layer.name: part for part in self.parts}, calls)
        branch = [value for part in self.parts for value in (part.down, part.up)]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": branch, "lr": settings.learning_rate},
                {"params": list(self.router.parameters()), "lr": settings.router_rate},
            ],
            fused=True,
        )
        self.rates = [settings.learning_rate, settings.router_rate]

    def tune(self, folder: Path) -> list[QuantizedLinear]:
        """The layers with tuned branches. folder: where the state is kept."""
        _refuse_too_large(self.activation_bytes(), f"activations of a batch of {self.settings.batch}")
        iterations, path = self.settings.iterations, folder / STATE_FILE
        done, saved = self.load(path), time.monotonic()
        for iteration in track(range(done, iterations), iterations, "TALoRA", done):
            self.step(iteration)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save(path, iteration + 1)
                saved = time.monotonic()
        self.save(path, iterations)
        self.log_routing()
        return self.layers()

    def layers(self) -> list[QuantizedLinear]:
        """All layers with their branches and the one router, as they are now."""
        router = self.router.exported()
        return [part.finished(router) for part in self.parts]

    @property
    def parameters(self) -> list[Tensor]:
        return [value for group in self.optimiser.param_groups for value in group["params"]]

    def step(self, iteration: int) -> float:
        """One iteration; returns its loss."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - iteration / self.settings.iterations)
        inputs, target, weight = self.batches.draw(iteration)
        loss = dfa_loss(self.predict(inputs, target.shape[1]), target, weight)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def predict(self, inputs: dict[str, Tensor], channels: int) -> Tensor:
        """The quantized model's prediction [B, channels, H, W]; a learned sigma is dropped."""
        self.gates.now = self.router(inputs["timestep"])
        return self.module(**inputs)[:, :channels]

    def activation_bytes(self) -> int:
        """What the tensors that one iteration keeps for its gradients take, measured on one sample."""
        with kept_for_gradients() as kept:
            self.predict(self.batches.first(), 1)
        return self.settings.batch * kept_bytes(kept, self.module)

    def log_routing(self) -> None:
        """Log which timesteps each branch serves."""
        times = sorted({call.timestep for call in self.batches.calls}, reverse=True)
        chosen = self.router.exported().choose(times)
        for branch in range(len(self.router.b2)):
            own = [f"{time:g}" for time, choice in zip(times, chosen, strict=True) if choice == branch]
            logger.info("TALoRA branch %d serves timesteps %s", branch, ", ".join(own) or "none")

    def save(self, path: Path, iteration: int) -> None:
        """Everything that changes while tuning, in one file that is replaced at once."""
        values = {f"parameter/{i}": value.detach() for i, value in enumerate(self.parameters)}
        for i, state in self.optimiser.state_dict()["state"].items():
            values |= {f"optimiser/{i}/{key}": value for key, value in state.items()}
        values = {key: value.contiguous() for key, value in values.items()}
        with whole_file(path) as part:
            save_file(values, part, metadata={"state": json.dumps({"iteration": iteration})})

    def load(self, path: Path) -> int:
        """Take up a saved state; returns how many iterations are done, 0 without one."""
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                iteration = int(json.loads(file.metadata()["state"])["iteration"])
                values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            logger.warning("%s cannot be read (%s); tuning starts again", path, error)
            return 0
        with torch.no_grad():
            for i, value in enumerate(self.parameters):
                value.copy_(values[f"parameter/{i}"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in values.items():
            if key.startswith("optimiser/"):
                _, i, name = key.split("/")
                state.setdefault(int(i), {})[name] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        return iteration


class TuningBatches:
    """Random batches over all calls of one shape: inputs, the float model's prediction, and the loss's weight.

    A batch depends on the seed and the iteration alone, so that a resumed run draws the same.
    """

    def __init__(
        self, model: LoadedModel, calls: Sequence[Call], weights: Sequence[Sequence[float]], settings: TuningSettings
    ) -> None:
        self.calls, self.weights, self.settings = list(calls), list(weights), settings
        self.shared = model.shared
        self.inputs = [tensors(call.inputs) for call in calls]
        self.targets = self._predictions(model)
        self.peers: dict[Shapes, list[tuple[int, int]]] = {}
        for i, call in enumerate(calls):
            shape = tuple((key, value.shape[1:]) for key, value in sorted(call.inputs.items()))
            self.peers.setdefault(shape, []).extend((i, row) for row in range(call.samples))

    @torch.no_grad()
    def _predictions(self, model: LoadedModel) -> list[Tensor]:
        module = _network(model, {}, self.calls)
        tracked = track(self.inputs, len(self.inputs), "float model's predictions")
        return [module(**inputs)[:, : inputs["hidden_states"].shape[1]] for inputs in tracked]

    def first(self) -> dict[str, Tensor]:
        """Inputs of one sample."""
        return {key: self._join(key, [(0, 0)]) for key in self.inputs[0]}

    def draw(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """At most `batch` different samples: inputs, target [B, C, H, W], weight [B]."""
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, f"batch {iteration}"))
        groups = list(self.peers.values())
        sizes = torch.tensor([float(len(group)) for group in groups])
        peers = groups[int(torch.multinomial(sizes, 1, generator=generator))]
        order = torch.randperm(len(peers), generator=generator)[: self.settings.batch]
        picks = [peers[i] for i in order.tolist()]
        inputs = {key: self._join(key, picks) for key in self.inputs[picks[0][0]]}
        target = torch.stack([self.targets[call][row] for call, row in picks])
        return inputs, target, torch.tensor([self._weight(*pick) for pick in picks])

    def _weight(self, call: int, row: int) -> float:
        weights = self.weights[call]
        return weights[row * len(weights) // self.calls[call].samples]

    def _join(self, key: str, picks: Sequence[tuple[int, int]]) -> Tensor:
        """The picked samples of one input; an input without batch axis (rotary tables) as it is."""
        if key in self.shared:
            return self.inputs[picks[0][0]][key]
        return torch.stack([self.inputs[call][key][row] for call, row in picks])


def _refuse_too_large(needed: int, what: str) -> None:
    """Raise ResourceError if that many bytes are not free."""
    remedy = "use a smaller calibrate.options.batch, or calibrate.options.use_lora=false to leave tuning out"
    machine.refuse_too_large(needed, f"TALoRA: {what} take about", remedy)


def _network(model: LoadedModel, parts: dict[str, BranchedLinear], calls: Sequence[Call]) -> nn.Module:
    """The denoiser with these linears, at the calls' resolution."""
    module = denoiser(model, parts)
    latents = calls[0].inputs["hidden_states"]
    if latents.ndim > 3:  # of tokens there is no table by height and width
        set_resolution(module, *latents.shape[-2:])
    return module


def _router(calls: Sequence[Call], branches: Branches, seed: int) -> TimestepRouter:
    times = torch.tensor(sorted({call.timestep for call in calls}))
    return TimestepRouter(branches.count, times, torch.Generator().manual_seed(_seed(seed, "router")))


def _seed(seed: int, name: str) -> int:
    """A seed for one use of randomness."""
    return seed * 2**32 + zlib.crc32(name.encode())
