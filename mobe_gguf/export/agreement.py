"""``verify --model``: does a file compute what its model computes?  The first layers of both, on the same tokens.

Three things run: transformers on the model's first layers (T), the runtime on a new float32 file of these layers (N),
and the runtime on the first layers of the file itself (F).  T and N must agree except for the order of additions; if
they do, llama.cpp's graph computes this model.  The file's keys must equal those of N.  N and F differ by the file's
types, and by its factors if it has any.

Memory and disk: the compared layers, the embeddings and the output, in float32.  Nothing else is read.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.core.errors import MobeError, UsageError, one_line
from mobe_gguf.core.files import describe_size, why_not_written
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import ExportOptions, ExportRequest, Recipe, write_model
from mobe_gguf.formats.gguf import Array, GgufFile, padded, read_gguf, read_model
from mobe_gguf.formats.safetensors import SINGLE_NAME, Entry, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.entries import fused_entries
from mobe_gguf.models.families import layer_in
from mobe_gguf.models.gguf_source import FACTORS_NAME
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, Reconstruction
from mobe_gguf.models.original import open_original
from mobe_gguf.models.writer import copy_files
from mobe_gguf.runtime import ggml
from mobe_gguf.runtime.logits import logits

#: Limit of the squared error between T and N, relative to T squared, at the median position.  Small models have 2e-13;
#: 1e-7 and more means another model.
GRAPH_LIMIT = 1e-8

#: Largest such error between F and N, by bits per weight of the file's largest experts.  Below 8 bits there is a
#: figure, no verdict. Measured on random models, whose routers flip: f16 2e-7, bf16 2e-5, q8_0 0.03.
TYPE_LIMITS = ((32.0, 1e-8), (16.0, 1e-3), (8.0, 0.2))

#: Keys that may differ: the number of layers, and those of factors.
_OWN_KEYS = ("block_count", "mobe.")

#: GGUF's number for the type of arrays.
_ARRAY = 9

#: Up to this many bytes of float32, ``export`` and ``compress`` compare by themselves: it takes some seconds.
QUICK = 200_000_000


@dataclass
class Agreement:
    """Errors by the number of layers.  ``graph``: T against N; ``file``: N against F, None if the files cannot be
    compared."""

    n_layers: int
    graph: dict[int, float] = field(default_factory=dict)
    file: dict[int, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"first {self.n_layers} layers: llama.cpp in float32 differs from transformers by {self.graph[self.n_layers]:.1e} of the "
            f"logits' energy, the file from that by {self.file[self.n_layers]:.1e}"
        )


def agreement(
    file: Path, model: Path, layers: int = 2, n_tokens: int = 32, fitted: bool = False
) -> Agreement:
    """Compare ``layers`` layers, and those before the first layer with experts.

    ``model``: what the file was made of, or MoBE factors of it.  ``fitted``: export solved for the factors again, so
    the file may be far from those of ``model``.  UsageError if transformers has no such model.
    """
    checkpoint, whole = _open(model), read_model(file)
    n = _compared(checkpoint, layers)
    vocabulary = checkpoint.shape(checkpoint.family.embedding)[0]
    tokens = np.random.default_rng(0).integers(vocabulary, size=n_tokens)
    result = Agreement(n)
    limit = _limit(whole, checkpoint.factors is not None and not fitted)
    if limit is None:
        result.notes.append(
            "the file's types are too small, or its factors too far from the model, for a verdict on its weights: its keys and "
            "the graph were compared"
        )
    graph_ok, file_ok = _compare(checkpoint, whole, n, tokens, result, limit)
    if not (graph_ok and file_ok):
        for fewer in range(_compared(checkpoint, 1), n):  # which layer is the first
            graph_ok, file_ok = _compare(checkpoint, whole, fewer, tokens, result, limit)
            if not (graph_ok and file_ok):
                break
        parts = min(
            k for k in result.graph if _beyond(result.graph[k], GRAPH_LIMIT) or _beyond(result.file[k], limit)
        )
        error = result.graph[parts]
        if _beyond(error, GRAPH_LIMIT):
            result.problems.append(
                f"layer {parts - 1} is the first to part from transformers: its logits are off by {error:.1e} of their energy in a "
                "float32 file, too: llama.cpp's graph computes another model"
            )
        else:
            result.problems.append(
                f"layer {parts - 1} is the first to part from the model: logits are off by {result.file[parts]:.1e} of their "
                f"energy, and the file's types explain {limit:.0e}"
            )
    return result


def check_written(path: Path, model: Path, *, layers: int = 2, fitted: bool = False) -> str:
    """The last check of ``export`` and ``compress``: :func:`agreement` of the new file ``path`` in words, or why it was
    not compared.

    MobeError if the file computes something else.
    """
    if (model / FACTORS_NAME).is_file():
        return "not compared with the model: it is a GGUF file, and mobe-gguf verify compares with Hugging Face directories"
    try:
        checkpoint = _open(model)
    except UsageError as e:
        return f"not compared with the model: {e.message}"
    if (size := _size(checkpoint, _compared(checkpoint, layers))) > QUICK:
        return (
            f"not compared with the model, for that takes {describe_size(size)} of memory and disk: "
            f"mobe-gguf verify {path} --model {model}"
        )
    try:
        found = agreement(path, model, layers, fitted=fitted)
    except OSError as e:
        return f"not compared with the model: its first layers cannot be written: {why_not_written(e)}"
    if found.problems:
        raise MobeError(f"{path}: written, but do not use it: {'; '.join(found.problems)}")
    return "; ".join([found.line(), *found.notes])


def _compared(checkpoint: Checkpoint, layers: int) -> int:
    """How many layers to compare: those asked for, and at least one of each kind of attention, without which the runtime's
    graphs stop."""
    kinds = checkpoint.config.get("layer_types")
    if not kinds and checkpoint.config.get("model_type") not in checkpoint.family.remote:
        kinds = getattr(
            checkpoint.hf_config().get_text_config(), "layer_types", None
        )  # what its class fills in
    kinds = [str(kind) for kind in kinds or []]
    firsts = [kinds.index(k) for k in dict.fromkeys(kinds) if "attention" in k and "linear" not in k]
    return min(
        checkpoint.n_layer, max(checkpoint.moe_layers[0] + max(1, layers), *(i + 1 for i in firsts), 0)
    )


def _size(checkpoint: Checkpoint, n: int) -> int:
    """Bytes in float32 of the first ``n`` layers, embeddings and output."""
    kept = (name for name in checkpoint.names if layer_in(name) < n)
    made = 4 * sum(checkpoint.info(name).numel for name in kept)
    if checkpoint.factors is not None:
        made += 4 * n * 3 * checkpoint.n_expert * checkpoint.n_ff_exp * checkpoint.n_embd
    return made


def _open(path: Path) -> Checkpoint:
    if (path / FACTORS_NAME).is_file():
        raise UsageError(
            f"--model {path}: these are factors of a GGUF file; a Hugging Face model is compared with"
        )
    source = open_original(path).directory
    if source is None:
        raise UsageError(f"--model {path}: a Hugging Face model directory is compared with, not a GGUF file")
    if source.config.get("model_type") in source.family.remote:
        raise UsageError(
            f"--model {path}: transformers does not know {source.config.get('model_type')}; its code is not run"
        )
    source = MobeCheckpoint(path) if source.is_mobe else source
    source.check_whole()
    return source


def _beyond(error: float, limit: float | None) -> bool:
    return limit is not None and not error <= limit


def _limit(file: GgufFile, factors_of_model: bool) -> float | None:
    """The largest error that the types of the file's experts allow; None if there is no verdict."""
    experts = [t for name, t in file.tensors.items() if "_exps" in name or "_basis" in name]
    if any("_basis" in t.name for t in experts) and not factors_of_model:
        return None
    least = min(
        (8 * ggml.type_info(t.type).bytes / ggml.type_info(t.type).block for t in experts), default=32.0
    )
    return next((limit for bits, limit in TYPE_LIMITS if least >= bits), None)


