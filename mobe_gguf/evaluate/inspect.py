"""What a GGUF file, a Hugging Face directory or a MoBE checkpoint holds: experts, factors, types, sizes."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import amount, describe_size
from mobe_gguf.core.sides import side
from mobe_gguf.core.tensors import merged_name
from mobe_gguf.formats.contents import ListedTensor, class_of, original_params, rows
from mobe_gguf.formats.gguf import GgufFile, is_count, missing_tensors, read_model, shown
from mobe_gguf.models.factors import ModelDirectory, recorded
from mobe_gguf.models.layout import OPTIONAL
from mobe_gguf.models.original import open_directory


@dataclass(frozen=True)
class Projection:
    """Gate, up or down of one layer: types of A (or of the ordinary experts) and B; m and r are None if not factorized.

    ``error`` is |W - W'|^2 / |W|^2 over the layer's experts, if the checkpoint recorded it.
    """

    type: str
    m: int | None = None
    r: int | None = None
    basis_type: str | None = None
    by_row: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    index: int
    gate: Projection
    up: Projection
    down: Projection

    @property
    def factorized(self) -> list[str]:
        """Names of the factorized projections."""
        return [name for name in names.ALL_PROJECTIONS if getattr(self, name).m is not None]


@dataclass
class Description:
    """Sizes, in the letters of docs/format.md: n_expert n, n_expert_used k, n_embd d, n_ff_exp p.

    ``kind``: ``gguf``, ``huggingface``, ``mobe`` (a checkpoint directory) or ``factors`` (of a GGUF file).
    n_ff_exp is that of the layer with the widest experts; ``widths`` has all that occur, the least first.
    ``n_bytes``: of all files together.  ``activation`` and ``group_count`` are None if nothing is factorized.
    ``problems``: contradictions found.
    """

    path: str
    kind: str
    arch: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff_exp: int | None
    entries: list[ListedTensor]
    original_params: int
    n_bytes: int
    name: str | None = None
    activation: str | None = None
    group_count: int | None = None
    version: int | None = None
    layers: list[Layer] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def n_params(self) -> int:
        return sum(e.n_params for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(e.n_bytes for e in self.entries) / max(1, self.n_params)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: plain values only."""
        plain = {k: v for k, v in asdict(self).items() if k != "entries"}
        plain |= {"parameters": self.n_params, "bits_per_weight": round(self.bits_per_weight, 4)}
        plain["classes"] = [
            {
                "class": r.label,
                "tensors": r.count,
                "types": dict(r.types),
                "parameters": r.n_params,
                "bytes": r.n_bytes,
            }
            for r in rows(self.entries)
        ]
        return plain


def describe(path: str | os.PathLike[str]) -> Description:
    """Describe a file or directory.  MobeError if it is neither a GGUF file nor a MoE model directory."""
    path = Path(path)
    if not path.exists():
        raise MobeError(f"{path}: no such file or directory")
    if path.is_dir():
        return _describe_directory(path)
    return describe_gguf(read_model(path))


# GGUF


