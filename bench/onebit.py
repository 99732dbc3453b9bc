"""Files of one to two bits: what each idea is worth, on the shipped model, or another one.

    python bench/onebit.py [--model DIR --text FILE --heldout FILE] [--rows LIST] [--out DIR] [--chunks N]

All files have the same bytes: gate and up of the experts in ``--type``, everything else iq4_xs.  Each row adds or takes away one
idea.  The difference to the row that it is compared with is paired: the mean over chunks of the difference of their KL divergences,
with its standard error.

- ``libggml``: codes by libggml's own encoder with llama-imatrix's importance matrix, as llama-quantize writes them;
- ``moments``: codes by second moments (`export --moments`), the experts' inputs weighed by the router alone;
- ``slopes``: gate's and up's inputs weighed by the slopes of the expert's outputs, too, which is what `moments` does;
- ``sequence``: each layer for what the rounded layers before it put out (`--sequential`), the routers as they are, corrections in
  full;
- ``confirmed``: corrections as far as one half of the text confirms the other;
- ``router``: the routers solved for again, too, which is what `--sequential` does;
- ``gradients``: gate's and up's inputs weighed by the loss's gradients in place of the slopes (`moments --gradients`), where the text
  suffices.

With ``--out`` files are kept, and a second run resumes with them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from llama_cpp import Llama
from rich.console import Console
from rich.table import Table

from mobe_gguf.calibrate.experts import ExpertForm
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.calibrate.pairs import Sums
from mobe_gguf.core import resources
from mobe_gguf.evaluate import tool
from mobe_gguf.evaluate.experts import ExpertsKept
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.sequential import Sequential

CTX = 512
#: Each row, and the row that it is compared with.
ROWS = {
    "libggml": None,
    "moments": "libggml",
    "slopes": "moments",
    "sequence": "slopes",
    "confirmed": "sequence",
    "router": "confirmed",
    "gradients": "router",
}


#: What stands in for an idea that is left out: class, method, replacement.
LEFT_OUT = {
    "slopes": (ExpertForm, "slope", lambda _, product, squares: torch.ones(len(product))),
    "confirmed": (Sums, "_common", lambda *_: 1.0),
    "router": (Sequential, "_refitted", lambda *_: []),
}


@contextmanager
def without(*ideas: str) -> Iterator[None]:
    """Inside, these ideas are left out."""
    with ExitStack() as stack:
        for idea in ideas:
            stack.enter_context(mock.patch.object(*LEFT_OUT[idea]))
        yield


def gather(kind: str, arguments: argparse.Namespace, out: Path) -> Path:
    """A file of moments; it is kept if it is there."""
    path = out / f"{kind}.safetensors"
    if path.exists():
        return path
    with without(*(("slopes",) if kind == "moments" else ())):
        collect(arguments.model, arguments.text, path, gradients=kind == "gradients")
    return path


def make(row: str, arguments: argparse.Namespace, out: Path) -> Path:
    """The file of a row; it is kept if it is there."""
    path = out / f"{arguments.type}-{row}.gguf"
    if path.exists():
        return path
    kinds = ((r"ffn_(gate|up|gate_up)_exps\.", arguments.type),)
    moments = gather(row if row in ("moments", "gradients") else "slopes", arguments, out)
    recipe = Recipe("iq4_xs", overrides=kinds, moments=str(moments))
    if row == "libggml":
        squares = out / "imatrix.gguf"
        if not squares.exists():
            given = ("-m", str(out / "reference.gguf"), "-f", str(arguments.text), "-o", str(squares))
            tool.run("llama-imatrix", *given)
        recipe = Recipe("iq4_xs", overrides=kinds, imatrix=(str(squares),))
    left_out = {"sequence": ("router", "confirmed"), "confirmed": ("router",)}.get(row, ())
    with without(*left_out):
        export(
            arguments.model, path, recipe, dense=True, quiet=True,
            sequential=(arguments.text,) if row in ("sequence", "confirmed", "router", "gradients") else (),
        )  # fmt: skip
    return path


def divergences(files: dict[str, Path], reference: Path, text: Path, chunks: int) -> dict[str, np.ndarray]:
    """Mean KL divergence of the second half of each chunk, ``[chunks]`` in nats, by the names of ``files``."""
    models = {name: _opened(path) for name, path in {"": reference, **files}.items()}
    tokens = models[""].tokenize(text.read_bytes(), add_bos=False)
    found: dict[str, list[float]] = {name: [] for name in files}
    for chunk in range(chunks):
        part = tokens[chunk * CTX : (chunk + 1) * CTX]
        expected = _log_probabilities(models[""], part)
        for name in files:
            own = _log_probabilities(models[name], part)
            found[name].append(float((np.exp(expected) * (expected - own)).sum(-1).mean()))
    return {name: np.array(values) for name, values in found.items()}


def _opened(path: Path) -> Llama:
    return Llama(
        str(path), n_ctx=CTX, n_batch=CTX, n_ubatch=CTX, logits_all=True, n_gpu_layers=0, verbose=False
    )


def _log_probabilities(model: Llama, tokens: list[int]) -> np.ndarray:
    model.reset()
    model.eval(tokens)
    x = model.scores[CTX // 2 : CTX - 1].astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def table(
    files: dict[str, Path], found: dict[str, np.ndarray], kept: dict[str, float], console: Console
) -> None:
    out = Table(box=None, pad_edge=False)
    for column in ("file", "MB", "KL divergence", "ratio", "difference", "experts kept"):
        out.add_column(column, justify="left" if column == "file" else "right")
    for name, path in files.items():
        values, against = found[name], ROWS[name]
        cells = [f"{path.stat().st_size / 1e6:.2f}", f"{values.mean():.4f}", "", ""]
        if against is not None:
            difference = values - found[against]
            error = difference.std(ddof=1) / len(difference) ** 0.5
            cells[2:] = [
                f"{values.mean() / found[against].mean():.3f}",
                f"{difference.mean():+.4f} ± {error:.4f}",
            ]
        out.add_row(name, *cells, f"{kept[name]:.1%}")
    console.print(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = resources.path("models")
    parser.add_argument("--model", type=Path, default=models / "tiny-moe")
    parser.add_argument("--text", type=Path, default=models / "calibration.txt")
    parser.add_argument("--heldout", type=Path, default=models / "heldout.txt")
    parser.add_argument("--type", default="q1_0")
    parser.add_argument("--rows", default=",".join(ROWS), help="without gradients where the text is short")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chunks", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reference = out / "reference.gguf"
        if not reference.exists():
            export(arguments.model, reference, Recipe("bf16"), dense=True, quiet=True)
        files = {row: make(row, arguments, out) for row in arguments.rows.split(",")}
        experts = ExpertsKept(reference, arguments.heldout, CTX, arguments.chunks, None)
        shares = {name: experts.shares(path).values() for name, path in files.items()}
        found = divergences(files, reference, arguments.heldout, arguments.chunks)
        table(files, found, {name: sum(s) / len(s) for name, s in shares.items()}, Console(width=100))


if __name__ == "__main__":
    main()
