"""How much text rounding by moments needs: KL divergence by number of calibration tokens, on two kinds of text.

    python bench/tokens.py [--model DIR] [--out DIR] [--chunks 10,40,180,1000] [--quant q3_k_m] [--texts A.txt,B.txt] [--eval-chunks N]
    python bench/tokens.py --corpus CACHE [--works treasury,henry] [--evaluated austen,shakespeare]

For each number of chunks of 512 tokens, moments and an importance matrix are made from that much of the calibration
text.  Then `export --dense --moments` makes one file and llama-quantize, with the matrix, another; both are evaluated
on every text. ``--shrinkage`` tries other values of ``core.metric.TRUSTED``.  With ``--out`` existing files are kept
and used.

``--corpus`` takes both texts from the tiny model's own corpus (models/data.py), which is fetched into CACHE: as much
calibration text as the most chunks need, and held-out chapters.  ``--works`` and ``--evaluated`` take only these sources
of it: calibration on one book, KL divergence on another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from mobe_gguf import evaluate
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import metric, resources
from mobe_gguf.core.errors import run_program
from mobe_gguf.evaluate import tool
from mobe_gguf.export import Recipe, export, parse_quant

CONTEXT = 512
#: Characters of the corpus that surely hold a chunk.
CHARACTERS = 4 * CONTEXT


def corpus(cache: Path, out: Path, works: str, evaluated: str, chunks: int) -> tuple[Path, Path]:
    """Files in ``out`` with calibration and held-out text of the corpus in ``cache``; of all its sources unless they are
    named."""
    sys.path.insert(0, str(resources.path("models")))
    data = importlib.import_module("data")
    train, held = data.load(cache)

    def text(name: str, documents: list[Any], sources: str, size: int) -> Path:
        wanted = set(sources.split(",")) if sources else {source.name for source in data.SOURCES}
        path = out / f"{name}.txt"
        path.write_text(data.calibration([d for d in documents if d.source in wanted], size, seed=1))
        return path

    calibration = text("corpus", train, works, CHARACTERS * chunks)
    return calibration, text(f"heldout-{evaluated.replace(',', '-') or 'all'}", held, evaluated, 1 << 30)


def made(
    model: Path, reference: Path, out: Path, texts: list[Path], chunks: int, quant: str
) -> tuple[Path, Path]:
    """The files ``(by llama-quantize, by moments)`` for that many chunks of the calibration text."""
    moments, imatrix = out / f"{chunks}.safetensors", out / f"{chunks}-imatrix.gguf"
    if not moments.is_file():
        collect(model, texts, moments, ctx=CONTEXT, chunks=chunks, quiet=True)
    if not imatrix.is_file():
        joined = out / "calibration.txt"
        joined.write_text("".join(text.read_text() for text in texts))
        where = ("-m", str(reference), "-f", str(joined), "-o", str(imatrix))
        tool.run("llama-imatrix", *where, "--chunks", str(chunks), "-c", str(CONTEXT))
    plain = out / f"plain-{quant}-{chunks}.gguf"
    if not plain.is_file():
        tool.run("llama-quantize", "--imatrix", str(imatrix), str(reference), str(plain), quant, "1")
    ours = out / f"ours-{quant}-{chunks}-{metric.TRUSTED:g}.gguf"
    if not ours.is_file():
        export(model, ours, Recipe(parse_quant(quant), moments=str(moments)), dense=True, quiet=True)
    return plain, ours


def main() -> None:
    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--calibration", default=str(models / "calibration.txt"), help="files, with commas")
    parser.add_argument("--texts", default=str(models / "heldout.txt"), help="what is evaluated, with commas")
    parser.add_argument(
        "--corpus", type=Path, metavar="CACHE", help="take the texts from the tiny model's corpus"
    )
    parser.add_argument("--works", default="", help="sources of --corpus to calibrate on  [default: all]")
    parser.add_argument("--evaluated", default="", help="sources of its held-out text  [default: all]")
    parser.add_argument("--chunks", default="10,40,180")
    parser.add_argument("--quant", default="q3_k_m")
    parser.add_argument("--eval-chunks", type=int, default=24)
    parser.add_argument("--shrinkage", type=float, default=metric.TRUSTED)
    parser.add_argument("--out", type=Path, help="keep the files here  [default: a temporary directory]")
    options = parser.parse_args()
    metric.TRUSTED = options.shrinkage
    settings = evaluate.EvalSettings(chunks=options.eval_chunks, threads=1)
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-tokens-") as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reference = out / "reference.gguf"
        if not reference.is_file():
            export(options.model, reference, Recipe(parse_quant("bf16")), allow_dense=True, quiet=True)
        counts = [int(count) for count in options.chunks.split(",")]
        calibration = [Path(text) for text in options.calibration.split(",")]
        texts = [Path(text) for text in options.texts.split(",")]
        if options.corpus is not None:
            found = corpus(options.corpus, out, options.works, options.evaluated, max(counts))
            calibration, texts = [found[0]], [found[1]]
        print("| tokens | text | llama-quantize, imatrix | by moments | ratio |\n|---|---|---|---|---|")
        for chunks in counts:
            files = made(options.model, reference, out, calibration, chunks, options.quant)
            for text in texts:
                rows = evaluate.compare(reference, files, text, settings, quiet=True)
                plain, ours = (row.divergence.kl.value for row in rows)
                print(
                    f"| {chunks * CONTEXT} | {text.name} | {plain:.4f} | {ours:.4f} | {ours / plain:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    run_program(main)