def describe_gguf(file: GgufFile) -> Description:
    """:func:`describe` for a GGUF file whose head has been read."""
    entries = [ListedTensor(t.name, t.type, t.shape, t.n_bytes) for t in file.tensors.values()]
    layers, problems = _gguf_layers(file)
    problems += [f"tensor {name} is missing" for name in missing_tensors(file)]
    widths = sorted({t.shape[-1] for t in file.tensors.values() if ".ffn_down_exps.weight" in t.name})
    factorized = {name for layer in layers for name in layer.factorized}
    version, key = file.keys.get(names.key_version(file.arch)), names.key_version(file.arch)
    groups = file.keys.get(names.key_group_count(file.arch))
    if factorized and (not is_count(version) or version not in (names.MOBE_VERSION, names.MOBE_VERSION_DOWN)):
        known = f"{names.MOBE_VERSION} and {names.MOBE_VERSION_DOWN}"
        problems.append(f"key {key} is {shown(version)}, this program knows {known}")
    elif is_count(version) and (newer := [p for p in factorized if side(p).version > version]):
        problems.append(f"key {key} is {version}, bases of {newer[0]} need {side(newer[0]).version}")
    return Description(
        path=str(file.path),
        kind="gguf",
        arch=file.arch,
        name=file.text("general.name"),
        n_layer=file.arch_number("block_count"),
        n_expert=file.arch_number("expert_count"),
        n_expert_used=file.arch_most("expert_used_count"),
        n_embd=file.arch_number("embedding_length"),
        n_ff_exp=widths[-1] if widths else None,
        widths=widths,
        entries=entries,
        original_params=original_params(entries),
        n_bytes=file.size,
        activation=file.text(names.key_activation(file.arch)),
        group_count=groups if is_count(groups) else None,
        version=version if is_count(version) else None,
        layers=layers,
        problems=problems,
    )


def _gguf_layers(file: GgufFile) -> tuple[list[Layer], list[str]]:
    problems: list[str] = []
    layers = []
    for name in file.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.ffn_down_exps\.weight", name)
        if match is None:
            continue
        index = int(match[1])
        layers.append(
            Layer(index, *(_gguf_projection(file, index, p, problems) for p in names.ALL_PROJECTIONS))
        )
    return sorted(layers, key=lambda layer: layer.index), problems


