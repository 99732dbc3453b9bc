"""Full second moments of what each expert is fed, gathered by running the original model over a text.

    S_e = E[ g^2 x x^T ]   over the tokens routed to expert e, g being the router's weight of the expert for the token

so that ``tr(D S_e D^T)`` is what an error D of the expert's matrix adds to its weighted output.  llama-imatrix counts the
diagonal only.  Measured on the shipped model (gate and up, 6 bases, B q3_k, A iq4_nl, 1.50 MB; KL divergence on
held-out text): diagonal 0.0314, S_e without g 0.0112, with g 0.0076.  Plain iq2_s, 1.51 MB: 0.0088.  Weighing each
token by the slope of the expert's own output, too, gave 0.0072, weighing the rows of W by it 0.0071: not done.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.core.atomic import atomic_path, check_output, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import check_space, sha256, why_not_written
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.metric import FLOOR, PRIOR
from mobe_gguf.core.progress import Bar, bar, console
from mobe_gguf.formats.moments import KEY
from mobe_gguf.formats.safetensors import Entry, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint

#: Directions kept of each S_e; what is left is kept as a diagonal.
RANK = 256
#: Tokens sent through the model at once.
BATCH = 4096
#: Share of the memory that is free with the model loaded that sums of ``n d^2`` may take.
SHARE = 0.5
#: Products with S_e in the search for its strongest directions.
POWER_STEPS = 2


def collect(
    model: Path,
    text: Path,
    out: Path,
    *,
    ctx: int = 512,
    chunks: int | None = None,
    rank: int = RANK,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the moments of every MoE layer of ``model``, a Hugging Face directory, to ``out``; returns what is said of them.

    The model is loaded whole, by transformers, in its own type.  Sums of a layer take ``4 n (d^2 + p^2)`` bytes; as many layers
    as SHARE of the free memory holds are summed in one pass over the text, the others in further ones.
    Raises MobeError or UsageError: model or text cannot be read, transformers does not know the model, too little text, no
    place for ``out``.  Code that a model's directory may hold is never run.
    """
    check_output(out)
    checkpoint = Checkpoint(model)
    if checkpoint.is_mobe:
        raise MobeError(f"{model} holds factors; expected the model that they were made of")
    checkpoint.check_whole()
    layers, n, d, p = checkpoint.moe_layers, checkpoint.n_expert, checkpoint.n_embd, checkpoint.n_ff_exp
    rank = min(rank, d)
    if rank < 1 or ctx < 2 or (chunks is not None and chunks < 1):
        raise UsageError(f"--rank {rank}, --ctx {ctx}, --chunks {chunks}: expected at least 1, 2 and 1")
    with _silent(quiet):
        tokens = _tokens(model, text, ctx, chunks)
    about = {
        "version": 1,
        "model": str(model),
        "source_checksum": checkpoint.checksum,
        "text": sha256(text),
        "tokens": tokens.numel(),
        "ctx": ctx,
        "rank": rank,
    }
    per_expert = tokens.numel() * checkpoint.n_expert_used // n
    if per_expert < 2 * d and not quiet:
        console.print(
            f"warning: {tokens.numel()} tokens are {per_expert} an expert on average, few for {d} channels: give a longer "
            "--text",
            highlight=False,
            soft_wrap=True,
        )
    passes = _Passes(checkpoint, tokens, rank, device, quiet)
    entries = []
    for layer in layers:
        shapes = {"gate": [(n, d, rank), (n, d)][: 2 if rank < d else 1], "down": [(n, p, p)]}
        for projection, parts in shapes.items():
            for i, shape in enumerate(parts):
                size = 2 * torch.Size(shape).numel()
                data = partial(passes.data, layer, projection, i)
                entries.append(Entry(tensor_names(layer, projection)[i], "F16", shape, size, data))
    try:
        check_space(
            destination(out),
            sum(e.n_bytes for e in entries),
            (),
            "Make room, write elsewhere, or choose a smaller --rank.",
        )
        with _silent(quiet), atomic_path(out) as part, bar("moments", len(layers), quiet) as progress:
            passes.progress = progress
            write_safetensors(part, entries, {"format": "pt", KEY: json.dumps(about)})
    except OSError as e:
        raise MobeError(f"{out}: cannot be written: {why_not_written(e)}; nothing was written") from e
    return about


