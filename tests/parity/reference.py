"""The model that a MoBE checkpoint stands for: experts multiplied out in float64, run by transformers in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mobe_gguf.models.families import family_of

_ACTIVATIONS = {
    "none": lambda u: u,
    "tanh": torch.tanh,
    "silu": lambda u: u / (1 + torch.exp(-u)),
}


def multiply_out(mobe: Path, target: Path, original: Path) -> Path:
    """Write the ordinary checkpoint, float32, with W_i = A_i f(sum_j alpha_ij B_j), of down f(sum_j alpha_ij B_j) A_i;
    returns ``target``.

    config.json is that of ``original``, the model that was factorized.  Reads the tensors by the names of docs/format.md and
    shapes and none of the package's own code for them.
    """
    config = json.loads((mobe / "config.json").read_text())
    family = family_of(config)
    f = _ACTIVATIONS[config["activation"]]
    tensors = {}
    for shard in sorted(mobe.glob("*.safetensors")):
        tensors |= load_file(shard)
    text = family.text(config)
    for layer in family.moe_layers(text):
        for projection in family.kinds:
            bases, mixes = (
                _take(tensors, f"{family.block_name(layer)}.{kind}_{projection}") for kind in ("B", "W")
            )
            experts = [family.expert_weight(layer, e, projection) for e in range(family.n_expert(text))]
            per_group = len(experts) // max(1, len(bases))
            for e, name in enumerate(experts if bases else ()):
                basis, alpha = bases[e // per_group].double(), mixes[e // per_group][e % per_group].double()
                if alpha.dim() == 1:  # the same for all rows of the basis
                    alpha = alpha[:, None].expand(*basis.shape[:2])
                formed, transform = f((alpha[:, :, None] * basis).sum(0)), tensors[name].double()
                tensors[name] = formed @ transform if projection == "down" else transform @ formed
        if family.stacked_here:
            _fuse(tensors, family.name, family.block_name(layer), family.n_expert(text))
    target.mkdir(parents=True)
    for path in original.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, target / path.name)
    config = json.loads((original / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.float().contiguous() for n, t in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


def _fuse(tensors: dict[str, torch.Tensor], family: str, block: str, n: int) -> None:
    """Replace single experts by the fused tensors that transformers knows of families that have no single ones."""

    def stack(projection: str) -> torch.Tensor | None:
        names = [f"{block}.experts.{e}.{projection}_proj.weight" for e in range(n)]
        return torch.stack([tensors.pop(name) for name in names]) if names[0] in tensors else None

    gate, up, down = stack("gate"), stack("up"), stack("down")
    assert up is not None and down is not None
    if family == "gpt_oss":
        both = torch.stack([gate, up], 2).flatten(1, 2).mT  # gate, up, gate, up, ...
        tensors |= {f"{block}.experts.gate_up_proj": both, f"{block}.experts.down_proj": down.mT}
    elif family.startswith("granitemoe"):
        both = torch.cat([gate, up], 1)
        tensors |= {f"{block}.input_linear.weight": both, f"{block}.output_linear.weight": down}
    elif family.startswith("llama4"):
        both = torch.cat([gate, up], 1).mT
        tensors |= {f"{block}.experts.gate_up_proj": both, f"{block}.experts.down_proj": down.mT}
    else:  # single experts, without gate
        for e in range(n):
            tensors[f"{block}.experts.{e}.up_proj.weight"] = up[e]
            tensors[f"{block}.experts.{e}.down_proj.weight"] = down[e]


def _take(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """Remove and return ``name``, or ``name_0``, ``name_1``, ... of one group each; empty if there is neither."""
    if name in tensors:
        return [tensors.pop(name)]
    found = []
    while f"{name}_{len(found)}" in tensors:
        found.append(tensors.pop(f"{name}_{len(found)}"))
    return found


def transformers_logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 [len(tokens), vocabulary] of an ordinary checkpoint that transformers knows."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return loaded(torch.tensor([tokens])).logits[0].numpy()
