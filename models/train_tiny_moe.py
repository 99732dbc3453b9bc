"""Train the tiny Mixture-of-Experts language model of this directory, on a CPU, in an hour or two.

    pip install torch transformers tokenizers safetensors numpy click
    python models/train_tiny_moe.py --cache ~/.cache/tiny-moe --minutes 90

The corpus (see data.py) is fetched into the cache; checkpoint and tokens lie there too, so that the same
command continues an interrupted run. Every `--export-every` minutes the model is written to models/tiny-moe/ as a
Hugging Face directory, file by file and atomically. With `--steps N` the learning rate follows the
step count and the run can be repeated; with `--minutes` it follows the clock (and the log says how
many steps that made).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import data  # noqa: E402
import fast_moe  # noqa: E402

HERE = Path(__file__).parent
END = "<|endoftext|>"
VOCABULARY = 1024
# tokenizer.json of Qwen2; llama.cpp knows it as the pre-tokenizer "qwen2" (src/llama-vocab.cpp)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Settings:
    """What must not change between the start of a run and its continuation."""

    seed: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    balance: float
    minutes: float | None
    steps: int | None
    warmup: float = 0.02  # share of the run
    floor: float = 0.03  # last learning rate over the highest
    length: int = 256  # tokens of a training sequence ...
    long_length: int = 512  # ... and in the last part of the run, which `long_from` starts
    long_from: float = 0.85


def log(message: str) -> None:
    """One line on stderr, with the time; from the first worker only."""
    if dist.is_initialized() and dist.get_rank():
        return
    print(time.strftime("%H:%M:%S ") + message, file=sys.stderr, flush=True)


# --- tokenizer and tokens ---------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's normalizer and pre-tokenizer; bytes first, merges next, the end token last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=None,
        bos_token=None,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )


def prepare(cache: Path, seed: int) -> None:
    """Put tokenizer and training tokens (uint16, documents shuffled once, each closed by the end token) into the cache.

    Also writes heldout.txt and calibration.txt beside this script.
    """
    folder = cache / "tokens"
    if not (folder / "train.npy").exists():
        log("reading the corpus")
        train, held = data.load(cache / "corpus")
        sizes: dict[str, list[int]] = {}
        for at, documents in enumerate((train, held)):
            for document in documents:
                sizes.setdefault(document.source, [0, 0])[at] += len(document.text.encode())
        for source, (kept, apart) in sizes.items():
            log(f"  {source}: {kept / 1e6:.2f} MB to train on, {apart / 1e3:.0f} kB held out")
        write(HERE / "heldout.txt", "\n\n".join(d.text for d in held) + "\n")
        write(HERE / "calibration.txt", data.calibration(train, 250_000, seed))
        tokenizer = train_tokenizer([d.text for d in train])
        end = tokenizer.convert_tokens_to_ids(END)
        order = np.random.default_rng(seed).permutation(len(train))
        ids = tokenizer([train[i].text for i in order], add_special_tokens=False)["input_ids"]
        tokens = np.concatenate([np.array([*one, end], dtype=np.uint16) for one in ids])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        (folder / "sizes.json").write_text(json.dumps(sizes))
        np.save(folder / "train.part.npy", tokens)
        os.replace(folder / "train.part.npy", folder / "train.npy")
        text_bytes = sum(a for a, _ in sizes.values())
        log(f"{len(tokens):,} training tokens, {text_bytes / len(tokens):.2f} bytes a token")


def read_tokens(cache: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """What `prepare` left in the cache."""
    folder = cache / "tokens"
    return PreTrainedTokenizerFast.from_pretrained(folder), np.load(folder / "train.npy")


def batch(tokens: np.ndarray, seed: int, seen: int, length: int, batch_tokens: int) -> torch.Tensor:
    """Sequences [batch_tokens / length, length + 1] after `seen` tokens of training.

    Each epoch cuts the stream at its own offset and shuffles the pieces, all from (seed, epoch,
    length): a continued run sees what an uninterrupted one would.
    """
    rows = batch_tokens // length
    per_epoch = (len(tokens) - 1 - length) // length // rows
    step = seen // batch_tokens
    epoch, at = divmod(step, per_epoch)
    rng = np.random.default_rng((seed, epoch, length))
    offset = int(rng.integers(length))
    starts = offset + length * rng.permutation(per_epoch * rows)[at * rows : (at + 1) * rows]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


# --- model ------------------------------------------------------------------------------------


def new_model(end: int) -> Qwen3MoeForCausalLM:
    """The architecture: 7.9 M parameters, 4 layers of 24 experts, 4 of them used by each token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,  # of a dense layer; there is none
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=24,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        router_aux_loss_coef=0.01,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # GPT-2's start: what adds to the residual stream is scaled by 1/sqrt(2 layers)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def check_fast_forward(model: Qwen3MoeForCausalLM) -> None:
    """Compare logits and gradients of the fast forward with transformers' own; error above 1e-4."""
    slow = Qwen3MoeForCausalLM(model.config)
    slow.load_state_dict(model.state_dict())
    ids = torch.randint(0, VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(0))
    results = []
    for one in (slow, model):
        out = one(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits.detach(), [p.grad.clone() for p in one.parameters()]))
        one.zero_grad(set_to_none=True)
    (logits, grads), (fast_logits, fast_grads) = results
    worst = max(
        float((a - b).abs().max() / a.abs().max())
        for a, b in zip([logits, *grads], [fast_logits, *fast_grads], strict=True)
    )
    log(f"fast forward and backward against transformers: largest relative difference {worst:.1e}")
    if worst > 1e-4:
        raise RuntimeError(f"the fast forward differs from transformers' by {worst:.1e}, more than 1e-4")


