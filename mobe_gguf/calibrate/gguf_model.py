"""A GGUF file as the source of a layer-by-layer run: transformers' class with tensors that are dequantized one by one.

This works for architectures whose tensors llama.cpp's converter only renames.  For others it permutes, splits or folds
tensors (DeepSeek's kv_b, Llama's rotary rows), and this module would have to undo that.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.calibrate.skeleton import unloadable
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.models.families import family_of
from mobe_gguf.models.gguf_source import GgufModel, StoredTensor
from mobe_gguf.models.tensors import all_finite

#: GGUF architecture -> model type of transformers.
KNOWN = {"qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe"}

#: GGUF name -> transformers' name; ``{}`` is the layer.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    **{f"blk.{{}}.attn_{x}": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
    **{f"blk.{{}}.attn_{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm" for x in "qk"},
    **{f"blk.{{}}.ffn_{x}": f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{
        f"blk.{{}}.ffn_{x}_shexp": f"model.layers.{{}}.mlp.shared_expert.{x}_proj"
        for x in ("gate", "up", "down")
    },
}


class GgufCheckpoint:
    """A :class:`mobe_gguf.calibrate.runnable.Runnable`, like a Hugging Face directory.

    MobeError if the file is damaged, or its architecture is not in KNOWN.
    """

    is_mobe = False

    def __init__(self, path: Path):
        self.path = path
        self.model = GgufModel(path)
        if self.model.arch not in KNOWN:
            raise MobeError(
                f"{path}: transformers' classes run GGUF files of {', '.join(KNOWN)} as they are stored, this is {self.model.arch}. Give "
                "the Hugging Face directory that it was made of"
            )
        self.model_type = KNOWN[self.model.arch]
        self.family = family_of({"model_type": self.model_type})
        self.moe_layers = self.model.moe_layers
        self.n_layer, self.n_expert = self.model.n_layer, self.model.n_expert
        self.n_expert_used, self.checksum = self.model.n_expert_used, self.model.checksum
        self.n_embd, self.n_ff_exp = self.model.n_embd, self.model.n_ff_exp
        self.hidden_size = self.model.n_embd
        self.expert, self.width = self.model.expert, self.model.width

    def expert_names(self) -> set[str]:
        """None of ``names`` is an expert's."""
        return set()

    def hf_config(self) -> Any:
        """transformers' config.  transformers reads most of it from the file; the code below adds what is missing."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )
        except Exception as e:  # transformers raises many kinds of errors here
            raise unloadable(self.path, "the model", e) from e
        config.moe_intermediate_size = self.model.n_ff_exp
        config.mlp_only_layers = [i for i in range(self.model.n_layer) if i not in self.model.moe_layers]
        config.decoder_sparse_step = 1
        shared = self._tensors.get(
            f"model.layers.{self.model.moe_layers[0]}.mlp.shared_expert.up_proj.weight"
        )
        if shared is not None:
            config.shared_expert_intermediate_size = shared.shape[0]
        config.tie_word_embeddings = "lm_head.weight" not in self._tensors
        config.vocab_size = self._tensors["model.embed_tokens.weight"].shape[0]
        config.dtype = torch.float32 if self._is_float32 else torch.bfloat16
        return config

    @property
    def _is_float32(self) -> bool:
        return self.model.stored(self.model.moe_layers[0], "up").type == "f32"

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(self.hf_config().to_dict())

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        found = {}
        for name, info in self.model.file.tensors.items():
            stem, _, kind = name.rpartition(".")
            layer = re.match(r"blk\.(\d+)\.", name)
            plain = re.sub(r"^blk\.\d+\.", "blk.{}.", stem)
            if plain in NAMES:
                found[f"{NAMES[plain].format(layer[1] if layer else '')}.{kind}"] = StoredTensor.of(info)
            elif not re.search(r"_exps$", stem):
                raise MobeError(
                    f"{self.path}: tensor {name} is not known in the architecture {self.model.arch}"
                )
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise MobeError(f"{self.path}: the tensor of {name} is missing")
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor that :meth:`get` returns."""
        return torch.float32

    def matrix(self, name: str) -> torch.Tensor:
        """Same as :meth:`get`."""
        return self.get(name)

    def get(self, name: str) -> torch.Tensor:
        """A tensor, dequantized to float32, in transformers' shape."""
        stored = self._tensors[name]
        tensor = stored.matrix(0).view(stored.shape)
        if not all_finite(tensor):
            raise MobeError(f"{self.path}: tensor {stored.name} holds values that are NaN or Inf")
        return tensor[None] if name.endswith("shared_expert_gate.weight") and tensor.dim() == 1 else tensor

    def check_whole(self) -> None:
        self.model.check_whole()
        widths = sorted({self.model.width(layer) for layer in self.moe_layers})
        if len(widths) > 1:
            raise MobeError(
                f"{self.path}: its layers have experts of {widths[0]} to {widths[-1]} rows, and transformers' class knows one "
                f"width. Let llama-imatrix count the channels instead:\n"
                f"  llama-imatrix -m {self.path} -f TEXT -o imatrix.gguf\nwhich factorize and export take with --imatrix"
            )
        for layer in self.model.moe_layers:
            for projection in ALL_PROJECTIONS:
                self.model.check_experts(layer, projection)
