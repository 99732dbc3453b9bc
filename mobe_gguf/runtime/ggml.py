"""ggml's tensor types, encoders and decoders: calls to the installed ``libggml-base`` through cffi.

gguf-py encodes only the simplest types, the library all of them.  The table of types here also comes from the library.
Names are ggml's own in lower case: ``f32``, ``q8_0``, ``q4_k``, ``iq3_s``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import cffi
import numpy as np

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError

#: From ``ggml/include/ggml.h``.  ``_load`` checks the struct that the library fills against the library's functions.
_DECLARATIONS = """
    struct ggml_type_traits {
        const char * type_name;
        int64_t      blck_size;
        int64_t      blck_size_interleave;
        size_t       type_size;
        _Bool        is_quantized;
        void      (* to_float)(const void * x, float * y, int64_t k);
        void      (* from_float_ref)(const float * x, void * y, int64_t k);
    };
    const struct ggml_type_traits * ggml_get_type_traits(int type);
    const char * ggml_type_name(int type);
    int64_t      ggml_blck_size(int type);
    size_t       ggml_type_size(int type);
    size_t       ggml_row_size(int type, int64_t ne);
    _Bool        ggml_is_quantized(int type);
    _Bool        ggml_quantize_requires_imatrix(int type);
    void         ggml_quantize_init(int type);
    size_t       ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows,
                                     int64_t n_per_row, const float * imatrix);
    _Bool        ggml_validate_row_data(int type, const void * data, size_t nbytes);
"""

#: Largest float16, the format of block scales.
_LARGEST = float(np.finfo(np.float16).max)

#: Values that a thread encodes or decodes at a time.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class TypeInfo:
    """One tensor type: a row of n values takes ``n / block * bytes`` bytes.

    ``encodes`` and ``decodes`` say whether ``quantize`` and ``dequantize`` support it.  They do not support integers,
    nor types that exist only between two kernels (q8_1, q8_k).
    """

    name: str
    id: int
    block: int
    bytes: int
    quantized: bool
    requires_imatrix: bool
    encodes: bool
    decodes: bool

    @property
    def bits(self) -> float:
        """Bits per value."""
        return 8 * self.bytes / self.block

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` values.  Raises ``MobeError`` unless it consists of whole blocks."""
        if n <= 0 or n % self.block:
            raise MobeError(
                f"type {self.name} holds values in blocks of {self.block}, and a row of {n} is not a whole "
                "number of them"
            )
        return n // self.block * self.bytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of ``shape``, whose last axis is the row.  Raises ``MobeError`` as :meth:`row_bytes`."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


@cache
def _load() -> tuple[cffi.FFI, Any, dict[str, TypeInfo]]:
    """Open the library and ask it for its types."""
    header = runtime.source_tree() / "ggml" / "include" / "ggml.h"
    count = re.search(r"\bGGML_TYPE_COUNT\s*=\s*(\d+)", header.read_text(encoding="utf-8"))
    if count is None:
        raise MobeError(f"{header} does not say how many types there are: run mobe-gguf build --force")
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    lib = ffi.dlopen(str(runtime.lib_dir() / "libggml-base.so"))
    found = {}
    for number in range(int(count[1])):
        traits = lib.ggml_get_type_traits(number)
        said = (lib.ggml_blck_size(number), lib.ggml_type_size(number), lib.ggml_is_quantized(number))
        if said != (traits.blck_size, traits.type_size, traits.is_quantized):
            raise AssertionError("struct ggml_type_traits in ggml.h is no longer as declared in ggml.py")
        if traits.blck_size == 0:  # the number of a type that was removed
            continue
        name = ffi.string(lib.ggml_type_name(number)).decode().lower()
        # f32 alone needs no decoder; the encoder takes all types that have one
        floating = name == "f32" or traits.to_float != ffi.NULL
        found[name] = TypeInfo(
            name=name,
            id=number,
            block=traits.blck_size,
            bytes=traits.type_size,
            quantized=traits.is_quantized,
            requires_imatrix=lib.ggml_quantize_requires_imatrix(number),
            encodes=floating,
            decodes=floating,
        )
    return ffi, lib, found


def types() -> dict[str, TypeInfo]:
    """Every type that the installed library knows, by name."""
    return dict(_load()[2])


def type_info(name: str) -> TypeInfo:
    """The type called ``name``, in upper or lower case.  Raises ``MobeError``, which lists the known types."""
    known = _load()[2]
    if name.lower() not in known:
        names = ", ".join(sorted(n for n, info in known.items() if info.encodes))
        raise MobeError(f"unknown tensor type {name!r}; the runtime knows {names}")
    return known[name.lower()]


