"""A model's tensors in another form: with single experts where they are fused, or fused where they are single."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from mobe_gguf.formats.safetensors import Entry
from mobe_gguf.models import mxfp4
from mobe_gguf.models.factors import ModelDirectory
from mobe_gguf.models.families import layer_in
from mobe_gguf.models.layout import ExpertLayout


def copies(
    checkpoint: ModelDirectory, factorized: Iterable[tuple[int, str]], layout: Callable[[int], ExpertLayout]
) -> list[Entry]:
    """All tensors except the matrices of the ``factorized`` (layer, projection) units.

    Where transformers 5 has fused a layer's experts into one tensor, they are split again, and the MoE block gets its
    classic name: a MoBE checkpoint always has one tensor per expert.  ``layout``: how a layer's experts are stored.
    """
    factorized = set(factorized)
    dropped = {source for unit in factorized for source in checkpoint.expert_sources(*unit)}
    fused: dict[str, list[tuple[int, str]]] = {}
    out: list[Entry] = []
    for layer in checkpoint.moe_layers:
        for projection in checkpoint.family.kinds:
            if checkpoint.is_fused(layer, projection):
                for source in checkpoint.expert_sources(layer, projection):
                    fused.setdefault(source, []).append((layer, projection))
    layers = {layer for units in fused.values() for layer, _ in units}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if name in fused:
            for layer, projection in fused[name]:
                if (layer, projection) not in factorized and not name.endswith(mxfp4.SCALES):
                    out += _split(checkpoint, name, layer, projection, layout(layer))
        elif name not in dropped:
            if (layer := layer_in(name)) in layers:
                name = checkpoint.family.own_name(name, layer)
            file = checkpoint.path / info.shard
            out.append(Entry.copy(name, info.dtype, info.shape, file, info.begin, info.end))
    return out


def fused_entries(
    checkpoint: ModelDirectory, layer: int, read: Callable[[str, int], torch.Tensor], dtype: torch.dtype
) -> Iterator[Entry]:
    """All experts of a layer in the fused tensors that transformers reads; ``read(projection, e)`` is a matrix."""
    family = checkpoint.family
    form = ExpertLayout(
        checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd, family.kinds, family.fused, None, family.transposed, family.interleaved
    )  # fmt: skip

    def share(together: tuple[str, ...], e: int) -> torch.Tensor:
        return form.join([read(projection, e) for projection in together])

    for together in family.fused:
        name, shape = family.fused_weights(layer, together[0])[0], form.stored_shape(together[0])
        yield Entry.made(
            name, dtype, shape, *(partial(share, together, e) for e in range(checkpoint.n_expert))
        )


def _split(
    checkpoint: ModelDirectory, name: str, layer: int, projection: str, layout: ExpertLayout
) -> Iterator[Entry]:
    """Split a fused tensor ``[n, 2p, d]`` (gate first) or ``[n, d, p]``, or its scales, into the single experts'.  Where parts
    are no runs of bytes, experts are read one by one."""
    info = checkpoint.info(name)
    if layout.transposed or layout.interleaved:
        dtype = torch.bfloat16 if name.endswith(mxfp4.BLOCKS) else checkpoint.dtype(name)
        for e in range(checkpoint.n_expert):
            to, shape = checkpoint.family.expert_weight(layer, e, projection), layout.shape(projection)
            yield Entry.made(to, dtype, shape, partial(checkpoint.expert, layer, projection, e))
        return
    n, rows, columns = info.shape
    part, halves = layout.place(projection)
    size = (info.end - info.begin) // n // halves
    offset = part * size
    suffix = "_scale_inv" if name.endswith("_scale_inv") else ""
    for e in range(n):
        begin = info.begin + e * halves * size + offset
        to = checkpoint.family.expert_weight(layer, e, projection) + suffix
        shape, file = (rows // halves, columns), checkpoint.path / info.shard
        yield Entry.copy(to, info.dtype, shape, file, begin, begin + size)
