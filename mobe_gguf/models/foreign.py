"""Model formats that are not supported, recognized by name: the message says which format it is and what to do.

Sources: what the tools write into config.json (``quantization_config``), and how they name their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError

_BF16 = "Take the model in bf16 that it was made of"
_GGUF = "llama.cpp's converter reads it; convert it, and give the GGUF file instead:\n  mobe-gguf convert {path} model.gguf"

#: ``quant_method`` of config.json -> what it is, and what to do.  FP8 in blocks and MXFP4 are supported, see ``checkpoint``.
METHODS: Mapping[str, tuple[str, str]] = {
    "gptq": ("GPTQ", _GGUF),
    "awq": ("AWQ", _BF16),
    "bitsandbytes": ("bitsandbytes", _BF16),
    "compressed-tensors": ("compressed-tensors", _GGUF),
    "modelopt": ("modelopt (NVFP4 or FP8)", _GGUF),
    "auto-round": ("AutoRound", _BF16),
    "quark": ("Quark", _BF16),
    "hqq": ("HQQ", _BF16),
    "aqlm": ("AQLM", _BF16),
    "torchao": ("torchao", _BF16),
    "exl2": ("EXL2", _BF16),
    "exl3": ("EXL3", _BF16),
}

#: Pattern of a tensor's name -> what it is, and what to do.
NAMES: tuple[tuple[str, str, str], ...] = (
    (
        r"\.switch_mlp\.",
        "MLX's (experts under switch_mlp)",
        "Take the Hugging Face model that it was made of",
    ),
    (r"\.qweight$", "GPTQ or AWQ", _GGUF),
    (r"\.weight_packed$", "compressed-tensors", _GGUF),
    (r"\.weight_scale_2$", "modelopt's NVFP4", _GGUF),
    (r"\.absmax$|\.quant_state\.", "bitsandbytes", _BF16),
    (r"^(model\.)?language_model\.", "that of a multimodal model (tensors under language_model.)", _GGUF),
)


def check_format(path: Path, config: Mapping[str, Any]) -> None:
    """MobeError if config.json says that the weights are in a format that is not supported."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if isinstance(method, str) and method.lower() in METHODS:
        what, mend = METHODS[method.lower()]
        raise MobeError(
            f"{path}/config.json: the weights are quantized by {what}, which is not read here. (Where the tensors are plain bf16, "
            f"f16 or f32 all the same, remove 'quantization_config'.) {mend.format(path=path)}"
        )
    if isinstance(config.get("quantization"), Mapping) and quantization is None:
        raise MobeError(
            f"{path}/config.json: 'quantization' is what MLX writes: the weights are in its form, which is not read here. "
            "Take the Hugging Face model that it was made of"
        )


def check_names(path: Path, names: Iterable[str], multimodal: bool) -> None:
    """MobeError if the tensors have another tool's names.  ``multimodal``: the family has such models."""
    for name in names:
        for pattern, what, mend in NAMES:
            if re.search(pattern, name) and not (multimodal and "multimodal" in what):
                raise MobeError(
                    f"{path}: tensor {name}: the model's form is {what}, which is not read here. "
                    f"{mend.format(path=path)}"
                )
