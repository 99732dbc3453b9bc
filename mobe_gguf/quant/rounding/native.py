"""Kernels from ``native/rounding/*.c``, compiled on first use and kept beside the runtime's build.

Without a compiler :func:`library` is None, and torch does the same, an order of magnitude slower.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cffi
import torch

from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding.grid import Levels
from mobe_gguf.quant.rounding.scales import Scales
from mobe_gguf.runtime.compile import processor
from mobe_gguf.runtime.source import cache_dir

_DECLARATIONS = """
    struct rounding_levels { const float * ladder; const uint8_t * order; const float * units; int32_t n; int32_t even; };
    struct rounding_sweep {
        int64_t rows, columns; int64_t group, block;
        const float * s; int64_t lds; float * g; float * q; int64_t ld; uint8_t * codes; int64_t ldc;
        float * d, * dmin; int64_t ldd; uint8_t * k, * m; int64_t ldk;
        const float * multipliers, * minima; int32_t n_multipliers, n_minima; int32_t solve;
        struct rounding_levels levels;
    };
    struct rounding_feedback {
        int64_t rows, columns, group; const float * l; int64_t ldl; const float * w; float * error; int64_t ld;
        float * left; int64_t ldleft; uint8_t * codes; int64_t ldc; const float * scale, * offset; int64_t lds;
        struct rounding_levels levels;
    };
    int64_t rounding_sweep(const struct rounding_sweep * a);
    void rounding_feedback(const struct rounding_feedback * a);
    struct codebook_span {
        int64_t rows; int32_t span, width, entries, signs, levels, reach, flips;
        const float * h, * inverse, * grid, * factors, * b, * d; int64_t * level, * index; float * sign, * unit;
        int64_t ldb, ldd, ldlevel, ldindex, ldsign, ldunit;
    };
    int32_t codebook_span(const struct codebook_span * a);
