"""What every row of the quality tables draws: the same prompts from the same noise, with the model's own sampler.

Fewer pictures are the first ones of more: labels come from one long list, and every picture's noise from its own seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.judging import JUDGINGS, Judging
from benchmarks.quality.painters import Painter, Pictures, PipelinePainter, PixelPainter, Run
from benchmarks.record import Json
from benchmarks.zoo.pixart_scenes.picture import GUIDANCE
from benchmarks.zoo.pixart_scenes.train import PLAN
from export.documents import sha256, whole_file
from export.models.load import LoadedModel, denoiser, load
from pipeline.backends.base import Arrays
from pipeline.backends.reference import ReferenceEngine
from pipeline.distance import sqnr_db
from pipeline.files import sha256_json
from pipeline.generate.conditioning import load_generation
from pipeline.generate.pipeline_folder import pipeline_root
from pipeline.progress import track

# Pictures at once: what a block computes stays in the cache.
BATCH_SIZES = {"pixart_mini": 4, "dit_mini": 50, "pixart_scenes": 8}
# Pictures whose steps on the float model's trajectory are compared; both halves of guidance count.
STEP_PICTURES = 16


@dataclass(frozen=True)
class Subject:
    """A bundled model and what is drawn with it. labels: [N, ...] int64, as its judge has them."""

    name: str
    model: LoadedModel
    painter: Painter
    labels: torch.Tensor
    prompts: list[str]
    seed: int

    @property
    def judging(self) -> Judging:
        return JUDGINGS[self.name]

    @property
    def facts(self) -> Json:
        """Everything that decides the pictures of one denoiser, and how they are judged."""
        return {
            "model": self.name,
            "model_sha256": self.model.sha256,
            "prompts": self.judging.conditions,
            "count": len(self.prompts),
            "seed": self.seed,
            **self.painter.facts,
            "judge_sha256": sha256(self.judging.judge_path),
        }


def make_subject(name: str, count: int, seed: int) -> Subject:
    """The bundled model `name` with `count` prompts and their noise."""
    model = load(f"zoo:{name}")
    labels, prompts = JUDGINGS[name].prompts(seed)
    return Subject(name, model, make_painter(model, count, seed), labels[:count], prompts[:count], seed)


def make_painter(model: LoadedModel, count: int, seed: int) -> Painter:
    """Of a bundled model: by its pipeline where it is of one."""
    root = pipeline_root(model)
    if root is not None:
        return PipelinePainter(root, model, PLAN.n_steps, GUIDANCE, seed)
    size = model.config["sample_size"]
    shape = (model.config["in_channels"], size, size)
    noise = np.stack([np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(count)])
    return PixelPainter(load_generation(model.folder), noise)


def draw(subject: Subject, run: Run, label: str) -> Pictures:
    """All pictures of the subject by the denoiser `run`, [N, C, H, W]."""
    size, prompts = BATCH_SIZES[subject.name], subject.prompts
    starts = range(0, len(prompts), size)
    parts = (subject.painter.draw(run, prompts[i : i + size], i) for i in starts)
    return np.concatenate([*track(parts, len(starts), label)])


def float_engine(subject: Subject) -> ReferenceEngine:
    return ReferenceEngine(denoiser(subject.model), torch.float32)


def float_pictures(subject: Subject, folder: Path) -> Pictures:
    """The float model's pictures; kept in `folder`, since every row is compared with them."""
    path = folder / f"float-{sha256_json(subject.facts)[:12]}.npy"
    if not path.is_file():
        pictures = draw(subject, float_engine(subject).run, f"{subject.name} float")
        with whole_file(path) as part, part.open("wb") as file:
            np.save(file, pictures)
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
    engine, calls, outputs = float_engine(subject), list[Arrays](), list[NDArray[np.floating]]()

    def kept(inputs: Arrays) -> Arrays:
        output = engine.run(inputs)
        calls.append(inputs)
        outputs.append(output["sample"])
        return output

    subject.painter.draw(kept, subject.prompts[:STEP_PICTURES], 0)
    return Trajectory(calls, outputs)
