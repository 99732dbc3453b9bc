from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from mobe_gguf import runtime
from mobe_gguf.runtime.source import Pin

from .miniature import FILES, PATCH, Miniature


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """Shared by all tests: objects that one compiled, the next need not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            member.size = len(text.encode())
            member.mtime = 1_600_000_000
            tar.addfile(member, io.BytesIO(text.encode()))
    archive = buffer.getvalue()
    pin = Pin("llama-cpp-python", "9.9.9", hashlib.sha256(archive).hexdigest(), len(archive))
    cache = tmp_path_factory.mktemp("cache")
    (cache / pin.filename).write_bytes(archive)
    return Miniature(pin, cache, archive)


@pytest.fixture
def patch_41(tmp_path: Path) -> Path:
    path = tmp_path / "0001-answer.patch"
    path.write_text(PATCH)
    return path


@pytest.fixture
def patch_mtmd(tmp_path: Path) -> Path:
    """Another patch: it changes no answer."""
    path = tmp_path / "0001-mtmd.patch"
    path.write_text(
        "--- a/vendor/llama.cpp/src/mtmd.c\n+++ b/vendor/llama.cpp/src/mtmd.c\n@@ -1 +1 @@\n"
        "-int mtmd(void) { return 0; }\n+int mtmd(void) { return 1; }\n"
    )
    return path


@pytest.fixture(scope="session")
def built() -> None:
    """The real runtime; ``make test`` builds it first."""
    if not runtime.is_built():
        pytest.skip("the runtime is not installed: run mobe-gguf build")
