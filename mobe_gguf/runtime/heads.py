"""Whether the installed runtime loads a GGUF file, found out from its head: no tensor is read.

    python -m mobe_gguf.runtime.heads FILE OUT

It is a separate program because llama.cpp ends the process if a file does not fit its graph.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mobe_gguf.runtime.apart import run_apart

#: llama.h's LLAMA_LOAD_MODE_NONE: nothing is mapped.
UNMAPPED = 0


def check_head(path: Path, of: object) -> None:
    """MobeError, with the program's output, if the runtime refuses the file at ``path``, whose data may be a hole.  ``of``: what
    the message calls it."""
    out = path.with_name("loaded")
    run_apart(__name__, path, out=out, of=of)
    out.unlink()


def main(path: str, out: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.load_mode = 0, True, UNMAPPED
    llama_cpp.llama_backend_init()
    if not llama_cpp.llama_model_load_from_file(path.encode(), params):
        sys.exit("error: it was refused")
    Path(out).touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