def _compare(
    checkpoint: Checkpoint,
    whole: GgufFile,
    n: int,
    tokens: np.ndarray,
    result: Agreement,
    limit: float | None,
) -> tuple[bool, bool]:
    """Whether the first ``n`` layers agree: of the graph, and of the file."""
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-verify-") as folder:
        small, new, old = Path(folder) / "model", Path(folder) / "new.gguf", Path(folder) / "file.gguf"
        _first_layers(checkpoint, n, small, whole.keys.get(f"{whole.arch}.expert_used_count"))
        options = ExportOptions(dense=True, allow_dense=True, quiet=True, tokenizer_pre="qwen2")
        write_model(ExportRequest(small, new, Recipe("f32"), options))
        reference = logits(new, tokens, of=checkpoint.path)
        result.graph[n] = _error(_transformers(small, tokens), reference)
        if not result.file:
            result.problems += _other_keys(whole, read_gguf(new))
        new.unlink()
        _first_blocks(whole, n, old)
        result.file[n] = _error(reference, logits(old, tokens))
    return not _beyond(result.graph[n], GRAPH_LIMIT), not _beyond(result.file[n], limit)


def _error(truth: np.ndarray, got: np.ndarray) -> float:
    """Squared error relative to the squared truth, both centred, at the median position: one flipped router does not
    count."""
    truth, got = (a.astype(np.float64) - a.mean(-1, keepdims=True, dtype=np.float64) for a in (truth, got))
    return float(np.median(((got - truth) ** 2).sum(-1) / (truth**2).sum(-1)))


