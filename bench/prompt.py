"""Prompt processing of a factorized model against the uncompressed one in the same quantization.

    python bench/prompt.py [--shapes qwen3-30b,...] [--quants q4_k,...] [--batches 16,64,512] [--threads 1,all]

Works as decode.py, with batches of a prompt's size.  A prompt forms each expert's matrix once for all its tokens.
"""

from __future__ import annotations

import decode

from mobe_gguf.core.errors import run_program


def main() -> None:
    options = decode.arguments(__doc__, batches="16,64,512").parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    decode.measure(options, batches, {16: 128, 64: 128, 512: 512}, "prompt")


if __name__ == "__main__":
    run_program(main)
