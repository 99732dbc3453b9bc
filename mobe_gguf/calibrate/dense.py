"""Inputs of a layer's ordinary matrices: attention, dense MLPs, shared experts, the output."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobe_gguf.calibrate.roots import MOST, Subspace, add_products, directions, mirror, root, size_of
from mobe_gguf.formats.safetensors import Entry

#: Name of a module of the model -> name of its GGUF tensor without ``.weight``, None if it has none.
Names = Callable[[str], str | None]


#: Modules that the converter takes apart -> the first of their GGUF tensors.
JOINED = {"shared_mlp.input_linear": "ffn_gate_shexp"}


def gguf_names(family: str, n_layer: int) -> Names:
    """gguf-py's mapping: by the architecture with the family's name, else by any architecture that knows the name."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    plain = family.removesuffix("_text").replace("_", "")
    archs = sorted(MODEL_ARCH, key=lambda a: re.sub("[-_]", "", MODEL_ARCH_NAMES[a]) != plain)
    maps: dict[Any, Any] = {}

    def find(module: str) -> str | None:
        for end, name in JOINED.items():
            if found := re.search(rf"\.(\d+)\.{re.escape(end)}$", module):
                return f"blk.{found[1]}.{name}"
        backbone = re.sub(
            "^model", "backbone", module
        )  # Nemotron-H, as its directories and the converter have it
        for arch in archs:
            if arch not in maps:
                maps[arch] = _name_map(arch, n_layer)
            if (name := maps[arch].get_name(module) or maps[arch].get_name(backbone)) is not None:
                return str(name)
        return None

    return find


def _name_map(arch: Any, n_layer: int) -> Any:
    """gguf-py's map of an architecture.

    For Arctic and others with special names, making the map changes the table from which all later maps are made
    (``findings/gguf-tensor-map-shared.sh``).  So the table is restored.
    """
    from gguf import get_tensor_name_map
    from gguf.tensor_mapping import TensorNameMap

    table = TensorNameMap.block_mappings_cfg
    before = dict(table)
    try:
        return get_tensor_name_map(arch, n_layer)
    finally:
        table.clear()
        table.update(before)


#: Of inputs that all tokens have, about this many tokens for each channel are summed, if there are MANY channels: every
#: second, third ... token of a longer text.  Measured in docs/calibration.md.
TOKENS = 16
MANY = 1024


