"""A model directory with a sparse, empty weights file, made from a config.json alone, for code that reads only
headers."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.safetensors import SINGLE_NAME
from mobe_gguf.plan.layout import source_shapes


def is_bare(model: Path) -> bool:
    """Whether there is a config.json and no weights."""
    if model.is_file():
        return model.name == "config.json" or model.suffix == ".json"
    return (model / "config.json").is_file() and not any(model.glob("*.safetensors*"))


@contextlib.contextmanager
def hollow(model: Path) -> Iterator[Path]:
    """A temporary directory with the config.json that ``model`` is or holds and one safetensors file with its shapes,
    in bf16.

    The file is sparse, takes no disk space, and is removed afterwards.  MobeError as :func:`source_shapes`, or if the
    file system has no sparse files of that size.
    """
    config = model if model.is_file() else model / "config.json"
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as directory:
        made = Path(directory) / config.absolute().parent.name
        made.mkdir()
        shutil.copy(config, made / "config.json")
        shapes = source_shapes(made / "config.json")
        entries, at = {}, 0
        for name, shape in shapes.items():
            end = at + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        header = json.dumps(entries).encode()
        try:
            with open(made / SINGLE_NAME, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(8 + len(header) + at)
        except OSError as e:
            raise MobeError(
                f"{directory}: a file of {at} bytes without content cannot be made there ({e.strerror}); set TMPDIR to another "
                "file system"
            ) from e
        yield made
