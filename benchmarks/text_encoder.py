"""A text encoder of true size, built and called: `python -m benchmarks.text_encoder BUNDLE`.

    python -m benchmarks.zoo.make_t5_xxl -o work/t5_xxl
    python -m benchmarks.text_encoder engines/t5_xxl --build -m work/t5_xxl

--build runs `python -m pipeline.build ... --drop-portable` first, in a process of its own: its time, processor time (of
all its processes) and peak memory, which is the resident memory of all its processes together, sampled every half
second, with the part that no file stands behind beside it. Then the bundle: bytes by part, its gates, and what a prompt
costs in a fresh process: to open the engine, the first call and later ones, peak memory.

Writes benchmarks/results/text_encoder_MACHINE.json.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import record
from benchmarks.record import Json
from export.models.description import sample_inputs
from pipeline import load, machine
from pipeline.bench.__main__ import description

NAME, ENGINE, TARGET = "text_encoder", "t5_w4a8", "cpu"
TOKENS, CALLS = 120, 5
SAMPLE_S = 0.5
STATUS = re.compile(r"^(VmRSS|RssAnon):\s*(\d+) kB", re.MULTILINE)


class TreeMemory(threading.Thread):
    """Peak resident bytes of a process and all it started, sampled while it runs (Linux). anonymous: of the memory
    that no file stands behind. Pages of a file that several processes map are counted in each."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process, self.resident, self.anonymous = process, 0, 0

    def run(self) -> None:
        while self._process.poll() is None:
            sizes = [_memory(pid) for pid in _tree(self._process.pid)]
            self.resident = max(self.resident, sum(size.get("VmRSS", 0) for size in sizes))
            self.anonymous = max(self.anonymous, sum(size.get("RssAnon", 0) for size in sizes))
            time.sleep(SAMPLE_S)


def _tree(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(text) for path in children for text in path.read_text(encoding="utf-8").split()]
    except OSError:  # it has ended
        return [pid]
    return [pid, *(inner for child in below for inner in _tree(child))]


def _memory(pid: int) -> dict[str, int]:
    """Bytes by field of /proc/PID/status; nothing of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {key: int(size) * 1024 for key, size in STATUS.findall(text)}


def run_build(model: Path, bundle: Path, more: Sequence[str]) -> Json:
    """Build in a child process. Raises SystemExit where that fails."""
    command = [sys.executable, "-m", "pipeline.build", "--engine", ENGINE, "--target", TARGET, "--drop-portable"]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([*command, "-m", str(model), "-o", str(bundle), *more])
    memory = TreeMemory(process)
    memory.start()
    code = process.wait()
    memory.join()
    if code:
        raise SystemExit(f"the build ended with exit code {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_resident_bytes": memory.resident,
        "peak_anonymous_bytes": memory.anonymous,
        "load_average": os.getloadavg()[2],
    }


def bundle_facts(bundle: Path) -> Json:
    """Bytes by the folder that a file is in, the stages of its build, and its gates."""
    sizes = Counter[str]()
    for path in bundle.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(bundle).parts[0] if path.parent != bundle else "."] += path.stat().st_size
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    gates = json.loads((bundle / "report" / "parity.json").read_text(encoding="utf-8"))["gates"]
    keys = ("name", "value", "limit", "unit", "passed")
    return {
        "size_bytes": {"all": sum(sizes.values()), **dict(sorted(sizes.items()))},
        "counts": manifest["counts"],
        "stages": manifest["stages"],
        "gates": [{key: gate[key] for key in keys} for gate in gates],
    }


def encode(bundle: Path, tokens: int, calls: int) -> Json:
    """What one prompt costs in this process, which should have done nothing else before."""
    started, opened = time.monotonic(), load(bundle)
    engine = opened.engine(TARGET)
    open_s = time.monotonic() - started
    inputs = sample_inputs(description(opened), 1, 0, tokens=tokens)
    inputs = {name: np.ones_like(value) if name == "attention_mask" else value for name, value in inputs.items()}
    seconds, before = [], time.process_time()
    for _ in range(calls):
        started = time.monotonic()
        output = engine.run(inputs)["last_hidden_state"]
        seconds.append(time.monotonic() - started)
    assert np.isfinite(output).all() and output.shape[:2] == (1, tokens), output.shape
    status = _memory(os.getpid())
    return {
        "tokens": tokens,
        "threads": machine.threads(),
        "open_s": round(open_s, 2),
        "first_call_s": round(seconds[0], 3),
        "call_s": round(float(np.median(seconds[1:])), 3),
        "cpu_s_per_call": round((time.process_time() - before) / calls, 3),
        "peak_resident_bytes": machine.peak_memory_bytes(),
        "anonymous_bytes": status.get("RssAnon"),
    }


def main() -> None:
    parser = record.parser(f"benchmarks.{NAME}", __doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", action="store_true", help="build it first, of the model -m")
    parser.add_argument("-m", "--model", type=Path, help="folder of the float encoder")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted build")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt")
    parser.add_argument("--calls", type=int, default=CALLS, help="two at least: the first is apart")
    parser.add_argument(
        "--encode-alone", action="store_true", help="print what a prompt costs in this process, as JSON"
    )
    parser.add_argument("-o", "--output-dir", type=Path, default=record.RESULTS, help="folder of the result")
    arguments = record.parsed(parser)
    if arguments.encode_alone:
        print(json.dumps(encode(arguments.bundle, arguments.tokens, arguments.calls)))
        return
    document: Json = {"engine": ENGINE, "target": TARGET}
    if arguments.build:
        if arguments.model is None:
            parser.error("--build needs the model, -m FOLDER")
        document["build"] = run_build(arguments.model, arguments.bundle, ["--resume"] if arguments.resume else [])
    document |= bundle_facts(arguments.bundle)
    command = [sys.executable, "-m", f"benchmarks.{NAME}", str(arguments.bundle), "--encode-alone"]
    command += ["--tokens", str(arguments.tokens), "--calls", str(arguments.calls)]
    document["encode"] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    place = record.slug(f"{machine.cpu_name()} {machine.cpu_count()}cpu")
    print(record.write(f"{NAME}_{place}", document, arguments.output_dir))


if __name__ == "__main__":
    main()
