"""Moments of a GGUF file whose architecture transformers' classes cannot run: llama.cpp runs it, and each matrix's inputs are read.

    python -m mobe_gguf.calibrate.heard FILE SETTINGS.json OUT

writes the files of some layers into a work folder and then OUT, which is empty.  The whole model runs for every group of layers:
llama.cpp maps the file, so a model larger than the memory runs, as slowly as the disk reads it.  A group's sums fit into the memory.

It is a separate program because llama.cpp ends the process if a file does not fit its graph.  llama-imatrix reads the same nodes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mobe_gguf.calibrate.dense import Sum
from mobe_gguf.calibrate.experts import ExpertForm, ExpertSums, Fed, by_expert, squares_of
from mobe_gguf.calibrate.gguf_model import KNOWN
from mobe_gguf.calibrate.layers import MomentSettings
from mobe_gguf.calibrate.roots import add_products
from mobe_gguf.calibrate.workspace import LayersWorkspace
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.progress import Bar
from mobe_gguf.formats.moments import KEY_SEEN, KEY_WEIGHS
from mobe_gguf.formats.safetensors import Entry, write_safetensors
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.runtime.apart import run_apart
from mobe_gguf.runtime.graph import Node, Reader

#: What an expert's gate and up become, by ggml's name; where it is none of these, slopes are not known and the router alone weighs.
GATES = {
    "SWIGLU": lambda g, u: functional.silu(g) * u,
    "GEGLU": lambda g, u: functional.gelu(g, approximate="tanh") * u,
    "GEGLU_ERF": lambda g, u: functional.gelu(g) * u,
    "REGLU": lambda g, u: functional.relu(g) * u,
}
#: Of experts: layer, and group 2 for those before down.
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:(gate|up|gate_up)|down)_exps\.weight")
MATRIX = re.compile(r"(?:blk\.(\d+)\..+|output|token_embd)\.weight")
WEIGHTED = re.compile(r"ffn_moe_weighted-(\d+)")
GLU = re.compile(r"ffn_moe_\w+-(\d+)")


def heard_model(path: Path) -> GgufModel | None:
    """The model of a GGUF file, if transformers' classes cannot run it as it is stored."""
    model = GgufModel(path) if path.is_file() else None
    if model is None or (
        model.arch in KNOWN and len({model.width(layer) for layer in model.moe_layers}) == 1
    ):
        return None
    return model


class GgufTokenizer:
    """The tokenizer in a GGUF file, by llama.cpp; for plain text."""

    chat_template = None

    def __init__(self, path: Path):
        from llama_cpp import Llama

        self._model = Llama(str(path), vocab_only=True, verbose=False)

    def __call__(self, text: str) -> Any:
        ids = self._model.tokenize(text.encode(), add_bos=True, special=False)
        return SimpleNamespace(input_ids=list(ids))


def gather(
    model: GgufModel,
    texts: Sequence[torch.Tensor],
    work: LayersWorkspace,
    settings: MomentSettings,
    budget: float,
    progress: Bar,
) -> None:
    """Write the files of all layers that are not there, a group of layers at a time.  MobeError if llama.cpp fails to run the model."""
    tokens = work.path / "tokens.npy"
    np.save(tokens, torch.cat(list(texts)).numpy())
    left = [i for i in range(model.n_layer) if not work.layer_file(f"{i:03d}").is_file()]
    progress.found(model.n_layer - len(left))
    needed = {layer: _bytes(model, layer) for layer in left}
    chunks = sum(len(text) for text in texts)
    while left or not work.layer_file("output").is_file():
        group = [
            layer for i, layer in enumerate(left) if not i or sum(needed[x] for x in left[: i + 1]) <= budget
        ]
        about = {
            "layers": group,
            "output": len(group) == len(left),
            "tokens": str(tokens),
            "work": str(work.path),
            "sizes": [text.numel() for text in texts],
            "settings": asdict(settings),
        }
        (work.path / "group.json").write_text(json.dumps(about))
        what = f"layers {group[0]} to {group[-1]}" if group else "output"
        _run_group(model.path, work, progress, what, chunks)
        left = left[len(group) :]
        progress.advance(len(group), f"{what} by llama.cpp")


def _run_group(path: Path, work: LayersWorkspace, progress: Bar, what: str, chunks: int) -> None:
    def tell(line: str) -> None:
        progress.update(f"{what}: {line.strip()} of {chunks} chunks")

    run_apart(__name__, path, work.path / "group.json", out=work.path / "scratch-done", on_line=tell)


