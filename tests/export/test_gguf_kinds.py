"""GGUF files that differ from the usual: a value for each layer in a key, experts without a gate, experts narrower than d."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from parity.gguf_files import EXPERTS, FF_EXP, HEAD_DIM, LAYERS, D, GgufFile, qwen3moe, uniform

from mobe_gguf import runtime
from mobe_gguf.calibrate.gguf_model import GgufCheckpoint
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import Recipe, export
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.gguf import Array, read_gguf
from mobe_gguf.quant.mixture import ModelFacts
from mobe_gguf.quant.recipe import Spec, plan

#: Width of experts that are fed less than the hidden size.
NARROW = 32

#: Widths of the experts by layer.
WIDTHS = [48, 96]


def factorize(model: Path, out: Path, **options: Any) -> Path:
    return run(prepare(model, out, Options(bases=2, steps=2, **options)), quiet=True).out


def logits(path: Path) -> np.ndarray:
    from llama_cpp import Llama

    options = dict(n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    with closing(Llama(str(path), **options)) as llama:
        llama.eval([5, 6, 7, 100, 11])
        return llama.scores[:5].copy()


def with_arrays() -> GgufFile:
    """One head of keys for four of queries, said once a layer: more bits for v in some mixtures."""
    file = qwen3moe()
    file.keys["qwen3moe.attention.head_count"] = [4] * LAYERS
    file.keys["qwen3moe.attention.head_count_kv"] = [1] * LAYERS
    for layer in range(LAYERS):
        for name in ("k", "v"):
            file.tensors[f"blk.{layer}.attn_{name}.weight"] = uniform(77 + layer, HEAD_DIM, D, std=0.1)
    return file


def by_layer() -> GgufFile:
    """Nemotron-3-Puzzle's form: a recurrent layer, attention, then experts whose width and use differ by layer, without gates."""
    arch, n_inner, n_state, n_heads = "nemotron_h_moe", 64, 16, 4
    file = GgufFile(arch)
    old = qwen3moe()
    file.keys = {k: v for k, v in old.keys.items() if k.startswith(("general.", "tokenizer."))}
    file.keys |= {
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": D,
        f"{arch}.block_count": 4,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": [0, 2, 0, 0],
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_epsilon": 1e-6,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.feed_forward_length": [0, 0, *WIDTHS],
        f"{arch}.expert_feed_forward_length": [0, 0, *WIDTHS],
        f"{arch}.expert_count": EXPERTS,
        f"{arch}.expert_used_count": [0, 0, 2, 3],
        f"{arch}.expert_shared_count": 1,
        f"{arch}.expert_shared_feed_forward_length": 32,
        f"{arch}.expert_weights_scale": 1.0,
        f"{arch}.ssm.conv_kernel": 4,
        f"{arch}.ssm.inner_size": n_inner,
        f"{arch}.ssm.state_size": n_state,
        f"{arch}.ssm.time_step_rank": n_heads,
        f"{arch}.ssm.group_count": 1,
    }
    conv = n_inner + 2 * n_state
    shapes: dict[str, tuple[int, ...]] = {
        "blk.0.ssm_in.weight": (n_inner + conv + n_heads, D),
        "blk.0.ssm_conv1d.weight": (conv, 4),
        "blk.0.ssm_conv1d.bias": (conv,),
        "blk.0.ssm_dt.bias": (n_heads,),
        "blk.0.ssm_a": (n_heads, 1),
        "blk.0.ssm_d": (n_heads, 1),
        "blk.0.ssm_norm.weight": (1, n_inner),
        "blk.0.ssm_out.weight": (D, n_inner),
    }
    for i, p in enumerate(WIDTHS, 2):
        shapes |= {
            f"blk.{i}.ffn_gate_inp.weight": (EXPERTS, D),
            f"blk.{i}.exp_probs_b.bias": (EXPERTS,),
            f"blk.{i}.ffn_up_exps.weight": (EXPERTS, p, D),
            f"blk.{i}.ffn_down_exps.weight": (EXPERTS, D, p),
            f"blk.{i}.ffn_up_shexp.weight": (32, D),
            f"blk.{i}.ffn_down_shexp.weight": (D, 32),
        }
    for i in range(4):
        file.tensors[f"blk.{i}.attn_norm.weight"] = 1 + uniform(900 + i, D, std=0.1)
    for seed, (name, shape) in enumerate(shapes.items(), 600):
        file.tensors[name] = uniform(seed, *shape, std=max(shape[-1], 16) ** -0.5)
    file.tensors["blk.0.ssm_a"] = -np.abs(file.tensors["blk.0.ssm_a"]) - 0.1
    file.tensors |= {
        name: old.tensors[name] for name in ("token_embd.weight", "output.weight", "output_norm.weight")
    }
    for name in ("q", "k", "v", "output"):
        file.tensors[f"blk.1.attn_{name}.weight"] = old.tensors[f"blk.1.attn_{name}.weight"]
    return file


