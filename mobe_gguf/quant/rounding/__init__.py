"""Rounding by second moments: codes of ggml's types chosen by what an error costs, not by what it measures.

    stored = TYPES["q3_k"].unpack(ggml.quantize(w, "q3_k", imatrix))      scales as libggml chooses them
    data = TYPES["q3_k"].pack(stored)                                     the same bytes

``rounder``: the door, values and moments to bytes.  ``forms``: what a type stores, codes and scales apart, the same for all types but those
with codebooks; ``grid``: what codes stand for while the scales are held, and which of them is nearest.  ``legacy``, ``ternary`` and
``kquants`` know the types' bytes.  ``engine`` (``native`` the same in C, ``reference`` without blocks) and ``scales`` choose codes and scales
by ``tr(D S D^T)``, S the second moments of the inputs.  ``codebook*``: all of it for the types with codebooks.

A new type is a subclass of :class:`forms.Type` with ``unpack`` and ``pack``, registered by :func:`forms.register`.
"""

from mobe_gguf.quant.rounding import kquants, legacy, ternary  # noqa: F401, they register their types
from mobe_gguf.quant.rounding.forms import TYPES, Stored, Type

__all__ = ["TYPES", "Stored", "Type"]
