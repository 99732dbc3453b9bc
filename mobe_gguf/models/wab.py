"""The output files of the method's authors' training, read together with the original model.

``train.py`` writes one file for each layer and projection, ``train_group.py`` one for each group of experts
(github.com/inclusionAI/MoBE):

    model_layers_3_mlp_gate_proj_WAB.pth    model_layers_3_mlp_up_proj_group1_WAB.pth

Each is a ``state_dict``: ``A_params`` [n, p, r], ``B_params`` [m, r, d], ``w_params`` [n, m].  The mixing weights are
``softmax(w_params)``.  A belongs to experts divided by their standard deviation, which is not in the file.  It is computed
from the original model again, as in training: over the layer's experts in float16.  The file does not name the activation
either.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.names import PROJECTIONS, WAB_ACTIVATIONS
from mobe_gguf.models.factors import MobeLayer
from mobe_gguf.models.mobe_checkpoint import ModelWithFactors
from mobe_gguf.models.tensors import all_finite

FILE = re.compile(r"model_layers_(\d+)_mlp_(\w+?)_proj(?:_group(\d+))?_WAB\.pth")

#: Key -> number of dimensions.
KEYS = {"A_params": 3, "B_params": 3, "w_params": 2}


def wab_name(layer: int, projection: str, group: int | None = None) -> str:
    """Name of one file."""
    suffix = "" if group is None else f"_group{group}"
    return f"model_layers_{layer}_mlp_{projection}_proj{suffix}_WAB.pth"


@dataclass(frozen=True)
class WabFiles:
    """The user's description of training output: its ``folders``, the ``activation`` used in training, and the MoE
    ``layers`` that are factorized (None: all).  The other layers stay ordinary."""

    folders: tuple[Path, ...]
    activation: str
    layers: tuple[int, ...] | None = None


class WabLayer(MobeLayer):
    """One MoE layer with the interface of :class:`MobeLayer`, read from .pth files and the original experts."""

    checkpoint: WabCheckpoint

    @cached_property
    def projections(self) -> tuple[str, ...]:
        units = self.checkpoint.files.keys() - self.checkpoint.left_out
        return tuple(p for p in PROJECTIONS if (self.index, p) in units)

    def _check(self, projection: str) -> tuple[int, int, int]:
        c, d, p = self.checkpoint, self.checkpoint.n_embd, self.checkpoint.n_ff_exp
        paths, parts = c.files[self.index, projection], self._parts(projection)
        g, n_group = len(parts), c.n_expert // len(parts)
        if n_group * g != c.n_expert:
            raise MobeError(f"{paths[0]}: {g} groups do not divide {c.n_expert} experts")
        m_group, r, _ = parts[0]["B_params"].shape
        expected = {"A_params": (n_group, p, r), "B_params": (m_group, r, d), "w_params": (n_group, m_group)}
        for path, part in zip(paths, parts, strict=True):
            for key, shape in expected.items():
                if tuple(part[key].shape) != shape:
                    raise MobeError(
                        f"{path}: {key} has shape {list(part[key].shape)}, expected {list(shape)} for {c.n_expert} "
                        f"experts in {g} group{'s'[: g > 1]} of {c.path}. Is it of this model, and is no group missing?"
                    )
        return g, m_group * g, r

    def is_row_mixed(self, projection: str) -> bool:
        return False

    def basis(self, projection: str) -> torch.Tensor:
        return torch.cat([self._part(projection, g, "B_params") for g in range(self.group_count(projection))])

    def basis_matrix(self, projection: str, index: int) -> torch.Tensor:
        g, m, _ = self._checked[projection]
        return self._part(projection, index // (m // g), "B_params", index % (m // g))

    def mix(self, projection: str) -> torch.Tensor:
        parts = [self._part(projection, g, "w_params") for g in range(self.group_count(projection))]
        return torch.cat([torch.softmax(part, dim=1) for part in parts])

    def transform(self, projection: str, expert: int) -> torch.Tensor:
        group, index = divmod(expert, self.checkpoint.n_expert // self.group_count(projection))
        return self._part(projection, group, "A_params", index) * self.scale(projection)

    def scale(self, projection: str) -> float:
        """sigma, the number by which training divided the layer's experts."""
        if projection not in self._scales:
            self._scales[projection] = self._standard_deviation(projection)
        return self._scales[projection]

    @cached_property
    def _scales(self) -> dict[str, float]:
        return {}

    def _standard_deviation(self, projection: str) -> float:
        """Standard deviation of all experts' values in float16, rounded to float16, like ``target.std()`` in training."""
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for e in range(self.checkpoint.n_expert):
            w = self.checkpoint.expert(self.index, projection, e).half().double()
            total, squares, count = total + w.sum(), squares + w.square().sum(), count + w.numel()
        return float(((squares - total**2 / count) / (count - 1)).clamp(min=0).sqrt().half())

    def _parts(self, projection: str) -> list[dict[str, torch.Tensor]]:
        return self.checkpoint.load(self.index, projection)

    def _part(self, projection: str, group: int, key: str, index: int | None = None) -> torch.Tensor:
        """One group's tensor, or row ``index`` of it, as float32."""
        self._checked[projection]
        tensor = self._parts(projection)[group][key]
        tensor = (tensor if index is None else tensor[index]).float()
        if not all_finite(tensor):
            path = self.checkpoint.files[self.index, projection][group]
            raise MobeError(f"{path}: {key} holds NaN or Inf; its training diverged. Train this unit again.")
        return tensor


