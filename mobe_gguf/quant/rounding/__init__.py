"""Rounding by second moments: codes of ggml's types chosen by what an error costs, not by what it measures.

    stored = TYPES["q3_k"].unpack(ggml.quantize(w, "q3_k", imatrix))      scales as libggml chooses them
    data = TYPES["q3_k"].pack(stored)                                     the same bytes

``forms``: what a type stores, codes and scales apart, the same for all types; ``grid``: what codes stand for while the scales
are held, and which of them is nearest.  ``legacy``, ``ternary``, ``kquants`` and ``codebook*`` know the types' bytes, a family
a module.  ``gptq`` and ``descent`` choose codes and scales by ``tr(D S D^T)``, S the second moments of the inputs.

A new type is a subclass of :class:`forms.Type` with ``unpack`` and ``pack``, registered by :func:`forms.register`.
"""

from mobe_gguf.quant.rounding import kquants, legacy, ternary  # noqa: F401, they register their types
from mobe_gguf.quant.rounding.forms import TYPES, Stored, Type

__all__ = ["TYPES", "Stored", "Type"]
