"""What calibration keeps on disk: finished layers of a run that may be stopped, then the whole checkpoint.

FOLDER/calibration.json     what the layers were made from (model, settings, data); another run's state is not used
FOLDER/layers/NAME/         one finished layer, while the run goes on; layers/seconds.json: the time it took so far
FOLDER/.../                 a method's own state, while the run goes on
FOLDER/quantized.*          the checkpoint, when all layers are done; the folders are then removed
FOLDER/kept/                what is not quantized, written by the command `calibrate`, so that `export` needs no model
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from typing_extensions import TypedDict

from export import checkpoint
from export.checkpoint import LAYERS_FILE, QuantizedLinear
from export.documents import Rules, read_json, whole_file
from export.errors import ContractError, RecipeError
from pipeline.calibrate.plan import LayerPlan
from pipeline.files import lock

logger = logging.getLogger(__name__)
ORIGIN_FILE = "calibration.json"
TIME_FILE = "seconds.json"
KEPT = "kept"
RULES = Rules(remedy="calibrate again with --force")


class Times(TypedDict):
    """seconds: what an interrupted run took."""

    seconds: Annotated[float, Ge(0)]


def copy_finished(source: Path, folder: Path, origin: Mapping[str, object]) -> None:
    """Copy the finished calibration in `source` into `folder`. Raises RecipeError as `refuse_unfinished` does."""
    refuse_unfinished(source, origin)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ORIGIN_FILE, checkpoint.WEIGHTS_FILE, LAYERS_FILE):
        shutil.copyfile(source / name, folder / name)


def refuse_unfinished(source: Path, origin: Mapping[str, object]) -> None:
    """Raise RecipeError if `source` has no finished calibration, or with every setting that differs if it was not made
    from `origin`."""
    path = source / ORIGIN_FILE
    if not (path.is_file() and (source / LAYERS_FILE).is_file()):
        raise RecipeError(f"{source} holds no finished calibration; python -m pipeline.calibrate -o {source} makes one")
    differing = differences(path, origin)
    if differing:
        raise RecipeError(f"{source}: made from other settings ({differing}); give the same ones, or calibrate again")


def differences(path: Path, origin: Mapping[str, object]) -> str | None:
    """What `path` says otherwise than `origin`, key by key in words; None where they agree."""
    stored = read_json(path, dict[str, object], RULES)
    there, here = (dict(_flat(value)) for value in (stored, json.loads(json.dumps(origin))))
    differing = [key for key in sorted(there | here) if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)} there, {here.get(key)} here" for key in differing) or None


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Keys like `weights.search`, as recipes and --set have them, and their values."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


class CalibrationState:
    """The folder of one calibration, locked while it is entered.

    Entering raises RecipeError if another process has it. State of other settings is refused with what differs
    (RecipeError) by `resume`, and else removed with a warning.
    """

    def __init__(self, folder: Path, origin: Mapping[str, object], resume: bool = False) -> None:
        self.folder, self.layers_dir = folder, folder / "layers"
        self.origin, self.resume = origin, resume

    def __enter__(self) -> CalibrationState:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder, "calibration")
        try:
            self._take_up()
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self.lock)

    def _take_up(self) -> None:
        """Make the folder one of this calibration."""
        path = self.folder / ORIGIN_FILE
        differing = differences(path, self.origin) if path.is_file() else None
        if differing and self.resume:
            remedy = "restore them to go on, or start again with --force instead of --resume"
            raise RecipeError(f"{self.folder} holds a calibration by other settings ({differing}); {remedy}")
        if differing:
            logger.warning("%s: removing a calibration by other settings (%s)", self.folder, differing)
        if differing or not path.is_file():
            for name in (ORIGIN_FILE, checkpoint.LAYERS_FILE, checkpoint.WEIGHTS_FILE):
                (self.folder / name).unlink(missing_ok=True)
            self._remove_folders()
            _write(path, self.origin)
        times = self.layers_dir / TIME_FILE
        self._earlier = read_json(times, Times, RULES)["seconds"] if times.is_file() else 0.0
        self._started = time.monotonic()

    def _remove_folders(self) -> None:
        for child in self.folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)

    @property
    def is_complete(self) -> bool:
        return (self.folder / LAYERS_FILE).is_file()

    @property
    def seconds(self) -> float:
        """How long this run has taken, and the interrupted ones before it to their last finished unit."""
        return self._earlier + time.monotonic() - self._started

    def has_all(self, plans: Sequence[LayerPlan]) -> bool:
        """Whether the layers are done; the JSON of each is written last."""
        return all((self.layers_dir / plan.name / LAYERS_FILE).is_file() for plan in plans)

    def add(self, layers: Sequence[QuantizedLinear]) -> None:
        """Keep the layers of a finished unit."""
        for layer in layers:
            checkpoint.save([layer], self.layers_dir / layer.name)
        _write(self.layers_dir / TIME_FILE, {"seconds": self.seconds})

    def layers(self, names: Sequence[str]) -> list[QuantizedLinear]:
        """Finished layers by name, in that order. Raises ContractError if a folder holds another layer."""
        return [layer for name in names for layer in load_named(self.layers_dir / name, [name])]

    def complete(self, layers: list[QuantizedLinear]) -> None:
        """Write the checkpoint, and remove what only an unfinished run needs."""
        checkpoint.save(layers, self.folder)
        self._remove_folders()


def load_named(folder: Path, names: Sequence[str]) -> list[QuantizedLinear]:
    """The layers that `folder` holds. Raises ContractError if they are not these, in this order."""
    layers = checkpoint.load(folder)
    pairs = zip([layer.name for layer in layers], names, strict=False)
    wrong = next(((held, name) for held, name in pairs if held != name), None)
    if wrong or len(layers) != len(names):
        held, expected = wrong or (f"{len(layers)} layers", f"{len(names)}")
        raise ContractError(
            f"{folder}: found {held} where {expected} belongs; remove that folder, which is then made again"
        )
    return layers


def _write(path: Path, document: object) -> None:
    """Write JSON. Not synced: what is lost with the machine's power is made again."""
    with whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
