"""Quality at equal bytes: MoBE files of one model against llama-quantize's, each with an importance matrix, in one table.

    python bench/quality.py [--model DIR] [--out DIR] [--chunks N] [--only plain,ours,sequence,sized,default,mobe] [--sizes 3.0M,3.47M,4.63M]
                            [--peers [PYTHON]] [--also FILE.gguf]... [--plot FILE.png]

A MoBE file is compared with plain files of its size:

- ``plain``: llama-quantize's own mixtures, and one of them with fewer bits for gate and up alone (``MIXED``), which a
  careful user would try first;
- ``ours``: plain files rounded by moments, in the types of llama-quantize's files; a second table has the ratios of
  their KL divergences;
- ``sequence``: the same, rounded in sequence (`export --sequential`);
- ``sized``: plain files whose types `--target-size` chooses;
- ``default``: the result of `factorize --for q4_k` with no other option.

``--peers`` adds AutoRound's files (see peers.py).  With ``--out`` all files are kept, and a second run resumes with
them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peers
import torch
from rich.console import Console

from mobe_gguf import evaluate
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import bar
from mobe_gguf.evaluate import plot, report, tool
from mobe_gguf.export import (
    ExportOptions,
    ExportRequest,
    Recipe,
    export,
    parse_quant,
    parse_target,
    write_model,
)
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.plan import Options, default_bases
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.wab import WabFiles, wab_name

#: For a small MoE, llama-quantize makes the same file of iq2_s and iq2_xs.
PLAIN = (
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
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
)

#: Types also written by `export --dense --moments`, for comparison with those of PLAIN.
OURS = ("q4_k_m", "q3_k_m", "iq4_xs", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs")

#: Types of gate and up in files that have the type REST everywhere else.
MIXED = ("iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
REST = "iq4_xs"

#: Type of the reference: the shipped model was trained in bf16 (float16 would round its smallest weights).
REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """A MoBE file.  ``by``: what weighs the error (``moments``, ``imatrix``, nothing), or ``published``.

    ``bases``, ``rank``: None is factorize's default.  ``basis``, ``transform``: types for which B and A are fitted and
    in which they are exported.  None: fitted for no type, exported in the types of ``quant``.
    """

    name: str
    by: str
    quant: str
    basis: str | None = None
    transform: str | None = None
    bases: int | None = None
    rank: int | None = None
    projections: tuple[str, ...] = ("gate", "up")

    def options(self, imatrix: Path, moments: Path, steps: int) -> Options:
        return Options(
            bases=self.bases,
            rank=self.rank,
            steps=steps,
            projections=self.projections,
            for_basis=self.basis,
            for_transform=self.transform,
            imatrix=str(imatrix) if self.by == "imatrix" else None,
            moments=str(moments) if self.by == "moments" else None,
        )


def variants(n: int, p: int) -> tuple[Variant, ...]:
    """The variants for n experts with p rows.  The last four differ only in how they are fitted, the others in size."""
    q4 = ("q4_k_m", "q4_k", "q4_k")
    q3 = (REST, "q3_k", "iq4_nl")
    quarter = default_bases(n, 1)
    return (
        Variant(f"m{2 * quarter}-q3_k", "moments", *q3, bases=2 * quarter),
        Variant(f"m{quarter}-q3_k", "moments", *q3),
        Variant(f"m{quarter * 2 // 3}-q3_k", "moments", *q3, bases=quarter * 2 // 3),
        Variant(
            f"m{quarter * 4 // 3}-r{p * 2 // 3}-q3_k", "moments", *q3, bases=quarter * 4 // 3, rank=p * 2 // 3
        ),
        Variant(
            f"down-m{2 * quarter}-q3_k", "moments", *q3, bases=2 * quarter, projections=("gate", "up", "down")
        ),
        Variant(f"down-m{quarter}-q3_k", "moments", *q3, projections=("gate", "up", "down")),
        Variant("ours-plain-q4_k", "", "q4_k_m"),
        Variant("ours-imatrix-q4_k", "imatrix", *q4),
        Variant("ours-moments-q4_k", "moments", *q4),
        Variant("published-q4_k", "published", "q4_k_m"),
    )


def make_plain(
    model: Path, out: Path, calibration: Path, threads: int, types: bool
) -> tuple[Path, Path, list[Path]]:
    """Make in ``out`` the reference, the importance matrix, and one file for each of PLAIN and MIXED."""
    reference = out / f"{model.name}-{REFERENCE}.gguf"
    if not reference.is_file():
        export(model, reference, Recipe(parse_quant(REFERENCE)), allow_dense=True, quiet=True)
    imatrix = out / f"{model.name}-imatrix.gguf"
    if not imatrix.is_file():
        where = ("-m", str(reference), "-f", str(calibration), "-o", str(imatrix))
        tool.run("llama-imatrix", *where, "-t", str(threads))
    wanted = {f"plain-{name}": (name, ()) for name in PLAIN}
    for name in MIXED:
        wanted[f"plain-{REST}-{name}"] = (REST, ("--tensor-type", f"ffn_(gate|up)_exps={name}"))
    files = []
    with bar("llama-quantize", len(wanted)) as progress:
        for stem, (name, more) in wanted.items() if types else ():
            progress.update(stem)
            files.append(out / f"{stem}.gguf")
            if not files[-1].is_file():
                paths = ("--imatrix", str(imatrix), *more, str(reference), str(files[-1]))
                tool.run("llama-quantize", *paths, name, str(threads))
            progress.advance(1, f"{files[-1].name}: {files[-1].stat().st_size / 1e6:.2f} MB")
    return reference, imatrix, files


def make_ours(
    model: Path, out: Path, calibration: Path, kinds: Sequence[str], sizes: Sequence[str]
) -> list[Path]:
    """Make plain files rounded by second moments in ``out``.

    ``kinds``: ``ours`` and ``sequence`` in the types of OURS, ``sized`` for ``sizes`` by `--target-size`.
    """
    if not {"ours", "sequence", "sized"} & set(kinds):
        return []
    moments, files = str(_moments(model, out, calibration)), []
    plain, sequence = (ExportOptions(dense=True, quiet=True, sequential=t) for t in ((), (calibration,)))
    wanted = {}
    for kind, options in (("ours", plain), ("sequence", sequence)):
        for name in OURS if kind in kinds else ():
            wanted[f"{kind}-{name}"] = Recipe(parse_quant(name), moments=moments), options
    for size in sizes if "sized" in kinds else ():
        wanted[f"sized-{size}"] = Recipe(REST, moments=moments, target=parse_target(size, None)), plain
    with bar("by moments", len(wanted)) as progress:
        for name, (recipe, options) in wanted.items():
            progress.update(name)
            files.append(out / f"{name}.gguf")
            if not files[-1].is_file():
                write_model(ExportRequest(model, files[-1], recipe, options))
            progress.advance(1, f"{files[-1].name}: {files[-1].stat().st_size / 1e6:.2f} MB")
    return files


def make_default(model: Path, out: Path, calibration: Path, sizes: Sequence[str]) -> list[Path]:
    """Export the result of `factorize --moments FILE --for q4_k` in the types that it was fitted for, and for each of
    ``sizes``."""
    moments, factors = str(_moments(model, out, calibration)), out / "factors-default"
    if not factors.is_dir():
        options = Options(moments=moments, for_basis="q4_k", for_transform="q4_k")
        jobs.run(jobs.prepare(model, factors, options, resume=True), quiet=True)
    wanted = {"mobe-default-q4_k": Recipe("q4_k_m", basis="q4_k", transform="q4_k", moments=moments)}
    for size in sizes:
        wanted[f"mobe-default-{size}"] = Recipe(REST, moments=moments, target=parse_target(size, None))
    files = []
    for name, recipe in wanted.items():
        files.append(out / f"{name}.gguf")
        try:
            if not files[-1].is_file():
                export(factors, files[-1], recipe, original=model, quiet=True)
        except MobeError as error:  # even the smallest types take more
            print(f"{name}: {error.message}", flush=True)
            files.pop()
    return files


def ratios(rows: Sequence[evaluate.Row]) -> list[str]:
    """A line for each of OURS if llama-quantize's file was measured, too: KL divergences, and ratios to its own."""
    found = {Path(row.facts.path).stem: row.divergence.kl.value for row in rows}
    lines = [
        "| types | llama-quantize, imatrix | by moments | ratio | in sequence | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name in OURS:
        plain = found.get(f"plain-{name}")
        if plain is not None:
            ours = [found.get(f"{kind}-{name}") for kind in ("ours", "sequence")]
            cells = [f"{kl:.5f} | {kl / plain:.3f}" if kl is not None else " | " for kl in ours]
            lines.append(f"| {name} | {plain:.5f} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _moments(model: Path, out: Path, calibration: Path) -> Path:
    """The moments of the calibration text; gathered if they are missing."""
    moments = out / f"{model.name}-moments.safetensors"
    if not moments.is_file():
        collect(model, calibration, moments)
    return moments


def make_mobe(
    model: Path, out: Path, calibration: Path, imatrix: Path, steps: int, published_steps: int, threads: int
) -> list[Path]:
    """Make a file for each of the variants in ``out``."""
    torch.set_num_threads(threads)
    checkpoint = Checkpoint(model)
    todo = variants(checkpoint.n_expert, checkpoint.n_ff_exp)
    moments = _moments(model, out, calibration)
    files = []
    with bar("MoBE", len(todo)) as progress:
        for variant in todo:
            progress.update(variant.name)
            file, factors = out / f"mobe-{variant.name}.gguf", out / f"factors-{variant.name}"
            files.append(file)
            recipe = Recipe(
                parse_quant(variant.quant),
                basis=variant.basis,
                transform=variant.transform,
                imatrix=(str(imatrix),),
                moments=str(moments) if variant.by == "moments" else None,
            )
            if not file.is_file() and variant.by == "published":
                train_published(checkpoint, factors, published_steps)
                export(model, file, recipe, wab=WabFiles((factors,), "silu"), quiet=True)
            elif not file.is_file():
                if not factors.is_dir():
                    job = jobs.prepare(model, factors, variant.options(imatrix, moments, steps), resume=True)
                    jobs.run(job, quiet=True)
                export(factors, file, recipe, quiet=True)
            progress.advance(1, f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    return files


def train_published(checkpoint: Checkpoint, out: Path, steps: int) -> None:
    """Gate and up of all layers by the published algorithm, saved as its authors' training does."""
    from factorize import published

    out.mkdir(exist_ok=True)
    m = default_bases(checkpoint.n_expert, 1)
    for layer in checkpoint.moe_layers:
        for projection in ("gate", "up"):
            path = out / wab_name(layer, projection)
            if not path.is_file():
                w, best = checkpoint.expert_stack(layer, projection), []
                for _ in published(w, m, min(w.shape[1:]), steps, keep=best):
                    pass
                torch.save(dict(zip(("A_params", "B_params", "w_params"), best, strict=True)), path)


def main() -> None:
    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--calibration", type=Path, default=models / "calibration.txt")
    parser.add_argument("--text", type=Path, default=models / "heldout.txt")
    parser.add_argument("--out", type=Path, help="keep the files here  [default: a temporary directory]")
    parser.add_argument(
        "--only",
        default="plain,mobe",
        help="files to make, of plain,ours,sequence,sized,default,mobe  [default: plain,mobe]",
    )
    parser.add_argument("--sizes", default="3.0M,3.47M,4.63M", help="of `sized` and `default`")
    parser.add_argument(
        "--peers",
        nargs="?",
        const="",
        metavar="PYTHON",
        help=f"AutoRound's files too, made by this Python  [default: ${peers.VARIABLE}, or the one that runs this]",
    )
    parser.add_argument("--also", type=Path, action="append", default=[], help="another GGUF file to compare")
    parser.add_argument("--steps", type=int, default=500, help="of our solver  [default: 500]")
    parser.add_argument("--published-steps", type=int, default=1000, help="[default: 1000]")
    parser.add_argument("--chunks", type=int, help="of 512 tokens  [default: all of the text]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot is not None:
        plot.check(options.plot)
    peer = None if options.peers is None else peers.interpreter(options.peers)
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-quality-") as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        kinds, sizes = options.only.split(","), options.sizes.split(",")
        made = make_plain(options.model, out, options.calibration, options.threads, "plain" in kinds)
        reference, imatrix, files = made
        files += make_ours(options.model, out, options.calibration, kinds, sizes)
        if "default" in kinds:
            files += make_default(options.model, out, options.calibration, sizes)
        if "mobe" in kinds:
            steps = options.steps, options.published_steps
            files += make_mobe(options.model, out, options.calibration, imatrix, *steps, options.threads)
        if peer is not None:
            files += peers.make(peer, options.model, out, options.calibration, options.threads)
        settings = evaluate.EvalSettings(chunks=options.chunks, threads=options.threads)
        files = sorted([*files, *options.also], key=lambda file: -file.stat().st_size)
        rows = evaluate.compare(reference, files, options.text, settings)
        console = Console(highlight=False, width=100)
        console.print(report.table(evaluate.facts_of(reference), rows, options.text, settings))
        print(*ratios(rows), sep="\n")
        if options.plot is not None:
            plot.plot(rows, options.plot)


if __name__ == "__main__":
    run_program(main)
