"""MoBE against the methods that its paper compares with, on one model, with equal numbers of parameters in gate and up.

    python bench/methods.py [--model DIR] [--target SHARE] [--steps N] [--chunks N] [--mse] [--out DIR]

Each row is `mobe-gguf factorize --method NAME --target SHARE`, exported as f16 (all except MoBE multiplied out) and
compared with the bf16 original by `mobe-gguf eval`.  ``mobe, even`` has the same number of bases in all layers, as the
paper does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mobe_gguf import evaluate
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.evaluate import tool
from mobe_gguf.evaluate.report import with_error
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.methods import METHODS
from mobe_gguf.factorize.plan import Options, default_rank
from mobe_gguf.models.checkpoint import Checkpoint

#: Type of the reference; the shipped model was trained in bf16.
REFERENCE = "bf16"


def even_bases(model: Path, target: float) -> int:
    """Number of full-rank bases in every unit that keeps the share ``target`` of parameters."""
    c = Checkpoint(model)
    rank = default_rank(c.n_ff_exp, c.n_embd)
    bases = round(c.n_expert * (target * c.n_ff_exp / rank - c.n_ff_exp / c.n_embd))
    if not 1 <= bases <= c.n_expert:
        raise MobeError(f"--target {target}: no number of bases of rank {rank} keeps that share")
    return bases


def main() -> None:
    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--target", type=float, default=0.626, help="share of gate and up to keep")
    parser.add_argument("--steps", type=int, default=500, help="of MoBE's solver")
    parser.add_argument("--mse", action="store_true", help="error of the matrices, without an imatrix")
    parser.add_argument("--calibration", type=Path, default=models / "calibration.txt")
    parser.add_argument("--text", type=Path, default=models / "heldout.txt")
    parser.add_argument("--chunks", type=int, help="of 512 tokens  [default: all of the text]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep the files here  [default: a temporary directory]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-methods-") as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reference = out / f"original-{REFERENCE}.gguf"
        export(options.model, reference, Recipe(parse_quant(REFERENCE)), allow_dense=True, quiet=True)
        imatrix = None
        if not options.mse:
            imatrix = str(out / "imatrix.gguf")
            where = ("-m", str(reference), "-f", str(options.calibration), "-o", imatrix)
            tool.run("llama-imatrix", *where, "-t", str(options.threads))
        even = Options(bases=even_bases(options.model, options.target), steps=options.steps)
        runs = {"mobe, even": even}
        for method in METHODS:
            steps = options.steps if method == "mobe" else None
            runs[method] = Options(method=method, target=options.target, steps=steps)
        results, files = [], []
        for i, run in enumerate(runs.values()):
            directory, file = out / f"method-{i}", out / f"method-{i}.gguf"
            results.append(jobs.run(jobs.prepare(options.model, directory, run.replace(imatrix=imatrix))))
            export(
                directory,
                file,
                Recipe(parse_quant("f16")),
                dense=run.method is not None and not METHODS[run.method].fitted,
                quiet=True,
            )
            files.append(file)
        settings = evaluate.EvalSettings(chunks=options.chunks, threads=options.threads)
        rows = evaluate.compare(reference, files, options.text, settings)
        Console(highlight=False, width=100).print(table(list(runs), results, rows))


def table(names: list[str], results: list[jobs.JobResult], rows: list[evaluate.Row]) -> Table:
    """A row for each method; errors are means over the units."""
    out = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    out.add_column("method")
    for column in ("kept", "error", "error of outputs", "KL divergence", "top-1", "seconds"):
        out.add_column(column, justify="right")
    for name, result, row in zip(names, results, rows, strict=True):
        n = len(result.units)
        out.add_row(
            name,
            f"{result.plan.projected_after / result.plan.projected_before:.1%}",
            f"{sum(u.error for u in result.units) / n:.4f}",
            f"{sum(u.objective for u in result.units) / n:.4f}",
            with_error(row.divergence.kl),
            f"{row.divergence.top1.value:.1%}",
            f"{sum(u.seconds or 0.0 for u in result.units):.1f}",
        )
    return out


if __name__ == "__main__":
    run_program(main)