def quantize(
    array: np.ndarray,
    type: str,
    imatrix: np.ndarray | None = None,
    *,
    name: str = "array",
    threads: int | None = None,
) -> np.ndarray:
    """Encode float32 ``array`` [..., n] as ``type``: uint8 [..., row_bytes(n)].

    ``imatrix``: float32 [n], the importance of each column, the same for all rows.  Give unseen columns a small value:
    most types encode a block as zeros if all its columns have importance zero.  ``threads``: how many threads share the
    rows (default: all cores); the number does not change the result.

    Raises ``MobeError``, which calls the array ``name``, for a type that cannot be encoded or needs an imatrix, for rows
    that are not whole blocks, and for values that are not finite or, in a type with float16 scales, above 65504.
    """
    ffi, lib, _ = _load()
    info = type_info(type)
    _check_array(array, np.float32, "array")
    if not info.encodes:
        raise MobeError(f"{name}: type {info.name} cannot be encoded")
    n = array.shape[-1]
    row_bytes = _row_bytes(info, n, name)
    weights = ffi.NULL
    if imatrix is not None:
        imatrix = _check_imatrix(imatrix, n, name)
        weights = ffi.from_buffer("float[]", imatrix)
    elif info.requires_imatrix:
        raise MobeError(f"{name}: type {info.name} needs an importance matrix: give one with --imatrix FILE")

    rows = array.reshape(-1, n)
    out = np.empty((len(rows), row_bytes), np.uint8)
    lib.ggml_quantize_init(info.id)

    def encode(first: int, last: int) -> None:
        part = np.ascontiguousarray(rows[first:last])
        check_values(part, info.name, name, first)
        source, target = ffi.from_buffer("float[]", part), ffi.from_buffer(out[first:last])
        written = lib.ggml_quantize_chunk(info.id, source, target, 0, last - first, n, weights)
        if written != (last - first) * row_bytes:
            raise MobeError(
                f"{name}: libggml wrote {written} bytes of {info.name}, expected {(last - first) * row_bytes}"
            )

    _in_parallel(encode, len(rows), n, threads)
    return out.reshape(*array.shape[:-1], row_bytes)


def dequantize(data: np.ndarray, type: str, n: int, *, threads: int | None = None) -> np.ndarray:
    """Decode uint8 ``data`` [..., row_bytes(n)], rows of ``n`` values of ``type``: float32 [..., n].

    Raises ``MobeError`` for a type that cannot be decoded, or for rows of another size.
    """
    ffi, _, _ = _load()
    info = type_info(type)
    _check_array(data, np.uint8, "data")
    if not info.decodes:
        raise MobeError(f"type {info.name} cannot be decoded")
    row_bytes = info.row_bytes(n)
    if data.shape[-1] != row_bytes:
        raise MobeError(
            f"a row of {n} values of type {info.name} takes {row_bytes} bytes, got {data.shape[-1]}"
        )
    rows = data.reshape(-1, row_bytes)
    if info.name == "f32":
        return np.ascontiguousarray(rows).view(np.float32).reshape(*data.shape[:-1], n).copy()
    out = np.empty((len(rows), n), np.float32)
    to_float = _load()[1].ggml_get_type_traits(info.id).to_float

    def decode(first: int, last: int) -> None:
        part = np.ascontiguousarray(rows[first:last])
        to_float(ffi.from_buffer(part), ffi.from_buffer("float[]", out[first:last]), (last - first) * n)

    _in_parallel(decode, len(rows), n, threads)
    return out.reshape(*data.shape[:-1], n)


def is_valid(data: np.ndarray, type: str) -> bool:
    """Whether uint8 ``data``, whole blocks of ``type``, decode to finite values only.

    The library reports on stderr what it found.
    """
    ffi, lib, _ = _load()
    info = type_info(type)
    _check_array(data, np.uint8, "data")
    if data.size % info.bytes:
        raise MobeError(
            f"type {info.name} has blocks of {info.bytes} bytes, and {data.size} are not whole ones"
        )
    data = np.ascontiguousarray(data)
    return bool(lib.ggml_validate_row_data(info.id, ffi.from_buffer(data), data.nbytes))


def _in_parallel(work: Callable[[int, int], None], rows: int, n: int, threads: int | None) -> None:
    """Call ``work(first, last)`` over runs of rows; cffi releases the GIL while C is at work."""
    step = max(1, _CHUNK // n)
    spans = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    threads = min(threads or len(os.sched_getaffinity(0)), len(spans))
    if threads <= 1:
        for span in spans:
            work(*span)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(work, *span) for span in spans]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_array(array: np.ndarray, dtype: Any, what: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim == 0:
        raise TypeError(f"{what} must be a numpy array of {np.dtype(dtype)} with at least one dimension")


def _row_bytes(info: TypeInfo, n: int, name: str) -> int:
    try:
        return info.row_bytes(n)
    except MobeError as error:
        raise MobeError(f"{name}: {error.message}") from None


def _check_imatrix(imatrix: np.ndarray, n: int, name: str) -> np.ndarray:
    if imatrix.shape != (n,):
        raise MobeError(
            f"{name}: expected an importance matrix of {n} values, one a column, got {imatrix.shape}"
        )
    imatrix = np.ascontiguousarray(imatrix, np.float32)
    if not (np.isfinite(imatrix).all() and (imatrix >= 0).all() and imatrix.any()):
        raise MobeError(f"{name}: an importance matrix must be finite, not negative, and not all zero")
    return imatrix


def check_values(rows: np.ndarray, type: str, name: str, first: int = 0) -> None:
    """MobeError unless all values of float32 ``rows`` ``[r, n]`` can be encoded as ``type``: finite and, in a type with
    float16 scales, at most 65504.  The message calls the tensor ``name``; ``first`` is the number of the first row.

    Call this before every encoder.  For most types libggml encodes NaN as valid blocks of finite values; for some it
    aborts the process.
    """
    limit = np.inf if type in ("f32", "bf16") else _LARGEST
    largest = max(rows.max(), -rows.min())  # NaN if any value is: then both are NaN
    if largest <= limit and np.isfinite(largest):
        return
    wrong = ~(np.abs(rows) <= limit) | ~np.isfinite(rows)
    row, column = np.argwhere(wrong)[0]
    value = rows[row, column]
    why = "not finite" if not np.isfinite(value) else f"too large for type {type} (at most {limit:g})"
    raise MobeError(f"{name}: value {value:g} at row {first + row}, column {column} is {why}")
