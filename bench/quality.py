"""The frontier of plain files: one model in the types of llama-quantize, each with an importance matrix, against the original.

    python bench/quality.py [--model DIR] [--out DIR] [--chunks N] [--also FILE.gguf]... [--plot FILE.png]

What a MoBE file has to be measured against is the plain file of its size.  ``--also`` puts other files of the same
vocabulary, as MoBE ones, into the same run and the same table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from mobe_gguf import evaluate, resources
from mobe_gguf.errors import MobeError
from mobe_gguf.evaluate import plot, report, tool
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.progress import bar

#: iq2_s is left out: of a small MoE, llama-quantize makes the same file of it as of iq2_xs.
TYPES = (
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q4_k_m",
    "q4_k_s",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "iq4_xs",
    "iq3_s",
    "iq3_xxs",
    "q2_k",
    "iq2_m",
    "iq2_xs",
    "iq2_xxs",
)

#: Of the reference: the shipped model is trained in bf16 (float16 would round its smallest weights).
REFERENCE = "bf16"


def make(model: Path, out: Path, calibration: Path, threads: int) -> tuple[Path, list[Path]]:
    """Reference, importance matrix and one file for each of TYPES in ``out``: reference and files, largest first."""
    reference = out / f"{model.name}-{REFERENCE}.gguf"
    export(model, reference, Recipe(parse_quant(REFERENCE)), allow_dense=True, quiet=True)
    imatrix = out / f"{model.name}-imatrix.gguf"
    where = ("-m", str(reference), "-f", str(calibration), "-o", str(imatrix))
    tool.run("llama-imatrix", *where, "-t", str(threads))
    files = []
    with bar("llama-quantize", len(TYPES)) as progress:
        for name in TYPES:
            progress.update(name)
            files.append(out / f"{model.name}-{name}.gguf")
            paths = ("--imatrix", str(imatrix), str(reference), str(files[-1]))
            tool.run("llama-quantize", *paths, name, str(threads))
            progress.advance(1, f"{files[-1].name}: {files[-1].stat().st_size / 1e6:.2f} MB")
    return reference, sorted(files, key=lambda file: -file.stat().st_size)


def main() -> None:
    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--calibration", type=Path, default=models / "calibration.txt")
    parser.add_argument("--text", type=Path, default=models / "heldout.txt")
    parser.add_argument("--out", type=Path, help="keep the files here  [default: a temporary directory]")
    parser.add_argument("--also", type=Path, action="append", default=[], help="another GGUF file to compare")
    parser.add_argument("--chunks", type=int, help="of 512 tokens  [default: all of the text]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot is not None:
        plot.check(options.plot)
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-quality-") as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reference, files = make(options.model, out, options.calibration, options.threads)
        settings = evaluate.Settings(chunks=options.chunks, threads=options.threads)
        rows = evaluate.compare(reference, [*files, *options.also], options.text, settings)
        console = Console(highlight=False, width=100)
        console.print(report.table(evaluate.facts_of(reference), rows, options.text, settings))
        if options.plot is not None:
            plot.plot(rows, options.plot)


if __name__ == "__main__":
    try:
        main()
    except MobeError as e:
        sys.exit(f"Error: {e.message}")
