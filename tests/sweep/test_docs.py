"""docs/calibration.md on sweeps: its file is one, and its scripts do what they say, with stand-ins for the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme
from pipeline.files import tree
from pipeline.sweep.__main__ import make_parser
from pipeline.sweep.plan import read_sweep
from tests.support.environments import without_xdist

SECTION = (readme.DOCS / "calibration.md").read_text(encoding="utf-8").partition("## Sweeps\n")[2].partition("\n## ")[0]
[TOML] = re.findall(r"^```toml\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
SLURM, BUCKET = re.findall(r"^```bash\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
# Of `sbatch`, those that the script may use.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "exclusive", "time", "requeue"}
NODES = ("localhost", "second")
# name -> a program that stands for it. Each call is a line of calls.txt.
STAND_INS = {
    "scontrol": f'echo "{NODES[0]}"; echo "{NODES[1]}"',
    # Leaves its own flags away and does the rest at once.
    "srun": 'while [[ $1 == -* ]]; do [[ $1 == -w || $1 == -x ]] && shift; shift; done; exec "$@"',
    "ray": '[[ $1 == status ]] && { test -e head; exit; }; [[ " $* " != *" --head "* ]] || touch head',
    "sleep": "exec /bin/sleep 1",
    # aws s3 sync FROM TO [--delete]; s3:// is a folder here.
    "aws": """
        from=${3/s3:\\/\\//$PWD/} to=${4/s3:\\/\\//$PWD/}
        [[ " $* " == *" --delete "* ]] && rm -rf "$to"
        mkdir -p "$to"
        if [ -d "$from" ]; then cp -r "$from/." "$to"; fi
    """,
}
DITC = f"""#!{sys.executable}
import sys
from tests.support.quick_build import shorten
from pipeline.__main__ import command
shorten()
command()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the stand-ins in bin/."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        add(tmp_path, name, f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
    return tmp_path


def add(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def ran(folder: Path, script: str, **variables: str) -> tuple[int, list[str]]:
    """Exit code of a script, and what it called."""
    (folder / "script").write_text(script)
    calls, path = folder / "calls.txt", os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    more = {"CALLS": str(calls), "PATH": path, "PYTHONPATH": str(readme.ROOT), **variables}
    with (folder / "out.txt").open("w") as stream:  # no pipe: what runs on in the background would hold it
        done = subprocess.run(
            ["bash", "script"],
            cwd=folder,
            env={**without_xdist(), **more},
            stdout=stream,
            stderr=stream,
            timeout=900,
            check=False,
        )
    return done.returncode, calls.read_text().splitlines()


def test_the_sweep_shown_is_one(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(TOML)
    names = [build.name for build in read_sweep(tmp_path / "sweep.toml")]
    assert len(names) == 8 and re.findall(r"\(`(pixart_w4a6-[\w-]+)`\)", SECTION) == names[:1]


def test_its_commands_are_such() -> None:
    commands = re.findall(r"^(?: {4})?(?:ditc |python -m pipeline\.)sweep (.*)$", SECTION, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = re.sub(r"\s+\|\|.*", "", command).replace('"', "").split()
        assert make_parser().parse_args(words).sweep == Path("sweep.toml")


@pytest.mark.process
def test_the_slurm_job_makes_a_cluster_of_all_its_machines(folder: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM, re.MULTILINE))
    assert SLURM.startswith("#!/bin/bash\n#SBATCH") and set(options) <= SBATCH and options["ntasks-per-node"] == "1"
    add(folder, "ditc", '#!/bin/bash\necho "ditc $*" >> "$CALLS"\n')
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": "/shared",
    }
    code, calls = ran(folder, SLURM, **slurm)
    assert code == 0, (folder / "out.txt").read_text()
    assert (
        "srun --nodes=1 --ntasks=1 -w localhost ray start --head --node-ip-address=127.0.0.1 --port=6379 --block"
        in calls
    )
    assert "srun --nodes=1 --ntasks=1 -x localhost ray start --address=127.0.0.1:6379 --block" in calls
    assert "ditc sweep sweep.toml -o /shared/sweeps/first --ray 127.0.0.1:6379 --resume" in calls
    code, calls = ran(folder, SLURM, **slurm | {"SLURM_JOB_NUM_NODES": "1"})
    assert code == 0 and not any("-x localhost" in call for call in calls[len(calls) // 2 + 1 :])


@pytest.mark.slow
@pytest.mark.torch
def test_a_bucket_keeps_a_sweep_whose_machine_is_taken_away(folder: Path) -> None:
    from tests.support import hostile  # imports PyTorch, which the others here need not wait for

    add(folder, "ditc", DITC)
    hostile.make_models(folder)
    (folder / "recipe.toml").write_text(hostile.RECIPE.format(model=folder / "model"))
    options = "".join(f"[options.s{steps}]\nsampling.n_steps = {steps}\n" for steps in (1, 2))
    (folder / "sweep.toml").write_text(f'schema_version = 1\nrecipes = ["recipe.toml"]\ntargets = "cpu"\n{options}')
    bucket, own = folder / "bucket/first", folder / "sweeps/first"
    code, calls = ran(folder, BUCKET, BUCKET="s3://bucket")
    assert code == 0, (folder / "out.txt").read_text()
    assert sum(call.startswith("aws s3 sync sweeps/first s3://bucket/first") for call in calls) >= 2
    assert tree(bucket) == tree(own) and "table.csv" in tree(bucket)
    shutil.rmtree(folder / "sweeps")
    (bucket / "sweep.json").unlink()  # as where copying was cut short
    (bucket / "bundles/fuzzed-s2/manifest.json").unlink()
    [weights] = bucket.glob("calibrations/*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _ = ran(folder, BUCKET, BUCKET="s3://bucket")
    said = (folder / "out.txt").read_text()
    assert code == 0 and "fuzzed-s2 is a part of a bundle" in said and "the layers are made again" in said, said
    rows = json.loads((bucket / "sweep.json").read_text())["builds"]
    assert [row["status"] for row in rows] == ["kept", "built"]
    (folder / "sweep.toml").write_text("colour = 1")
    assert ran(folder, BUCKET, BUCKET="s3://bucket")[0] == 2, "the exit code is that of the sweep"
