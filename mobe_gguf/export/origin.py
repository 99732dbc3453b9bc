"""What the exported model was made of, and its name in the file's metadata.

llama.cpp's converter takes ``general.name`` and related keys from the directory's name.  That is of little use here: a
MoBE checkpoint's directory may be called ``mobe``, and in the hub's cache the name is a hash.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import readable
from mobe_gguf.models.factors import ModelDirectory, recorded
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.hub import model_id

HUB = "https://huggingface.co/"

#: Files of a model directory from which metadata are read.
SOURCES = ("README.md", "config.json", "generation_config.json")


@dataclass(frozen=True)
class Origin:
    """``name``: name of the written model; ``source``: name of the original; ``base``: the original's id on the hub
    (``org/name``), if known.  ``of_mobe``: whether the model was made from factors, kept or multiplied out.
    """

    name: str
    source: str
    base: str | None
    of_mobe: bool

    @classmethod
    def of(
        cls, checkpoint: ModelDirectory | GgufModel, base: str | None = None, dense: bool = False
    ) -> Origin:
        """``base``: the id that the user gave; UsageError if it is not one.  ``dense``: the factors are multiplied
        out."""
        if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is None:
            raise UsageError(f"--base-model {base}: expected an id of the hub such as Qwen/Qwen3-30B-A3B")
        path = checkpoint.path.absolute()
        factorized = recorded(checkpoint.config, "source")
        if isinstance(factorized, str) and Path(factorized).name:
            path = Path(factorized)
        base = base or model_id(path)
        source = name = readable(path.name).removesuffix(".gguf") if base is None else base.partition("/")[2]
        of_mobe = checkpoint.factors is not None
        if of_mobe and "mobe" not in name.lower():
            name += "-MoBE"
        return cls(f"{name}-dense" if of_mobe and dense else name, source, base, of_mobe)

    def keys(self) -> dict[str, str | int]:
        """``general.base_model.*`` for the file; empty if the converter's own are as good."""
        if self.base is None or not self.of_mobe:
            return {}
        organization, _, name = self.base.partition("/")
        return {
            "general.base_model.count": 1,
            "general.base_model.0.name": name.replace("-", " "),
            "general.base_model.0.organization": organization,
            "general.base_model.0.repo_url": HUB + self.base,
        }

    @contextlib.contextmanager
    def directory(self, model: Path) -> Iterator[Path]:
        """A temporary directory named ``name`` with the files from which the converter takes metadata."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / self.name
            folder.mkdir()
            for name in SOURCES:
                if (model / name).is_file():
                    shutil.copyfile(model / name, folder / name)
            yield folder
