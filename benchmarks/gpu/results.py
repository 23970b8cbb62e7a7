"""The document of the GPU benchmark: benchmarks/results/gpu_NAME.json, one for each GPU, filled section by section.

    {"schema_version": 1, "gpu": {...}, "machine": {...}, "sections": {NAME: {...}}, "targets": [...]}

A section has the commit, the code and the versions it was measured with, "rows", the names it did not reach within its
budget, and why it stopped if it did. It is written after every row, so that a run that is killed keeps what it has.
"""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.record import Json
from export.errors import ContractError
from pipeline import machine
from pipeline.files import write_json

SCHEMA_VERSION = 1
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def gpu_facts() -> Json:
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
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(STATE, (value.strip() for value in done.stdout.split(",")), strict=False))


def host_facts() -> Json:
    """The machine around the GPU; needs no package."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": machine.cpu_name(),
        "cpus": machine.cpu_count(),
    }


def stamp() -> Json:
    """What a section's numbers belong to."""
    return {
        "commit": record.commit(),
        "code": machine.code_version(),
        "versions": machine.tool_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@dataclass
class Results:
    """The document at `path`; sections that are not measured anew stay as they were."""

    path: Path
    document: Json

    @classmethod
    def open(cls, path: Path, gpu: Json) -> Results:
        """What is at `path`, or an empty document for `gpu`. Raises ContractError for what another version wrote."""
        document = record.read(path, {"schema_version": SCHEMA_VERSION, "sections": {}, "targets": []})
        if document.get("schema_version") != SCHEMA_VERSION:
            version = f"schema_version {document.get('schema_version')}"
            raise ContractError(f"{path}: {version}; this code adds to {SCHEMA_VERSION}, give another --output-dir")
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

    def keep(self, name: str, row: Json) -> None:
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
        self.document["sections"][name]["stopped"] = why
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.document)


def rows_of(document: Json, section: str) -> list[Json]:
    """Rows of a section that were measured: neither failed nor skipped."""
    rows = document["sections"].get(section, {}).get("rows", [])
    return [row for row in rows if "failed" not in row and "skipped" not in row]


def wrong(document: Json) -> list[str]:
    """Names of rows that did not pass a check."""
    return [row["name"] for part in document["sections"].values() for row in part["rows"] if row.get("passed") is False]


def broken(document: Json) -> list[str]:
    """Names of rows that could not be run, and of sections that did not come to their end, with the reason."""
    stopped = [f"{name}: {part['stopped']}" for name, part in document["sections"].items() if part["stopped"]]
    rows = [row for part in document["sections"].values() for row in part["rows"]]
    return stopped + [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]


def is_checked(document: Json) -> bool:
    """Did every kernel pass with today's code and tools?"""
    section, now = document["sections"].get("check"), stamp()
    if section is None or section["stopped"] or section["not_reached"]:
        return False
    same = all(section[key] == now[key] for key in ("code", "versions"))
    return same and bool(section["rows"]) and all(row.get("passed") for row in section["rows"])
