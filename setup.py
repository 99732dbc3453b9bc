"""Puts the files that lie outside the package, but that an installed package needs, into the wheel.

All else is in pyproject.toml.  ``mobe_gguf.core.resources`` finds the files again, in a checkout or in a wheel.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

#: Copied to ``mobe_gguf/_data`` under the same path.  Of the models, what ``mobe-gguf demo`` and ``eval`` run on.
DATA = (
    "patches",
    "native",
    "models/tiny-moe",
    "models/heldout.txt",
    "models/calibration.txt",
    "models/calibration",
)

IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout's own directories are used
            return
        target = Path(self.build_lib) / "mobe_gguf" / "_data"
        shutil.rmtree(target, ignore_errors=True)
        for name in DATA:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=IGNORED)
            else:
                shutil.copy2(ROOT / name, target / name)


setup(cmdclass={"build_py": BuildPy})
