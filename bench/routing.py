"""Which experts the shipped model uses on real text, and how much a cache of formed matrices helps.

    python bench/routing.py [--terms 0,4,2] [--slots 0,4,6,8,12,24] [--tokens 2048] [--rounds 3] [--plot docs/cache.png]

The shipped model is factorized and exported once for each number of mixing terms (0: all; kept in --dir).  llama.cpp
then reads held-out text, one token at a time, in windows of 512 that share the cache.  The ids of the experts are taken
from the graph (ffn_moe_topk of each layer) with the cache on.  Hits are counted by the context and read from its log;
they must equal what the rule of replacement gives for these ids (cache.missed).  Bytes are those of a token in all
layers' experts: bases that missed experts mix, kept rows that are read or written, A and down.  Speeds are medians of
--rounds in turns, measured without reading ids.

The plot shows the hit rate against the share of experts kept: for that text, for random routing, and for the trace of
cache.py with the published figures behind it.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cache
import numpy as np
from cache import ffi, ggml_graph
from llama_bench import Speeds
from rich.console import Console
from rich.table import Table

from mobe_gguf.core import names, resources
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import console
from mobe_gguf.evaluate import heldout, plot
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.runtime import ggml
from mobe_gguf.studies import demo

WINDOW = 512
BASES = 6


@dataclass(frozen=True)
class Model:
    """A file and its sizes.  ``users[layer][projection]``: ``[n, m]``, which bases each expert mixes; empty without
    factors."""

    path: Path
    n: int
    k: int
    layers: int
    d: int
    users: list[dict[str, np.ndarray]]
    sizes: list[dict[str, float]]

    @property
    def slot_bytes(self) -> int:
        """Memory of one kept matrix of each projection of each layer."""
        lib = ggml_graph.library()
        total = 0
        for users, sizes in zip(self.users, self.sizes, strict=True):
            shape = [self.d, int(sizes.get("rank", 0)), 1, 1, self.n, self.k, 1, 1, False]
            total += len(users) * lib.ggml_mobe_cache_size(ffi.new("ggml_mobe_shape *", shape), 1)
        return total

    @classmethod
    def read(cls, path: Path) -> Model:
        file = read_model(path)
        n, layers = file.arch_key("expert_count"), file.arch_key("block_count")
        users: list[dict[str, np.ndarray]] = []
        sizes: list[dict[str, float]] = []
        for layer in range(layers):
            size = {p: _bytes_each(file, names.transform_name(layer, p)) for p in names.ALL_PROJECTIONS}
            user = {}
            for projection in names.PROJECTIONS:
                basis = file.tensors.get(names.basis_name(layer, projection))
                if basis is None:
                    continue
                mix = file.tensors[names.mix_name(layer, projection)]
                values = np.fromfile(mix.file, np.float32, n * basis.shape[0], offset=mix.offset)
                user[projection] = values.reshape(n, -1) != 0
                size["basis"], size["rank"] = basis.n_bytes / basis.shape[0], basis.shape[1]
            users.append(user)
            sizes.append(size)
        d = file.arch_key("embedding_length")
        return cls(path, n, file.arch_key("expert_used_count"), layers, d, users, sizes)

    def bytes_a_token(self, ids: np.ndarray, slots: int) -> float:
        """Mean bytes per token for the experts ``ids`` ``[layers, tokens, k]``, with a cache of ``slots`` (0: no
        cache)."""
        kept = ggml.type_info("q8_0").bits / 8
        total = 0.0
        for layer, tokens in enumerate(ids):
            sizes, users = self.sizes[layer], self.users[layer]
            total += tokens.size * sum(sizes[p] for p in names.ALL_PROJECTIONS)
            for used in users.values():
                for missed in cache.missed(tokens, slots):
                    total += used[missed].any(0).sum() * sizes["basis"]
                if slots:
                    total += tokens.size * sizes["rank"] * self.d * kept
        return total / ids.shape[1]


def _bytes_each(file, name: str) -> float:
    info = file.tensors[name]
    return info.n_bytes / info.shape[0]


@dataclass
class Run:
    """``ids`` [layers, tokens, k], if requested; ``asked`` and ``found``: numbers of matrices, from the log."""

    seconds: float
    asked: int = 0
    found: int = 0
    slots: int = 0
    ids: np.ndarray | None = None


@contextmanager
def logged() -> Iterator[list[str]]:
    """llama.cpp's log messages during the block."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(_level, text, _data) -> None:
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)