def _bytes(model: GgufModel, layer: int) -> int:
    """Memory of a layer's sums, at most."""
    widths = [
        info.shape[-1]
        for name, info in model.file.tensors.items()
        if name.startswith(f"blk.{layer}.") and len(info.shape) > 1 and "_exps" not in name
    ]
    experts = model.n_expert * model.width(layer) ** 2 if layer in model.moe_layers else 0
    return 4 * (sum(width**2 for width in widths) + experts)


class _HeardExperts(ExpertSums):
    """The sums of a layer's experts, whose inputs and weights come from llama.cpp's graph."""

    def __init__(self, model: GgufModel, layer: int, fed: Fed, work: LayersWorkspace):
        gated = f"blk.{layer}.ffn_gate_exps.weight" in model.file.tensors
        merged = f"blk.{layer}.ffn_gate_up_exps.weight" in model.file.tensors
        kinds = ("gate", "up") if gated or merged else ("up",)
        super().__init__(layer, kinds, (model.n_expert, model.n_embd, model.width(layer)), fed, work)
        self._model = model

    @cached_property
    def squares(self) -> torch.Tensor:
        """Of each expert's down, ``[n, p]``."""
        return torch.stack([squares_of(self._model.expert(self.layer, "down", e)) for e in range(self.n)])

    def hear(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor, slopes: torch.Tensor) -> None:  # fmt: skip
        """Of a batch: x ``[T, d]``, experts and the router's weights ``[T, k]``, what down is fed ``[T, k, p]``, slopes ``[T, k]``."""
        begin = self.fed.done * index.shape[1]
        self.fed.add(x, index, weights)
        end = begin + index.numel()
        self.fed.metric.view(-1)[begin:end] = (weights * slopes.sqrt()).flatten()
        flat = (hidden * weights[..., None]).flatten(0, 1)
        for e, places in enumerate(by_expert(index, self.n)):
            if len(places):
                add_products(self.down_sums.tensor[e], flat[places])


