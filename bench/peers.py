"""GGUF files of one model by another project's quantizer, AutoRound, for bench/quality.py --peers.

AutoRound is not a dependency.  It is run by an interpreter that has it (``python -m venv V && V/bin/pip install
auto-round==0.16.1 torch==2.13.0``), named by --peers or AUTOROUND_PYTHON.  Its converter gets the pinned llama.cpp's
``conversion`` and ``gguf``, because with PyPI's gguf 0.19.0 it refuses Qwen3-MoE.  It also gets the pre-tokenizer that
our exporter recognizes: a tuned model whose tokenizer llama.cpp does not list could not be written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.calibrate.text import read_tokens
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.progress import bar
from mobe_gguf.export.tokenizer import recognize

#: AutoRound's types; each is compared with llama-quantize's and our file of the same type.
TYPES = ("q2_k_s", "q3_k_s", "q4_k_s")
VARIABLE = "AUTOROUND_PYTHON"

#: Pieces of the text are longer than ``length`` tokens by this factor, because AutoRound drops shorter samples.
SLACK = 1.15


#: A ``conversion`` package that is the pinned one, except for the name of the pre-tokenizer.
OVERLAY = """\
__path__ = [{path!r}]
with open({path!r} + "/__init__.py", encoding="utf-8") as file:
    exec(compile(file.read(), file.name, "exec"))
from .base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
"""


@dataclass(frozen=True)
class Tuning:
    """``samples`` of ``length`` tokens each, with ``steps`` for each block of the model."""

    steps: int = 50
    samples: int = 32
    length: int = 512


def interpreter(named: str | None) -> Path:
    """The Python that has AutoRound: ``named``, the environment's, or this one.  MobeError if it has none."""
    python = named or os.environ.get(VARIABLE) or sys.executable
    found = shutil.which(python)
    if found is None:
        raise MobeError(
            f"{python}: no such program; --peers and {VARIABLE} name a Python that has auto-round"
        )
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('auto_round') is None)"
    if subprocess.run([found, "-c", look], check=False).returncode:
        raise MobeError(
            f"{found} has no auto-round, so there is nothing to compare with: "
            f"name a Python that has it by --peers PYTHON or {VARIABLE}, or make one: "
            "python -m venv V && V/bin/pip install auto-round==0.16.1 torch==2.13.0"
        )
    return Path(found)


def pieces(text: str, tokens: int, length: int) -> list[str]:
    """``text``, which has ``tokens`` tokens, in pieces most of which have ``length`` tokens or more."""
    step = max(1, round(SLACK * length * len(text) / max(1, tokens)))
    return [text[i : i + step] for i in range(0, len(text) - step + 1, step)]


def command(python: Path, model: Path, dataset: Path, out: Path, name: str, tuning: Tuning) -> list[str]:
    """AutoRound's command line for one type.

    The router is not rounded (by default it is).  torch.compile is off: for the many small matrices of the shipped
    model it had not finished the first layer after two minutes, and without it a step takes about a second.
    """
    options = {
        "model": str(model.resolve()),
        "scheme": f"gguf:{name}",
        "format": f"gguf:{name}",
        "iters": str(tuning.steps),
        "nsamples": str(tuning.samples),
        "seqlen": str(tuning.length),
        "dataset": str(dataset),
        "ignore_layers": "mlp.gate",
        "device_map": "cpu",
        "output_dir": str(out),
    }
    more = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [str(python), "-m", "auto_round", *more, "--disable_torch_compile", "--disable_trust_remote_code"]


def overlay(root: Path, tree: Path, pre: str) -> None:
    """Write a folder ``root`` for LLAMA_CPP_ROOT: the converter of ``tree``, which gives every pre-tokenizer the name
    ``pre``."""
    (root / "conversion").mkdir(parents=True)
    text = OVERLAY.format(path=str(tree / "conversion"), pre=pre)
    (root / "conversion" / "__init__.py").write_text(text, encoding="utf-8")


def make(
    python: Path, model: Path, out: Path, calibration: Path, threads: int, tuning: Tuning | None = None
) -> list[Path]:
    """``autoround-TYPE.gguf`` in ``out`` for each of TYPES; existing files are kept.  AutoRound's output is in
    ``autoround-TYPE.log``."""
    text = calibration.read_text(encoding="utf-8")
    tuning = tuning or Tuning()
    tree = runtime.source_tree()
    files = [out / f"autoround-{name}.gguf" for name in TYPES]
    with bar("AutoRound", len(TYPES)) as progress, tempfile.TemporaryDirectory(dir=out) as scratch:
        root, dataset = Path(scratch) / "tree", Path(scratch) / "text.json"
        overlay(root, tree, recognize(model).name)
        paths = {"LLAMA_CPP_ROOT": str(root.resolve()), "PYTHONPATH": str(tree / "gguf-py")}
        environment = os.environ | paths | {"OMP_NUM_THREADS": str(threads)}
        count = read_tokens(model, [calibration], 1, None, sys.maxsize).numel()
        dataset.write_text(json.dumps(pieces(text, count, tuning.length)), encoding="utf-8")
        for name, file in zip(TYPES, files, strict=True):
            progress.update(name)
            if not file.is_file():
                made, log = Path(scratch) / name, file.with_suffix(".log")
                line = command(python, model, dataset, made, name, tuning)
                with log.open("w", encoding="utf-8") as words:
                    done = subprocess.run(
                        line, env=environment, stdout=words, stderr=subprocess.STDOUT, check=False
                    )
                found = sorted(made.rglob("*.gguf"))
                if done.returncode or len(found) != 1:
                    raise MobeError(
                        f"AutoRound wrote {len(found)} files of {name}, exit code {done.returncode}; "
                        f"its words are in {log}"
                    )
                shutil.move(found[0], file)
            progress.advance(1, f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    return files
