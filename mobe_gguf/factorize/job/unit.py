"""One unit of a job, a projection of a layer: read, probe, fit and write it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.metric import Roots
from mobe_gguf.core.sides import side
from mobe_gguf.factorize.baselines import Matrices
from mobe_gguf.factorize.down import fit_down
from mobe_gguf.factorize.job import probing
from mobe_gguf.factorize.job.state import Job
from mobe_gguf.factorize.plan import baseline
from mobe_gguf.factorize.solver import Factors, Settings, fit
from mobe_gguf.factorize.target import Size, Unit
from mobe_gguf.formats.safetensors import STORED, Entry, write_safetensors

#: One unit at a time reads the source, because sequential reads are fastest.
_READING = threading.Lock()


@dataclass(frozen=True)
class UnitResult:
    """``error``: |W - W'|^2 / |W|^2; ``objective``: the same in the metric minimised; ``seconds`` None if resumed."""

    layer: int
    projection: str
    error: float
    objective: float
    steps: int
    seconds: float | None = None


def fit_unit(
    job: Job, layer: int, projection: str, device: str, on_step: Callable[[float, float], None] | None = None
) -> UnitResult:
    """Read, fit and write one unit."""
    checkpoint, size = job.checkpoint, job.size((layer, projection))
    stack, weight = _read(job, layer, projection)
    if job.settings.how.fitted:
        settings = job.settings.solver(size, projection)
        factors: Factors | Matrices = _fit(layer, projection, stack, weight, settings, device, on_step)
    else:
        shape = checkpoint.n_expert, checkpoint.width(layer), checkpoint.n_embd
        chosen, dtype = baseline(job.settings, *shape), STORED[job.settings.dtype]
        factors = chosen.compress(stack, weight=weight, dtype=dtype, device=device)
    result = UnitResult(layer, projection, factors.error, factors.objective, factors.steps, factors.seconds)
    # The file has no times, so a resumed job gives the same bytes as one that was never stopped.
    about = {"error": result.error, "objective": result.objective, "steps": result.steps}
    about |= asdict(size) if size else {}
    with atomic_path(job.unit_path(layer, projection), job.shared) as part:
        entries = [Entry.of(name, tensor) for name, tensor in _tensors(job, result, factors).items()]
        write_safetensors(part, entries, {"format": "pt", "mobe": json.dumps(about)})
    return result


def probe_unit(
    known: Mapping[Unit, probing.Probes],
    wanted: Mapping[Unit, list[Size]],
    job: Job,
    layer: int,
    projection: str,
    device: str,
    on_step: Callable[[float, float], None],
) -> tuple[Unit, probing.Probes]:
    """Read one unit and measure it at several sizes."""
    unit = (layer, projection)
    stack, weight = _read(job, layer, projection)

    def fit_briefly(size: Size, steps: int, on_step: Callable[[float, float], None]) -> float:
        settings = replace(job.settings.solver(size, projection), steps=steps)
        return _fit(layer, projection, stack, weight, settings, device, on_step).objective

    return unit, probing.probe_unit(job, unit, known.get(unit), wanted[unit], fit_briefly, on_step)


def _read(job: Job, layer: int, projection: str) -> tuple[torch.Tensor, torch.Tensor | Roots | None]:
    """A unit's experts and the second moments of their inputs.  These are full if there are moments; they are those of single
    channels with an imatrix, or for a baseline, which supports no other kind for each expert."""
    checkpoint = job.checkpoint
    columns = checkpoint.expert_shape(layer, projection)[1]
    weight: torch.Tensor | Roots | None = None
    if job.moments:
        weight = job.moments.weight(layer, projection, checkpoint.n_expert, columns)
        if not job.settings.how.fitted:
            weight = weight.channels()
    elif job.imatrix:
        weight = job.imatrix.weight(layer, projection, checkpoint.n_expert, columns)
    with _READING:
        return checkpoint.expert_stack(layer, projection), weight


def _fit(
    layer: int,
    projection: str,
    stack: torch.Tensor,
    weight: torch.Tensor | Roots | None,
    settings: Settings,
    device: str,
    on_step: Callable[[float, float], None] | None,
) -> Factors:
    """Fit a unit's ``stack``, which is scaled in place."""
    return (fit_down if side(projection).output else fit)(
        stack,
        settings,
        weight=weight,
        device=device,
        label=f"layer {layer} {projection}",
        on_step=on_step,
        overwrite_w=True,
    )


def _tensors(job: Job, unit: UnitResult, factors: Factors | Matrices) -> dict[str, torch.Tensor]:
    """The unit's factors under the names of the MoBE checkpoint, or its matrices under their own names."""
    family, g = job.checkpoint.family, job.settings.groups
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(factors, Matrices):
        for e, matrix in enumerate(factors.matrices):
            tensors[family.expert_weight(unit.layer, e, unit.projection)] = matrix
        return tensors
    for group, (basis, mix) in enumerate(zip(factors.basis.chunk(g), factors.mix.chunk(g), strict=True)):
        index = group if g > 1 else None
        tensors[family.basis(unit.layer, unit.projection, index)] = basis
        tensors[family.mix(unit.layer, unit.projection, index)] = mix
    for e, transform in enumerate(factors.transform):
        tensors[family.expert_weight(unit.layer, e, unit.projection)] = transform
    return tensors
