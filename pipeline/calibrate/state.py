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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export import checkpoint
from export.checkpoint import LAYERS_FILE, QuantizedLinear
from pipeline.calibrate.plan import LayerPlan

ORIGIN_FILE = "calibration.json"


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
