"""How much of a target is run in a verification: all that there is, but less of the portable model, which is slow.

It decodes its weights in function bodies and multiplies in float32. On a small model a call takes several times as long
as the `cpu` engine's; on a large one, whose weights stay packed and are decoded in every call, about 45 processor
seconds for 600 M parameters. There every linear is looked at in one step instead of three, two steps are compared and
no picture is drawn. What is compared meets the same limits as in other targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.backends import PORTABLE

# Of the portable model of a small model: pictures of its own trajectory, and every how many steps are compared.
PICTURES, EVERY = 1, 3


@dataclass(frozen=True)
class Effort:
    """steps: whose output is compared with the reference's. probed: the steps in which all linears are looked at.
    pictures: how many the target draws by itself."""

    steps: tuple[int, ...]
    probed: tuple[int, ...]
    pictures: int


def effort_for(target: str, n_steps: int, probed: tuple[int, ...], pictures: int, large: bool) -> Effort:
    """What is run of `target`, out of all steps, the steps `probed` and `pictures`; `large`: the model is.

    >>> effort_for("cpu", 4, (0, 2, 3), 4, large=False)
    Effort(steps=(0, 1, 2, 3), probed=(0, 2, 3), pictures=4)
    >>> effort_for("onnx", 8, (0, 4, 7), 4, large=False)
    Effort(steps=(0, 3, 4, 6, 7), probed=(0, 4, 7), pictures=1)
    >>> effort_for("onnx", 8, (0, 4, 7), 1, large=True)
    Effort(steps=(0, 7), probed=(4,), pictures=0)
    """
    if target != PORTABLE:
        return Effort(tuple(range(n_steps)), probed, pictures)
    if large:
        return Effort(tuple(sorted({probed[0], probed[-1]})), (probed[len(probed) // 2],), 0)
    return Effort(tuple(sorted({*range(0, n_steps, EVERY), *probed})), probed, min(PICTURES, pictures))


def note(target: str, effort: Effort, n_steps: int, probed: tuple[int, ...], pictures: int) -> str:
    """What a report says where less was run than of other targets; "" where it was not."""
    if effort == Effort(tuple(range(n_steps)), probed, pictures):
        return ""
    drawn = f"{effort.pictures} of {pictures} pictures" if effort.pictures else "no picture"
    looked = f"linears in {len(effort.probed)} of {len(probed)} steps"
    return f"{target}: compared in {len(effort.steps)} of {n_steps} steps, {looked}, {drawn}: it is slow"