class WabCheckpoint(ModelWithFactors):
    """The original model at ``path``, with factors from training files in place of its experts.

    Raises MobeError if a file is missing or does not match its name, or if the activation does not fit.
    """

    layer_class = WabLayer
    under_expert_names = False

    def __init__(self, path: str | os.PathLike[str], said: WabFiles):
        super().__init__(path)
        if self.is_mobe:
            raise MobeError(f"{self.path} is a MoBE checkpoint; --wab goes with the original model")
        self.activation = said.activation
        self.files = self._find(said)
        self._loaded: tuple[tuple[int, str], list[dict[str, torch.Tensor]]] | None = None
        self._check_activation()

    def original_path(self, given: str | os.PathLike[str] | None) -> Path:
        """This directory's own path."""
        return self.path

    def source_files(self) -> list[Path]:
        return super().source_files() + [path for paths in self.files.values() for path in paths]

    def load(self, layer: int, projection: str) -> list[dict[str, torch.Tensor]]:
        """The content of a unit's files, one for each group, mapped and not read.  The last unit is cached."""
        if self._loaded is None or self._loaded[0] != (layer, projection):
            self._loaded = None
            parts = [read_wab(path) for path in self.files[layer, projection]]
            self._loaded = (layer, projection), parts
        return self._loaded[1]

    def _find(self, said: WabFiles) -> dict[tuple[int, str], list[Path]]:
        """``(layer, projection)`` -> its files, one for each group."""
        wanted = self.moe_layers if said.layers is None else said.layers
        if unknown := sorted(set(wanted) - set(self.moe_layers)):
            raise MobeError(f"{self.path}: layer {unknown[0]} has no routed experts, MoE layers are "
                            f"{self.moe_layers[0]} to {self.moe_layers[-1]}")  # fmt: skip
        found: dict[tuple[int, str], dict[int | None, Path]] = {}
        for folder in said.folders:
            if not folder.is_dir():
                raise MobeError(f"{folder}: no such directory; --wab names the one with the *_WAB.pth files")
            for path in sorted(folder.glob("*_WAB.pth")):
                self._sort_in(path, wanted, found)
        where = ", ".join(map(str, said.folders))
        if not found:
            raise MobeError(
                f"{where}: no files named like {wab_name(wanted[0], 'gate')}, which training writes"
            )
        missing = [(layer, p) for layer in wanted for p in PROJECTIONS if (layer, p) not in found]
        if missing:
            raise MobeError(
                f"{where}: nothing for {_units(missing)}. Expected {wab_name(*missing[0])} and so on. "
                "Train them, or name the layers that are factorized with --wab-layers; the others stay as they are."
            )
        return {unit: self._in_order(unit, groups) for unit, groups in found.items()}

    def _sort_in(
        self, path: Path, wanted: Collection[int], found: dict[tuple[int, str], dict[int | None, Path]]
    ) -> None:
        match = FILE.fullmatch(path.name)
        if match is None or match[2] not in PROJECTIONS:
            raise MobeError(f"{path}: expected a name like {wab_name(3, 'gate')}, of gate or up. Move it elsewhere if it "
                            "is not one of the files to export.")  # fmt: skip
        unit, group = (int(match[1]), match[2]), None if match[3] is None else int(match[3])
        if unit[0] not in self.moe_layers:
            raise MobeError(
                f"{path}: layer {unit[0]} of {self.path} has no routed experts. Is it of this model?"
            )
        if unit[0] not in wanted:
            return
        groups = found.setdefault(unit, {})
        if group in groups:
            raise MobeError(
                f"{path} and {groups[group]} are of the same layer, projection and group; keep one"
            )
        groups[group] = path

    def _in_order(self, unit: tuple[int, str], groups: dict[int | None, Path]) -> list[Path]:
        if None in groups:
            if len(groups) > 1:
                one, other = sorted(groups.values())[:2]
                raise MobeError(
                    f"{one} and {other} are of one unit, with groups and without; keep what is right"
                )
            return [groups[None]]
        for expected in range(max(g for g in groups if g is not None) + 1):
            if expected not in groups:
                some = next(iter(groups.values()))
                raise MobeError(f"{some.with_name(wab_name(*unit, expected))} is missing: there is {some.name}, but not "
                                f"group {expected}")  # fmt: skip
        return [groups[g] for g in sorted(groups, key=lambda g: -1 if g is None else g)]

    def _check_activation(self) -> None:
        """Try the activation on one expert: no file names it, and a wrong one turns the model's output into noise."""
        index, projection = min(self.files)
        layer = self.layer(index)
        w = self.expert(index, projection, 0)
        u = combine(layer.mix(projection)[:1], layer.group_basis(projection, 0))
        a = layer.transform(projection, 0)
        errors = {}
        for activation in WAB_ACTIVATIONS:
            rest = w - a @ activate(u, activation)[0]
            errors[activation] = float(rest.square().sum() / w.square().sum())
        error = errors[self.activation]
        if not error < 1 or 2 * min(errors.values()) < error:
            said = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
            raise MobeError(
                f"{self.files[index, projection][0]}: these factors do not give the experts of {self.path} back: relative "
                f"error of expert 0 by --activation: {said}; about 0.1 is usual. "
                "Name the activation that they were trained with, and the model that they were trained on."
            )


