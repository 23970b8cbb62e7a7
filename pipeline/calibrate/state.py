"""What calibration keeps on disk: finished layers of a run that may be stopped, then the whole checkpoint.

FOLDER/calibration.json     what the layers were made from (model, recipe); another run's state is not used
FOLDER/layers/NAME/         one finished layer, while the run goes on
FOLDER/.../                 a method's own state, while the run goes on
FOLDER/quantized.*          the checkpoint, when all layers are done; the folders are then removed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export import checkpoint
from export.checkpoint import LAYERS_FILE, QuantizedLinear
from export.errors import RecipeError
from pipeline.calibrate.plan import LayerPlan

ORIGIN_FILE = "calibration.json"


def copy_finished(source: Path, folder: Path, origin: Mapping[str, Any]) -> None:
    """Copy the finished calibration in `source` into `folder`.

    Raises RecipeError if there is none, or with every setting that differs if it was not made from `origin`.
    """
    path = source / ORIGIN_FILE
    if not (path.is_file() and (source / LAYERS_FILE).is_file()):
        raise RecipeError(f"{source} holds no finished calibration; python -m pipeline.calibrate -o {source} makes one")
    found, wanted = (dict(_flat(value)) for value in (json.loads(path.read_text()), json.loads(json.dumps(origin))))
    differing = [key for key in sorted(found | wanted) if found.get(key) != wanted.get(key)]
    if differing:
        told = "; ".join(f"{key} is {found.get(key)} there, {wanted.get(key)} here" for key in differing)
        raise RecipeError(f"{source}: made from other settings ({told}); give the same ones, or calibrate again")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ORIGIN_FILE, checkpoint.WEIGHTS_FILE, LAYERS_FILE):
        shutil.copyfile(source / name, folder / name)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys like `weights.search`, as recipes and --set have them, and their values."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


class CalibrationState:
    """The folder of one calibration. State of another model or recipe is removed when it is opened."""

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self.folder, self.layers_dir = folder, folder / "layers"
        text = json.dumps(origin, indent=1, sort_keys=True)
        path = folder / ORIGIN_FILE
        if not path.is_file() or path.read_text() != text:
            self._clear()
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            partial.write_text(text)
            os.replace(partial, path)

    def _clear(self) -> None:
        for name in (ORIGIN_FILE, checkpoint.LAYERS_FILE, checkpoint.WEIGHTS_FILE):
            (self.folder / name).unlink(missing_ok=True)
        for child in self.folder.iterdir() if self.folder.is_dir() else ():
            if child.is_dir():
                shutil.rmtree(child)

    @property
    def is_complete(self) -> bool:
        return (self.folder / LAYERS_FILE).is_file()

    def has(self, name: str) -> bool:
        """Whether the layer is done; its JSON is written last."""
        return (self.layers_dir / name / LAYERS_FILE).is_file()

    def has_all(self, plans: Sequence[LayerPlan]) -> bool:
        return all(self.has(plan.name) for plan in plans)

    def add(self, layer: QuantizedLinear) -> None:
        checkpoint.save([layer], self.layers_dir / layer.name)

    def layers(self, names: Sequence[str]) -> list[QuantizedLinear]:
        """Finished layers by name, in that order."""
        return [layer for name in names for layer in checkpoint.load(self.layers_dir / name)]

    def complete(self, layers: list[QuantizedLinear]) -> None:
        """Write the checkpoint, and remove what only an unfinished run needs."""
        checkpoint.save(layers, self.folder)
        for child in self.folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
