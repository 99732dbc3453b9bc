"""The factors of a MoBE checkpoint as GGUF tensors and keys (docs/format.md, "GGUF"), or multiplied out.

A comes through the converter, under the name of the experts that it replaces; B and the mix are added here.  If the
checkpoint is an original model with factors beside it, the converter gives the original experts, and A replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.sides import side
from mobe_gguf.export.conversion import Conversion, KeyWriter, add_keys
from mobe_gguf.export.source import Stacked, Tensor, Whole
from mobe_gguf.models.factors import FactorDirectory, MobeLayer
from mobe_gguf.models.mobe_checkpoint import Reconstruction


def check_factors(checkpoint: FactorDirectory) -> None:
    """Compare all shapes of experts and factors before any work is done.

    MobeError names the tensor that contradicts the others, or the layers whose number of groups differs: the format has
    one number for all layers.
    """
    group_counts: dict[int, str] = {}
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:  # asking for a size checks every shape
            group_counts.setdefault(layer.group_count(projection), f"layer {index} {projection}")
    if not group_counts:
        raise MobeError(
            f"{checkpoint.path}: config.json has num_B, but there is no tensor B_gate or B_up. "
            f"Factorize the original model again:\n  mobe-gguf factorize MODEL {checkpoint.path}"
        )
    if len(group_counts) > 1:
        said = ", ".join(f"{where}: {g}" for g, where in group_counts.items())
        raise MobeError(f"{checkpoint.path}: all layers must have the same number of groups, found {said}")


def put_transforms(conversion: Conversion, checkpoint: FactorDirectory) -> None:
    """Replace the original experts in ``conversion.tensors`` by their A's."""
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            shape = layer.transform_shape(projection)
            _put(conversion, layer, projection, shape, partial(layer.transform, projection))


def put_experts(conversion: Conversion, checkpoint: FactorDirectory) -> None:
    """Replace all A's in ``conversion.tensors`` by the multiplied-out experts, which makes an ordinary model."""
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            shape = checkpoint.expert_shape(index, projection)
            _put(conversion, layer, projection, shape, Reconstruction(layer, projection))


def _put(
    conversion: Conversion,
    layer: MobeLayer,
    projection: str,
    shape: tuple[int, ...],
    read: Callable[[int], torch.Tensor],
) -> None:
    """Replace the converter's tensor of all experts by ``read(e)``, each of shape ``shape``."""
    name = names.transform_name(layer.index, projection)
    if name not in conversion.tensors:
        raise MobeError(
            f"{layer.checkpoint.path}: llama.cpp's converter made no tensor {name} of the experts"
        )
    stack = (layer.checkpoint.n_expert, *shape)
    conversion.replace(name, Stacked(stack, read))


def add_factors(conversion: Conversion, checkpoint: FactorDirectory) -> None:
    """Put basis and mix behind each factorized A in ``conversion.tensors``, and set the ``mobe`` keys.

    ``checkpoint`` must have passed :func:`check_factors`.
    """
    behind: dict[str, list[Tensor]] = {}
    groups, version = 1, names.MOBE_VERSION
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            behind[names.transform_name(index, projection)] = _factors(conversion, layer, projection)
            groups, version = layer.group_count(projection), max(version, side(projection).version)
    conversion.tensors = {
        tensor.name: tensor
        for found in conversion.tensors.values()
        for tensor in (found, *behind.get(found.name, ()))
    }
    add_mobe_keys(conversion.writer, conversion.arch, version, checkpoint.activation, groups)


def add_mobe_keys(writer: KeyWriter, arch: str, version: int, activation: str, groups: int) -> None:
    """All keys that a file with factors has."""
    values: dict[str, str | int] = {
        names.key_version(arch): version,
        names.key_activation(arch): activation,
        names.key_group_count(arch): groups,
    }
    add_keys(writer, values)


def _factors(conversion: Conversion, layer: MobeLayer, projection: str) -> list[Tensor]:
    """Basis ``[m, r, d]`` and mix ``[n, m/g]`` or ``[n, m/g, r]`` of one projection; for down, d and r are swapped.

    MobeError if the converter did not make one stack ``[n, p, r]`` (of down: ``[n, r, p]``) of the A's.
    """
    checkpoint, index = layer.checkpoint, layer.index
    transform, expected = (
        names.transform_name(index, projection),
        (checkpoint.n_expert, *layer.transform_shape(projection)),
    )
    found = conversion.tensors.get(transform)
    if found is None or found.source.shape != expected:
        got = "no such tensor" if found is None else f"shape {list(found.source.shape)}"
        raise MobeError(
            f"{checkpoint.path}: llama.cpp's converter made {got} of {transform}, expected {list(expected)}"
        )
    shape = (layer.n_basis(projection), *layer.basis_shape(projection))
    return [
        Tensor(names.basis_name(index, projection), Stacked(shape, partial(layer.basis_matrix, projection))),
        Tensor(names.mix_name(index, projection), Whole(layer.mix(projection))),
    ]
