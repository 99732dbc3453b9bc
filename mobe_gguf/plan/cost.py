"""The cost of each form on a machine: bytes in VRAM and RAM, bytes read per token, tokens per second, estimated
quality.

A token reads all weights once, except the embeddings (one row) and the experts (k of n).  ``seconds = bytes in VRAM /
its bandwidth + bytes in RAM by type / the CPU's measured rate of the type + nodes of the graph``.  Routed experts go to
system memory first, a layer at a time, as with llama.cpp's ``--n-cpu-moe``; bases stay with the other weights.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from mobe_gguf.core.reading import reading_seconds
from mobe_gguf.plan.forms import Form
from mobe_gguf.plan.layout import Layout
from mobe_gguf.plan.machine import Machine
from mobe_gguf.plan.memory import Beside
from mobe_gguf.plan.probe import Probe
from mobe_gguf.quant.roundtrip import noise

#: Nodes in the graph of a MoE decoder layer; all threads synchronize after each.
NODES = 40
#: Memory that is left to the system and other programs.
RESERVE = 0.5e9

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")

#: KL divergence per unit of relative squared error of gate and up, and the share of it that remains with rounding by
#: moments.  Of the shipped model (docs/quality.md); its q4_k, q3_k and q2_k files agree within a fifth.
KL_OF_ERROR, ROUNDED_BY_MOMENTS = 0.155, 0.5
#: What rounded factors lose more, relative to plain files: the shipped model's file of 3.89 MB has 0.0070 where 0.0029 follows
#: without it, its plain file of 3.95 MB 0.0033 where 0.0020 follows (README's table).
ROUNDED_FACTORS = 1.5
#: KL divergence of unrounded factors by the share of gate and up that they keep; shipped model, 2 to 4 wide bases.
KL_OF_KEPT = ((0.5, 0.0065), (0.625, 0.0022), (0.75, 0.0009))


@dataclass(frozen=True)
class Cost:
    """The cost of one form: bytes in VRAM and RAM, KV cache included, and bytes of each that a token reads.

    ``cpu_layers``: layers with experts in RAM.  ``error``: relative squared error of the experts, if a probe measured
    it.
    """

    form: Form
    vram: int
    ram: int
    read_vram: int
    read_ram: int
    tokens_per_second: float
    cpu_layers: int
    fits: bool
    kl: float
    error: float | None = None

    @property
    def limit(self) -> str:
        """The memory from which a token reads more."""
        return "VRAM" if self.read_vram > self.read_ram else "RAM"


def read_per_token(layout: Layout, form: Form, name: str) -> float:
    """Bytes of a tensor that a token reads."""
    n_bytes = form.tensor_bytes(name)
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer and int(layer[1]) >= layout.n_layer:
        return 0  # multi-token prediction
    if EXPERTS.fullmatch(name):
        return n_bytes * layout.n_expert_used / layout.n_expert
    if name == "token_embd.weight" and "output.weight" in form.shapes:
        return n_bytes / form.shapes[name][0]
    return n_bytes


def cost(layout: Layout, form: Form, machine: Machine, beside: Beside, measured: Probe | None = None) -> Cost:
    """The cost with as many layers' experts in VRAM as fit; without a GPU everything is in RAM."""
    layers = layout.expert_layers
    experts: dict[int, list[str]] = defaultdict(list)
    rest = []
    for name in form.shapes:
        if found := EXPERTS.fullmatch(name):
            experts[int(found[1])].append(name)
        else:
            rest.append(name)
    size = {layer: sum(form.tensor_bytes(name) for name in experts[layer]) for layer in layers}
    lookup = form.tensor_bytes("token_embd.weight")  # llama.cpp keeps the input embeddings in system memory
    common = sum(form.tensor_bytes(name) for name in rest) - lookup
    on_gpu = common + beside.states + beside.compute
    cpu_layers, in_vram = len(layers), []
    if machine.vram >= on_gpu:
        for layer in reversed(layers):  # --n-cpu-moe keeps the first layers' experts in system memory
            if on_gpu + size[layer] > machine.vram:
                break
            on_gpu += size[layer]
            in_vram.append(layer)
        cpu_layers = len(layers) - len(in_vram)
        vram_names = [n for n in rest if n != "token_embd.weight"] + [
            n for layer in in_vram for n in experts[layer]
        ]
        ram = lookup + sum(size.values()) - sum(size[layer] for layer in in_vram)
    else:
        on_gpu, vram_names = 0, []
        ram = common + lookup + sum(size.values()) + beside.states + beside.compute
    in_gpu = set(vram_names)
    read_vram = sum(read_per_token(layout, form, name) for name in vram_names)
    by_type: dict[str, float] = defaultdict(float)
    for name in form.shapes:
        if name not in in_gpu:
            by_type[form.types[name]] += read_per_token(layout, form, name)
    seconds = reading_seconds(
        read_vram, machine.vram_bandwidth, by_type, lambda kind: machine.cpu_rate(kind, form.factorized)
    )
    seconds += NODES * machine.node * (layout.n_layer if not vram_names else cpu_layers)
    fits = ram + RESERVE <= machine.ram and on_gpu <= max(machine.vram, 0)
    return Cost(
        form,
        round(on_gpu),
        round(ram),
        round(read_vram),
        round(sum(by_type.values())),
        1 / seconds,
        cpu_layers,
        fits,
        expected_kl(layout, form, measured),
        None if measured is None else probed_error(form, measured),
    )


def expected_kl(layout: Layout, form: Form, measured: Probe | None = None) -> float:
    """KL divergence that the shipped model would have with experts in these types, or with the ``measured`` errors.  It
    serves to put files in order and is no promise."""
    if measured is not None:
        return KL_OF_ERROR * 1.5 * probed_error(form, measured)
    total = sum(math.prod(s) for name, s in form.shapes.items() if EXPERTS.fullmatch(name))
    error = sum(
        math.prod(shape) / total * _noise(layout, form.types[name])
        for name, shape in form.shapes.items()
        if EXPERTS.fullmatch(name)
    )
    plain = KL_OF_ERROR * ROUNDED_BY_MOMENTS * error * 1.5
    return ROUNDED_FACTORS * (plain + kl_of_kept(form.kept)) if form.factorized else plain


def _noise(layout: Layout, type_name: str) -> float:
    """Relative squared error of experts in the type; none where the model has them in MXFP4 and they are copied."""
    return 0.0 if type_name == "mxfp4" and layout.native <= 5 else noise(type_name)


def probed_error(form: Form, measured: Probe) -> float:
    """The probe's error for the experts' types, or for the form's factors; mean over the weights of all experts."""
    total = found = 0.0
    for name, shape in form.shapes.items():
        if not EXPERTS.fullmatch(name):
            continue
        basis = form.shapes.get(name.replace("_exps.", "_basis."))
        size = math.prod(shape[:-1]) * (basis[-1] if basis else shape[-1])  # of what factors replace
        total += size
        found += size * (measured.forms[form.name].after if basis else measured.error(form.types[name]))
    return found / total


def kl_of_kept(kept: float) -> float:
    """KL divergence for the share ``kept``: log-linear between the measured points."""
    (x0, y0), (x1, y1) = next(
        ((a, b) for a, b in zip(KL_OF_KEPT, KL_OF_KEPT[1:], strict=False) if kept <= b[0]), KL_OF_KEPT[-2:]
    )
    return y0 * (y1 / y0) ** ((kept - x0) / (x1 - x0))