def _gguf_projection(file: GgufFile, layer: int, projection: str, problems: list[str]) -> Projection:
    """One projection; contradictions to docs/format.md, "GGUF", are added to ``problems``."""
    transform = file.tensors.get(names.transform_name(layer, projection))
    basis = file.tensors.get(names.basis_name(layer, projection))
    mix = file.tensors.get(names.mix_name(layer, projection))
    if transform is None:
        fused = file.tensors.get(merged_name(layer))
        if projection in OPTIONAL and not _has_gates(file):
            return Projection("-")
        if fused is None or basis is not None:
            problems.append(f"tensor {names.transform_name(layer, projection)} is missing")
        return Projection(fused.type if fused else "?")
    if basis is None:
        if mix is not None:
            problems.append(f"tensor {mix.name} has no {names.basis_name(layer, projection)} beside it")
        return Projection(transform.type)
    on = side(projection)
    m, rows, _ = shape = (1, 1, *basis.shape)[-3:]
    r = shape[on.r_axis]
    groups = file.keys.get(names.key_group_count(file.arch))
    n, d = file.arch_number("expert_count"), _n_embd(file, layer)
    if len(basis.shape) != 3 or shape[on.d_axis] != d:
        form = on.basis_form.format(d=d)
        problems.append(f"tensor {basis.name} has shape {list(basis.shape)}, expected {form}")
    found = (1, *transform.shape)[on.d_axis]
    if found != r:
        what = f"{found} rows" if on.output else f"rows of {found}"
        problems.append(f"tensor {transform.name} has {what}, {basis.name} has rank {r}")
    if not is_count(groups) or groups < 1 or m % groups:
        problems.append(
            f"tensor {basis.name} has {m} bases, key {names.key_group_count(file.arch)} is {shown(groups)}"
        )
    elif mix is None:
        problems.append(f"tensor {names.mix_name(layer, projection)} is missing")
    elif mix.type != "f32" or mix.shape not in ((n, m // groups), (n, m // groups, rows)):
        problems.append(
            f"tensor {mix.name} is {mix.type} {list(mix.shape)}, expected f32 {[n, m // groups]} or "
            f"{[n, m // groups, rows]}"
        )
    by_row = mix is not None and len(mix.shape) == 3
    return Projection(transform.type, m, r, basis.type, by_row)


def _has_gates(file: GgufFile) -> bool:
    """Whether experts have a gate; in some architectures (nemotron_h_moe) they have none."""
    return any(re.fullmatch(r"blk\.\d+\.ffn_gate(_up)?_(exps|basis)\.\w+", name) for name in file.tensors)


def _n_embd(file: GgufFile, layer: int) -> int:
    """d of a layer's experts, as most of the layer's tensors have it; tensors that are not factorized come first.  The
    inputs of experts may be smaller than ``embedding_length``."""
    plain, bases = Counter[int](), Counter[int]()
    for projection in names.ALL_PROJECTIONS:
        axis = side(projection).d_axis
        basis = file.tensors.get(names.basis_name(layer, projection))
        if basis is not None:
            bases[(1, *basis.shape)[axis]] += 1
        elif (info := file.tensors.get(names.transform_name(layer, projection))) is not None:
            plain[(1, *info.shape)[axis]] += 1
    return (plain or bases).most_common(1)[0][0]


# directories


def _describe_directory(path: Path) -> Description:
    checkpoint = open_directory(path)
    labels = _labels(checkpoint)
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    entries = [
        ListedTensor(
            name, info.dtype.lower(), info.shape, info.n_bytes, label=labels.get(name) or _label(name)
        )
        for name, info in infos.items()
    ]
    description = Description(
        path=str(path),
        kind=checkpoint.kind,
        arch=checkpoint.family.name,
        n_layer=checkpoint.n_layer,
        n_expert=checkpoint.n_expert,
        n_expert_used=checkpoint.n_expert_used,
        n_embd=checkpoint.n_embd,
        n_ff_exp=checkpoint.n_ff_exp,
        entries=entries,
        original_params=0,
        n_bytes=sum((path / shard).stat().st_size for shard in {info.shard for info in infos.values()}),
        version=recorded(checkpoint.config, "version"),
        layers=[_layer(checkpoint, index) for index in checkpoint.moe_layers],
        problems=[f"tensor {name} is missing" for name in checkpoint.missing()],
    )
    if not description.problems:
        try:
            checkpoint.check_whole()
        except MobeError as e:
            description.problems.append(e.message.removeprefix(f"{path}: ").removeprefix(f"{path}/"))
    in_factors = sum(e.n_params for e in entries if e.label in ("A", "B", "mix"))
    replaced = [name for layer in description.layers for name in layer.factorized]
    dense = math.prod((checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd))
    description.original_params = description.n_params - in_factors + len(replaced) * dense
    if (factors := checkpoint.factors) is not None:
        description.activation = factors.activation
        index = next((layer.index for layer in description.layers if layer.factorized), None)
        if index is not None:
            layer = factors.layer(index)
            description.group_count = layer.group_count(layer.projections[0])
    return description


def _layer(checkpoint: ModelDirectory, index: int) -> Layer:
    found = {}
    for projection in names.ALL_PROJECTIONS:
        family = checkpoint.family
        sources = checkpoint.expert_sources(index, projection)
        if not sources:  # the experts are in the GGUF file that the factors were made of
            found[projection] = Projection("-")
            continue
        dtype = checkpoint.info(sources[0]).dtype.lower()
        layer = None if (factors := checkpoint.factors) is None else factors.layer(index)
        if layer is None or projection not in layer.projections:
            found[projection] = Projection(dtype)
            continue
        basis = next(
            name
            for name in (family.basis(index, projection), family.basis(index, projection, 0))
            if name in checkpoint
        )
        found[projection] = Projection(
            type=dtype,
            m=layer.n_basis(projection),
            r=layer.rank(projection),
            basis_type=checkpoint.info(basis).dtype.lower(),
            by_row=layer.is_row_mixed(projection),
            error=_recorded_error(checkpoint.config, index, projection),
        )
    return Layer(index, **found)


def _recorded_error(config: dict[str, Any], layer: int, projection: str) -> float | None:
    value = recorded(config, "errors", str(layer), projection)
    return float(value) if isinstance(value, (int, float)) else None


def _labels(checkpoint: ModelDirectory) -> dict[str, str]:
    """Tensor name -> class of ``contents.CLASSES``, for all tensors of routed experts."""
    labels = {}
    for index in checkpoint.moe_layers:
        layer = None if (factors := checkpoint.factors) is None else factors.layer(index)
        for projection in names.ALL_PROJECTIONS:
            factorized = layer is not None and projection in layer.projections
            label = "A" if factorized else class_of(names.transform_name(index, projection))
            for name in checkpoint.expert_sources(index, projection):
                labels[name] = label
    return labels


def _label(name: str) -> str:
    """Class of a tensor outside the routed experts, by its Hugging Face name."""
    if re.search(r"\.B_(gate|up|down)(_\d+)?$", name):
        return "B"
    if re.search(r"\.W_(gate|up|down)(_\d+)?$", name):
        return "mix"
    if re.search(r"embed|lm_head", name):
        return "embeddings"
    return "attention" if re.search(r"\.(self_attn|attention)\.(?!.*norm)", name) else "other"


# tables


def summary(d: Description) -> list[str]:
    """A few lines of text."""
    kinds = {
        "gguf": "GGUF file",
        "huggingface": "Hugging Face model",
        "mobe": "MoBE checkpoint",
        "factors": "factors of a GGUF file",
    }
    p = f", p {d.n_ff_exp}" if d.n_ff_exp else ""
    p = f", p {d.widths[0]} to {d.widths[-1]}" if len(d.widths) > 1 else p
    lines = [
        f"{d.path}: {kinds[d.kind]}" + (f", {d.name}" if d.name else ""),
        f"{d.arch}: {d.n_layer} layers, {len(d.layers)} of them MoE; n {d.n_expert}, k {d.n_expert_used}, "
        f"d {d.n_embd}{p}",
    ]
    if d.group_count is not None:
        layout = f", layout version {d.version}" if d.version is not None else ""
        lines.append(f"factorized: f {d.activation}, {d.group_count} group{'s'[: d.group_count > 1]}{layout}")
    ratio = ""
    if d.n_params != d.original_params:
        ratio = f"; {d.n_params / d.original_params:.1%} of the original's {amount(d.original_params)}"
    lines.append(
        f"{amount(d.n_params)} parameters{ratio}; "
        f"{describe_size(d.n_bytes)}, {d.bits_per_weight:.2f} bits per weight"
    )
    return lines


def layer_table(layers: list[Layer]) -> Table:
    """MoE layers; consecutive equal layers share a line.  At most 100 columns wide."""
    table = Table(pad_edge=False, box=None)
    columns = ("layers", "projection", "m", "r", "mix", "A", "B", "error")
    for column in columns:
        table.add_column(column, justify="right" if column in ("m", "r", "error") else "left")
    for first, last, projection, p in _runs(layers):
        form = (
            (str(p.m), str(p.r), "by row" if p.by_row else "scalar") if p.m is not None else ("-", "-", "-")
        )
        error = "-" if p.error is None else f"{p.error:.4f}"
        numbers = str(first) if first == last else f"{first}-{last}"
        table.add_row(numbers, projection, *form, p.type, p.basis_type or "-", error)
    return table


def _runs(layers: list[Layer]) -> list[tuple[int, int, str, Projection]]:
    """``(first, last, projections, their description)`` for runs of consecutive equal layers."""
    runs: list[list[Layer]] = []
    for layer in layers:
        previous = runs[-1][-1] if runs else None
        if (
            previous is not None
            and layer.index == previous.index + 1
            and all(getattr(previous, p) == getattr(layer, p) for p in names.ALL_PROJECTIONS)
        ):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    out = []
    for run in runs:
        first, last, head = run[0].index, run[-1].index, run[0]
        alike: dict[Projection, list[str]] = {}
        for projection in names.ALL_PROJECTIONS:
            alike.setdefault(getattr(head, projection), []).append(projection)
        out += [(first, last, ", ".join(found), p) for p, found in alike.items()]
    return out
