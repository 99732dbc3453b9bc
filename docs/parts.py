"""The table of types in docs/parts.md: out of the installed library, and out of the source that it was compiled from.

    python docs/parts.py            writes the table into docs/parts.md (about a minute: i-quants search their codes)
    python docs/parts.py --types    prints the rows of mobe_gguf/formats/types.py

Needs a runtime (``mobe-gguf build``) and its source in the cache.  ``tests/test_parts.py`` fails when the page is stale: a newer
llama.cpp has other types, fallbacks or products.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import ggml, source

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parts.md"
BEGIN, END = "<!-- types: made by docs/parts.py, do not edit -->", "<!-- end of types -->"

#: Standard deviations of the Gaussian rows that errors are measured on.
DEVIATIONS = (1.0, 5e-4, 1e-4)
COLUMNS = 1024

HEADER = (
    "type",
    "number",
    "block",
    "bits",
    "error",
    "at 5e-4",
    "at 1e-4",
    "imatrix",
    "short rows",
    "x86, one token",
    "x86, prompt",
    "NEON",
    "CUDA",
)


def tree() -> Path:
    """``llama.cpp`` of the source that was unpacked for a build; MobeError if there is none."""
    found = sorted(source.cache_dir().glob("*/src/vendor/llama.cpp"))
    if not found:
        raise MobeError("no llama.cpp source in the cache: run mobe-gguf build")
    return next((path for path in found if "-stock-" not in str(path)), found[0])


def body(text: str, signature: str) -> str:
    """The function whose definition begins with ``signature``, to the brace that closes it.  ValueError if it is not there."""
    begin = text.index(signature)
    return text[begin : text.index("\n}", begin)]


def named(text: str) -> list[str]:
    return [name.lower() for name in re.findall(r"\bcase GGML_TYPE_(\w+):", text)]


def fallbacks(root: Path) -> dict[str, str]:
    """``tensor_type_fallback``: type -> type for rows that its blocks do not divide."""
    text = body(
        (root / "src/llama-quant.cpp").read_text(encoding="utf-8"), "static ggml_type tensor_type_fallback("
    )
    found, waiting = {}, []
    for case, result in re.findall(r"case GGML_TYPE_(\w+):|return_type = GGML_TYPE_(\w+)", text):
        if case:
            waiting.append(case.lower())
        elif waiting:
            found |= dict.fromkeys(waiting, result.lower())
            waiting = []
    return found


def need_imatrix(root: Path) -> list[str]:
    """``tensor_requires_imatrix``: types that llama-quantize refuses without one, whatever the mixture."""
    text = body(
        (root / "src/llama-quant.cpp").read_text(encoding="utf-8"), "static bool tensor_requires_imatrix("
    )
    return named(text[: text.index("return true")].partition("switch")[2])


def repacked(root: Path) -> dict[str, dict[str, str]]:
    """``ggml_repack_get_optimal_repack_type``: type -> {"x86" or "neon": what the processor must have}."""
    text = (root / "ggml/src/ggml-cpu/repack.cpp").read_text(encoding="utf-8")
    text = body(text, "static const ggml::cpu::tensor_traits * ggml_repack_get_optimal_repack_type(")
    found: dict[str, dict[str, str]] = {}
    parts = re.split(r"if \(cur->type == GGML_TYPE_(\w+)\)", text)[1:]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        kinds = found.setdefault(name.lower(), {})
        for condition in re.findall(r"if \((.*ggml_cpu_has.*)\) \{", part):
            if m := re.search(r"has_(avx2|avx512)\b", condition):
                kinds["x86"] = {"avx2": "AVX2", "avx512": "AVX-512"}[m[1]]
            elif "has_neon" in condition:  # the last asks for least
                kinds["neon"] = "dotprod" if "dotprod" in condition else "i8mm"
    # of a patch of this project; native/ggml_mobe/mobe-rows16.c says on which processors
    for name in named(text.partition("if (mobe_rows16_takes(")[2].partition("\n    }")[0]):
        found.setdefault(name, {})["x86"] = {"tq1_0": "AVX-512 VBMI"}.get(name, "AVX2")
    return found


def products(root: Path) -> dict[str, tuple[str, str, str, str]]:
    """Type -> how a stack of experts is multiplied (``mul_mat_id``): x86 for a token, for a prompt; NEON; CUDA."""
    cpu = root / "ggml/src/ggml-cpu"
    traits = (cpu / "ggml-cpu.c").read_text(encoding="utf-8")
    rows = re.findall(r"\[GGML_TYPE_(\w+)\] = \{(.*?)\n    \}", traits, re.DOTALL)
    dots = {
        n.lower(): m[1] for n, text in rows if (m := re.search(r"\.vec_dot += .*?(ggml_vec_dot_\w+)", text))
    }
    sections = (cpu / "arch-fallback.h").read_text(encoding="utf-8").split("\n#elif ")
    plain = {
        kind: next(s for s in sections if s.startswith(f"defined({macro})"))
        for kind, macro in (("x86", "__x86_64__"), ("neon", "__aarch64__"))
    }
    tiled_text = (cpu / "tiled/tiled.cpp").read_text(encoding="utf-8")
    # each is defined twice; the last is for processors that have tiles
    tiled, packed_too = (
        [
            name.lower()
            for name in re.findall(r"GGML_TYPE_(\w+)", body(tiled_text[tiled_text.rindex(head) :], head))
        ]
        for head in ("static bool ggml_tiled_supported(", "static bool ggml_tiled_repacked_supported(")
    )
    packed, cuda = repacked(root), _cuda(root)
    found = {}
    for name, dot in dots.items():
        own = {
            k: "plain C" if f"#define {dot}_generic {dot}\n" in f"{text}\n" else "own"
            for k, text in plain.items()
        }
        for kind, what in packed.get(name, {}).items():
            own[kind] = f"repacked ({what})"
        prompt = own["x86"]
        if name in packed_too:  # by a patch of this project
            prompt = "tiled"
        elif name in tiled:  # what is repacked does not come there
            prompt = "tiled" if prompt == "own" else f"{prompt}, else tiled"
        found[name] = (own["x86"], prompt, own["neon"], cuda.get(name, "none"))
    return found


def _cuda(root: Path) -> dict[str, str]:
    """Types of which the CUDA backend multiplies stacks: "own" in both of its products, or what it does instead."""
    folder = root / "ggml/src/ggml-cuda"
    text = (folder / "ggml-cuda.cu").read_text(encoding="utf-8")
    text = text[text.index("static bool ggml_backend_cuda_device_supports_op(") :]
    text = text[text.index("case GGML_OP_MUL_MAT_ID:") :]
    supported = named(text[: text.index("return true", text.index("switch (a->type)"))])
    vectors = named(
        (folder / "mmvq.cu")
        .read_text(encoding="utf-8")
        .partition("get_vec_dot_q_cuda")[2]
        .partition("default:")[0]
    )
    matrices = named(body((folder / "mmq.cu").read_text(encoding="utf-8"), "bool ggml_cuda_should_use_mmq("))
    found = {}
    for name in supported:
        if name in ("f32", "f16", "bf16") or {name} <= {*vectors} & {*matrices}:
            found[name] = "own"
        elif name in vectors:
            found[name] = "one token; prompts decoded"
    return found


def error(name: str, deviation: float, rows: int) -> float:
    """Relative squared error of a type on Gaussian rows of that standard deviation; all columns weigh alike."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32) * np.float32(deviation)
    weights = np.ones(COLUMNS, np.float32) if ggml.type_info(name).requires_imatrix else None
    y = ggml.dequantize(ggml.quantize(x, name, weights), name, COLUMNS).astype(np.float64)
    return float(np.square(y - x).sum() / np.square(x.astype(np.float64)).sum())