class _Listener:
    """Sums of all matrices of some layers."""

    def __init__(self, model: GgufModel, about: dict[str, Any], tokens: int):
        self.model, self.layers, self.output = model, set(about["layers"]), about["output"]
        self.work, self.tokens = LayersWorkspace(Path(about["work"])), tokens
        self.sums: dict[str, Sum] = {}
        self.stems: dict[str, str] = {}
        self.experts: dict[int, _HeardExperts] = {}
        self._inputs: dict[int, str] = {}
        self._now: dict[int, dict[str, Any]] = {}

    def ask(self, node: Node) -> bool:
        op = node.op
        if op in ("MUL_MAT", "MUL_MAT_ID"):
            return self._layer_of(node.source(0)) is not None
        found = WEIGHTED.fullmatch(node.name) or (GLU.fullmatch(node.name) if op in GATES else None)
        return found is not None and int(found[1]) in self.layers

    def _layer_of(self, weight: Node | None) -> str | None:
        """The tensor's name, if its inputs are wanted."""
        name = "" if weight is None else weight.name
        found = MATRIX.fullmatch(name)
        if found is None or name not in self.model.file.tensors or "_inp" in name:
            return None
        wanted = int(found[1]) in self.layers if found[1] else self.output
        return name if wanted else None

    def seen(self, node: Node) -> None:
        if found := WEIGHTED.fullmatch(node.name):
            self._weighted(int(found[1]), node)
        elif node.op in GATES:
            self._slopes(int(GLU.fullmatch(node.name)[1]), node)  # type: ignore[index]
        else:
            name, x = self._layer_of(node.source(0)), node.source(1)
            assert name is not None and x is not None
            if routed := EXPERTS.fullmatch(name):
                self._routed(int(routed[1]), routed[2] is not None, node, x)
            elif node.op == "MUL_MAT":
                self._dense(name, x)

    # experts

    def _routed(self, layer: int, first: bool, node: Node, x: Node) -> None:
        now = self._now.setdefault(layer, {})
        values = torch.from_numpy(x.values()).float()[0]  # [T, k or 1, d]
        if first:
            if "x" not in now:
                ids = node.source(2)
                assert ids is not None
                now["x"] = values
                now["index"] = torch.from_numpy(ids.values())[0, 0]
            return
        now["hidden"] = values
        if "before" in now:  # the inputs were weighted
            self._finish(layer, torch.ones(now["index"].shape))

    def _slopes(self, layer: int, node: Node) -> None:
        now, gate, up = self._now.get(layer), node.source(0), node.source(1)
        if now is None or "x" not in now or gate is None:
            return
        g = torch.from_numpy(gate.values()).float()[0]
        if up is None:
            g, u = g.chunk(2, -1)
        else:
            u = torch.from_numpy(up.values()).float()[0]
        if g.shape[:2] != now["index"].shape:  # of another matrix with such a name
            return
        experts, act = self._experts(layer), GATES[node.op]
        form = ExpertForm(SimpleNamespace(_apply_gate=lambda joined: act(*joined.chunk(2, -1))))
        product, slopes = torch.cat([g, u], -1).flatten(0, -2), torch.empty(now["index"].numel())
        for e, places in enumerate(by_expert(now["index"], experts.n)):
            if len(places):
                slopes[places] = form.slope(product[places], experts.squares[e])
        now["slopes"] = slopes.view(now["index"].shape)

    def _weighted(self, layer: int, node: Node) -> None:
        now, weights = self._now.setdefault(layer, {}), node.source(1)
        if "hidden" not in now:
            now["before"] = True
            return
        assert weights is not None
        self._finish(layer, torch.from_numpy(weights.values()).float()[0, ..., 0])

    def _experts(self, layer: int) -> _HeardExperts:
        if layer not in self.experts:
            k = int(self._now[layer]["index"].shape[1])
            fed = Fed.new(self.work, self.tokens, self.model.n_embd, k, torch.float32, f"fed-{layer}")
            self.experts[layer] = _HeardExperts(self.model, layer, fed, self.work)
        return self.experts[layer]

    def _finish(self, layer: int, weights: torch.Tensor) -> None:
        now = self._now[layer]
        experts, index = self._experts(layer), now["index"]
        del self._now[layer]
        x, slopes = now["x"], now.get("slopes", torch.ones(index.shape))
        if x.shape[1] != 1:
            raise MobeError(f"layer {layer}: a token's experts have inputs of their own; use --imatrix")
        experts.hear(x[:, 0], index, weights.reshape(index.shape), now["hidden"], slopes)

    # other matrices

    def _dense(self, name: str, x: Node) -> None:
        _, heads, _, d = x.shape
        assert x.address is not None
        stem = self.stems.get(name)
        if stem is None:
            stem = self.stems[name] = self._inputs.get(x.address, name.removesuffix(".weight"))
            self._inputs.setdefault(x.address, stem)
        if stem != name.removesuffix(".weight"):
            return
        if stem not in self.sums:
            self.sums[stem] = Sum.new(heads, d, self.tokens, torch.device("cpu"))
        values = torch.from_numpy(x.values()).float()[0]  # [heads, T, d]
        self.sums[stem].add(values.transpose(0, 1))

    def next_chunk(self) -> None:
        """Addresses of nodes may be used again."""
        self._inputs.clear()

    # files

    def write(self, settings: MomentSettings, sizes: list[int]) -> None:
        for layer in sorted(self.layers):
            self._write(f"{layer:03d}", f"blk.{layer}.", settings, sizes, self.experts.pop(layer, None))
        if self.output:
            self._write("output", "", settings, sizes, None)

    def _write(
        self, name: str, begin: str, settings: MomentSettings, sizes: list[int], experts: ExpertSums | None
    ) -> None:
        own = begin or ("output", "token_embd")
        weighs = {tensor: stem for tensor, stem in self.stems.items() if tensor.startswith(own)}
        entries: list[Entry] = []
        for stem in sorted(set(weighs.values())):
            entries += self.sums.pop(stem).entries(stem, settings.keep, settings.rank)
        seen = None
        if experts is not None:
            found, more = experts.moments(settings.keep, settings.rank)
            entries, weighs, seen = entries + found, weighs | more, experts.fed.seen(experts.n, sizes)
        with atomic_path(self.work.layer_file(name)) as part:
            about = {KEY_WEIGHS: json.dumps(weighs), KEY_SEEN: json.dumps(seen)}
            write_safetensors(part, entries, {"format": "pt", **about})
        if experts is not None:
            for file in self.work.path.glob("scratch-gate-*"), self.work.path.glob("scratch-down-*"):
                for left in file:
                    left.unlink()


def main(path: str, settings: str, out: str) -> None:
    about = json.loads(Path(settings).read_text())
    tokens = np.load(about["tokens"], allow_pickle=False)
    with torch.inference_mode():
        listener = _Listener(GgufModel(path), about, tokens.size)
        reader = Reader(Path(path), tokens.shape[1], listener.ask, listener.seen, torch.get_num_threads())
        try:
            for number, chunk in enumerate(tokens.tolist(), 1):
                listener.next_chunk()
                reader.run(chunk)
                print(number, flush=True)  # for the bar of the process that waits
            listener.write(MomentSettings(**about["settings"]), about["sizes"])
        except MobeError as error:
            raise SystemExit(f"Error: {error.message}") from error
    for left in Path(about["work"]).glob("scratch-*"):
        left.unlink()
    Path(out).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
