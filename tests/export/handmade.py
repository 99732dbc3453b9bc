"""MoBE checkpoints with random factors, made by hand: what export must write is known number by number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mobe_gguf.formats.safetensors import write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.families import family_of


def cut(path: Path, layer: int, projection: str, *, m: int, r: int) -> None:
    """Leave ``m`` bases of rank ``r`` to one projection (not down, no groups) of what :func:`make_mobe` made: layers differ,
    and ``num_B`` is the largest, as ``factorize --target`` writes it."""
    family = family_of(json.loads((path / "config.json").read_text()))
    tensors = load_file(path / "model.safetensors")
    basis, mix = family.basis(layer, projection), family.mix(layer, projection)
    tensors[basis] = tensors[basis][:m, :r].clone()
    for expert in range(len(tensors[mix])):
        name = family.expert_weight(layer, expert, projection)
        tensors[name] = tensors[name][:, :r].clone()
    tensors[mix] = tensors[mix][:, :m].clone()
    save_file(tensors, path / "model.safetensors")


def make_mobe(
    source: Path,
    target: Path,
    *,
    m: int = 4,
    r: int | None = None,
    g: int = 1,
    by_row: bool = False,
    activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
    layers: tuple[int, ...] | None = None,
    projections: tuple[str, ...] = ("gate", "up"),
    architectures: list[str] | None = None,
    our_key: bool = False,
) -> Path:
    """Replace ``projections`` of the single-file model ``source`` by random factors; returns ``target``.

    ``dtype`` is that of all tensors written.  ``our_key`` adds a ``mobe`` key as ``factorize`` does; the published
    checkpoints have none.  Tensors are named as in docs/format.md, "MoBE checkpoint".
    """
    config = json.loads((source / "config.json").read_text())
    family = family_of(config)
    n, p, d = (f(family.text(config)) for f in (family.n_expert, family.n_ff_exp, family.n_embd))
    r = r or p
    tensors = load_file(source / "model.safetensors")
    if family.stacked_here:  # factors are made of single experts
        write_safetensors(target.parent / "single", Checkpoint(source).copies([]), {})
        tensors = load_file(target.parent / "single")
    random = torch.Generator().manual_seed(7)
    for layer in layers or family.moe_layers(family.text(config)):
        for projection in projections:
            for expert in range(n):
                name = family.expert_weight(layer, expert, projection)
                shape = (r, p) if projection == "down" else (p, r)
                tensors[name] = torch.randn(*shape, generator=random) * 0.1
            for group in range(g):
                suffix = group if g > 1 else None
                rows, columns = (d, r) if projection == "down" else (r, d)
                tensors[family.basis(layer, projection, suffix)] = torch.randn(
                    m // g, rows, columns, generator=random
                )
                shape = (n // g, m // g, rows) if by_row else (n // g, m // g)
                tensors[family.mix(layer, projection, suffix)] = torch.randn(*shape, generator=random)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target / path.name)
    config |= {"num_B": m, "activation": activation}
    if architectures is not None:
        config["architectures"] = architectures
    if our_key:
        config["mobe"] = {"version": 1, "solver": "by hand"}
    (target / "config.json").write_text(json.dumps(config))
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    return target