@dataclass
class Watch:
    """Collects ffn_moe_topk of each layer, token by token."""

    layers: int
    k: int
    ids: list[list[np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import llama_cpp

        self.ids = [[] for _ in range(self.layers)]
        lib = ctypes.CDLL(str(ggml_library()))
        lib.ggml_get_name.restype = ctypes.c_char_p
        lib.ggml_get_name.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2

        @llama_cpp.ggml_backend_sched_eval_callback
        def callback(tensor, ask, _data) -> bool:
            match = re.fullmatch(rb"ffn_moe_topk-(\d+)", lib.ggml_get_name(tensor))
            if match and not ask:
                row = np.empty(self.k, np.int32)
                lib.ggml_backend_tensor_get(tensor, row.ctypes.data, 0, row.nbytes)
                self.ids[int(match[1])].append(row)
            return bool(match) or not ask

        self.callback = callback


def ggml_library() -> Path:
    from mobe_gguf import runtime

    return runtime.lib_dir() / "libggml-base.so"


def feed(model: Model, tokens: np.ndarray, threads: int, budget: int = 0, watch: bool = False) -> Run:
    """Decode ``tokens`` one at a time, in windows, with ``budget`` bytes of cache."""
    import llama_cpp

    with logged() as lines:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
        params.n_threads = params.n_threads_batch = threads
        params.mobe_cache = budget
        watcher = Watch(model.layers, model.k) if watch else None
        if watcher:
            params.cb_eval = watcher.callback
        weights = llama_cpp.llama_model_load_from_file(
            str(model.path).encode(), llama_cpp.llama_model_default_params()
        )
        if not weights:
            raise MobeError(f"{model.path}: cannot be loaded: {''.join(lines)[-1000:]}")
        context = llama_cpp.llama_init_from_model(weights, params)
        if not context:
            raise MobeError(f"{model.path}: no context: {''.join(lines)[-1000:]}")
        one = (llama_cpp.llama_token * 1)()
        start = time.perf_counter()
        for at, token in enumerate(tokens):
            if at % WINDOW == 0:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            one[0] = int(token)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)):
                raise MobeError(f"{model.path}: token {at} could not be computed")
        run = Run(time.perf_counter() - start)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(weights)
    text = "".join(lines)
    if counts := re.search(r"(\d+) matrices asked for, (\d+) of them found", text):
        run.asked, run.found = int(counts[1]), int(counts[2])
    if size := re.search(r"MiB: (\d+) formed matrices for each", text):
        run.slots = int(size[1])
    if watcher:
        run.ids = np.array(watcher.ids)
    return run


def make(directory: Path, terms: int | None, steps: int) -> tuple[Model, Model]:
    """The shipped model in q4_k, plain and with ``terms`` mixing terms per expert (None: all)."""
    directory.mkdir(parents=True, exist_ok=True)
    source = resources.path("models") / demo.MODEL
    factors = directory / f"factors-{terms or BASES}-{steps}"
    if not factors.exists():  # else of an earlier run with the same settings
        options = Options(bases=BASES, steps=steps, seed=0, mix_terms=terms)
        jobs.run(jobs.prepare(source, factors, options, resume=True))
    made = []
    for folder, name in ((source, "plain"), (factors, factors.name)):
        path = directory / f"{name}.gguf"
        export(folder, path, Recipe(parse_quant("q4_k")), allow_dense=True, quiet=True)
        made.append(Model.read(path))
    return made[0], made[1]


def text_tokens(model: Model, count: int) -> np.ndarray:
    """The first ``count`` tokens of the held-out text."""
    import llama_cpp

    with logged():
        llm = llama_cpp.Llama(str(model.path), vocab_only=True, verbose=False)
        tokens = llm.tokenize(heldout().read_bytes(), add_bos=False)[:count]
        llm.close()
    if len(tokens) < count:
        raise MobeError(f"--tokens {count}: the held-out text has {len(tokens)}")
    return np.array(tokens, np.int32)


def check(model: Model, run: Run, ids: np.ndarray, slots: int) -> float:
    """The hit rate; MobeError unless the log's counts equal those of :func:`cache.misses`."""
    missed = sum(
        int(cache.misses(ids[layer], slots).sum()) * len(users) for layer, users in enumerate(model.users)
    )
    asked = sum(ids[layer].size * len(users) for layer, users in enumerate(model.users))
    if (run.slots, run.asked, run.found) != (slots, asked, asked - missed):
        raise MobeError(
            f"{model.path}, {slots} kept: the log counts {run.found} of {run.asked} in {run.slots} slots, "
            f"by the ids there should be {asked - missed} of {asked}"
        )
    return run.found / run.asked