@contextlib.contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    """With ``quiet``, nothing on stderr of what transformers says while it loads, but errors."""
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if quiet and had_bar:
            logging.enable_progress_bar()


def _tokens(model: Path, text: Path, ctx: int, chunks: int | None) -> torch.Tensor:
    """``[chunks, ctx]`` token numbers; what is left over at the end is dropped."""
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise MobeError(f"{text}: cannot be read: {e.strerror or e}; name a text with --text") from e
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as e:  # transformers raises all sorts of errors here
        raise _unloadable(model, "its tokenizer", e) from e
    tokenizer.model_max_length = int(1e12)  # it would warn of a text that is longer than the model's context
    ids = torch.tensor(tokenizer(content).input_ids)
    there = len(ids) // ctx
    if there < (chunks or 1):
        raise UsageError(
            f"{text}: it has {len(ids)} tokens, {there} chunks of {ctx}; expected {chunks or 1} at least. Give a longer "
            "--text, a smaller --ctx or fewer --chunks."
        )
    count = chunks or there
    return ids[: count * ctx].view(count, ctx)


def _unloadable(model: Path, what: str, error: Exception) -> MobeError:
    if "trust_remote_code" in str(error):
        code = ", ".join(sorted(p.name for p in model.glob("*.py"))) or "not in this directory"
        why = (
            f"transformers knows it only by Python code of its own ({code}), and code out of a model directory is never run "
            "here. Use --imatrix (llama-imatrix) for such a model"
        )
        return MobeError(f"{model}: {what} cannot be loaded: {why}")
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MobeError(f"{model}: transformers cannot load {what}: {said}")


class _Enough(Exception):
    """Ends a forward pass behind the last layer that is summed."""


