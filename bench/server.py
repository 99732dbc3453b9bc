"""llama-server with several requests at once, and with speculative decoding; tokens computed together share the bases.

    python bench/server.py [--shape qwen3-30b] [--quant q4_k] [--layers 6] [--slots 1,2,4,8] [--tokens 48] [--rounds 3]

Models are synthetic (see synthetic.py) and kept in --dir.  Each round starts the server once for every form, with the
largest number of slots, and sends it 1, 2, ... requests at the same time: token ids as the prompt, a fixed number of
tokens to generate.  Tokens per second are all generated tokens divided by the time until the last answer; the time
includes prompts of 4 tokens.

The last column is one request with speculative decoding.  A model of one small layer drafts 4 tokens, of which the
server accepts 2 on average, at random.  This is done by --spec-synth-len 3, the server's own option for measuring,
because with random weights no draft would be right.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import decode
import synthetic
from llama_bench import Speeds
from rich.console import Console
from rich.table import Table

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import console

#: Seconds that loading, and answering a request, may take.
PATIENCE = 300

#: A draft's length, and how many tokens a step of the target yields on average.
DRAFT, ACCEPTED = 4, 3

PROMPT = 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(file: Path, slots: int, tokens: int, threads: int, *options: str) -> Iterator[str]:
    """Run a llama-server, whose slots each have room for one request; yields its address."""
    port = free_port()
    command = [str(runtime.tool("llama-server")), "-m", str(file), "-t", str(threads), "--port", str(port)]
    room = slots * 2 * max(256, tokens + PROMPT)
    command += ["-np", str(slots), "-c", str(room), "--cache-ram", "0", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            end = time.monotonic() + PATIENCE
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    words = log.read().decode(errors="replace")[-1500:]
                    raise MobeError(f"{' '.join(command)} does not answer:\n{words}")
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def complete(address: str, number: int, tokens: int) -> int:
    """Generate ``tokens`` tokens after a prompt that depends on ``number``; returns how many came."""
    prompt = [300 + (number * PROMPT + i) * 37 % 3000 for i in range(PROMPT)]
    wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0}
    wanted |= {"ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)["tokens_predicted"]


def speed(address: str, together: int, tokens: int) -> float:
    """Tokens a second of ``together`` requests at once."""
    with ThreadPoolExecutor(together) as pool:
        start = time.perf_counter()
        counts = list(pool.map(lambda number: complete(address, number, tokens), range(together)))
        seconds = time.perf_counter() - start
    if min(counts) < tokens:
        raise MobeError(f"the server generated {counts} tokens, {tokens} of each request were asked for")
    return sum(counts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="qwen3-30b")
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--forms", default="plain,dense,terms4,none", help="plain, dense, termsS, none")
    parser.add_argument("--slots", default="1,2,4,8", help="requests at once")
    parser.add_argument("--tokens", type=int, default=48, help="generated for each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-drafts", action="store_true", help="leave out the last column")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    options = parser.parse_args()
    runtime.tool("llama-server")
    slots = [int(word) for word in options.slots.split(",")]
    columns = [*slots, *([] if options.no_drafts else ["drafts"])]
    wanted = decode.forms(options.shape, options.quant, options.layers, options.dir, options.forms.split(","))
    files = {label: file for label, (file, shape, _) in wanted.items() if shape}
    drafter = synthetic.rest(options.dir, "small", options.quant, 1)
    drafts = ("-md", str(drafter), "--spec-type", "draft-simple", "--spec-draft-n-max", str(DRAFT))
    drafts += ("--spec-synth-len", str(ACCEPTED))
    speeds = {label: {column: Speeds() for column in columns} for label in files}
    for turn in range(options.rounds):
        for label, file in files.items():
            console.print(f"round {turn + 1} of {options.rounds}: {label}")
            with server(file, max(slots), options.tokens, options.threads) as address:
                complete(address, 0, 4)  # the first request is slower
                for together in slots:
                    speeds[label][together].values.append(speed(address, together, options.tokens))
            if not options.no_drafts:
                with server(file, 1, options.tokens, options.threads, *drafts) as address:
                    complete(address, 0, 4)
                    speeds[label]["drafts"].values.append(speed(address, 1, options.tokens))
    table = Table(
        title=f"llama-server, {options.shape}, {options.layers} layers, {options.quant}, {options.threads} threads: tokens/s"
    )
    table.add_column("form")
    for column in columns:
        table.add_column("1, drafts of 4" if column == "drafts" else f"{column} at once", justify="right")
    for label, found in speeds.items():
        alone = found[columns[0]].median
        table.add_row(label, *(f"{each} ({each.median / alone:.2f})" for each in found.values()))
    out = Console(width=130 if not sys.stdout.isatty() else None)
    out.print(table)
    out.print(f"In parentheses: over the speed of {columns[0]} at once.", highlight=False)


if __name__ == "__main__":
    run_program(main)
