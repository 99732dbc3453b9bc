"""Files of second moments, as ``mobe-gguf moments`` writes them (docs/format.md)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import Roots
from mobe_gguf.formats.safetensors import read_header

VERSION = 1
KEY = "mobe_moments"


class Moments:
    """A file of :func:`collect`; MobeError if it is missing, damaged or something else."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise MobeError(
                f"{path}: no such file. Make it with:\n  mobe-gguf moments MODEL {path} --text FILE"
            )
        self._tensors = read_header(path)
        with safe_open(path, framework="pt") as f:
            about = (f.metadata() or {}).get(KEY)
        try:
            self.about: dict[str, Any] = json.loads(about or "")
            version = self.about["version"]
        except (ValueError, KeyError, TypeError) as e:
            raise MobeError(f"{path}: not a file of `mobe-gguf moments`; make one with that command") from e
        if version != VERSION:
            raise MobeError(f"{path}: format version {version}, this program knows {VERSION}; make it again")

    @property
    def checksum(self) -> str:
        """sha256 over what the file was made of: model, text, settings."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

    def nbytes(self, layer: int, projection: str) -> int:
        """Bytes of a unit's moments as they are used, in float32."""
        return 2 * sum(
            self._tensors[n].n_bytes for n in tensor_names(layer, projection) if n in self._tensors
        )

    def directions(self, layer: int, projection: str) -> int:
        """Columns of each expert's root."""
        return self._tensors[tensor_names(layer, projection)[0]].shape[2]

    def check(self, layer: int, projection: str, n: int, d: int) -> None:
        """MobeError if the file lacks the inputs, d in number, of a layer's projection, or is of another model."""
        root, rest = (self._tensors.get(name) for name in tensor_names(layer, projection))
        if root is None:
            raise MobeError(
                f"{self.path}: no tensor {tensor_names(layer, projection)[0]}; the moments are of another model"
            )
        if len(root.shape) != 3 or root.shape[:2] != (n, d) or (rest is not None and rest.shape != (n, d)):
            raise MobeError(
                f"{self.path}: {tensor_names(layer, projection)[0]} has shape {list(root.shape)}, expected {n} experts with {d} inputs. "
                "The moments are of another model."
            )

    def weight(self, layer: int, projection: str, n: int, d: int) -> Roots:
        """What a layer's gate and up (the same) or down are fed; MobeError as :meth:`check`."""
        self.check(layer, projection, n, d)
        root_name, rest_name = tensor_names(layer, projection)
        with safe_open(self.path, framework="pt") as f:
            root = f.get_tensor(root_name).float()
            rest = f.get_tensor(rest_name).float() if rest_name in self._tensors else None
        if not torch.isfinite(root).all() or (rest is not None and not torch.isfinite(rest).all()):
            raise MobeError(f"{self.path}: {root_name} holds values that are not finite; make the file again")
        return Roots(root, rest)


def tensor_names(layer: int, projection: str) -> tuple[str, str]:
    stem = f"layers.{layer}.{'down' if projection == 'down' else 'gate_up'}"
    return f"{stem}.root", f"{stem}.rest"