class _Passes:
    """Runs the model over the text as often as is needed to give each layer's moments, in order."""

    def __init__(self, checkpoint: Checkpoint, tokens: torch.Tensor, rank: int, device: str, quiet: bool):
        self.checkpoint, self.tokens, self.rank, self.device = checkpoint, tokens, rank, device
        self.progress = Bar("moments", 1, None, quiet)
        self._model: Any = None
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._parts: dict[tuple[int, str], tuple[torch.Tensor, ...]] = {}

    def data(self, layer: int, projection: str, part: int) -> Iterator[Any]:
        """Bytes of root (0) or rest (1) of a layer."""
        unit = layer, projection
        if unit not in self._parts:
            if unit not in self._sums:
                self._run(layer)
            sums = self._sums.pop(unit)
            if not torch.isfinite(sums).all():
                raise MobeError(f"layer {layer}: the model's activations are not finite on this text")
            self._parts = {unit: compress(sums, sums.shape[1] if projection == "down" else self.rank)}
            if projection == "down":
                counts = self._counts[layer].int()
                said = f"layer {layer}: {counts.min()} to {counts.max()} tokens an expert"
                self.progress.advance(1, said)
        yield self._parts[unit][part].half().contiguous().view(torch.uint8).numpy()

    def _run(self, first: int) -> None:
        """Sum the layers from ``first`` on, as many as memory holds."""
        if self._model is None:
            self._model = self._load()
        n, d, p = self.checkpoint.n_expert, self.checkpoint.n_embd, self.checkpoint.n_ff_exp
        if self.device == "cpu":
            free = free_memory()
        else:
            free = torch.cuda.mem_get_info(torch.device(self.device))[0]
        at_once = max(1, int(SHARE * free) // (4 * n * (d * d + p * p)))
        todo = [layer for layer in self.checkpoint.moe_layers if layer >= first][:at_once]
        hooks = []
        for name, module in self._model.named_modules():
            found = re.search(r"(?:^|\.)layers\.(\d+)\..*\bexperts$", name)
            if found and int(found[1]) in todo:
                hook = partial(self._add, int(found[1]), int(found[1]) == todo[-1])
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            if len(hooks) != len(todo):
                raise MobeError(
                    f"{self.checkpoint.path}: transformers' model has {len(hooks)} modules `experts` in layers {todo}, expected "
                    "one in each. This needs transformers 5 (pip install 'transformers>=5') and a model that it knows."
                )
            for layer in todo:
                self._sums[layer, "gate"] = torch.zeros(n, d, d, device=self.device)
                self._sums[layer, "down"] = torch.zeros(n, p, p, device=self.device)
                self._counts[layer] = torch.zeros(n)
            batch = max(1, BATCH // self.tokens.shape[1])
            with torch.inference_mode():
                for i, ids in enumerate(self.tokens.split(batch)):
                    self.progress.update(
                        f"layers {todo[0]}-{todo[-1]}: {i * batch} of {len(self.tokens)} chunks"
                    )
                    try:
                        self._model(ids.to(self.device), use_cache=False)
                    except _Enough:
                        pass
        finally:
            for hook in hooks:
                hook.remove()

    def _load(self) -> Any:
        """The model without its output head, on the device."""
        from transformers import AutoModel

        path = self.checkpoint.path
        try:
            model = AutoModel.from_pretrained(path, dtype="auto", trust_remote_code=False)
        except Exception as e:  # transformers raises all sorts of errors here
            raise _unloadable(path, "the model", e) from e
        return model.eval().to(self.device)

    def _add(
        self, layer: int, is_last: bool, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before the experts: ``experts(x [T, d], index [T, k], weights [T, k])``, by place or by name; their matrices are in
        ``gate_up_proj`` ``[n, 2p, d]``, gate first."""
        given = [*args, *kwargs.values()]
        matrices, p = getattr(module, "gate_up_proj", None), self.checkpoint.n_ff_exp
        known = len(given) >= 3 and given[1].shape == given[2].shape and hasattr(module, "act_fn")
        if not known or matrices is None or matrices.shape[1] != 2 * p:
            raise MobeError(f"layer {layer}: transformers calls the experts in a way that is not known here")
        x, index, weights = given[:3]
        x = x.reshape(-1, x.shape[-1]).float()
        index, weights = index.reshape(len(x), -1), weights.reshape(len(x), -1).float()
        for expert in index.unique().tolist():
            token, place = (index == expert).nonzero(as_tuple=True)
            fed, weight = x[token], weights[token, place][:, None]
            gate, up = (fed @ matrices[expert].T.to(fed)).split(p, dim=1)
            for projection, inputs in (("gate", fed), ("down", module.act_fn(gate) * up)):
                inputs = inputs * weight
                self._sums[layer, projection][expert].addmm_(inputs.T, inputs)
            self._counts[layer][expert] += len(token)
        if is_last:
            raise _Enough


def compress(sums: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """``(root [n, d, rank],)`` of sums ``[n, d, d]``, and ``rest [n, d]`` if rank < d: on the CPU, mean of the diagonals 1.

    Every expert gets PRIOR of the average expert's rows besides, with the average moments.
    """
    n, d, _ = sums.shape
    mean = sums.mean(0)
    size = float(mean.diagonal().double().mean()) * (1 + PRIOR)
    if not size > 0:
        raise MobeError("the experts of a layer were fed nothing but zeros")
    root = torch.empty(n, d, rank)
    rest = torch.empty(n, d)
    generator = torch.Generator().manual_seed(0)
    for e in range(n):
        s = ((sums[e] + PRIOR * mean) / size).double()
        if rank == d:
            values, vectors = torch.linalg.eigh(s)
            root[e] = (vectors * values.clamp_min(FLOOR).sqrt()).float().cpu()
            continue
        q = torch.randn(d, rank, generator=generator).to(s)
        for _ in range(POWER_STEPS + 1):
            q = torch.linalg.qr(s @ q)[0]
        values, vectors = torch.linalg.eigh(q.T @ s @ q)
        root[e] = (q @ (vectors * values.clamp_min(0).sqrt())).float().cpu()
        rest[e] = (s.diagonal().cpu().float() - root[e].square().sum(-1)).clamp_min(FLOOR)
    return (root,) if rank == d else (root, rest)


def tensor_names(layer: int, projection: str) -> tuple[str, str]:
    stem = f"layers.{layer}.{'down' if projection == 'down' else 'gate_up'}"
    return f"{stem}.root", f"{stem}.rest"
