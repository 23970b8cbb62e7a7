"""64-bit Arm on this machine: an emulator, Debian's Python for it in a folder, and wheels. Nothing is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.cpu import library, packaged

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-gcc"
# Cortex-A76: the Raspberry Pi 5's. It has the dot product's instructions, and none of i8mm.
CPU = "cortex-a76"
# Older ones end where onnxruntime is imported: they show programs the /proc/cpuinfo of the machine below.
OLDEST_EMULATOR = 8
PYTHON = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
WAITED_S = 900


class AbsentError(Exception):
    """Something that is needed cannot be had here; the message is the reason of a skip."""


def called(*command: object, cwd: Path | None = None) -> str:
    """What a tool prints. Raises AbsentError where it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=WAITED_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AbsentError(f"{words[0]} does not run ({error})") from error
    if done.returncode != 0:
        raise AbsentError(f"{' '.join(words[:2])} fails: {(done.stderr.strip() or 'no reason')[-300:]}")
    return done.stdout


@dataclass(frozen=True)
class Apt:
    """apt with a state of its own in `folder`: for another architecture, or another suite, than the machine's."""

    folder: Path
    architecture: str
    suite: str | None = None

    def __call__(self, *arguments: str) -> str:
        return called("apt-get", *self._options(), *arguments, cwd=self.folder)

    def _options(self) -> list[str]:
        for name in ("state/lists/partial", "cache/archives/partial", "sources"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        for file in Path("/etc/apt/sources.list.d").glob("*.sources"):
            text = file.read_text()
            if self.suite:
                parts = [part for part in text.split("\n\n") if _has_suite(part, self.suite.partition("-")[0])]
                text = "\n\n".join(re.sub(r"^Suites:.*$", f"Suites: {self.suite}", part, flags=re.M) for part in parts)
            (self.folder / "sources" / file.name).write_text(text)
        settings = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "Dir::State": self.folder / "state",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self.folder / "sources",
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _has_suite(part: str, name: str) -> bool:
    """Whether a source of packages has a release itself, and not only what was mended in it."""
    suites = re.search(r"^Suites:(.*)$", part, re.M)
    return suites is not None and name in suites[1].split()


def need_tools() -> None:
    for tool in (COMPILER, "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise AbsentError(f"no {tool}")


def emulator(folder: Path) -> str:
    """This machine's, or Debian's newer one, unpacked into `folder`."""
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        path = shutil.which(name)
        if path and int(re.search(r"version (\d+)", called(path, "--version"))[1]) >= OLDEST_EMULATOR:  # type: ignore[index]
            return path
    own = folder / "usr" / "bin" / "qemu-aarch64"
    if not own.exists():
        codename = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.M)
        architecture = called("dpkg", "--print-architecture").strip()
        apt = Apt(folder / "apt", architecture, f"{codename[1]}-backports" if codename else "stable")
        folder.joinpath("apt").mkdir(parents=True, exist_ok=True)
        apt("-q", "update")
        apt("-q", "download", "qemu-user")
        for file in (folder / "apt").glob("*.deb"):
            called("dpkg-deb", "-x", file, folder)
            file.unlink()
        for other in own.parent.glob("qemu-*"):
            if other != own:
                other.unlink()
    return str(own)


@dataclass(frozen=True)
class Arm:
    """A Python for Arm with what runs a bundle, and this package with a kernel library for Arm in it."""

    emulator: str
    root: Path
    packages: Path
    code: Path

    @property
    def python(self) -> Path:
        [path] = (self.root / "usr" / "bin").glob("python3.??")
        return path

    def run(self, *arguments: object, cwd: Path) -> str:
        """What a Python program prints."""
        paths = f"PYTHONPATH={self.code}:{self.packages}"
        names = [f"QEMU_LD_PREFIX={self.root}", paths, f"DITC_CACHE={cwd / 'cache'}", "PATH=/nowhere"]
        return called("env", "-i", *names, self.emulator, "-cpu", CPU, self.python, *arguments, cwd=cwd)


def make(folder: Path) -> Arm:
    """All of it, in `folder`; what an earlier call has made there is taken again. Raises AbsentError."""
    need_tools()
    qemu, arm = emulator(folder / "emulator"), folder / "root"
    if not (folder / "whole").exists():
        shutil.rmtree(arm, ignore_errors=True)
        folder.joinpath("apt").mkdir(parents=True, exist_ok=True)
        apt = Apt(folder / "apt", "arm64")
        apt("-q", "update")
        apt("-q", "-y", "--download-only", "--no-install-recommends", "install", *PYTHON)
        arm.mkdir()
        for file in (folder / "apt" / "cache" / "archives").glob("*.deb"):
            called("dpkg-deb", "-x", file, arm)
        shutil.rmtree(folder / "apt")
        [name] = [path.name for path in (arm / "usr" / "bin").glob("python3.??")]
        needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
        version = ["--python-version", name.removeprefix("python"), "--implementation", "cp"]
        target = ["--target", folder / "packages", "--only-binary=:all:"]
        called(sys.executable, "-m", "pip", "install", "--quiet", *target, *tags, *version, *needs)
        (folder / "whole").touch()
    code = folder / "code"
    shutil.rmtree(code, ignore_errors=True)
    for name in ("export", "pipeline", "plugins"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels.json"))
    shutil.copy(ROOT / "ditc.py", code)
    packaged.add(code / "plugins" / "cpu", library.version(), compile_for_arm)
    return Arm(qemu, arm, folder / "packages", code)


def compile_for_arm(path: Path) -> None:
    """As `library.build` does on such a machine."""
    called(COMPILER, *library.FLAGS, *library.POSIX_FLAGS, *library.SOURCES, "-o", path, cwd=library.FOLDER)


def answer(text: str) -> Any:
    """The JSON in a program's last line."""
    return json.loads(text.strip().splitlines()[-1])