def _transformers(small: Path, tokens: np.ndarray) -> np.ndarray:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            small,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            trust_remote_code=False,
        )
        with torch.inference_mode():
            return model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    except Exception as e:  # its classes check little of what they are told
        raise MobeError(
            f"transformers cannot run the model's first layers: {type(e).__name__}: {one_line(e)}"
        ) from e


def _other_keys(file: GgufFile, new: GgufFile) -> Iterator[str]:
    """Keys of the architecture whose values differ in a new file of the model."""
    if file.arch != new.arch:
        yield f"the file's architecture is {file.arch}, a new file of the model has {new.arch}"
        return
    prefix = f"{new.arch}."
    for key in sorted(k for k in {*file.keys, *new.keys} if k.startswith(prefix)):
        found, expected = file.keys.get(key), new.keys.get(key)
        if isinstance(found, Array) and isinstance(expected, Array):  # a value for each layer
            same = found.head[: expected.length] == expected.head
        else:
            same = found == expected
        if same or key.removeprefix(prefix).startswith(_OWN_KEYS):
            continue
        yield f"key {key} is {file.keys.get(key)!r}, a new file of the model has {new.keys.get(key)!r}"


def _first_layers(checkpoint: Checkpoint, n: int, out: Path, used: object) -> None:
    """Write an ordinary model of the first ``n`` layers to ``out``; FP8 and factors become float32.

    ``used``: how many experts the file uses for a token.
    """
    out.mkdir()
    copy_files(checkpoint.small_files(), out)
    config = {
        k: v
        for k, v in checkpoint.config_file.items()
        if k not in ("num_B", "activation", "mobe", "quantization_config")
    }
    config["architectures"] = [checkpoint.family.architecture]
    inner = config.get(checkpoint.family.text_key or "")
    text = dict(inner) if isinstance(inner, dict) else config
    by_layer = {k: v for k, v in text.items() if isinstance(v, list) or k == "hybrid_override_pattern"}
    text |= {k: v[:n] for k, v in by_layer.items() if v and len(v) == checkpoint.n_layer}
    text |= {k: [i for i in text[k] if i < n] for k in ("moe_layers", "mlp_only_layers") if text.get(k)}
    text |= {"num_hidden_layers": n}
    text |= {key: 0 for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in text}
    if isinstance(used, int):  # of ``--experts-used``
        text |= {key: used for key in checkpoint.family.n_expert_used_keys if key in text}
    if alike := checkpoint.check_values().alike:
        text |= alike
        text.pop("rope_scaling", None)
    if text is not config:
        config[str(checkpoint.family.text_key)] = text
    (out / "config.json").write_text(json.dumps(config))
    write_safetensors(out / SINGLE_NAME, _entries(checkpoint, n), {"format": "pt"})


