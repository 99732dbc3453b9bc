"""The rules on rotary embeddings used in ``config_tables``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.judgement import Config, Judge, Judgement


def rope_of(config: Config, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rotary parameters from either spelling: ``rope_parameters`` of transformers 5, or ``rope_theta`` and
    ``rope_scaling``, which counts if both are there (``modeling_rope_utils.py``); ``default`` if there is none."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    said = config.get(key) or default or {}
    if not isinstance(said, Mapping):
        raise MobeError(f"config.json: '{key}' must be an object, got {said!r}")
    rope = dict(said)
    rope.setdefault("rope_type", rope.get("type") or "default")
    return rope


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """``1 + 0.1 scale ln(factor)``, YaRN's correction of attention."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """The factor by which transformers multiplies cosines and sines (``modeling_rope_utils.py``)."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _magnitude(factor, rope["mscale"]) / _magnitude(factor, rope["mscale_all_dim"])
    return _magnitude(factor)


def rotary(
    *kinds: str,
    latent: bool = False,
    divided: bool = False,
    partial_too: bool = False,
    ramp: bool = False,
    default: Mapping[str, Any] | None = None,
) -> Judge:
    """Rotary scaling: no scaling and the ``kinds`` can be carried.  ``latent``: DeepSeek's graph, which also scales all of
    attention.  ``divided``: that of V3.2, see :func:`_scale_attention`.  ``partial_too``: the file says how many dimensions are
    rotated.  ``ramp``: YaRN's ramp may begin and end between dimensions, where the runtime rounds to whole ones.  ``default``: what
    the class takes if config.json says nothing."""

    def judge(config: Config, judgement: Judgement) -> None:
        rope = rope_of(config, default)
        kind, partial = (
            rope["rope_type"],
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor")),
        )
        if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
            judgement.refuse(
                "rope_parameters", dict(rope), f"has one for all layers, none for {nested[0]} alone"
            )
            return
        if partial not in (None, 1, 1.0) and not partial_too:
            judgement.refuse("partial_rotary_factor", partial, "rotates all dimensions")
        if kind == "dynamic":
            judgement.notes.append(
                "config.json: rope scaling 'dynamic' begins beyond max_position_embeddings, the file's context length; llama.cpp "
                "has none there"
            )
            return
        if kind not in ("default", *kinds):
            judgement.refuse("rope_type", kind, f"knows {', '.join(kinds) or 'no scaling'} in this family")
            return
        if rope.get("truncate") is False and kind == "yarn":
            if ramp:
                judgement.notes.append(
                    "config.json: 'truncate' is False; llama.cpp rounds the range of YaRN's ramp to whole dimensions, which changes some "
                    "rotary frequencies a little"
                )
                judgement.alike["rope_parameters"] = rope | {"truncate": True}
            else:
                judgement.refuse("truncate", False, "rounds the range of YaRN's ramp to whole dimensions")
        factor = rope.get("factor")
        if kind in ("linear", "yarn"):
            if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
                judgement.refuse("factor", factor, f"needs a number from 1 on for rope_type '{kind}'")
            elif factor > 1:
                _scale_attention(rope, float(factor), kind, latent, judgement, divided)

    return judge


def _scale_attention(
    rope: Mapping[str, Any], factor: float, kind: str, latent: bool, judgement: Judgement, divided: bool
) -> None:
    """Set keys so that the runtime scales rotated dimensions and attention as transformers does.

    ``llama-context.cpp`` multiplies rotated dimensions by ``attn_factor (1 + 0.1 ln factor)``.  With a yarn_log_multiplier L
    (``src/models/deepseek2.cpp``) it multiplies them by ``attn_factor``, and all of attention by
    ``(attn_factor (1 + L ln factor))^2``.  In ``divided`` graphs (``src/models/deepseek32.cpp``), rotated dimensions are
    multiplied by ``attn_factor (1 + 0.1 ln factor) / (1 + L ln factor)``, and all of attention by
    ``(attn_factor (1 + 0.1 ln factor))^2``: the special case of deepseek2 in ``llama-context.cpp`` is not theirs.
    """
    rotated = _yarn_magnitude(rope, factor) if kind == "yarn" else 1.0
    whole = _magnitude(factor)
    if not latent:
        if kind == "yarn" and not math.isclose(rotated, whole, rel_tol=1e-7):
            judgement.keys["rope.scaling.attn_factor"] = rotated / whole
        return
    attention = _magnitude(factor, rope["mscale_all_dim"]) if rope.get("mscale_all_dim") else 1.0
    multiplier = (attention / (rotated if kind == "yarn" else whole) - 1) / math.log(factor)
    attn_factor = rotated
    if kind == "yarn" and abs(multiplier) < 1e-9:  # L of 0: the runtime's other branch
        multiplier, attn_factor = 0.0, rotated / whole
    elif kind == "yarn" and divided:
        attn_factor = attention / whole
    judgement.keys["rope.scaling.yarn_log_multiplier"] = multiplier
    if not math.isclose(attn_factor, 1.0, rel_tol=1e-7):
        judgement.keys["rope.scaling.attn_factor"] = attn_factor
