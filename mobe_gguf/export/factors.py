"""The factors of a MoBE checkpoint as GGUF tensors and keys (docs: DESIGN "GGUF layout").

A comes through the converter, under the name of the experts that it replaces; B and the mix are added here.
"""

from __future__ import annotations

from functools import partial

from mobe_gguf import names
from mobe_gguf.errors import MobeError
from mobe_gguf.export.converter import Conversion, Tensor
from mobe_gguf.export.source import Stacked, Whole
from mobe_gguf.mobe_checkpoint import MobeCheckpoint, MobeLayer


def check_factors(checkpoint: MobeCheckpoint) -> None:
    """Compare all shapes of experts and factors, before work is done on them.

    MobeError names the tensor that contradicts the others, or the layers whose groups differ: the format has one number
    for all.
    """
    group_counts: dict[int, str] = {}
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:  # asking for a size checks every shape
            group_counts.setdefault(layer.group_count(projection), f"layer {index} {projection}")
        if not checkpoint.is_fused(index, "down"):
            for name in checkpoint.expert_sources(index, "down"):
                if name.endswith(".weight"):
                    checkpoint.expect_shape(name, checkpoint.expert_shape("down"), "from config.json")
    if not group_counts:
        raise MobeError(
            f"{checkpoint.path}: config.json has num_B, but there is no tensor B_gate or B_up. "
            f"Factorize the original model again:\n  mobe-gguf factorize MODEL {checkpoint.path}"
        )
    if len(group_counts) > 1:
        said = ", ".join(f"{where}: {g}" for g, where in group_counts.items())
        raise MobeError(f"{checkpoint.path}: all layers must have the same number of groups, found {said}")


def add_factors(conversion: Conversion, checkpoint: MobeCheckpoint) -> None:
    """Put basis and mix behind each factorized A in ``conversion.tensors``, and set the ``mobe`` keys.

    ``checkpoint`` went through :func:`check_factors`.
    """
    behind: dict[str, list[Tensor]] = {}
    groups = 1
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            behind[names.transform_name(index, projection)] = _factors(conversion, layer, projection)
            groups = layer.group_count(projection)
    conversion.tensors = {
        tensor.name: tensor
        for found in conversion.tensors.values()
        for tensor in (found, *behind.get(found.name, ()))
    }
    writer, arch = conversion.writer, conversion.arch
    writer.add_uint32(names.key_version(arch), names.MOBE_VERSION)
    writer.add_string(names.key_activation(arch), checkpoint.activation)
    writer.add_uint32(names.key_group_count(arch), groups)


def _factors(conversion: Conversion, layer: MobeLayer, projection: str) -> list[Tensor]:
    """Basis ``[m, r, d]`` and mix ``[n, m/g]`` or ``[n, m/g, r]`` of one projection.

    MobeError if the converter did not make of the A's what they should be: one stack ``[n, p, r]``.
    """
    checkpoint, index = layer.checkpoint, layer.index
    m, r = layer.n_basis(projection), layer.rank(projection)
    transform, expected = (
        names.transform_name(index, projection),
        (checkpoint.n_expert, checkpoint.n_ff_exp, r),
    )
    found = conversion.tensors.get(transform)
    if found is None or found.source.shape != expected:
        got = "no such tensor" if found is None else f"shape {list(found.source.shape)}"
        raise MobeError(
            f"{checkpoint.path}: llama.cpp's converter made {got} of {transform}, expected {list(expected)}"
        )
    shape = (m, r, checkpoint.n_embd)
    return [
        Tensor(names.basis_name(index, projection), Stacked(shape, partial(layer.basis_matrix, projection))),
        Tensor(names.mix_name(index, projection), Whole(layer.mix(projection))),
    ]