def _entries(checkpoint: Checkpoint, n: int) -> Iterator[Entry]:
    replaced: dict[str, tuple[Reconstruction, int]] = {}
    factors: set[str] = set()
    source = checkpoint.factors
    layers = [] if source is None else [source.layer(i) for i in checkpoint.moe_layers if i < n]
    for layer in layers:
        factors |= set(layer.factor_names)
        for projection in (p for p in ALL_PROJECTIONS if p in layer.projections):
            read = Reconstruction(layer, projection)
            for e in range(checkpoint.n_expert):
                replaced[checkpoint.family.expert_weight(layer.index, e, projection)] = (read, e)
    stacked = [i for i in checkpoint.moe_layers if i < n and checkpoint.family.stacked_here]
    for index in stacked:

        def matrix(projection: str, e: int, index: int = index) -> torch.Tensor:
            name = checkpoint.family.expert_weight(index, e, projection)
            if name in replaced:
                return replaced[name][0](e)
            return checkpoint.expert(index, projection, e)

        factors |= {x for p in checkpoint.family.kinds for x in checkpoint.expert_sources(index, p)}
        yield from fused_entries(checkpoint, index, matrix, torch.float32)
    for name, (read, e) in replaced.items() if not stacked else ():
        yield Entry.of(name, read(e))
    for name in checkpoint.names:
        if layer_in(name) >= n or name in replaced or name in factors or name.endswith("_scale_inv"):
            continue
        info = checkpoint.info(name)
        if info.dtype.startswith("F8"):
            yield Entry.of(name, _float(checkpoint, name))
            continue
        yield Entry.copy(name, info.dtype, info.shape, checkpoint.path / info.shard, info.begin, info.end)


def _float(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor in FP8 as float32; fused experts one after the other."""
    if len(checkpoint.shape(name)) == 2:
        return checkpoint.matrix(name)
    raise MobeError(f"{checkpoint.path}: tensor {name} is fused and in FP8: not compared")


def _of_layers(pair: bytes, n_layer: object, n: int) -> bytes:
    """An encoded key and value; a list with a number for each layer is cut to the first ``n``."""
    (length,) = struct.unpack_from("<Q", pair)
    kind, at = struct.unpack_from("<I", pair, 8 + length)[0], 12 + length
    if kind != _ARRAY or struct.unpack_from("<Q", pair, at + 4)[0] != n_layer:
        return pair
    size = (len(pair) - at - 12) // int(n_layer)  # type: ignore[call-overload]
    return pair[: at + 4] + struct.pack("<Q", n) + pair[at + 12 : at + 12 + n * size]


def _first_blocks(file: GgufFile, n: int, out: Path) -> None:
    """Write the first ``n`` blocks of ``file``, and all tensors outside blocks, to ``out``."""
    kept = [
        t for name, t in file.tensors.items() if not name.startswith("blk.") or int(name.split(".")[1]) < n
    ]
    pairs = []
    with open(file.path, "rb") as source:
        for name, (begin, end) in file.key_spans.items():
            if name.startswith("split."):
                continue
            source.seek(begin)
            pairs.append(source.read(end - begin))
            if name.startswith(f"{file.arch}."):
                pairs[-1] = _of_layers(pairs[-1], file.keys.get(f"{file.arch}.block_count"), n)
            if name == f"{file.arch}.block_count":
                pairs[-1] = pairs[-1][:-4] + struct.pack("<I", n)
    if file.arch == "deepseek2" and f"{file.arch}.attention.q_lora_rank" not in file.keys:
        # with fewer layers the runtime no longer guesses that it has none
        key = f"{file.arch}.attention.q_lora_rank".encode()
        pairs.append(struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 0))
    with open(out, "wb") as target:
        target.write(b"GGUF" + struct.pack("<IQQ", 3, len(kept), len(pairs)) + b"".join(pairs))
        offset = 0
        for t in kept:
            raw, shape = t.name.encode(), t.shape[::-1]
            target.write(
                struct.pack("<Q", len(raw)) + raw + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            )
            target.write(struct.pack("<IQ", ggml.type_info(t.type).id, offset))
            offset += padded(t.n_bytes, file.alignment)
        for t in kept:
            target.write(bytes(-target.tell() % file.alignment))
            for chunk in Entry.copy(t.name, "U8", t.shape, t.file, t.offset, t.offset + t.n_bytes).data():
                target.write(chunk)
        target.write(bytes(-target.tell() % file.alignment))
