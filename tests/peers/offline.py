"""A pytest plugin for llama-cpp-python's own tests: what has to download a model is skipped, by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

_NONE = SimpleNamespace(params={})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        asked = [*item.fixturenames, *getattr(item, "callspec", _NONE).params.values()]
        if any(str(name).endswith("_model_path") for name in asked):
            item.add_marker(pytest.mark.skip(reason="downloads a model"))
