"""The document of the GPU benchmark: benchmarks/results/gpu_NAME.json, one for each GPU, filled section by section.

    {"schema_version": 1, "gpu": {...}, "machine": {...}, "sections": {NAME: {...}}, "targets": [...]}

A section has the commit, the code and the versions it was measured with, "rows", the names it did not reach within its
budget, and why it stopped if it did. It is written after every row, so that a run that is killed keeps what it has.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import record
from export.errors import ContractError
from pipeline import machine
from pipeline.files import write_json

SCHEMA_VERSION = 1
GPU_KEYS = ("name", "compute_capability", "multiprocessors", "memory_bytes", "l2_bytes")
SECTION_KEYS = ("commit", "code", "versions", "date", "budget_s", "seconds", "rows", "not_reached", "stopped", "state")
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def gpu_facts() -> dict[str, Any]:
    """The current GPU. Raises what torch raises without one."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "compute_capability": 10 * gpu.major + gpu.minor,
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": getattr(gpu, "L2_cache_size", 50 << 20),
        "cuda": torch.version.cuda,
    }


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and driver as nvidia-smi says; empty where it is not there or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(STATE, (value.strip() for value in done.stdout.split(",")), strict=False))


def host_facts() -> dict[str, Any]:
    """The machine around the GPU; needs no package."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": machine.cpu_name(),
        "cpus": machine.cpu_count(),
    }


def slug(gpu: str) -> str:
    """Name of a GPU for a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def stamp() -> dict[str, Any]:
    """What a section's numbers belong to."""
    code = machine.code_version()
    return {"commit": record.commit(), "code": code, "versions": machine.tool_versions()} | {
        "date": time.strftime("%Y-%m-%d", time.gmtime())
    }


@dataclass
class Results:
    """The document at `path`; sections that are not measured anew stay as they were."""

    path: Path
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, gpu: dict[str, Any]) -> Results:
        """What is at `path`, or an empty document for `gpu`."""
        document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sections": {}, "targets": []}
        head = {"schema_version": SCHEMA_VERSION, "gpu": gpu, "machine": host_facts()}
        return cls(path, {**head, "sections": document["sections"], "targets": document["targets"]})

    def begin(self, name: str, budget_s: float) -> None:
        """Start section `name` anew."""
        self.document["sections"][name] = {
            **stamp(),
            "budget_s": budget_s,
            "seconds": 0.0,
            "rows": [],
            "not_reached": [],
            "stopped": "begun",
            "state": {"before": gpu_state()},
        }
        self.save()

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.document["sections"][name]["rows"].append(row)
        self.save()

    def end(self, name: str, not_reached: list[str], seconds: float) -> None:
        """The section came to its end, with names of rows that its budget did not reach."""
        section = self.document["sections"][name]
        section |= {"not_reached": not_reached, "stopped": "", "seconds": round(seconds, 1)}
        section["state"]["after"] = gpu_state()
        self.save()

    def stop(self, name: str, why: str) -> None:
        """The section did not come to its end."""
        if name in self.document["sections"]:
            self.document["sections"][name]["stopped"] = why
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.document)


def rows_of(document: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Rows of a section that were measured: neither failed nor skipped."""
    rows = document["sections"].get(section, {}).get("rows", [])
    return [row for row in rows if "failed" not in row and "skipped" not in row]


def wrong(document: dict[str, Any]) -> list[str]:
    """Names of rows that did not pass a check."""
    return [row["name"] for part in document["sections"].values() for row in part["rows"] if row.get("passed") is False]


def broken(document: dict[str, Any]) -> list[str]:
    """Names of rows that could not be run, and of sections that did not come to their end, with the reason."""
    stopped = [f"{name}: {part['stopped']}" for name, part in document["sections"].items() if part["stopped"]]
    rows = [row for part in document["sections"].values() for row in part["rows"]]
    return stopped + [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]


def is_checked(document: dict[str, Any]) -> bool:
    """Did every kernel pass with today's code and tools?"""
    section, now = document["sections"].get("check"), stamp()
    if section is None or section["stopped"] or section["not_reached"]:
        return False
    same = all(section[key] == now[key] for key in ("code", "versions"))
    return same and bool(section["rows"]) and all(row.get("passed") for row in section["rows"])


def validate(document: dict[str, Any]) -> None:
    """Raise ContractError for a document that is none of ours."""
    missing = [key for key in ("schema_version", "gpu", "machine", "sections", "targets") if key not in document]
    missing += [f"gpu.{key}" for key in GPU_KEYS if key not in document.get("gpu", {})]
    for name, section in document.get("sections", {}).items():
        missing += [f"sections.{name}.{key}" for key in SECTION_KEYS if key not in section]
        missing += [
            f"sections.{name}.rows[{i}].name" for i, row in enumerate(section.get("rows", [])) if "name" not in row
        ]
    if missing:
        raise ContractError(f"a GPU benchmark's document lacks {', '.join(missing)}; write it with benchmarks.gpu")
    if document["schema_version"] != SCHEMA_VERSION:
        raise ContractError(f"schema_version {document['schema_version']}; this code reads {SCHEMA_VERSION}")