def without_gates() -> GgufFile:
    file = qwen3moe()
    for layer in range(LAYERS):
        del file.tensors[f"blk.{layer}.ffn_gate_exps.weight"]
    return file


def narrow() -> GgufFile:
    file = without_gates()
    for layer in range(LAYERS):
        file.tensors[f"blk.{layer}.ffn_up_exps.weight"] = uniform(layer, EXPERTS, FF_EXP, NARROW, std=0.1)
        file.tensors[f"blk.{layer}.ffn_down_exps.weight"] = uniform(layer, EXPERTS, NARROW, FF_EXP, std=0.1)
    return file


def test_a_value_for_each_layer(tmp_path: Path) -> None:
    """Factorized, exported and run."""
    source = with_arrays().write(tmp_path / "m.gguf")
    assert np.isfinite(logits(source)).all()
    factors = factorize(source, tmp_path / "factors")
    export(factors, tmp_path / "o.gguf", Recipe("q4_k_m", overrides=(("attn_v", "q8_0"),)), quiet=True)
    assert read_gguf(tmp_path / "o.gguf").keys["qwen3moe.attention.head_count_kv"] == Array(2, (1, 1))
    assert np.isfinite(logits(tmp_path / "o.gguf")).all()


@pytest.mark.parametrize("quant", ["q2_k", "iq4_nl", "q4_k_m"])
def test_types_of_such_a_file_are_those_of_llama_quantize(quant: str, tmp_path: Path) -> None:
    file = read_gguf(with_arrays().write(tmp_path / "m.gguf"))
    command = [runtime.tool("llama-quantize"), "--dry-run", file.path, quant.upper()]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = re.findall(
        r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$", said.stdout + said.stderr, re.M
    )
    specs = [Spec(info.name, info.shape) for info in file.tensors.values()]
    choices = plan(specs, Recipe(quant), ModelFacts.of(file.arch, file.keys))
    assert {n: c.type for n, c in choices.items()} == {n: (b or a).lower() for n, a, b in lines}