def facts(root: Path) -> dict[str, list[str]]:
    """Type -> cells of its row, without the errors."""
    short, needs, multiplied = fallbacks(root), need_imatrix(root), products(root)
    found = {}
    for name, info in ggml.types().items():
        if not info.encodes or name == "f32":
            continue
        imatrix = "encoder" if info.requires_imatrix else "yes" if name in needs else ""
        instead = short.get(name, "" if info.block == 1 else "f16" if info.block <= 32 else "stops")
        found[name] = [str(info.id), str(info.block), f"{info.bits:.4g}", imatrix, instead, *multiplied[name]]
    return dict(sorted(found.items(), key=lambda item: ggml.type_info(item[0]).bits))


def table(rows: int = 256) -> Iterator[str]:
    """The table, line by line."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---|" + "--:|" * 6 + "---|" * 6
    for name, cells in facts(tree()).items():
        errors = [f"{error(name, deviation, rows):.2g}" for deviation in DEVIATIONS]
        yield f"| `{name}` | {' | '.join([*cells[:3], *errors, *cells[3:]])} |"


def on_page() -> dict[str, list[str]]:
    """Type -> cells of its row, as the page has them."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if "`" in line]
    return {row[0].strip("`"): row[1:] for row in rows}


def main() -> None:
    if "--types" in sys.argv[1:]:
        for t in ggml.types().values():
            print(f'    TensorType("{t.name}", {t.id}, {t.block}, {t.bytes}),')
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([f"{before}{BEGIN}", "", *table(), "", f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
