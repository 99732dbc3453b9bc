"""What an unpatched build answers to small files: recorded here, compared with the patched build by test_stock.py.

    cd tests && python -m stock.record              # builds the unpatched runtime in the cache first, some minutes
    cd tests && python -m stock.record --lib DIR    # DIR holds the shared libraries of an unpatched build

Writes ``golden.json`` (digests of the files, messages) and ``golden.npz`` (tokens, logits) beside this file.  To be run again when the pin of
the source distribution changes or the files of ``parity/gguf_files.py`` do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from parity.gguf_files import GgufFile, factorize, llama, qwen3moe
from parity.llama import greedy
from parity.loader import Loader

from mobe_gguf.runtime import source
from mobe_gguf.runtime.install import Environment

HERE = Path(__file__).parent
GOLDEN_TEXT, GOLDEN_ARRAYS = HERE / "golden.json", HERE / "golden.npz"

PROMPT = "the wind and the water in her hand"
N_TOKENS = 24

#: The likeliest token must lead by this share of the logits' spread, or another processor might choose the second.
MIN_LEAD = 1e-3

#: Ordinary files, whose answers are compared.
FILES = {"llama": llama, "qwen3moe": qwen3moe}

#: MoBE files that an unpatched build must refuse.  With r = d the A's have the shape of ordinary experts: what gives the
#: file away then is that tensors are left over.
REFUSED = {
    "r < d": lambda: factorize(qwen3moe(), rank=32),
    "r = d": lambda: factorize(qwen3moe(), rank=64),
    "r = d, row-wise mix": lambda: factorize(qwen3moe(), rank=64, by_row=True),
    "down, r < d": lambda: factorize(qwen3moe(), rank=32, projections=("down",)),
    "down, r = d": lambda: factorize(qwen3moe(), rank=64, projections=("down",)),
}


def stock_environment() -> Environment:
    """Where this script puts the unpatched runtime."""
    return Environment.at(source.cache_dir() / "stock-runtime")


def run_stock(lib: Path, file: GgufFile) -> dict[str, np.ndarray]:
    """``greedy`` in a process that loads the libraries in ``lib``: the Python package is the installed one, which no
    patch touches."""
    with tempfile.TemporaryDirectory() as scratch:
        return run_stock_file(lib, file.write(Path(scratch) / "model.gguf"))


def run_stock_file(lib: Path, path: Path) -> dict[str, np.ndarray]:
    """The same of a file that is there."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.npz"
        subprocess.run(
            [sys.executable, "-m", "stock.record", "--greedy", str(path), str(out)],
            cwd=HERE.parent,
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(lib)},
            check=True,
        )
        return dict(np.load(out))


def record(lib: Path) -> None:
    """Write both golden files from the answers of the libraries in ``lib``."""
    golden: dict = {
        "source": f"{source.LLAMA_CPP.name} {source.LLAMA_CPP.version}",
        "files": {},
        "refused": {},
    }
    arrays = {}
    for name, make in FILES.items():
        answer = run_stock(lib, make())
        spread, lead = answer["logits"].std(), leads(answer["logits"])[-N_TOKENS:]
        if lead.min() < MIN_LEAD * spread:
            raise SystemExit(
                f"{name}: two tokens are as good as equally likely ({lead.min():g} of {spread:g})"
            )
        arrays |= {f"{name}.{key}": value for key, value in answer.items()}
        golden["files"][name] = make().digest()
    with tempfile.TemporaryDirectory() as scratch, Loader(lib) as loader:
        for name, make in REFUSED.items():
            outcome = loader.load(make().write(Path(scratch) / "model.gguf"))
            if outcome.loaded or outcome.signal:
                raise SystemExit(
                    f"the unpatched runtime does not refuse the MoBE file with {name}: {outcome}"
                )
            golden["refused"][name] = outcome.errors.splitlines()[0]
    GOLDEN_TEXT.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(GOLDEN_ARRAYS, **arrays)


def leads(logits: np.ndarray) -> np.ndarray:
    """By how much the likeliest token leads, at every position."""
    best = np.sort(logits, axis=-1)[:, -2:]
    return best[:, 1] - best[:, 0]


def build_stock() -> Path:
    """The libraries of the unpatched runtime, built from the pinned source unless they are there."""
    from mobe_gguf.runtime.build import BuildRecipe, build
    from mobe_gguf.runtime.compile import BuildOptions

    build(BuildRecipe(BuildOptions(), patches=(), kernels=None), stock_environment())
    return stock_environment().lib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", type=Path, help="shared libraries of an unpatched build")
    parser.add_argument("--greedy", nargs=2, type=Path, metavar=("GGUF", "NPZ"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.greedy:
        np.savez(args.greedy[1], **greedy(args.greedy[0], PROMPT, N_TOKENS))
    else:
        record(args.lib or build_stock())


if __name__ == "__main__":
    main()
