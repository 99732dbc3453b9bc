"""Full second moments of each matrix's inputs, from running the original model over a text, layer by layer.

    S_e = E[ g^2 x x^T ]       over the tokens routed to expert e

g is the router's weight of the expert for the token; for gate and up g^2 is that squared times the slope of the expert's output
(``ExpertForm.slope``), or with gradients times the size of the loss's gradient (``gradients``).  ``tr(D S_e D^T)`` is then about the
squared error that an error D of the expert's matrix adds to its weighted output.  llama-imatrix collects only the diagonal.

Measured on the shipped model (gate and up, 6 bases, B q3_k, A iq4_nl, 1.50 MB; KL divergence on held-out text): diagonal
0.0314, S_e without g 0.0112, with the router's weight 0.0076.  Plain iq2_s, 1.51 MB: 0.0088.  docs/calibration.md has what slopes and
gradients are worth.  Not done: to weigh the rows of W by the slope, too (0.0071 where the tokens' slopes have 0.0072).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.calibrate.gradients import NEEDED, experts_bytes
from mobe_gguf.calibrate.heard import GgufTokenizer, gather, heard_model
from mobe_gguf.calibrate.layers import SHARE, MomentSettings
from mobe_gguf.calibrate.shares import Gathering, free, open_runnable, run_shares, shares_for
from mobe_gguf.calibrate.skeleton import Skeleton, silent
from mobe_gguf.calibrate.text import default_texts, read_chunks
from mobe_gguf.calibrate.workspace import LayersWorkspace
from mobe_gguf.core.atomic import atomic_path, check_output, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.executors import Place
from mobe_gguf.core.executors.cluster import cluster
from mobe_gguf.core.files import Unchanged, check_space, describe_size, why_not_written
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.core.progress import bar, say
from mobe_gguf.formats.moments import KEY, KEY_SEEN, KEY_WEIGHS, VERSION
from mobe_gguf.formats.safetensors import Entry, read_header, read_metadata, write_safetensors
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.original import SourceModel

#: The report names experts with fewer tokens than this: their moments are mostly the layer's average.
FEW = 128
#: How many such experts the report names at most.
NAMED = 12
#: A text is recommended for such experts if its tokens reach them this many times as often as those of the whole text.
HELPS = 1.5


# wide: the options of a user, all with defaults
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
    ray: str | None = None,
    gradients: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the moments of every matrix of ``model``, a Hugging Face directory or a GGUF file (see ``gguf_model``), to ``out``;
    returns the facts for :func:`report`.

    transformers runs the model, one layer at a time (see ``layers``), in its own type; FP8 weights are dequantized.  A GGUF file of
    another architecture is run by llama.cpp (see ``heard``).  ``text``: files, see :func:`text.read_chunks`; None: the text that ships
    with the project.  ``keep``: the kept directions hold this share of the energy of a layer's average moments (default 0.999); or
    ``rank``: how many directions are kept.  ``device``: one, or several as ``cuda:0,cuda:1``, or with ``ray``, the address of a cluster,
    its kind: the text is then shared out (see ``shares``).  ``memory``: bytes that may be used besides those that torch takes, by each of
    them.  ``gradients``: weigh experts' inputs by the loss's gradients, see ``gradients``; not done, with a warning, if the average expert
    sees too few tokens.  Finished layers are kept in ``OUT.work`` until all are done; ``resume`` continues from there.

    Raises MobeError or UsageError if model or text cannot be read, neither transformers nor llama.cpp knows the model, there is too
    little text, or no space for ``out``.  Code in a model's directory is never run.
    """
    texts = [text] if isinstance(text, Path) else list(text or default_texts())
    settings = _settings(ctx, chunks, rank, keep, memory)
    check_output(out, [model, *texts])
    unchanged = Unchanged(model)
    place, heard = Place.of(device, ray), heard_model(model)
    checkpoint: Any = heard or open_runnable(model)  # a Runnable, or what llama.cpp runs
    if checkpoint.is_mobe:
        raise MobeError(f"{model} holds factors; expected the model that they were made of")
    if heard is not None and (place != Place() or gradients):
        raise UsageError(
            f"{model}: llama.cpp runs a GGUF file of {heard.arch}, on the CPU and without gradients; leave out --device, --ray and "
            "--gradients, or give the Hugging Face directory that it was made of"
        )
    checkpoint.check_whole()
    with silent(quiet):
        parts = _read(model, heard, checkpoint, texts, ctx, chunks)
        tokens = torch.cat(list(parts.values()))
        skeleton = None if heard else Skeleton(checkpoint, place.devices[0])
    about = {
        "version": VERSION,
        "model": str(model),
        "source_checksum": checkpoint.checksum,
        "source": "safetensors"
        if model.is_dir()
        else "gguf, dequantized"
        if heard is None
        else "gguf, run by llama.cpp",
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
    work = LayersWorkspace.beside(destination(out))
    try:
        with cluster(ray), silent(quiet):
            n_shares = _shares(work, place)
            if n_shares > 1:
                about["shares"] = n_shares
            budget = settings.memory or int(SHARE * free(place.devices[0]))
            itemsize = 4 if skeleton is None else skeleton.dtype.itemsize
            gradients = gradients and _enough_for_gradients(checkpoint, per_expert, budget, itemsize, quiet)
            about["gradients"] = gradients
            _check_space(out, work, checkpoint, tokens.numel(), itemsize, gradients)
            with work.open(about, resume):
                texts_tokens = tuple(parts.values())
                if heard is not None or skeleton is None:
                    assert heard is not None
                    with bar("moments", heard.n_layer, quiet) as progress:
                        gather(heard, texts_tokens, work, settings, budget, progress)
                else:
                    job = Gathering(skeleton.checkpoint, texts_tokens, work, settings, gradients, n_shares)
                    if n_shares > 1:
                        run_shares(job, place, checkpoint.n_layer, quiet)
                    else:
                        with bar("moments", job.steps(checkpoint.n_layer), quiet) as progress:
                            job.run(skeleton, place.devices[0], progress)
                unchanged.check(f"begin again:\n  rm -r {work.path}")
                sizes = {str(path): part.numel() for path, part in parts.items()}
                about |= _assemble(out, work, about, checkpoint.n_layer, sizes)
        work.remove()
    except OSError as e:
        raise MobeError(
            f"{out}: cannot be written: {why_not_written(e)}. Finished layers are kept in {work.path}; go on with:\n  --resume"
        ) from e
    return about


def _read(
    model: Path, heard: GgufModel | None, checkpoint: Any, texts: Sequence[Path], ctx: int, chunks: int | None
) -> dict[Path, torch.Tensor]:
    if heard is None:
        return read_chunks(model, texts, ctx, chunks, checkpoint.shape(checkpoint.family.embedding)[0])
    n_vocab = heard.file.tensors["token_embd.weight"].shape[0]
    return read_chunks(model, texts, ctx, chunks, n_vocab, GgufTokenizer(model))


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


def _enough_for_gradients(
    checkpoint: SourceModel, per_expert: int, budget: int, itemsize: int, quiet: bool
) -> bool:
    """Whether the average expert's tokens suffice for gradients, with a warning if not.  UsageError if a layer's experts do not fit
    in memory."""
    needed = NEEDED * checkpoint.n_embd
    if per_expert < needed:
        if not quiet:
            say(
                f"warning: --gradients is left out: it helps from {needed} tokens an expert ({NEEDED} for each channel) and does harm "
                f"with few; this text gives {per_expert} on average"
            )
        return False
    experts = experts_bytes(checkpoint, itemsize)
    if experts > budget:
        raise UsageError(
            f"--gradients needs a layer's experts in memory, {describe_size(experts)}, and may use {describe_size(budget)}; give more "
            "--memory, or leave it out"
        )
    return True


def _shares(work: LayersWorkspace, place: Place) -> int:
    """How many shares the text is run in: as many as in the run that is resumed, if there is one."""
    try:
        return int(work.read("settings.json").get("shares", 1))
    except (OSError, ValueError, TypeError, AttributeError):
        return shares_for(place)


def _check_space(
    out: Path,
    work: LayersWorkspace,
    checkpoint: SourceModel,
    tokens: int,
    itemsize: int,
    gradients: bool,
) -> None:
    """Check disk space for two sets of states and for a layer's expert inputs and sums, with ``gradients`` also for states and
    gradients of all layers.  The size of ``out`` is known only later."""
    width = getattr(checkpoint, "hidden_size", checkpoint.n_embd)
    a_set = tokens * width * itemsize
    needed = 3 * a_set + 4 * checkpoint.n_expert * checkpoint.n_ff_exp**2
    if gradients:
        needed = max(needed, (checkpoint.n_layer + 1) * a_set + 8 * tokens * width)
    left = [f for f in work.path.rglob("*") if re.match("states|scratch|gradient-", f.name)]
    check_space(destination(out), needed, left, "Make room, write OUT elsewhere, or give fewer --chunks.")


def _assemble(
    out: Path, work: LayersWorkspace, about: dict[str, Any], n_layer: int, texts: dict[str, int]
) -> dict[str, Any]:
    """Join all layers' files; returns the coverage, and which of the ``texts`` (name -> tokens) reach the experts that saw
    few tokens."""
    files = [work.layer_file(f"{i:03d}") for i in range(n_layer)]
    files += [work.layer_file("output")] * work.layer_file("output").is_file()
    entries: list[Entry] = []
    weighs: dict[str, str] = {}
    coverage: dict[str, Any] = {}
    reached = torch.zeros(len(texts), dtype=torch.int64)
    for file in files:
        head, metadata = read_header(file), read_metadata(file)
        entries += [Entry.copy(name, i.dtype, i.shape, file, i.begin, i.end) for name, i in head.items()]
        weighs |= json.loads(metadata[KEY_WEIGHS])
        for name, info in head.items():
            if name.endswith("_gate_exps.tokens"):
                raw = file.read_bytes() if info.n_bytes < 0 else _bytes(file, info.begin, info.end)
                counts = torch.frombuffer(bytearray(raw), dtype=torch.int32)
                few = (counts < FEW).nonzero().flatten()
                seen = json.loads(metadata.get(KEY_SEEN) or "null")  # a folder of an earlier version has none
                if seen is not None and len(seen) == len(texts):
                    reached += torch.tensor(seen)[:, few].sum(1)
                coverage[name.split(".")[1]] = {
                    "least": int(counts.min()),
                    "median": int(counts.median()),
                    "few": len(few),
                    "experts": few.tolist(),
                }
    said = {"coverage": coverage, "reached": dict(zip(texts, _rates(reached, texts), strict=True))}
    about = about | said
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
    return said


def _rates(reached: torch.Tensor, texts: dict[str, int]) -> list[float]:
    """How often a token of each text reaches an expert that saw few tokens, as a multiple of the whole text's rate."""
    whole = float(reached.sum()) / sum(texts.values())
    return [
        round(n / size / whole, 2) if whole and size else 0.0
        for n, size in zip(reached.tolist(), texts.values(), strict=True)
    ]


def _bytes(file: Path, begin: int, end: int) -> bytes:
    with open(file, "rb") as f:
        f.seek(begin)
        return f.read(end - begin)


def report(about: dict[str, Any], out: Path) -> str:
    """A line about the coverage: tokens per expert, experts that saw few, and which text would help them."""
    coverage = about["coverage"].values()
    least, few = min(c["least"] for c in coverage), sum(c["few"] for c in coverage)
    said = f"{out}: {describe_size(out.stat().st_size)}, {about['tokens']} tokens; an expert saw {least} at least, "
    said += f"{sorted(c['median'] for c in coverage)[len(coverage) // 2]} in the median"
    if few:
        said += (
            f"; {few} experts saw fewer than {FEW} ({_named(about['coverage'])}): {_advice(about['reached'])}"
        )
    return said


def _named(coverage: dict[str, Any]) -> str:
    """``blk.3: 17, 22; blk.5: 1``: the experts that saw few tokens, at most NAMED of them."""
    left, said = NAMED, []
    for block, found in coverage.items():
        if shown := found["experts"][:left]:
            said.append(f"{block}: {', '.join(map(str, shown))}")
            left -= len(shown)
    more = sum(found["few"] for found in coverage.values()) - (NAMED - left)
    return "; ".join(said) + (f" and {more} more" if more else "")


def _advice(reached: dict[str, float]) -> str:
    """Which text reaches them, if one does so more often than the others."""
    name, rate = max(reached.items(), key=lambda item: item[1])
    if len(reached) > 1 and rate >= HELPS:
        return f"give more text like {name}, which reaches them {rate:.1f} times as often as the whole text"
    return "give a longer --text, or one of more kinds"
