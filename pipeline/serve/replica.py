"""What a replica of `ditc serve --ray` runs: one engine, in a process of a Ray cluster. Ray itself is not seen here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from export.errors import ContractError, RecipeError
from pipeline.bundle.pipeline_bundle import manifest_sha256
from pipeline.generate.draw import Picture, Pictures
from pipeline.text_to_image import Pipeline


@dataclass(frozen=True)
class Order:
    """Pictures to draw together. preview_steps: of each, after how many steps there are previews."""

    pictures: tuple[Picture, ...]
    n_steps: int | None
    guidance_scale: float | None
    preview_steps: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Progress:
    """A step that was made. previews, and pictures after the last step: [H, W, C] uint8 by the place in the order, or a
    sentence on why there is none."""

    steps_done: int
    n_steps: int
    previews: dict[int, Pictures | str]
    pictures: dict[int, Pictures | str]


class Replica:
    """Draws orders, one at a time."""

    def __init__(self, bundle: str, manifest: str, target: str, threads: int, keep_loaded: bool | None = None) -> None:
        """bundle: a folder of this machine; manifest: the SHA-256 that the server's own has. keep_loaded: as of
        Pipeline.load, by the memory of the replica's machine. Raises RecipeError for another bundle than that."""
        if (own := manifest_sha256(Path(bundle))) != manifest:
            raise RecipeError(
                f"{bundle} of this machine is another bundle (manifest {own[:12]}) than the server's "
                f"({manifest[:12]}); copy the same one to every machine"
            )
        self.pipeline = Pipeline.load(bundle, target, threads, keep_loaded)

    async def draw(self, order: Order) -> AsyncIterator[Progress]:
        """Step by step. Steps are made in another thread, so that the cluster finds the replica alive meanwhile, and
        none is made after the one that is running when nobody waits any more."""
        drawing = await asyncio.to_thread(self.pipeline.start, order.pictures, order.n_steps, order.guidance_scale)
        while not drawing.is_over:
            await asyncio.to_thread(drawing.step)
            wanted = [row for row, steps in enumerate(order.preview_steps) if drawing.steps_done in steps]
            previews = {row: _or_reason(drawing.preview, row) for row in wanted}
            finished = range(len(order.pictures) if drawing.is_over else 0)
            pictures = {row: _or_reason(drawing.picture, row) for row in finished}
            yield Progress(drawing.steps_done, drawing.n_steps, previews, pictures)


def _or_reason(take: Callable[[int], Pictures], row: int) -> Pictures | str:
    try:
        return take(row)
    except ContractError as error:  # this picture's own: those beside it need not have NaN
        return str(error)
