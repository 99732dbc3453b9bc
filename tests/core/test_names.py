"""``mobe_gguf/core/names.py`` and the C side say the same."""

from __future__ import annotations

import re

import pytest

from mobe_gguf.core import names, resources

HEADER = resources.path("native") / "ggml_mobe" / "ggml-mobe.h"


@pytest.fixture(scope="module")
def header() -> str:
    return HEADER.read_text(encoding="utf-8")


def test_version(header: str):
    found = dict(re.findall(r"^#define GGML_(MOBE_VERSION\w*) +(\d+) ", header, re.MULTILINE))
    assert found == {n: str(v) for n, v in vars(names).items() if n.startswith("MOBE_VERSION")}


def test_keys(header: str):
    """Every ``key_*`` of names.py is a GGML_MOBE_KEY_* of the header, and the other way round."""
    in_c = dict(re.findall(r'^#define GGML_MOBE_KEY_(\w+) +"(.*)"$', header, re.MULTILINE))
    in_python = {
        name.removeprefix("key_").upper(): function("%s")
        for name, function in vars(names).items()
        if name.startswith("key_")
    }
    assert in_c == in_python and in_python


def test_activations(header: str):
    """Same order, same numbers; the words themselves are in ggml-mobe.c."""
    in_enum = re.findall(r"^ +GGML_MOBE_ACTIVATION_(\w+) = (\d+),$", header, re.MULTILINE)
    assert in_enum == [(name.upper(), str(i)) for i, name in enumerate(names.ACTIVATIONS)]
    source = HEADER.with_name("ggml-mobe.c").read_text(encoding="utf-8")
    table = re.search(r"MOBE_ACTIVATION_NAME\[[^]]*\] = \{(.*?)\};", source, re.DOTALL)
    assert table, "ggml-mobe.c has no table MOBE_ACTIVATION_NAME"
    words = re.findall(r'"(\w+)"', table[1])
    assert words == list(names.ACTIVATIONS)


@pytest.mark.parametrize("projection", names.ALL_PROJECTIONS)
def test_tensors(projection: str):
    """llama.cpp gets the bases' names from a patch, and the mix's suffix from llama-mobe.cpp."""
    patches = "\n".join(
        p.read_text(encoding="utf-8") for p in sorted(resources.path("patches").glob("*.patch"))
    )
    stem = re.search(
        rf'^\+ +\{{ LLM_TENSOR_FFN_{projection.upper()}_BASIS, +"([^"]+)" \}},$', patches, re.MULTILINE
    )
    assert stem, f"no patch names LLM_TENSOR_FFN_{projection.upper()}_BASIS"
    assert names.basis_name(7, projection) == stem[1] % 7 + ".weight"
    assert names.mix_name(7, projection) == stem[1] % 7 + ".mix"
    loader = HEADER.with_name("llama-mobe.cpp").read_text(encoding="utf-8")
    assert 'name(kind, "weight", tn.bid)' in loader and 'name(kind, "mix", tn.bid)' in loader
