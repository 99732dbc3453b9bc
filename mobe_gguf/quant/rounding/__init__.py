"""Rounding by second moments: chooses codes of ggml's types to minimize the error of outputs, not of weights.

    stored = TYPES["q3_k"].unpack(ggml.quantize(w, "q3_k", imatrix))      scales as libggml chooses them
    data = TYPES["q3_k"].pack(stored)                                     the same bytes

- ``rounder``: the entry point, from values and moments to bytes.
- ``forms``: codes and scales of a type, in one form for all types without codebooks.
- ``grid``: the values of codes under fixed scales, and the search for the nearest one.
- ``legacy``, ``ternary``, ``kquants``: the types' byte layouts.
- ``engine`` (``native``: the same in C; ``reference``: without blocks) and ``scales``: choose codes and scales by
  ``tr(D S D^T)``, where S are the second moments of the inputs.
- ``codebook*``: all of this for the types with codebooks.

A new type is a subclass of :class:`forms.Type` with ``unpack`` and ``pack``, registered by :func:`forms.register`.
"""

from mobe_gguf.quant.rounding import kquants, legacy, ternary  # noqa: F401, they register their types
from mobe_gguf.quant.rounding.forms import TYPES, Stored, Type

__all__ = ["TYPES", "Stored", "Type"]
