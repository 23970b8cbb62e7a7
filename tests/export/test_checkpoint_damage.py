"""Checkpoints whose files are damaged or from another version are refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.checkpoint import (
    LAYERS_FILE,
    WEIGHTS_FILE,
    load,
    save,
)
from export.errors import ContractError
from tests.export.test_checkpoint import ROUTED, layer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save([layer(seed=0), layer("E3M0", "per_channel", seed=1)], tmp_path)
    return tmp_path


def edit(folder: Path, change: Any) -> None:
    """Apply `change` to the parsed rows file."""
    document = json.loads((folder / LAYERS_FILE).read_text())
    change(document)
    (folder / LAYERS_FILE).write_text(json.dumps(document))


@pytest.mark.parametrize("name", [LAYERS_FILE, WEIGHTS_FILE])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ContractError, match=f"{name}.*calibrate again"):
        load(saved)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", [LAYERS_FILE, WEIGHTS_FILE])
def test_truncated_file(saved: Path, name: str, keep: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: min(int(len(data) * keep), len(data) - 2)])
    with pytest.raises(ContractError, match=f"{name}.*calibrate again"):
        load(saved)


def test_bytes_that_are_no_text(saved: Path) -> None:
    (saved / LAYERS_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContractError, match="is not in UTF-8"):
        load(saved)


@pytest.mark.parametrize("text", ["[]", "3", '{"layers": []}'])
def test_another_document(saved: Path, text: str) -> None:
    (saved / LAYERS_FILE).write_text(text)
    with pytest.raises(ContractError, match="schema version None, this version reads 2; calibrate again"):
        load(saved)


def test_another_schema(saved: Path) -> None:
    edit(saved, lambda document: document.update(schema_version=99))
    with pytest.raises(ContractError, match="schema version 99, this version reads 2"):
        load(saved)


DAMAGES = {
    "no layers": lambda document: document.pop("layers"),
    "layers of another kind": lambda document: document.update(layers="two"),
    "a row that is no table": lambda document: document["layers"].append(3),
    "missing key": lambda document: document["layers"][0].pop("kind"),
    "unknown key": lambda document: document["layers"][1].update(colour="red"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows(saved: Path, damage: str) -> None:
    edit(saved, DAMAGES[damage])
    with pytest.raises(ContractError, match=f"{LAYERS_FILE}: .*layers.*calibrate again"):
        load(saved)


def test_missing_tensor(saved: Path) -> None:
    edit(saved, lambda document: document["layers"][0].update(name="blocks.7.to_q"))
    with pytest.raises(ContractError, match=r"tensor blocks.7.to_q/codes is missing; .*calibrate again"):
        load(saved)


def test_missing_tensor_of_the_router(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    save([ROUTED], tmp_path)
    arrays = load_file(tmp_path / WEIGHTS_FILE)
    del arrays["router/b1"]
    save_file(arrays, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ContractError, match=r"tensor router/b1 is missing; .*calibrate again"):
        load(tmp_path)


def test_rows_that_do_not_fit_their_tensors(saved: Path) -> None:
    edit(saved, lambda document: document["layers"][0].update(in_features=32))
    with pytest.raises(ContractError, match=r"codes are uint8 \(6, 12\); E2M1 exact_group with K=32 needs"):
        load(saved)
