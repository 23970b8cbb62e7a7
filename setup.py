"""The wheel's compiled part: the kernel library of the `cpu` target, where there is a C compiler; without one the wheel
is pure, and the library is compiled at first use. All else that setuptools needs to know is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build backends run without it

from export.errors import EnvironmentLacksError
from plugins.cpu import library, packaged


class BuildWithLibrary(build_py):
    """Compiles the library beside the copied sources; an editable install has none, it changes with them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            packaged.add(Path(self.build_lib, "plugins", "cpu"), library.version(), library.build)
        except EnvironmentLacksError as error:
            self.warn(f"this wheel carries no kernel library: {error}")


class WheelOfOnePlatform(bdist_wheel):
    """With a library the wheel is for its platform, and for every Python: nothing in it is linked to one."""

    def run(self) -> None:
        self.run_command("build")
        folder = Path(self.get_finalized_command("build_py").build_lib, "plugins", "cpu")
        compiled = (folder / packaged.NAME).is_file()
        self.root_is_pure, self.distribution.has_ext_modules = not compiled, lambda: compiled
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfOnePlatform})
