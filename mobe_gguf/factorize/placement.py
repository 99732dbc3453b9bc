"""``--placement``: the number and rank of bases, and types, for a machine, by arithmetic.

A token reads all bases of a layer, ``m r d`` weights, and A of the experts that it uses, ``k p r``.  Few wide bases make the
first small, many narrow ones the second.  Where the bases lie decides which is faster: in the CPU's memory beside A (``cpu``),
in the GPU's memory with everything else (``gpu``), or in the GPU's memory while the experts' own matrices are in the CPU's
(``hybrid``, llama.cpp's ``--cpu-moe``).  So all sizes that keep the same share of the parameters are compared, the fastest that
fits is taken, and types become smaller until one fits.  The time of a token is that of ``plan`` (:mod:`core.reading`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import describe_size, parse_size
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.names import PROJECTIONS
from mobe_gguf.core.reading import VRAM_BANDWIDTH, reading_seconds
from mobe_gguf.factorize.plan import LARGEST, SLACK, block_of
from mobe_gguf.factorize.spec import Options
from mobe_gguf.factorize.target import Size
from mobe_gguf.formats.types import BY_NAME
from mobe_gguf.models.original import Original
from mobe_gguf.quant.roundtrip import resolve

#: Bytes per second of system memory if nothing is said: two channels of DDR5.
RAM_BANDWIDTH = 60e9
#: Numbers of bases to compare.  One basis for all (MoLAE) has a third more error at equal size, so it is not among them.
BASES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: Types of B and A, best first.
TYPES = (("q4_k", "q4_k"), ("q4_k", "q3_k"), ("q3_k", "q2_k"))
#: Type that other tensors are assumed to have; bytes of KV cache and buffers.
OTHER, BESIDE = "q4_k", 2e9
#: Sizes within this share of the fastest time count as equally fast; the most bases of these are taken, for their error.
EQUAL = 1.01


@dataclass(frozen=True)
class Hardware:
    """Bytes of memory, and bytes per second."""

    placement: str
    ram: int
    vram: int
    ram_bandwidth: float
    vram_bandwidth: float


@dataclass(frozen=True)
class Placed:
    """A size with its types, the bytes that it takes in each memory, and what a token reads."""

    size: Size
    basis_type: str
    transform_type: str
    vram: float
    ram: float
    read_vram: float
    read_ram: float
    seconds: float

    def line(self) -> str:
        """The choice, for people."""
        where = [f"{describe_size(round(self.vram))} in VRAM"] if self.vram else []
        where += [f"{describe_size(round(self.ram))} in RAM"] if self.ram else []
        return (
            f"{self.size.bases} bases of rank {self.size.rank}, bases in {self.basis_type}, A in {self.transform_type}: "
            f"{' and '.join(where)}; a token reads {describe_size(round(self.read_vram + self.read_ram))}, "
            f"{1 / self.seconds:.1f} tokens/s at most"
        )


def hardware(
    placement: str, ram: str | None, vram: str | None, bandwidth: str | None, vram_bandwidth: str | None
) -> Hardware:
    """From options; what is not said is this machine's, or a usual value.  UsageError if there is no GPU memory to use."""
    there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    memory = (
        parse_size(vram, "--vram") if vram and vram.strip() not in ("0", "none") else 0 if vram else there
    )
    if placement != "cpu" and not memory:
        raise UsageError(f"--placement {placement} needs a GPU: say how much memory it has, as --vram 24G")
    return Hardware(
        placement,
        parse_size(ram, "--ram") if ram else free_memory(),
        memory,
        float(parse_size(bandwidth, "--bandwidth")) if bandwidth else RAM_BANDWIDTH,
        float(parse_size(vram_bandwidth, "--vram-bandwidth")) if vram_bandwidth else VRAM_BANDWIDTH,
    )


