"""What every row of the quality tables draws: the same prompts from the same noise, with the model's own sampler.

Fewer pictures are the first ones of more: labels come from one long list, and every picture's noise from its own seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.metrics import Array
from benchmarks.record import Json
from benchmarks.zoo import judges
from export.models.load import LoadedModel, denoiser, load
from pipeline.backends.base import Arrays
from pipeline.backends.reference import ReferenceEngine
from pipeline.distance import sqnr_db
from pipeline.files import sha256, sha256_json
from pipeline.generate.conditioning import Generation, load_generation
from pipeline.generate.sampling import make_sampler, sample
from pipeline.progress import track

Pictures = NDArray[np.float32]
Run = Callable[[Arrays], Arrays]
BATCH_SIZES = {"pixart_mini": 4, "dit_mini": 50}  # pictures at once: what a block computes stays in the cache
LABELS = 10_000  # the long list; more pictures than this cannot be asked for
JUDGED_AT_ONCE = 500
# Pictures whose steps on the float model's trajectory are compared; both halves of guidance count.
STEP_PICTURES = 16


@dataclass(frozen=True)
class Subject:
    """A bundled model and what is drawn with it. labels: [N, slots] int64; noise: [N, C, H, W]."""

    name: str
    model: LoadedModel
    generation: Generation
    labels: torch.Tensor
    prompts: list[str]
    noise: Pictures
    seed: int

    @property
    def facts(self) -> Json:
        """Everything that decides the pictures of one denoiser, and how they are judged."""
        return {
            "model": self.name,
            "model_sha256": self.model.sha256,
            "prompts": judges.CONDITIONS[self.name],
            "count": len(self.prompts),
            "seed": self.seed,
            "sampler": self.generation.sampler,
            "n_steps": self.generation.n_steps,
            "guidance_scale": self.generation.guidance_scale,
            "judge_sha256": sha256(judges.JUDGES[self.name].path),
        }


def make_subject(name: str, count: int, seed: int) -> Subject:
    """The bundled model `name` with `count` prompts and their noise."""
    model = load(f"zoo:{name}")
    labels, prompts = judges.conditions(name, LABELS, seed)
    size = model.config["sample_size"]
    shape = (model.config["in_channels"], size, size)
    noise = np.stack([np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(count)])
    return Subject(name, model, load_generation(model.folder), labels[:count], prompts[:count], noise, seed)


def draw(subject: Subject, run: Run, label: str) -> Pictures:
    """All pictures of the subject by the denoiser `run`, [N, C, H, W]."""
    size = BATCH_SIZES[subject.name]
    starts = range(0, len(subject.prompts), size)
    parts = (slice(start, start + size) for start in starts)
    return np.concatenate([_draw(subject, run, part) for part in track(parts, len(starts), label)])


def _draw(
    subject: Subject, run: Run, part: slice, on_step: Callable[[int, Arrays, Arrays], None] | None = None
) -> Pictures:
    generation = subject.generation
    sampler = make_sampler(generation.sampler, generation.n_steps, generation.timestep_scale)
    encoded = generation.encode(subject.prompts[part])
    return sample(run, encoded, subject.noise[part], sampler, generation.guidance_scale, on_step)


def float_engine(subject: Subject) -> ReferenceEngine:
    return ReferenceEngine(denoiser(subject.model), torch.float32)


def float_pictures(subject: Subject, folder: Path) -> Pictures:
    """The float model's pictures; kept in `folder`, since every row is compared with them."""
    path = folder / f"float-{sha256_json(subject.facts)[:12]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw(subject, float_engine(subject).run, f"{subject.name} float")
        np.save(path.with_suffix(".part.npy"), pictures)
        path.with_suffix(".part.npy").replace(path)
    return np.load(path)


# --- steps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """The float model's calls while it draws STEP_PICTURES pictures: inputs and output [2 B, C, H, W] of every step."""

    calls: list[Arrays]
    outputs: list[NDArray[np.floating]]

    def errors_db(self, run: Run) -> list[float]:
        """SQNR of another denoiser's output in each step, on the same inputs."""
        pairs = zip(self.calls, self.outputs, strict=True)
        return [sqnr_db(output, run(call)["sample"]) for call, output in pairs]


def float_trajectory(subject: Subject) -> Trajectory:
    calls: list[Arrays] = []
    outputs: list[NDArray[np.floating]] = []

    def keep(_: int, inputs: Arrays, output: Arrays) -> None:
        calls.append(inputs)
        outputs.append(output["sample"])

    _draw(subject, float_engine(subject).run, slice(0, STEP_PICTURES), keep)
    return Trajectory(calls, outputs)


# --- the judge ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def judged(name: str, pictures: Pictures) -> tuple[Array, torch.Tensor]:
    """What the bundled judge sees: features [N, 64] float64, and labels [N, slots] int64."""
    judge = judges.load(name)
    parts = torch.from_numpy(pictures).clamp(-1, 1).split(JUDGED_AT_ONCE)
    features = torch.cat([judge.features(part) for part in parts]).double().numpy()
    return features, torch.cat([judge.read(part) for part in parts])


def real_features(name: str) -> Array:
    """Features of the held-out real data, [M, 64]."""
    return judged(name, judges.JUDGES[name].test()[1].numpy())[0]