def curve(tokens: np.ndarray, n: int) -> np.ndarray:
    """``[n]``: hit rate of caches of 1 to n slots for ``tokens`` [T, k]."""
    return np.array([1 - cache.misses(tokens, slots).sum() / tokens.size for slots in range(1, n + 1)])


def draw(path: Path, ids: np.ndarray, model: Model) -> None:
    """Plot the hit rate against the share of experts kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = np.arange(1, model.n + 1) / model.n
    each = [curve(layer, model.n) for layer in ids]
    for layer in each:
        axes.plot(shares, layer, color="tab:red", alpha=0.25, linewidth=0.8)
    label = f"shipped model on held-out text ({model.k} of {model.n} experts; thin: layers)"
    axes.plot(shares, np.mean(each, axis=0), color="tab:red", marker="o", markersize=3, label=label)
    rng = np.random.default_rng(0)
    dice = np.array([rng.choice(model.n, model.k, replace=False) for _ in range(len(ids[0]))])
    axes.plot(shares, curve(dice, model.n), color="gray", linestyle=":", label="the same by dice")
    n, k = 128, 8
    trace = cache.trace(n, k, 600)
    slots = np.array([4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128])
    found = [1 - cache.misses(trace, s)[200:].sum() / trace[200:].size for s in slots]
    axes.plot(slots / n, found, color="tab:blue", label=f"trace of bench/cache.py ({k} of {n})")
    points = cache.LOCALITY[:2]
    axes.plot(*zip(*points, strict=True), "D", color="tab:blue", label="published, large models")
    axes.set_xlabel("share of a layer's experts kept")
    axes.set_ylabel("matrices found")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="lower right", fontsize=8)
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=130)


def measure(options: argparse.Namespace, wanted: list[int | None]) -> tuple[Table, np.ndarray, Model]:
    """The table, and the ids and model of the first number of terms."""
    models = {terms: make(options.dir, terms, options.steps) for terms in wanted}
    plain = models[wanted[0]][0]
    tokens = text_tokens(plain, options.tokens)
    slots = [int(word) for word in options.slots.split(",")]
    runs: list[tuple[str, int, Model, Callable[[], Run], Speeds]] = []

    def contender(label: str, kept: int, model: Model) -> None:
        budget = kept * model.slot_bytes
        run = lambda: feed(model, tokens, options.threads, budget)  # noqa: E731
        runs.append((label, kept, model, run, Speeds()))

    contender("plain", 0, plain)
    ids = {}
    for terms, (_, model) in models.items():
        most = max(slots) or model.n
        ids[model.path] = feed(model, tokens, options.threads, most * model.slot_bytes, watch=True).ids
        for kept in slots:
            contender(str(terms or BASES), kept, model)
    last: dict[int, Run] = {}
    for turn in range(options.rounds):
        console.print(f"round {turn + 1} of {options.rounds}")
        for i, (*_, run, speeds) in enumerate(runs):
            last[i] = run()
            speeds.values.append(len(tokens) / last[i].seconds)
    table = Table(title=f"{demo.MODEL}, q4_k, {len(tokens)} tokens of text, {options.threads} threads")
    for column in ("terms", "kept", "of experts", "cache, MB", "found", "MB a token", "tokens/s", "of plain"):
        table.add_column(column, justify="right")
    baseline = runs[0][-1].median
    for i, (label, kept, model, _, speeds) in enumerate(runs):
        routed = ids.get(model.path, ids[runs[1][2].path])
        table.add_row(
            label, str(kept) if i else "-", f"{kept / model.n:.0%}" if kept else "-",
            f"{kept * model.slot_bytes / 1e6:.2f}" if kept else "-",
            f"{check(model, last[i], routed, kept):.1%}" if kept else "-",
            f"{model.bytes_a_token(routed, kept) / 1e6:.3f}", str(speeds), f"{speeds.median / baseline:.2f}",
        )  # fmt: skip
    first = models[wanted[0]][1]
    return table, ids[first.path], first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--terms", default="0,4,2", help="non-zero coefficients an expert; 0 for all")
    parser.add_argument("--slots", default="0,4,6,8,12,24", help="matrices kept of each projection")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="of the factorization")
    parser.add_argument("--dir", type=Path, default=Path("routing"), help="where the models are kept")
    parser.add_argument("--plot", type=Path, help="write the plot there (.png, .svg, .pdf)")
    options = parser.parse_args()
    if options.plot:
        plot.check(options.plot)
    table, ids, model = measure(options, [int(word) or None for word in options.terms.split(",")])
    Console(width=110 if not sys.stdout.isatty() else None).print(table)
    if options.plot:
        draw(options.plot, ids, model)


if __name__ == "__main__":
    run_program(main)