@pytest.mark.parametrize("projections", ["up", "up,down"])
def test_layers_of_different_widths(projections: str, tmp_path: Path) -> None:
    """Looked at, factorized with the same options as any file, exported with A solved for again, and run."""
    source, factors, out = (tmp_path / name for name in ("m.gguf", "factors", "o.gguf"))
    by_layer().write(source)
    for command in (
        ["inspect", source],
        ["verify", source],
        ["factorize", source, factors, "--target", "0.8", "--steps", "2", "--projections", projections, "-q"],
        ["export", factors, out, "--quant", "q8_0", "-q"],
        ["verify", out],
        ["inspect", out],
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, (command, done.output)
    assert "p 48 to 96" in done.stdout
    assert np.isfinite(logits(source)).all() and np.isfinite(logits(out)).all()
    plan = CliRunner().invoke(
        main, ["factorize", str(source), str(tmp_path / "x"), "--projections", "up", "--dry-run", "--json"]
    )
    assert json.loads(plan.stdout)["plan"]["projected_before"] == EXPERTS * D * sum(WIDTHS)


def test_bases_that_span_all_give_the_same_answers(tmp_path: Path) -> None:
    """Of each layer by its own width."""
    source = by_layer().write(tmp_path / "m.gguf")
    factors = factorize(source, tmp_path / "f", rank=D, activation="none", projections=("up",))
    export(factors, tmp_path / "o.gguf", Recipe("f32"), quiet=True)
    plain, made = logits(source), logits(tmp_path / "o.gguf")
    assert np.square(plain - made).sum() < 1e-6 * np.square(plain).sum()


def test_methods_that_know_one_width(tmp_path: Path) -> None:
    source = by_layer().write(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"48 to 96; choose layers of one width with --layers"):
        prepare(source, tmp_path / "f", Options(method="svd", projections=("up",)))
    file = qwen3moe()
    for name, shape in (("gate", (96, D)), ("up", (96, D)), ("down", (D, 96))):
        file.tensors[f"blk.1.ffn_{name}_exps.weight"] = uniform(5, EXPERTS, *shape)
    with pytest.raises(MobeError, match=r"experts of 48 to 96 rows"):
        GgufCheckpoint(file.write(tmp_path / "q.gguf")).check_whole()


@pytest.mark.parametrize("kind", [tuple, list, lambda values: Array(len(values), tuple(values))])
def test_the_first_layer_counts(kind: Callable[[list[int]], Any]) -> None:
    """Of the file and of the converter, as in llama.cpp's ``n_gqa()``; a layer without attention has 0 heads of keys."""
    keys = {"x.attention.head_count": 8, "x.attention.head_count_kv": kind([2, 1]), "x.block_count": 2}
    assert ModelFacts.of("x", keys) == ModelFacts(n_layer=2, n_expert=0, n_gqa=4)
    keys["x.attention.head_count_kv"] = kind([0, 2])
    assert ModelFacts.of("x", keys).n_gqa == 0


@pytest.mark.parametrize("value", ["2", ["a", "b"], -1, True, 2.0])
def test_heads_that_are_no_number(value: Any, tmp_path: Path) -> None:
    file = qwen3moe()
    file.keys["qwen3moe.attention.head_count_kv"] = value
    factors = factorize(file.write(tmp_path / "m.gguf"), tmp_path / "factors")
    words = r"key qwen3moe\.attention\.head_count_kv is .*, expected a whole number"
    with pytest.raises(MobeError, match=words):
        export(factors, tmp_path / "o.gguf", Recipe("q4_k_m"), quiet=True)


def test_groups_of_experts_that_are_no_number(tmp_path: Path) -> None:
    file = qwen3moe()
    file.keys["qwen3moe.expert_group_count"] = "2"
    factors = factorize(file.write(tmp_path / "m.gguf"), tmp_path / "factors")
    with pytest.raises(MobeError, match=r"key qwen3moe\.expert_group_count is '2', expected a whole number"):
        export(factors, tmp_path / "o.gguf", Recipe("q8_0"), experts_used=1, quiet=True)


@pytest.mark.parametrize("make", [without_gates, narrow])
def test_experts_without_a_gate_and_narrow_ones_are_no_problem(
    make: Callable[[], GgufFile], tmp_path: Path
) -> None:
    """Plain and factorized: ``inspect`` and ``verify`` find them whole, and show their sizes."""
    source = make().write(tmp_path / "m.gguf")
    factors = factorize(source, tmp_path / "factors", projections=("up",))
    export(factors, tmp_path / "o.gguf", Recipe("f32"), quiet=True)
    factors = factorize(source, tmp_path / "all", projections=("up", "down"))
    export(factors, tmp_path / "a.gguf", Recipe("f32"), quiet=True)
    for path in (source, tmp_path / "o.gguf", tmp_path / "a.gguf"):
        for command in ("inspect", "verify"):
            result = CliRunner().invoke(main, [command, str(path)])
            assert result.exit_code == 0, (path, command, result.output)
    assert describe(source).layers[0].gate.type == "-"
    assert describe(tmp_path / "a.gguf").layers[1].up.m == 2


def test_what_contradicts_narrow_experts(tmp_path: Path) -> None:
    """Their width is that of down, not whatever the bases have."""
    export(
        factorize(narrow().write(tmp_path / "m.gguf"), tmp_path / "f", projections=("up",)),
        tmp_path / "o.gguf",
        Recipe("f32"),
        quiet=True,
    )
    before = read_gguf(tmp_path / "o.gguf")
    name = b"blk.0.ffn_up_basis.weight"
    content = bytearray((tmp_path / "o.gguf").read_bytes())
    at = content.index(name) + len(name) + 4
    rank = before.tensors[name.decode()].shape[1]
    content[at : at + 16] = (16).to_bytes(8, "little") + (2 * rank).to_bytes(8, "little")
    (tmp_path / "o.gguf").write_bytes(content)
    problems = describe(tmp_path / "o.gguf").problems
    assert f"tensor {name.decode()} has shape [2, {2 * rank}, 16], expected [m, r, {NARROW}]" in problems


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Of the file to be written and of its imatrix: refused before any work, for keys and the card name them."""
    factors = factorize(qwen3moe().write(tmp_path / "m.gguf"), tmp_path / "factors")
    strange = str(tmp_path / "b\udcff.gguf")
    with pytest.raises(UsageError, match="not UTF-8"):
        export(factors, strange, Recipe("q8_0"), quiet=True)
    with pytest.raises(UsageError, match="not UTF-8"):
        export(factors, tmp_path / "o.gguf", Recipe("q8_0", imatrix=(strange,)), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors", "m.gguf"]


def test_the_original_may_have_such_a_name(tmp_path: Path) -> None:
    source = qwen3moe()
    del source.keys["general.name"]
    factors = factorize(source.write(tmp_path / "b\udcff.gguf"), tmp_path / "factors")
    export(factors, tmp_path / "o.gguf", Recipe("q8_0"), card=True, quiet=True)
    assert "# b\ufffd-MoBE\n" in (tmp_path / "README.md").read_text()
