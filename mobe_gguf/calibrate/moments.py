"""Full second moments of what each matrix is fed, gathered by running the original model over a text, layer by layer.

    S_e = E[ g^2 x x^T ]   over the tokens routed to expert e, g being the router's weight of the expert for the token

so that ``tr(D S_e D^T)`` is what an error D of the expert's matrix adds to its weighted output.  llama-imatrix counts the
diagonal only.  Measured on the shipped model (gate and up, 6 bases, B q3_k, A iq4_nl, 1.50 MB; KL divergence on
held-out text): diagonal 0.0314, S_e without g 0.0112, with g 0.0076.  Plain iq2_s, 1.51 MB: 0.0088.  Weighing each
token by the slope of the expert's own output, too, gave 0.0072, weighing the rows of W by it 0.0071: not done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.calibrate.gguf_model import GgufCheckpoint
from mobe_gguf.calibrate.layers import SHARE, MomentSettings, Run
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.skeleton import Skeleton, silent
from mobe_gguf.calibrate.text import default_texts, read_tokens
from mobe_gguf.calibrate.workspace import LayersWorkspace
from mobe_gguf.core.atomic import atomic_path, check_output, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import check_space, describe_size, why_not_written
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.core.progress import bar, say
from mobe_gguf.formats.moments import KEY, KEY_WEIGHS, VERSION
from mobe_gguf.formats.safetensors import Entry, read_header, read_metadata, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint

#: An expert with fewer tokens than this is named in the report: most of what its moments say is then the layer's average.
FEW = 128


# wide: what a user may choose, all of it optional
def collect(
    model: Path,
    text: Path | Sequence[Path] | None,
    out: Path,
    *,
    ctx: int = 512,
    chunks: int | None = None,
    rank: int | None = None,
    keep: float | None = None,
    memory: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the moments of every matrix of ``model``, a Hugging Face directory or a GGUF file (see ``gguf_model``), to ``out``; returns what is said of them.

    transformers runs the model, one layer at a time (see ``layers``), in its own type; FP8 weights are dequantized.
    ``text``: files, see :func:`read_tokens`; None: what ships with the project.  ``keep``: share of the energy of a layer's average moments that the directions hold which are kept (0.999 if nothing is
    said), or ``rank`` of them.  ``memory``: bytes that may be used beside what torch takes.  What is finished is kept in
    ``OUT.work`` until all is, and ``resume`` resumes from there.
    Raises MobeError or UsageError: model or text cannot be read, transformers does not know the model, too little text, no
    place for ``out``.  Code that a model's directory may hold is never run.
    """
    texts = [text] if isinstance(text, Path) else list(text or default_texts())
    settings = _settings(ctx, chunks, rank, keep, memory)
    check_output(out)
    checkpoint: Runnable = GgufCheckpoint(model) if model.is_file() else Checkpoint(model)
    if checkpoint.is_mobe:
        raise MobeError(f"{model} holds factors; expected the model that they were made of")
    checkpoint.check_whole()
    n_vocab = checkpoint.shape(checkpoint.family.embedding)[0]
    with silent(quiet):
        tokens = read_tokens(model, texts, ctx, chunks, n_vocab)
        skeleton = Skeleton(checkpoint, device)
    about = {
        "version": VERSION,
        "model": str(model),
        "source_checksum": checkpoint.checksum,
        "source": "gguf, dequantized" if model.is_file() else "safetensors",
        "text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "tokens": tokens.numel(),
        "ctx": ctx,
        "rank": rank,
        "keep": settings.keep if rank is None else None,
        "prior": PRIOR,
    }
    per_expert = tokens.numel() * checkpoint.n_expert_used // checkpoint.n_expert
    if per_expert < 2 * checkpoint.n_embd and not quiet:
        say(
            f"warning: {tokens.numel()} tokens are {per_expert} an expert on average, few for {checkpoint.n_embd} channels: give a "
            "longer --text"
        )
    budget = settings.memory or int(SHARE * _free(device))
    work = LayersWorkspace.beside(destination(out))
    try:
        _check_space(out, work, checkpoint, tokens, skeleton.dtype)
        with silent(quiet), work.open(about, resume), bar("moments", len(skeleton.layers), quiet) as progress:
            Run(skeleton, tokens, work, settings, budget, progress).run()
            about["coverage"] = _assemble(out, work, about, len(skeleton.layers))
        work.remove()
    except OSError as e:
        raise MobeError(
            f"{out}: cannot be written: {why_not_written(e)}. Finished layers are kept in {work.path}; go on with:\n  --resume"
        ) from e
    return about


