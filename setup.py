"""Copy configs/ and assets/ into the package when a wheel is built; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithShippedFiles(build_py):
    """The modules, and what `sharpmoe.shipped_files` finds beside them; an editable install uses the checkout's."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("configs", "assets"):
            shutil.copytree(ROOT / name, Path(self.build_lib, "sharpmoe", "shipped", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