@dataclass
class Sum:
    """``sums`` ``[n, d, d]`` of one set of inputs over ``tokens`` tokens: each ``every``-th of the text's."""

    sums: torch.Tensor
    every: int = 1
    tokens: int = 0
    _skip: int = 0

    @classmethod
    def new(cls, n: int, d: int, text: int, device: torch.device) -> Sum:
        """For a text of ``text`` tokens."""
        return cls(torch.zeros(n, d, d, device=device), max(1, text // (TOKENS * d)) if d >= MANY else 1)

    @property
    def n_bytes(self) -> int:
        return self.sums.numel() * 4

    def add(self, x: torch.Tensor) -> None:
        """Add inputs x ``[..., n, d]``."""
        n, d = self.sums.shape[:2]
        x = x.reshape(-1, n, d)
        given, x = len(x), x[self._skip :: self.every].float()
        self._skip = (self._skip - given) % self.every
        if n == 1:
            add_products(self.sums[0], x[:, 0])
        else:
            self.sums.baddbmm_(x.permute(1, 2, 0), x.transpose(0, 1))
        self.tokens += len(x)

    def entries(self, stem: str, keep: float, rank: int | None) -> list[Entry]:
        """Tensors of the file, see docs/format.md; ``sums`` is used up."""
        n, d = self.sums.shape[:2]
        if n == 1:
            mirror(self.sums[0])
        mean = self.sums[0] if n == 1 else self.sums.mean(0)
        size = size_of(mean, stem)
        found: list[tuple[torch.Tensor, torch.Tensor | None]]
        if n == 1 and d > MOST:
            subspace = Subspace.of(mean, keep, rank)
            found = [subspace.root(subspace.mean / size, mean.diagonal() / size)]
        else:
            k = directions(mean, keep) if rank is None else min(rank, d)
            self.sums.div_(size)
            found = [root(one, k) for one in self.sums]
        tensors = {
            "root": torch.stack([one.half() for one, _ in found]),
            "scale": torch.tensor([size / self.tokens]),
            "tokens": torch.full((n,), self.tokens, dtype=torch.int32),
        }
        if found[0][1] is not None:
            tensors["rest"] = torch.stack([rest.half() for _, rest in found if rest is not None])
        return [Entry.of(f"{stem}.{name}", tensor) for name, tensor in tensors.items()]


class Watch:
    """Sums the inputs of the ``nn.Linear`` modules of ``module`` while it runs, for as many as fit in ``limit`` bytes.  ``text``: tokens
    that it will run.

    Modules with the same input tensor share a sum.  After the first batch :attr:`waiting` lists those that were left out,
    for further passes.  In latent attention (MLA) the heads' queries without position are summed, too: they are the input
    of the key half of ``kv_b``, which GGUF files may store separately.
    """

    def __init__(
        self, module: nn.Module, prefix: str, names: Names, limit: float, text: int, tiled: bool = False
    ):
        self.sums: dict[str, Sum] = {}
        self.waiting: set[str] = set()
        self.started = False
        self._done: set[str] = set()
        self._limit, self._text = limit, text
        self._stems: dict[str, str] = {}
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._parts: list[tuple[nn.Module, str, int]] = []
        #: Heads of values and their size, for each head of keys, of matrices whose columns the converter reorders.
        self._tiled: dict[str, tuple[int, int, int]] = {}
        for path, part in module.named_modules():
            if isinstance(part, nn.Linear) and ".experts." not in f".{path}.":
                name = names(f"{prefix}{path}")
                if name is not None and "_inp" not in name:  # routers are not quantized
                    self._parts.append((part, name, 0))
            if tiled and isinstance(getattr(part, "num_v_heads", None), int):  # ``Family.tiled_heads``
                name = names(f"{prefix}{path}.out_proj")
                keys = part.num_k_heads
                if name is not None:
                    self._tiled[name] = (keys, part.num_v_heads // keys, part.head_v_dim)
            nope = getattr(part, "qk_nope_head_dim", None)
            if isinstance(nope, int) and isinstance(getattr(part, "kv_b_proj", None), nn.Linear):
                queries = getattr(part, "q_b_proj", None) or getattr(part, "q_proj", None)
                name = names(f"{prefix}{path}.k_b_proj")
                if isinstance(queries, nn.Linear) and name is not None:
                    self._parts.append((queries, name, part.qk_head_dim))
                    self._nope = nope

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Collect sums while the module runs over all batches."""
        hooks, self.started = [], True
        for part, name, head in self._parts:
            if head:
                hooks.append(part.register_forward_hook(self._after(name, head)))
            else:
                hooks.append(part.register_forward_pre_hook(self._before(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def next_batch(self) -> None:
        """Call this before each batch."""
        self._seen.clear()

    def next_pass(self) -> dict[str, Sum]:
        """Return the sums of this pass; the modules left out follow in the next one."""
        found, self.sums = self.sums, {}
        self._done |= set(found)
        self.waiting = set()
        return found

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            stem = self._stems.get(name)
            if stem is None:
                stem = next((s for tensor, s in self._seen if tensor is x), name)
                self._stems[name] = stem
            if stem != name:
                return
            self._seen.append((x, name))
            if name in self._tiled:
                x = x.unflatten(-1, self._tiled[name]).transpose(-3, -2).flatten(-3)
            self._add(name, x, 1)

        return hook

    def _after(self, name: str, head: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self._stems[name] = name
            x = out.unflatten(-1, (-1, head))[..., : self._nope]
            self._add(name, x, x.shape[-2])

        return hook

    def _add(self, stem: str, x: torch.Tensor, n: int) -> None:
        if stem in self._done:
            return
        if stem not in self.sums:
            if stem in self.waiting:
                return
            new = 4 * n * x.shape[-1] ** 2
            if self.sums and sum(s.n_bytes for s in self.sums.values()) + new > self._limit:
                self.waiting.add(stem)
                return
            self.sums[stem] = Sum.new(n, x.shape[-1], self._text, x.device)
        self.sums[stem].add(x)

    def weighs(self) -> dict[str, str]:
        """GGUF tensor -> stem, known after the first batch."""
        found = {f"{name}.weight": stem for name, stem in self._stems.items()}
        for name, stem in list(found.items()):
            if ".attn_kv_b." in name:  # its value half has the same input
                found[name.replace("_kv_b", "_v_b")] = stem
            if ".ffn_gate_shexp." in name:  # up's inputs, too
                found.setdefault(name.replace("_gate_", "_up_"), stem)
        return found
