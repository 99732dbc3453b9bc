"""Files of second moments, as ``mobe-gguf moments`` writes them (docs/format.md).

One *stem* names one set of inputs, such as the input of a layer's q, k and v.  It weighs every GGUF tensor with that input:

    moments = Moments(path)
    roots = moments.find("blk.0.attn_k.weight")       # None if the file has no moments for it

    S_e = scale * (root_e root_e^T + diag(rest_e))

S_e of expert e is ``E[g^2 x x^T]`` per token of the text; g is 1 for tensors that are not experts.  For down it is the router's
weight, for gate and up that times the root of how much the expert's output changes with their outputs, or of the loss's gradient.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import Roots
from mobe_gguf.core.names import transform_name
from mobe_gguf.formats.safetensors import read_header

#: The version that is written.  Version 1 is read as well: routed experts only, without scale and tokens.
VERSION = 2
KNOWN = (1, 2)
KEY = "mobe_moments"
#: Key of the header beside KEY: ``{GGUF tensor: stem}`` as JSON.
KEY_WEIGHS = "mobe_moments_weighs"
#: Tensors of a layer with ``--gradients``: ``index``, ``gate`` ``[T, k]`` and ``down`` ``[T]``, see :meth:`Moments.gradients`.
GRADIENT = "blk.{}.gradient.{}"
#: Only in a layer's file in the work directory: how many tokens of each text its experts saw, ``[texts, n]``.
KEY_SEEN = "mobe_moments_seen"


class Moments:
    """A file of ``mobe-gguf moments``, opened lazily: the head is read now, tensors on demand.

    MobeError if it is missing, damaged or something else.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise MobeError(
                f"{path}: no such file. Make it with:\n  mobe-gguf moments MODEL {path} --text FILE"
            )
        self._tensors = read_header(path)
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        try:
            self.about: dict[str, Any] = json.loads(metadata.get(KEY) or "")
            version = self.about["version"]
            weighs = json.loads(metadata.get(KEY_WEIGHS) or "{}")
            self._weighs = {str(name): str(stem) for name, stem in weighs.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise MobeError(f"{path}: not a file of `mobe-gguf moments`; make one with that command") from e
        if version not in KNOWN:
            raise MobeError(f"{path}: format version {version}, this program knows {VERSION}; make it again")
        if version == 1:
            self._weighs = self._old_names()

    def _old_names(self) -> dict[str, str]:
        weighs = {}
        for name in self._tensors:
            if found := re.fullmatch(r"(layers\.(\d+)\.(gate_up|down))\.root", name):
                for projection in found[3].split("_"):
                    weighs[transform_name(int(found[2]), projection)] = found[1]
        return weighs

    @cached_property
    def checksum(self) -> str:
        """sha256 over what the file was made from: model, text, settings."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

    def of_another(self, checksum: object) -> str | None:
        """A warning for a user whose model has another ``checksum`` than the model that was run; None if they are equal
        or one is unknown."""
        theirs = self.about.get("source_checksum")
        if not isinstance(theirs, str) or not isinstance(checksum, str) or theirs == checksum:
            return None
        return (
            f"warning: {self.path} was made of another model ({self.about.get('model')}, checksum {theirs[:12]}..., this one's is "
            f"{checksum[:12]}...). Moments of a model's other formats serve, those of another model do harm. Make them with: mobe-gguf "
            "moments MODEL FILE --text TEXT"
        )

    # lookup by the name of a GGUF tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The GGUF tensors that the file has moments for."""
        return tuple(self._weighs)

    def __contains__(self, name: str) -> bool:
        return name in self._weighs

    def stem(self, name: str) -> str | None:
        """Stem of a tensor; tensors with the same stem have the same input.  None if the file has no moments for ``name``."""
        return self._weighs.get(name)

    def shape(self, name: str) -> tuple[int, int, int] | None:
        """``(n, d, k)`` of a tensor's root, from the head; None if the file has no moments for it.  MobeError if the head is
        damaged."""
        stem = self._weighs.get(name)
        if stem is None:
            return None
        root, rest = self._tensors.get(f"{stem}.root"), self._tensors.get(f"{stem}.rest")
        if root is None or len(root.shape) != 3 or (rest is not None and rest.shape != root.shape[:2]):
            raise MobeError(f"{self.path}: the moments of {name} ({stem}) are damaged; make the file again")
        n, d, k = root.shape
        return n, d, k

    def find(self, name: str) -> Roots | None:
        """Second moments of the input of GGUF tensor ``name``: ``root`` ``[n, d, k]``, ``rest`` ``[n, d]`` or None where k = d.
        n is the number of experts, 1 for a matrix of all tokens, or the number of heads where each has its own.  The mean
        of all diagonals is 1; :meth:`scale` is their size.

        None if the file has no moments for it (an older file, or one made with fewer ``--tensors``).  MobeError if they
        are damaged.
        """
        if self.shape(name) is None:
            return None
        stem = self._weighs[name]
        root = self._read(f"{stem}.root").float()
        rest = self._read(f"{stem}.rest").float() if f"{stem}.rest" in self._tensors else None
        if not torch.isfinite(root).all() or (rest is not None and not torch.isfinite(rest).all()):
            raise MobeError(f"{self.path}: {stem}.root holds values that are not finite; make the file again")
        return Roots(root, rest)

    def scale(self, name: str) -> float | None:
        """Factor for the moments of :meth:`find`.  With it ``tr(D S D^T)`` is the mean squared error, per token of the text,
        that an error D of the matrix adds to the layer's output.  None if the file has no scale (version 1)."""
        stem = self._weighs.get(name)
        return (
            None
            if stem is None or f"{stem}.scale" not in self._tensors
            else float(self._read(f"{stem}.scale"))
        )

    def tokens(self, name: str) -> torch.Tensor | None:
        """Tokens that each expert saw, int64 ``[n]``; None if the file has no counts (version 1)."""
        stem = self._weighs.get(name)
        found = stem is not None and f"{stem}.tokens" in self._tensors
        return self._read(f"{stem}.tokens").long() if found else None

    def gradients(self, layer: int) -> dict[str, torch.Tensor] | None:
        """Sizes of the loss's gradients over the router's weights, 1 on average, for each token of the text: ``gate`` ``[T, k]``, at
        gate's and up's outputs of expert ``index`` ``[T, k]``, and ``down`` ``[T]``, at down's.

        None if the file was made without.  MobeError if they are damaged.
        """
        names = {part: GRADIENT.format(layer, part) for part in ("index", "gate", "down")}
        if not self.about.get("gradients") or names["gate"] not in self._tensors:
            return None
        tokens = self.about.get("tokens")
        found = {part: self._read(name) for part, name in names.items() if name in self._tensors}
        whole = len(found) == len(names) and found["index"].shape == found["gate"].shape
        if not whole or any(
            len(part) != tokens or not bool(((part >= 0) & (part < float("inf"))).all())
            for part in found.values()
        ):
            raise MobeError(f"{self.path}: {names['gate']} is damaged; make the file again")
        return found

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as f:
            return f.get_tensor(name)

    # lookup for a layer's routed experts

    def nbytes(self, layer: int, projection: str) -> int:
        """Bytes of a unit's moments in memory, in float32."""
        shape = self.shape(transform_name(layer, projection))
        if shape is None:
            return 0
        n, d, k = shape
        return 4 * n * d * (k + (k < d))

    def directions(self, layer: int, projection: str) -> int:
        """Number of columns of each expert's root."""
        shape = self.shape(transform_name(layer, projection))
        return 0 if shape is None else shape[2]

    def check(self, layer: int, projection: str, n: int, d: int) -> None:
        """MobeError if the file lacks the d inputs of a layer's projection, or belongs to another model."""
        name = transform_name(layer, projection)
        shape = self.shape(name)
        if shape is None:
            raise MobeError(f"{self.path}: nothing of {name}; the moments are of another model")
        if shape[:2] != (n, d):
            raise MobeError(
                f"{self.path}: {self._weighs[name]}.root has shape {list(shape)}, expected {n} experts with {d} inputs. "
                "The moments are of another model."
            )

    def weight(self, layer: int, projection: str, n: int, d: int) -> Roots:
        """Second moments of the inputs of a layer's projection (gate and up have the same); MobeError as :meth:`check`."""
        self.check(layer, projection, n, d)
        found = self.find(transform_name(layer, projection))
        assert found is not None
        return found
