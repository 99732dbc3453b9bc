"""Types of the values in config.json: those that transformers' class of the model declares.

Checked before anything reads them, so a text in place of a number is named, not what trips over it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mobe_gguf.core.errors import MobeError

Config = Mapping[str, Any]

#: Of rotary embeddings, whose values no class declares.
ROPE_NUMBERS = (
    "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor", "alpha",
)  # fmt: skip


def check_types(model_type: str, config: Config, where: Any) -> None:
    """MobeError names the first value whose type is not its key's.  ``config``: config.json as it is; ``model_type``: whose
    class declares the types.  If transformers has no such class, only what all classes have is checked.
    """
    config = {key: _decoded(value) for key, value in config.items()}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        _check_common(part, where)
    try:
        from huggingface_hub.errors import StrictDataclassFieldValidationError
        from transformers import CONFIG_MAPPING
    except ImportError:
        return
    if model_type not in CONFIG_MAPPING:
        return
    kind = CONFIG_MAPPING[model_type]
    for field in dataclasses.fields(kind):
        value = config.get(field.name)
        if isinstance(value, bool) and "bool" not in str(field.type):
            raise MobeError(f"{where}/config.json: '{field.name}' is {value}, expected {_name(field.type)}")
    try:
        kind(**_widened(kind, config))
    except StrictDataclassFieldValidationError as e:
        said = str(e).partition("Error: Field ")[2].partition(". Errors:")[0]
        raise MobeError(f"{where}/config.json: {said or e}") from e
    except Exception:  # noqa: BLE001, what a class says beyond types is judged elsewhere
        return


def _check_common(config: Config, where: Any) -> None:
    """What no class checks: rotary embeddings, and numbers that are none."""
    for key in ("rope_scaling", "rope_parameters"):
        check_rope(key, config.get(key), where)
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MobeError(f"{where}/config.json: '{key}' is {value}, expected a finite number")
    if not isinstance(config.get("is_causal", True), bool):  # any class reads it, none declares it
        raise MobeError(
            f"{where}/config.json: 'is_causal' is {config['is_causal']!r}, expected true or false"
        )


def check_rope(key: str, value: Any, where: Any) -> None:
    """MobeError unless ``value`` is an object of numbers and texts."""
    said = f"{where}/config.json: '{key}'"
    if not isinstance(value, Mapping | None):
        raise MobeError(f"{said} must be an object, got {value!r}")
    for name, number in (value or {}).items():
        if name not in ROPE_NUMBERS or number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise MobeError(f"{said}: '{name}' must be a number that is not negative, got {number!r}")


def _decoded(value: Any) -> Any:
    """``value`` with floats in place of transformers' spelling of those that JSON lacks, ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(entry) for key, entry in value.items()}
    return value


def _name(kind: Any) -> str:
    """``int``, ``float | None``."""
    return str(kind.__name__ if isinstance(kind, type) else kind)


def _widened(kind: Any, config: Config) -> dict[str, Any]:
    """``config`` with floats where it has whole numbers for them, as 1 for 1.0, which other readers take."""
    floats = {f.name for f in dataclasses.fields(kind) if isinstance(f.default, float)}
    parts = getattr(kind, "sub_configs", {})
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in floats and type(value) is int:
            value = float(value)
        elif key in parts and isinstance(value, Mapping) and dataclasses.is_dataclass(parts[key]):
            value = _widened(parts[key], value)
        values[key] = value
    values.pop("quantization_config", None)
    return values
