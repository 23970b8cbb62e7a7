"""The results of `python -m benchmarks.quality`: one JSON for each model, a record for each row, written row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks import record
from benchmarks.quality.metrics import LEVEL, RESAMPLES
from benchmarks.quality.rows import Algorithm
from benchmarks.record import Json
from export.errors import RecipeError
from pipeline import machine
from pipeline.files import sha256_json
from pipeline.jobs.jobs import Ended
from pipeline.recipe import Recipe

FLOAT = "float"
# What a record may say of its row.
MEASURED, UNAVAILABLE, FAILED = "measured", "unavailable", "failed"
INTERVALS = (
    f"{LEVEL:.0%}; frechet_*: {RESAMPLES} bootstraps over pictures (real data fixed, sets of equal noise resampled "
    "together), percentiles moved so that their mean is the estimate; accuracy: Wilson; psnr_db, ssim: percentile "
    f"bootstrap of the median over pictures, {RESAMPLES} resamples; all with seed 0"
)


class Results:
    """benchmarks/results/quality_MODEL.json (or another folder): records by the name of their row."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder

    @property
    def path(self) -> Path:
        return self.folder / f"quality_{self.model}.json"

    def read(self) -> Json:
        """The whole document; without rows if there is none yet."""
        return record.read(self.path, {"rows": {}})

    def refuse_others(self, subject: Mapping[str, object]) -> None:
        """Raises RecipeError if the file holds rows of other pictures: a table must not mix them."""
        stored = self.read().get("subject", subject)
        different = [
            f"{key} {stored.get(key)!r}, not {subject[key]!r}" for key in subject if stored.get(key) != subject[key]
        ]
        if different:
            raise RecipeError(f"{self.path} has {'; '.join(different)}; give another --output-dir, or remove it")

    def has(self, name: str, key: str) -> bool:
        """Is the row measured under this key?"""
        row = self.read()["rows"].get(name, {})
        return row.get("status") == MEASURED and row.get("key") == key

    def add(self, name: str, row: Mapping[str, object], subject: Mapping[str, object]) -> None:
        """Put in one row's record, with this process's stamp unless it has one; what else stands in the file stays."""
        document = self.read()
        missing = {key: value for key, value in stamp().items() if key not in row}
        document["rows"][name] = {**row, **missing}
        self._write(document, subject)

    def put(self, part: str, value: object, subject: Mapping[str, object]) -> None:
        """Replace a part beside the rows, for example "sensitivity"."""
        self._write(self.read() | {part: value}, subject)

    def _write(self, document: Json, subject: Mapping[str, object]) -> None:
        header = {"model": self.model, "subject": subject, "intervals": INTERVALS}
        rest = {key: value for key, value in document.items() if key not in (*header, "machine", "versions", "commit")}
        record.write(self.path.stem, header | rest, self.folder)


def row_key(
    subject: Mapping[str, object],
    recipe: Recipe | None,
    multipliers: tuple[int, ...],
    algorithm: Algorithm | None = None,
) -> str:
    """Hash of the settings that decide a row's numbers. The code does so, too: its hash is kept with every record, and
    `--redo` measures a row again after a change."""
    parts = [asdict(getattr(recipe, part)) for part in ("formats", "weights", "calibrate")] if recipe else []
    if recipe and recipe.attention.formats is not None:  # else the key of rows that were measured before it was
        parts.append(asdict(recipe.attention))
    if algorithm is not None:
        parts.append(dict(algorithm))
    return sha256_json([subject, parts, list(multipliers)])[:16]


def outcome(ended: Ended) -> Json:
    """What a record says of how the row's job ended: its numbers, or why it failed. A table with a hole says what is in
    it, and no row stops another."""
    return {"status": MEASURED} | ended.result if ended.passed else {"status": FAILED, "reason": ended.reason}


def stamp() -> Json:
    """The processor and the code of this process, which a record of what it measures bears."""
    return {"cpu": machine.cpu_name(), "commit": record.commit(), "code_sha256": machine.code_version()}