def choose(model: Original, machine: Hardware, asked: Options) -> tuple[Options, Placed]:
    """``asked`` with the fastest size that fits, no activation, and types.  With a target, a share, sizes keep this share of the
    parameters, else about that of the paper's.

    UsageError if ``asked`` has sizes, or a target in bytes, or nothing fits; then the message has what the smallest one takes.
    """
    said = replace(asked, target=None)
    if not said.says_no_form or isinstance(asked.target, int):
        raise UsageError(
            "--placement chooses the form: leave out --bases, --rank, --groups, --activation, --mix, --mix-terms and --method; --target "
            "is a share with it, as 0.6"
        )
    if asked.projections not in (None, tuple(PROJECTIONS)):
        raise UsageError("--placement is for gate and up; leave out --projections")
    layers = model.moe_layers if asked.layers is None else asked.layers
    units = len(PROJECTIONS) * len(layers)
    found = fastest(model, machine, units, asked.target)
    return replace(
        said,
        bases=found.size.bases,
        rank=found.size.rank,
        activation="none",
        for_basis=asked.for_basis or found.basis_type,
        for_transform=asked.for_transform or found.transform_type,
    ), found


def fastest(model: Original, machine: Hardware, units: int, share: float | None = None) -> Placed:
    """The fastest size for ``units`` stacks that fits, in the best types that fit.  UsageError if nothing fits."""
    d, p = model.n_embd, model.n_ff_exp
    goal = min(p / d + 0.25, LARGEST) if share is None else share
    there = list(sizes(model, goal))
    if not there:
        raise UsageError(
            f"--placement: no sizes keep {goal:.0%} of experts of {p} x {d}; give --bases and --rank"
        )
    for types in TYPES:
        found = [place(model, size, types, units, machine) for size in there]
        fitting = [f for f in found if f.vram <= machine.vram and f.ram <= machine.ram]
        if fitting:
            best = min(f.seconds for f in fitting)
            return max((f for f in fitting if f.seconds <= EQUAL * best), key=lambda f: f.size.bases)
    smallest = min(found, key=lambda f: f.vram + f.ram)
    raise UsageError(
        f"--placement {machine.placement}: nothing fits into {describe_size(machine.vram)} of VRAM and {describe_size(machine.ram)} of "
        f"RAM. The smallest: {smallest.line()}"
    )


def sizes(model: Original, share: float) -> Iterator[Size]:
    """Sizes that keep about ``share`` of the parameters, with ranks of whole blocks."""
    n, p, d = model.n_expert, model.n_ff_exp, model.n_embd
    block = block_of(d)
    for m in BASES:
        each = 1 / d + m / (n * p)
        rank = round(share / each / block) * block
        if m <= n and 0 < rank <= d and share / SLACK <= rank * each <= share * SLACK and rank * each < 1:
            yield Size(m, rank)


def place(model: Original, size: Size, types: tuple[str, str], units: int, machine: Hardware) -> Placed:
    """What one size takes and how fast it is read, with gate and up factorized."""
    n, p, d, k = model.n_expert, model.n_ff_exp, model.n_embd, model.n_expert_used
    m, r = size.bases, size.rank
    basis_type, transform_type = resolve("--for-basis", types[0], d), resolve("--for-transform", types[1], r)
    basis = units * m * r * d * BY_NAME[basis_type].bits / 8
    transform = units * n * p * r * BY_NAME[transform_type].bits / 8
    plain = (3 * len(model.moe_layers) - units) * n * p * d * BY_NAME[transform_type].bits / 8
    predicting = int(model.config.get("num_nextn_predict_layers") or 0)  # their experts are not run
    other = (model.n_params - 3 * (len(model.moe_layers) + predicting) * n * p * d) * BY_NAME[OTHER].bits / 8
    experts = transform + plain
    vram, ram = {
        "cpu": (0.0, basis + experts + other + BESIDE),
        "gpu": (basis + experts + other + BESIDE, 0.0),
        "hybrid": (basis + other + BESIDE, experts),
    }[machine.placement]
    reads = {"bases": basis + other, "experts": experts * k / n}
    on_gpu = {"cpu": 0.0, "gpu": sum(reads.values()), "hybrid": reads["bases"]}[machine.placement]
    on_cpu = sum(reads.values()) - on_gpu
    seconds = reading_seconds(on_gpu, machine.vram_bandwidth, {"": on_cpu}, lambda _: machine.ram_bandwidth)
    return Placed(size, basis_type, transform_type, vram, ram, on_gpu, on_cpu, seconds)