"""

#: Sums may be reordered, nothing else: ``-ffast-math`` would flush denormal numbers in the whole process.
_FLAGS = (
    "-O3 -march=native -std=gnu11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
).split()

#: Set to 0, everything is done in torch.
VARIABLE = "MOBE_GGUF_NATIVE_ROUNDING"

#: Rows that are worth a thread.
_ROWS = 16


@cache
def library() -> tuple[cffi.FFI, Any] | None:
    """The compiled kernels, or None where there is no compiler (or VARIABLE says so)."""
    named = os.environ.get("CC", "").split()[:1]
    found: list[str | None] = [*named] if named else [shutil.which(name) for name in ("cc", "gcc", "clang")]
    compiler = next((name for name in found if name), None)
    if os.environ.get(VARIABLE) == "0" or compiler is None:
        return None
    sources = sorted((resources.path("native") / "rounding").glob("*.c"))
    texts = [source.read_bytes() for source in sources]
    key = hashlib.sha256(
        b"\0".join([*texts, " ".join([compiler, *_FLAGS, processor()]).encode()])
    ).hexdigest()
    path = cache_dir() / f"rounding-{key[:12]}.so"
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    try:
        if not path.is_file():
            _compile(compiler, sources, path)
        return ffi, ffi.dlopen(str(path))
    except (OSError, subprocess.CalledProcessError, MobeError):
        return None


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".rounding-") as directory:
        made = Path(directory) / path.name
        command = [compiler, *_FLAGS, "-o", str(made), *map(str, sources), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(made, path)


@dataclass
class Kernels:
    """The kernels for one grid of levels and its scales; what they are given is float32 on the CPU, rows contiguous."""

    ffi: cffi.FFI
    lib: Any
    grid: Levels
    threads: int

    @classmethod
    def of(cls, grid: object, like: torch.Tensor) -> Kernels | None:
        """None where torch has to do it: other devices or types, codebooks, no compiler."""
        fits = isinstance(grid, Levels) and like.device.type == "cpu" and like.dtype == torch.float32
        if not fits or (found := library()) is None:
            return None
        assert isinstance(grid, Levels)
        return cls(*found, grid, torch.get_num_threads())

    def pointer(self, x: torch.Tensor | None, kind: str = "float *") -> Any:
        return self.ffi.NULL if x is None else self.ffi.cast(kind, x.data_ptr())

    def _levels(self) -> dict[str, Any]:
        grid = self.grid
        order, units = grid.order.to(torch.uint8), grid.levels.contiguous()
        self._kept = order, units  # alive while the kernel runs
        return {
            "ladder": self.pointer(grid.ladder),
            "order": self.pointer(order, "uint8_t *"),
            "units": self.pointer(units),
            "n": len(grid.ladder),
            "even": int(grid.even),
        }

    def _run(
        self, name: str, rows: int, arguments: dict[str, Any], strides: dict[str, tuple[str, int]]
    ) -> int:
        """Call kernel ``name`` on runs of rows, a thread each: of ``strides``, arrays with a row each, every one gets its part."""
        step = max(_ROWS, -(-rows // self.threads))
        function = getattr(self.lib, name)

        def part(first: int) -> int:
            given = dict(arguments, rows=min(step, rows - first))
            for field, (kind, stride) in strides.items():
                if given[field] != self.ffi.NULL:
                    given[field] = self.ffi.cast(kind, given[field]) + first * stride
            return function(self.ffi.new(f"struct {name} *", given)) or 0

        firsts = range(0, rows, step)
        if len(firsts) == 1:
            return part(0)
        with ThreadPoolExecutor(len(firsts)) as pool:
            return sum(pool.map(part, firsts))

    def sweep(
        self,
        e: int,
        outer: slice,
        s: torch.Tensor,
        gradient: torch.Tensor,
        values: torch.Tensor,
        codes: torch.Tensor,
        scales: Scales,
        solve: bool,
    ) -> int:
        """Columns ``outer`` of matrix ``e``: ``values``, ``codes`` and ``scales`` are changed in place, and ``gradient`` ``[rows, columns]`` of
        these columns alone."""
        one, start = scales.type, outer.start
        columns = outer.stop - start
        p, ld = values.shape[1:]
        arguments = {
            "columns": columns,
            "group": one.group,
            "block": one.block,
            "s": self.pointer(s[e, start:, start:]),
            "lds": s.shape[-1],
            "g": self.pointer(gradient),
            "q": self.pointer(values[e, :, outer]),
            "ld": ld,
            "codes": self.pointer(codes[e, :, start:], "uint8_t *"),
            "ldc": codes.shape[-1],
            "solve": int(solve),
            "multipliers": self.pointer(scales.multipliers),
            "minima": self.pointer(scales.minima),
            "n_multipliers": 0 if scales.multipliers is None else len(scales.multipliers),
            "n_minima": 0 if scales.minima is None else len(scales.minima),
            "levels": self._levels(),
        }
        strides = {"g": ("float *", ld), "q": ("float *", ld), "codes": ("uint8_t *", codes.shape[-1])}
        for names, kind, per in ((("d", "dmin"), "float *", one.block), (("k", "m"), "uint8_t *", one.group)):
            for name in names:
                x = getattr(scales, name)
                width = 0 if x is None else x.shape[-1]
                arguments[name] = self.pointer(None if x is None else x[e, :, start // per :], kind)
                strides[name] = (kind, width)
                if width:
                    arguments["ldd" if per == one.block and name[0] == "d" else "ldk"] = width
        return self._run("rounding_sweep", p, arguments, strides)

    def feedback(
        self,
        e: int,
        outer: slice,
        lower: torch.Tensor,
        w: torch.Tensor,
        error: torch.Tensor,
        left: torch.Tensor,
        codes: torch.Tensor,
    ) -> None:
        """Columns ``outer`` of matrix ``e``: sets ``codes`` and ``error``; ``left`` ``[rows, columns]`` is used up."""
        start, grid = outer.start, self.grid
        p, n = w.shape[1:]
        groups = grid.scale.shape[-1]
        offset = None if grid.offset is None else grid.offset[e, :, start // grid.group :]
        arguments = {
            "columns": outer.stop - start,
            "group": grid.group,
            "l": self.pointer(lower[e, start:, start:]),
            "ldl": n,
            "w": self.pointer(w[e, :, start:]),
            "error": self.pointer(error[e, :, start:]),
            "ld": n,
            "left": self.pointer(left),
            "ldleft": left.shape[-1],
            "codes": self.pointer(codes[e, :, start:], "uint8_t *"),
            "ldc": codes.shape[-1],
            "scale": self.pointer(grid.scale[e, :, start // grid.group :]),
            "offset": self.pointer(offset),
            "lds": groups,
            "levels": self._levels(),
        }
        strides = {
            "w": ("float *", n),
            "error": ("float *", n),
            "left": ("float *", left.shape[-1]),
            "codes": ("uint8_t *", codes.shape[-1]),
            "scale": ("float *", groups),
            "offset": ("float *", groups),
        }
        self._run("rounding_feedback", p, arguments, strides)
