"""docs/parts.md is of the llama.cpp that is installed, and the product's own tables say what it says."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from parity import gguf_files

from mobe_gguf import runtime
from mobe_gguf.formats import types
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.quant.mixture import ModelFacts, Spec
from mobe_gguf.quant.recipe import (
    BLOCK,
    ENCODER_NEEDS,
    FALLBACK,
    FLOATS,
    NEED_IMATRIX,
    Recipe,
    fitting_type,
    parse_override,
    plan,
)
from mobe_gguf.runtime import ggml, source

pytestmark = pytest.mark.usefixtures("built")

#: Types whose encoders prepare tables for seconds: their errors are left to ``python docs/parts.py``.
SLOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")


@pytest.fixture(scope="module")
def built() -> None:
    if not runtime.is_built() or not list(source.cache_dir().glob("*/src/vendor/llama.cpp")):
        pytest.skip("no runtime with its source: run mobe-gguf build")


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "docs" / "parts.py")))


def test_the_page_is_of_this_tree(parts: SimpleNamespace) -> None:
    on_page = {name: [*cells[:3], *cells[6:]] for name, cells in parts.on_page().items()}
    assert on_page == parts.facts(parts.tree()), "stale: run python docs/parts.py"


def test_errors_are_as_on_the_page(parts: SimpleNamespace) -> None:
    """On fewer rows, and by whatever instructions this processor has: a tenth, and the two digits that are printed."""
    page = parts.on_page()
    for name in page.keys() - set(SLOW):
        for deviation, said in zip(parts.DEVIATIONS, page[name][3:6], strict=True):
            assert parts.error(name, deviation, 32) == pytest.approx(float(said), rel=0.15), (name, deviation)


def test_tables_of_the_product(parts: SimpleNamespace) -> None:
    root = parts.tree()
    assert parts.fallbacks(root) == FALLBACK
    assert set(parts.need_imatrix(root)) == set(NEED_IMATRIX)
    assert {t.name for t in ggml.types().values() if t.requires_imatrix} == set(ENCODER_NEEDS)
    # nvfp4 is left out: libggml's encoder gives it no scale of the tensor
    assert set(BLOCK) == {t.name for t in ggml.types().values() if t.encodes} - {"nvfp4"}
    assert all(types.BY_NAME[name].block == block for name, block in BLOCK.items())


def short_rows(path: Path, row: int) -> Path:
    """A model whose down experts, one tensor a layer, have rows of so many values."""
    file = gguf_files.qwen3moe()
    for name in [name for name in file.tensors if "_exps" in name]:
        n, p, d = file.tensors[name].shape
        p, d = (p, row) if "_down_" in name else (row, d)
        file.tensors[name] = np.zeros((n, p, d), np.float32)
    file.keys["qwen3moe.expert_feed_forward_length"] = row
    return file.write(path)


@pytest.mark.parametrize("row", [96, 48])
def test_short_rows_as_llama_quantize_treats_them(row: int, tmp_path: Path) -> None:
    """The tool itself, of each type: what it takes instead is what ``fit`` takes, and where it stops there is no fallback."""
    path = short_rows(tmp_path / "short.gguf", row)
    for name in BLOCK.keys() - set(FLOATS) | {"nvfp4"}:
        options = ["--dry-run", "--tensor-type", f"ffn_down_exps={name}"]
        command = [runtime.tool("llama-quantize"), *options, path, "Q8_0", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if name not in FALLBACK and types.BY_NAME[name].block > 32:
            assert name in ("q1_0", "nvfp4") and done.returncode != 0
            assert "no tensor type fallback is defined" in said, said[-500:]
            continue
        assert done.returncode == 0, said[-500:]
        found = re.search(r"\] blk\.0\.ffn_down_exps\.weight .*\((\w+)\)$", said, re.MULTILINE)
        assert found and found[1].lower() == fitting_type(name, row), (name, row, found and found[0])


@pytest.mark.parametrize("pure", [False, True])
def test_the_first_pattern_that_is_found_counts(pure: bool, tmp_path: Path) -> None:
    """In llama-quantize as in ``plan``, whatever comes later and however much more it says."""
    path = gguf_files.qwen3moe().write(tmp_path / "model.gguf")
    patterns = ["ffn_(gate|up)_exps=q5_0", "blk.0.ffn_(gate|down)_exps=q8_0", "blk.1=q4_1", "attn=q5_1"]
    options = [*(word for p in patterns for word in ("--tensor-type", p)), *["--pure"][:pure]]
    command = [runtime.tool("llama-quantize"), "--dry-run", *options, path, "Q4_0", "1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    theirs = {name: (new or old).lower() for name, old, new in _types(said.stdout + said.stderr)}
    file = read_gguf(path)
    specs = [Spec(info.name, info.shape) for info in file.tensors.values()]
    recipe = Recipe("q4_0", overrides=tuple(map(parse_override, patterns)), pure=pure)
    ours = {
        name: choice.type for name, choice in plan(specs, recipe, ModelFacts.of(file.arch, file.keys)).items()
    }
    assert ours == theirs
    assert ours["blk.0.ffn_gate_exps.weight"] == "q5_0" and ours["blk.1.attn_q.weight"] == "q4_1"


def test_where_export_obeys_a_pattern_and_llama_quantize_does_not(tmp_path: Path) -> None:
    """f16 and bf16; and the tool lowers the pattern's case, which makes another class of ``\\D``."""
    path = gguf_files.qwen3moe().write(tmp_path / "model.gguf")
    file = read_gguf(path)
    specs = [Spec(info.name, info.shape) for info in file.tensors.values()]
    facts, gate = ModelFacts.of(file.arch, file.keys), "blk.0.ffn_gate_exps.weight"
    for quant, pattern, theirs in (
        ("f16", "gate_exps=q8_0", "f16"),
        ("q4_0", r"gate\Dexps=q8_0", "q4_0"),
    ):
        command = [
            runtime.tool("llama-quantize"),
            "--dry-run",
            "--tensor-type",
            pattern,
            path,
            quant.upper(),
            "1",
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        found = {name: (new or old).lower() for name, old, new in _types(said.stdout + said.stderr)}
        recipe = Recipe(quant, overrides=(parse_override(pattern),))
        assert (found[gate], plan(specs, recipe, facts)[gate].type) == (theirs, "q8_0")


def _types(said: str) -> list[tuple[str, str, str]]:
    """Name, type and new type of every tensor in what ``llama-quantize --dry-run`` prints."""
    return re.findall(r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$", said, re.MULTILINE)