# --- measuring --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: Qwen3MoeForCausalLM, ids: torch.Tensor, window: int = 512
) -> tuple[float, float, torch.Tensor]:
    """Mean loss (nats) of all predicted tokens of `ids` [N] in windows, of their second halves, and expert counts.

    The second halves are what llama-perplexity averages (at -c 512). Counts: [layers, experts]. Expects an
    unpatched model, so that transformers' own forward is what is measured.
    """
    routers = [layer.mlp.gate for layer in model.model.layers]
    counts = torch.zeros(len(routers), model.config.num_experts, dtype=torch.long)

    def count(layer: int):
        def hook(_module, _inputs, outputs):
            counts[layer] += torch.bincount(outputs[2].reshape(-1), minlength=counts.shape[1])

        return hook

    hooks = [router.register_forward_hook(count(i)) for i, router in enumerate(routers)]
    model.eval()
    losses = []
    rows = ids[: len(ids) // window * window].view(-1, window)
    for part in rows.split(8):
        logits = model(part, use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"))
    for hook in hooks:
        hook.remove()
    loss = torch.cat(losses)
    return float(loss.mean()), float(loss[:, window // 2 - 1 :].mean()), counts


def unigram_loss(train: np.ndarray, ids: torch.Tensor) -> float:
    """Loss (nats) of `ids` under the token frequencies of the training stream, each count plus one."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[ids.numpy()].mean())


# --- writing ----------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def make_portable(folder: Path) -> None:
    """Let transformers 4.57 load what transformers 5 saved, too.

    Version 5 renamed `num_experts` and `rope_theta` (both names are written; each version ignores or
    maps the other's) and its tokenizer class; and it indents tokenizer.json, which doubles its size.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_experts"] = config["num_local_experts"]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("backend", "is_local", "local_files_only"):
        config.pop(local, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    compact = json.dumps(
        json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":")
    )
    path.write_text(compact, encoding="utf-8")


def export(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Qwen3MoeForCausalLM:
    """Write the Hugging Face directory in bfloat16, each file atomically; returns the model read back, in float32."""
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.7,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        copy.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        make_portable(Path(part))
        for file in sorted(Path(part).iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, folder / file.name)
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_checkpoint(path: Path, state: dict) -> None:
    """The state of the run, whole or not at all."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


# --- the run ----------------------------------------------------------------------------------


def rate(settings: Settings, progress: float) -> float:
    """Learning rate at `progress` (0 to 1): linear warm-up, then a cosine down to `floor`."""
    if progress < settings.warmup:
        return settings.learning_rate * (progress / settings.warmup + 1e-3)
    angle = math.pi * min(1.0, (progress - settings.warmup) / (1 - settings.warmup))
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(angle)))


def optimizer_for(model: Qwen3MoeForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True)


def average_gradients(model: Qwen3MoeForCausalLM) -> None:
    """Mean of each gradient over the workers, in one exchange."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def shared_clock(seconds: float) -> float:
    """The first worker's clock, so that all take the same learning rate and stop at the same step."""
    clock = torch.tensor(seconds, dtype=torch.float64)
    dist.broadcast(clock, 0)
    return clock.item()


def resume(checkpoint: Path, settings: Settings, model, optimizer) -> tuple[int, int, float]:
    """(steps, tokens, seconds) done so far; weights and optimizer take the checkpoint's state if there is one."""
    if not checkpoint.exists():
        return 0, 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    for name, old in state["settings"].items():
        if getattr(settings, name) != old:
            raise click.ClickException(
                f"{checkpoint} was made with {name} {old}, this run asks for {getattr(settings, name)}: "
                f"repeat the old options to continue it, or give --fresh to start again"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log(f"continuing at step {state['step']}, {state['seconds'] / 60:.1f} minutes in")
    return state["step"], state["seen"], state["seconds"]


def train(settings: Settings, cache: Path, out: Path, export_every: float) -> dict | None:
    """Train (or continue), exporting on the way; the first worker returns the figures of the finished run.

    Every worker holds the model and takes its share of each batch's sequences. One thread each: on a
    machine with other work, threads that wait for each other at every operator lose most of their time.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(settings.seed)
    tokenizer, tokens = read_tokens(cache)
    held = torch.tensor(tokenizer((HERE / "heldout.txt").read_text(encoding="utf-8"))["input_ids"])
    model = new_model(tokenizer.convert_tokens_to_ids(END))
    optimizer = optimizer_for(model, settings)
    routers = fast_moe.install(model)
    check_fast_forward(model)
    checkpoint = cache / "checkpoint.pt"
    step, seen, spent = resume(checkpoint, settings, model, optimizer)

    model.train()
    began, exported, reported = time.monotonic() - spent, spent, (spent, seen)
    recent: list[float] = []
    while True:
        spent = shared_clock(time.monotonic() - began)
        progress = step / settings.steps if settings.steps else spent / (60 * settings.minutes)
        if progress >= 1:
            break
        length = settings.long_length if progress >= settings.long_from else settings.length
        rows = batch(tokens, settings.seed, seen, length, settings.batch_tokens)[rank::workers]
        for group in optimizer.param_groups:
            group["lr"] = rate(settings, progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))
        balance = fast_moe.balance_loss(routers)
        (loss + settings.balance * balance).backward()
        average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + settings.batch_tokens
        recent.append(loss.item())
        if step % 50 == 0:
            speed = (seen - reported[1]) / (spent - reported[0])
            log(
                f"step {step} {100 * progress:.1f}% loss {np.mean(recent):.4f} balance {balance.item():.3f} "
                f"gradient {norm.item():.2f} rate {rate(settings, progress):.2e} tokens {seen / 1e6:.2f}M {speed:.0f}/s"
            )
            recent, reported = [], (spent, seen)
        if rank == 0 and spent - exported > 60 * export_every:
            exported = spent
            state = {"settings": asdict(settings), "step": step, "seen": seen, "seconds": spent}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, state)
            nats, _, counts = evaluate(export(model, tokenizer, out), held[:16384])
            share = counts / counts.sum(1, keepdim=True) * counts.shape[1]
            log(
                f"exported at step {step}: held-out perplexity (first 16k tokens) {math.exp(nats):.3f}, "
                f"expert share over the even one {share.min():.2f} to {share.max():.2f}"
            )
    if rank:
        return None
    final = export(model, tokenizer, out)
    log(f"trained: {step} steps, {seen:,} tokens, {spent / 60:.1f} minutes")
    run = {"steps": step, "tokens_seen": seen, "minutes": round(spent / 60, 1)}
    return figures(final, tokenizer, tokens, held) | run


def worker(
    rank: int, workers: int, meeting: str, settings: Settings, cache: Path, out: Path, export_every: float
) -> None:
    """One process of the run; the first writes figures.json into the cache."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    result = train(settings, cache, out, export_every)
    if rank == 0:
        write(cache / "figures.json", json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


def figures(model: Qwen3MoeForCausalLM, tokenizer, tokens: np.ndarray, held: torch.Tensor) -> dict:
    """What the model card states, measured on heldout.txt by the exported model."""
    nats, half_nats, counts = evaluate(model, held)
    per_token = (HERE / "heldout.txt").stat().st_size / len(held)
    share = counts / counts.sum(1, keepdim=True)
    torch.manual_seed(1)
    prompt = torch.tensor([tokenizer("And it came to pass")["input_ids"]])
    sample = model.generate(prompt, max_new_tokens=150, do_sample=True, temperature=0.7, top_k=0)
    return {
        "train_tokens": len(tokens),
        "heldout_tokens": len(held),
        "bytes_per_token": round(per_token, 4),
        "perplexity": round(math.exp(nats), 3),
        "perplexity_second_half": round(math.exp(half_nats), 3),
        "bits_per_byte": round(nats / math.log(2) / per_token, 4),
        "unigram_perplexity": round(math.exp(unigram_loss(tokens, held)), 1),
        "expert_share": [
            {
                "min": round(float(s.min()), 4),
                "median": round(float(s.median()), 4),
                "max": round(float(s.max()), 4),
            }
            for s in share
        ],
        "sample": tokenizer.decode(sample[0], skip_special_tokens=True),
    }


@click.command(help=__doc__)
@click.option(
    "--cache", type=click.Path(path_type=Path), required=True, help="Corpus, tokens and checkpoint."
)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "tiny-moe", show_default=True)
@click.option("--minutes", type=float, help="Length of the run by the clock.")
@click.option("--steps", type=int, help="Length of the run in steps.")
@click.option("--seed", default=1, show_default=True)
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--balance", default=0.02, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--workers", default=2, show_default=True, help="Processes of one thread each.")
@click.option("--export-every", default=10.0, show_default=True, help="Minutes between exports.")
@click.option("--fresh", is_flag=True, help="Forget the checkpoint and the tokens in the cache.")
def main(cache: Path, out: Path, workers: int, export_every: float, fresh: bool, **options) -> None:
    if (options["minutes"] is None) == (options["steps"] is None):
        raise click.UsageError("give one of --minutes and --steps")
    settings = Settings(**options)
    if settings.batch_tokens % (settings.long_length * workers):
        raise click.UsageError(f"--batch-tokens must be a multiple of {settings.long_length} x --workers")
    cache = cache.expanduser().resolve()
    if fresh:
        (cache / "checkpoint.pt").unlink(missing_ok=True)
        shutil.rmtree(cache / "tokens", ignore_errors=True)
    prepare(cache, settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, f"{folder}/meeting", settings, cache, out, export_every)
        torch.multiprocessing.spawn(worker, arguments, nprocs=workers)
    click.echo((cache / "figures.json").read_text(), nl=False)


if __name__ == "__main__":
    main()