def _settings(
    ctx: int, chunks: int | None, rank: int | None, keep: float | None, memory: int | None
) -> MomentSettings:
    if (rank is not None and rank < 1) or ctx < 2 or (chunks is not None and chunks < 1):
        raise UsageError(f"--rank {rank}, --ctx {ctx}, --chunks {chunks}: expected at least 1, 2 and 1")
    if keep is not None and rank is not None:
        raise UsageError("--keep and --rank both say how many directions are kept; give one of them")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep {keep}: expected a share of the energy, above 0 and at most 1")
    return MomentSettings(0.999 if keep is None else keep, rank, memory)


def _free(device: str) -> int:
    return free_memory() if device == "cpu" else int(torch.cuda.mem_get_info(torch.device(device))[0])


def _check_space(
    out: Path, work: LayersWorkspace, checkpoint: Runnable, tokens: torch.Tensor, dtype: torch.dtype
) -> None:
    """Two sets of states, what the experts of a layer are fed and their sums; how large the file becomes shows only later."""
    a_set = tokens.numel() * checkpoint.n_embd * dtype.itemsize
    needed = 3 * a_set + 4 * checkpoint.n_expert * checkpoint.n_ff_exp**2
    left = [*work.path.glob("states-*"), *work.path.glob("scratch-*")] if work.path.is_dir() else []
    check_space(destination(out), needed, left, "Make room, write OUT elsewhere, or give fewer --chunks.")


def _assemble(out: Path, work: LayersWorkspace, about: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """All layers' files as one; returns the coverage."""
    files = [work.layer_file(f"{i:03d}") for i in range(n_layer)]
    files += [work.layer_file("output")] * work.layer_file("output").is_file()
    entries: list[Entry] = []
    weighs: dict[str, str] = {}
    coverage: dict[str, Any] = {}
    for file in files:
        head = read_header(file)
        entries += [Entry.copy(name, i.dtype, i.shape, file, i.begin, i.end) for name, i in head.items()]
        weighs |= json.loads(read_metadata(file)[KEY_WEIGHS])
        for name, info in head.items():
            if name.endswith("_gate_exps.tokens"):
                raw = file.read_bytes() if info.n_bytes < 0 else _bytes(file, info.begin, info.end)
                counts = torch.frombuffer(bytearray(raw), dtype=torch.int32)
                coverage[name.split(".")[1]] = {
                    "least": int(counts.min()),
                    "median": int(counts.median()),
                    "few": int((counts < FEW).sum()),
                }
    about = about | {"coverage": coverage}
    needed = sum(e.n_bytes for e in entries)
    check_space(
        destination(out),
        needed,
        (),
        f"Make room; finished layers are kept in {work.path}. Go on with:\n  --resume",
    )
    with atomic_path(out) as part:
        write_safetensors(
            part, entries, {"format": "pt", KEY: json.dumps(about), KEY_WEIGHS: json.dumps(weighs)}
        )
    return coverage


def _bytes(file: Path, begin: int, end: int) -> bytes:
    with open(file, "rb") as f:
        f.seek(begin)
        return f.read(end - begin)


def report(about: dict[str, Any], out: Path) -> str:
    """What a person wants to know of the coverage, one line."""
    coverage = about["coverage"].values()
    least, few = min(c["least"] for c in coverage), sum(c["few"] for c in coverage)
    said = f"{out}: {describe_size(out.stat().st_size)}, {about['tokens']} tokens; an expert saw {least} at least, "
    said += f"{sorted(c['median'] for c in coverage)[len(coverage) // 2]} in the median"
    if few:
        said += f"; {few} experts saw fewer than {FEW}: give a longer --text, or one of more kinds"
    return said