def read_wab(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped into memory.  MobeError if it holds anything but these three.

    Only tensors are read from the pickle (``weights_only``); code in it is not run.
    """
    if not zipfile.is_zipfile(path):
        raise MobeError(f"{path}: truncated, or no file of torch.save (a zip archive since torch 1.6). Copy it again, or "
                        "load and save it with a newer torch.")  # fmt: skip
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as e:
        raise MobeError(f"{path}: cannot be read: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        raise MobeError(f"{path}: refused, for it is no plain file of tensors{_named(e)}. A pickle can run any code when "
                        "it is loaded, so only tensors are read. Get the file from where it was made.") from e  # fmt: skip
    except Exception as e:  # torch raises many kinds of errors for damaged files
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise MobeError(f"{path}: cannot be read as a file of torch.save: {reason}. Copy it again.") from e
    found = state if isinstance(state, dict) else {}
    for key, n_dim in KEYS.items():
        tensor = found.get(key)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise MobeError(
                f"{path}: no tensor {key}; expected {', '.join(KEYS)}, as the authors' training writes them"
            )
        if tensor.dim() != n_dim or not tensor.is_floating_point() or not tensor.numel():
            raise MobeError(f"{path}: {key} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected "
                            f"{n_dim} dimensions of floating-point numbers")  # fmt: skip
    return {key: found[key].detach() for key in KEYS}


def _named(error: Exception) -> str:
    """The object that a refused pickle asks for, from torch's message."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f": it asks for {match[1]}" if match else ""


def _units(units: list[tuple[int, str]]) -> str:
    """``layer 1 (up), layers 3, 4, 5 (gate, up)``: at most eight, then a count."""
    by_layer: dict[int, list[str]] = {}
    for layer, projection in units:
        by_layer.setdefault(layer, []).append(projection)
    said = [f"layer {layer} ({', '.join(found)})" for layer, found in by_layer.items()]
    return ", ".join(said[:8]) + (f" and {len(said) - 8} more layers" if len(said) > 8 else "")
