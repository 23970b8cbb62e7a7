"""How much of a target is run in a verification: all that there is, but less of a slow one, the portable model.

It decodes its weights in function bodies and multiplies in float32. On a small model a call takes several times as long
as the `cpu` engine's; on a large one, whose weights stay packed and are decoded in every call, about 45 processor
seconds for 600 M parameters. Its linears are looked at in one step instead of two, and in no call of a large batch;
of a large model one step is compared and no picture is drawn. What is compared meets the same limits as in other
targets.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.backends import BACKENDS
from pipeline.generate.case import is_large
from pipeline.recipe import Recipe
from pipeline.verify import calls

if TYPE_CHECKING:
    from export.models.load import LoadedModel

# Of a slow target of a small model: pictures of its own trajectory, and every how many steps are compared.
PICTURES, EVERY = 1, 3
BATCHES = tuple(size for size, _ in calls.BATCHES)
# Batches of the special calls whose inner tensors are looked at: samples of every pool. Those of 2 are among those of
# 9, which take more memory and time: of the portable model the 2 are looked at, else the 9.
INSIDE, FEW_INSIDE = (1, 3, 9), (1, 2, 3)
# The same of a large model, the first sample alone: an odd length, a partial mask, larger latents and a timestep
# between the integers, as no sample of a step has them.
LARGE_INSIDE, LARGE_SAMPLES = (3,), 1
# Special calls of a large model's portable model, so that an empty mask is looked at in its other targets alone.
LARGE_PORTABLE = (3,)
# Scores of an attention that are computed again in one call. Of a longer one every head is looked at, and some of the
# queries, evenly among all: at 4096 tokens 32 of each head of two samples.
MOST_SCORES = 2**22
# Calls of a large model's lowered graph where it stands in for an engine: those of 9 hold each sample three times. It
# draws no picture, which repeats its steps.
STOOD_IN = (1, 2, 3)
# Of `verify --quick`: the first step and the last, which is looked into; of a small model with the noise of so many
# pictures, none of which is drawn by the engine: where a step is that long one flip moves a picture as far as
# quantization does. Of the special calls those of one sample and of three, which have samples of every pool; no calls
# for what an engine keeps.
QUICK_STEPS, QUICK_PICTURES, QUICK_SPECIAL, QUICK_INSIDE = 2, 2, (1, 3), (3,)


@dataclass(frozen=True)
class Effort:
    """steps: whose output is compared with the reference's. probed: the steps in which all linears and stretches are
    looked at. pictures: how many the target draws by itself. special: batch sizes of the calls that drawing does not
    make; inside: those of them that are looked into, by so many `samples` each, None for all. state: are calls made for
    what an engine keeps between them?"""

    steps: tuple[int, ...]
    probed: tuple[int, ...]
    pictures: int
    special: tuple[int, ...] = BATCHES
    inside: tuple[int, ...] = INSIDE
    samples: int | None = None
    state: bool = True


def effort_for(
    target: str, n_steps: int, probed: tuple[int, ...], pictures: int, large: bool, runs: bool = True
) -> Effort:
    """What is run of `target`, out of all steps, the steps `probed` and `pictures`; `large`: the model is. runs: does
    the engine, or does its lowered graph stand in for it?

    >>> effort_for("cpu", 4, (0, 3), 4, large=False).inside
    (1, 3, 9)
    >>> effort_for("onnx", 8, (0, 7), 1, large=True)
    Effort(steps=(7,), probed=(7,), pictures=0, special=(3,), inside=(), samples=None, state=False)
    """
    last = probed[-1:]
    if not BACKENDS[target].slow:
        if not large:
            return Effort(tuple(range(n_steps)), probed, pictures)
        if not runs:
            return Effort(tuple(range(n_steps)), last, 0, STOOD_IN, LARGE_INSIDE, LARGE_SAMPLES)
        return Effort(tuple(range(n_steps)), last, pictures, inside=LARGE_INSIDE, samples=LARGE_SAMPLES)
    if large:
        return Effort(last, last, 0, special=LARGE_PORTABLE, inside=(), state=False)
    steps = tuple(sorted({*range(0, n_steps, EVERY), *probed}))
    return Effort(steps, last, min(PICTURES, pictures), inside=FEW_INSIDE)


def quick_targets(targets: Sequence[str], running: Collection[str]) -> tuple[str, ...]:
    """The targets that a quick verification looks at: those that run here, without slow ones where there are others.

    >>> quick_targets(["cpu", "rtx", "onnx"], ["cpu", "onnx"]), quick_targets(["rtx", "onnx"], ["onnx"])
    (('cpu',), ('onnx',))
    """
    runs = [target for target in targets if target in running] or targets
    return tuple(target for target in runs if not BACKENDS[target].slow) or tuple(runs)


def quick_recipe(recipe: Recipe) -> Recipe:
    """The recipe as a quick verification draws by it: of QUICK_STEPS steps, but for one of fewer."""
    steps = min(QUICK_STEPS, recipe.sampling.n_steps)
    return replace(recipe, sampling=replace(recipe.sampling, n_steps=steps))


def quick_effort(effort: Effort) -> Effort:
    """What a quick verification runs of a target, out of what a whole one runs of a trajectory of as few steps."""
    special = tuple(size for size in effort.special if size in QUICK_SPECIAL)
    inside = tuple(size for size in effort.inside if size in QUICK_INSIDE)
    return replace(effort, probed=effort.probed[-1:], pictures=0, special=special, inside=inside, state=False)


def quick_pictures(model: LoadedModel) -> int:
    """How many pictures the reference draws; 0 for as many as otherwise, of a large model or a text encoder."""
    return QUICK_PICTURES if model.family.steps and not is_large(model) else 0


def quick_note(looked_at: Sequence[str], targets: Sequence[str], n_steps: int | None) -> str:
    """What a report says of it. n_steps: None of an autoencoder, which is called as in a whole verification."""
    less = [f"{', '.join(looked_at)} alone"]
    if n_steps is not None:
        less += [
            f"{n_steps} step(s), the last of them looked into",
            f"special calls of batch {' and '.join(map(str, QUICK_SPECIAL))}",
            "no gate on pictures, no call for what an engine keeps between calls",
        ]
    left_out = [target for target in targets if target not in looked_at]
    others = f"; not looked at: {', '.join(left_out)}" if left_out else ""
    return f"quick verification: {'; '.join(less)}{others}. A whole one (without --quick) looks at all of it"


def note(target: str, effort: Effort, n_steps: int, probed: tuple[int, ...], pictures: int) -> str | None:
    """What a report says where less was run than can be."""
    if effort == Effort(tuple(range(n_steps)), probed, pictures):
        return None
    looked = f"linears in {len(effort.probed)} of {len(probed)} steps"
    alone = _calls([size for size in effort.special if size not in effort.inside], "compared by their outputs alone")
    skipped = _calls([size for size in BATCHES if size not in effort.special], "not made")
    if effort.samples == LARGE_SAMPLES and effort.inside:
        alone += f"; one sample of batch {', '.join(map(str, effort.inside))} is looked into"
    drawn = f"{effort.pictures} of {pictures} pictures" if effort.pictures else "no picture"
    if not BACKENDS[target].slow:
        return f"{target}: large model, {looked}{'' if effort.pictures else f', {drawn}'}{alone}{skipped}"
    kept = "" if effort.state else "; nor are those that show what is kept between calls"
    steps = f"{target}: compared in {len(effort.steps)} of {n_steps} steps"
    return f"{steps}, {looked}, {drawn}: it is slow{alone}{skipped}{kept}"


def _calls(sizes: Sequence[int], treatment: str) -> str:
    if not sizes:
        return ""
    *others, last = map(str, sizes)
    return f"; calls of batch {', '.join(others)}{' and ' * bool(others)}{last} are {treatment}"
