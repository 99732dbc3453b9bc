"""ik_llama.cpp's own quantization types and our stock ones, at their sizes: KL divergences, all in ik_llama.cpp's runtime.

    python -m venv IK && IK/bin/pip install ik-llama-cpp-python==0.1.5
    python bench/quality.py --only ours,sequence,sized --chunks 24 --out DIR
    python bench/ik_types.py IK/bin/python DIR [--chunks 24]

llama.cpp does not read these types.  Their files are made by ik_llama.cpp's llama-quantize from DIR's bf16 file, with
DIR's importance matrix.  Then IK's Python evaluates all files on the held-out text, each against the bf16 file in the same
runtime: mean KL divergence over the second half of each chunk, as llama-perplexity does it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

TYPES = ("iq2_kt", "iq2_kl", "iq3_kt", "iq3_k", "iq4_kt", "iq4_ks", "iq4_k")
CONTEXT = 512


def log_probabilities(file: str, chunks: list[list[int]], threads: int):  # type: ignore[no-untyped-def]
    """``[chunks, scored, n_vocab]`` float32, in ik_llama.cpp."""
    import ctypes

    import ik_llama_cpp._ctypes_api as api
    import numpy as np
    from ik_llama_cpp import IkLlama

    model = IkLlama(file, n_ctx=CONTEXT, n_threads=threads, verbose=False)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model._model.model))
    batch, found = api.llama_batch_init(CONTEXT, 0, 1), []
    for chunk in chunks:
        api.llama_kv_cache_clear(model.ctx)
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i >= CONTEXT // 2
            batch.seq_id[i][0] = 0
        if api.llama_decode(model.ctx, batch):
            raise SystemExit(f"{file}: llama_decode failed")
        for i in range(CONTEXT // 2, CONTEXT - 1):
            row = ctypes.cast(api.llama_get_logits_ith(model.ctx, i), ctypes.POINTER(ctypes.c_float))
            found.append(np.ctypeslib.as_array(row, (n_vocab,)).copy())
    x = np.stack(found).astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def evaluate() -> None:
    """Run by IK's Python, which has neither this project nor torch.  Standard input: files and chunks, as JSON."""
    import numpy as np

    asked = json.load(sys.stdin)
    reference, *files = asked["files"]
    p = log_probabilities(reference, asked["chunks"], asked["threads"])
    for file in files:
        q = log_probabilities(file, asked["chunks"], asked["threads"])
        kl = (np.exp(p) * (p - q)).sum(-1)
        size = Path(file).stat().st_size / 1e6
        error = kl.std() / len(kl) ** 0.5
        print(f"| {Path(file).stem} | {size:.2f} | {kl.mean():.4f} ± {error:.4f} |", flush=True)


def main() -> None:
    from mobe_gguf.calibrate.text import read_tokens
    from mobe_gguf.core import resources
    from mobe_gguf.evaluate import tool

    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", type=Path, help="the Python that has ik-llama-cpp-python")
    parser.add_argument("files", type=Path, help="what bench/quality.py --out made")
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, default=models / "heldout.txt")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    out: Path = options.files
    reference, matrix = (out / f"{options.model.name}-{name}.gguf" for name in ("bf16", "imatrix"))
    old = out / "imatrix.dat"  # its llama-quantize reads the old form of an importance matrix alone
    if not old.is_file():
        given = ("-m", str(reference), "--in-file", str(matrix), "--output-format", "dat", "-o", str(old))
        tool.run("llama-imatrix", *given)
    files = [file for kind in ("ours", "sequence", "sized") for file in out.glob(f"{kind}-*.gguf")]
    for name in TYPES:
        files.append(out / f"ik-{name}.gguf")
        if not files[-1].is_file():
            program = (options.python, "-c", "from ik_llama_cpp.quantize import main; main()", "quantize")
            part = files[-1].with_suffix(".part")
            line = [*program, reference, part, name.upper(), "--imatrix", old]
            done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
            if done.returncode or not part.is_file():
                raise SystemExit(f"{name}: ik_llama.cpp's llama-quantize failed: {done.stderr[-500:]}")
            part.rename(files[-1])
    tokens = read_tokens(options.model, [options.text], CONTEXT, options.chunks, sys.maxsize)
    ordered = sorted(files, key=lambda file: -file.stat().st_size)
    asked = {
        "files": [str(file) for file in (reference, *ordered)],
        "chunks": tokens.tolist(),
        "threads": options.threads,
    }
    print("| file | MB | KL divergence |\n|---|---|---|", flush=True)
    line = [str(options.python), __file__, "evaluate"]
    done = subprocess.run(line, input=json.dumps(asked), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{options.python} failed: {done.stderr[-500:]}")


if __name__ == "__main__":
    evaluate() if sys.argv[1:] == ["evaluate"] else main()
