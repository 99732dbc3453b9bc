"""A wheel carries what ``mobe-gguf build`` and ``demo`` need, so that neither needs a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError

ROOT = Path(__file__).parents[2]


def files(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not {"__pycache__"} & set(path.parts) and not path.name.startswith(".")
    }


def test_the_wheel_carries_patches_kernels_and_model(tmp_path: Path):
    # setuptools writes beside the sources: work on a copy
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, checkout)
    for name in ("mobe_gguf", "patches", "native", "models"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for name in ("patches", "native", "models/tiny-moe", "models/calibration"):
        expected = files(ROOT / name)
        assert expected and {f"mobe_gguf/_data/{name}/{file}" for file in expected} <= held
    assert {"mobe_gguf/_data/models/heldout.txt", "mobe_gguf/_data/models/calibration.txt"} <= held
    assert not [name for name in held if not name.startswith(("mobe_gguf/", "mobe_gguf-"))]

    # an import that finds the wheel first, from a directory that holds no checkout
    code = "import sys; sys.path[0] = sys.argv[1]; from mobe_gguf.core import resources as r; print(*map(r.path, r.NAMES))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "installed"], cwd=tmp_path, capture_output=True, text=True
    )
    found = done.stdout.split()
    assert found == [str(tmp_path / "installed/mobe_gguf/_data" / name) for name in resources.NAMES], (
        done.stderr
    )


def test_resources_of_a_checkout():
    assert resources.path("patches") == ROOT / "patches"
    assert (resources.path("native") / "ggml_mobe").is_dir()
    with pytest.raises(ValueError, match="unknown resource 'nothing'"):
        resources.path("nothing")


def test_a_damaged_installation_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "mobe_gguf")
    with pytest.raises(MobeError, match=r"holds no 'patches' directory .*pip install --force-reinstall"):
        resources.path("patches")
