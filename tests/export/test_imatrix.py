"""Importance matrices: read as llama-quantize reads them, and used for what they fit; the files by the real tool."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from export.handmade import make_mobe
from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.export.imatrix import Imatrix, of_prediction
from mobe_gguf.export.report import importance_lines
from mobe_gguf.export.source import Tensor, Whole
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.formats.imatrix import ImatrixFile, Statistics
from mobe_gguf.quant.recipe import ALIASES, QUANTS, ModelFacts, Spec, plan

#: Rows of whole blocks of 256, so that every type fits; A is as wide as the input, so that no size gives it away.
SIZES = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4, num_hidden_layers=2)
TOKENS, USED = 4 * 32, 2
FACTORIZED = dict(
    plain={},
    grouped=dict(m=4, g=2),
    by_row=dict(by_row=True),
    partly=dict(layers=(1,), projections=("up",)),
    down=dict(m=4, g=2, projections=ALL_PROJECTIONS),
    # which goes by ggml's own products, but not while somebody collects
    linear=dict(m=3, activation="none", projections=ALL_PROJECTIONS),
)


def run(tool: str, *options: Any) -> None:
    done = subprocess.run([runtime.tool(tool), *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def collect(model: Path, out: Path) -> Path:
    text = out.with_suffix(".txt")
    text.write_text(tiny.TEXT * 8)
    run("llama-imatrix", "-m", model, "-f", text, "-c", 32, "-b", 32, "--chunks", 4, "-t", 1, "-o", out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imatrix")


@pytest.fixture(scope="module")
def source(model: Callable[..., Path]) -> Path:
    return model("qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def original(source: Path, folder: Path) -> Path:
    """An importance matrix of the ordinary model; the model in f32 lies beside it as ``dense.gguf``."""
    export(source, folder / "dense.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    return collect(folder / "dense.gguf", folder / "original.gguf")


@pytest.fixture(scope="module")
def factorized(source: Path, folder: Path) -> Callable[[str], tuple[Path, Path, Path]]:
    """``factorized(key of FACTORIZED)``: a MoBE checkpoint, its f32 GGUF, its importance matrix."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path, Path]:
        if kind not in made:
            checkpoint = make_mobe(source, folder / kind, **({"m": 2, "r": 256} | FACTORIZED[kind]))
            export(checkpoint, folder / f"{kind}.gguf", Recipe("f32"), quiet=True)
            imatrix = collect(folder / f"{kind}.gguf", folder / f"{kind}-imatrix.gguf")
            made[kind] = (checkpoint, folder / f"{kind}.gguf", imatrix)
        return made[kind]

    return get


def entries(path: Path) -> dict[str, Statistics]:
    file = ImatrixFile(str(path))
    found = {name: file.entry(name) for name in file.names}
    return {name: entry for name, entry in found.items() if entry is not None}


def tensor(path: Path, name: str) -> np.ndarray:
    info = read_gguf(path).tensors[name]
    assert info.type == "f32"
    return np.fromfile(path, np.float32, info.n_bytes // 4, offset=info.offset).reshape(info.shape)


def same_files(ours: Path, theirs: Path) -> None:
    """All keys and all tensors, byte by byte."""
    a, b = read_gguf(ours), read_gguf(theirs)
    assert a.keys == b.keys
    for name, info in a.tensors.items():
        other = b.tensors[name]
        assert info.type == other.type, name
        data = np.fromfile(ours, np.uint8, info.n_bytes, offset=info.offset)
        want = np.fromfile(theirs, np.uint8, info.n_bytes, offset=other.offset)
        np.testing.assert_array_equal(data, want, err_msg=name)


def changed_by(imatrix: Path, path: Path, source: Path, recipe: Recipe) -> set[str]:
    """Tensors that come out otherwise with the importance matrix than without."""
    with_it, without_it = path.with_name("with.gguf"), path.with_name("without.gguf")
    export(source, with_it, replace(recipe, imatrix=(str(imatrix),)), refit=False, quiet=True)
    export(source, without_it, recipe, refit=False, quiet=True)
    a, b = read_gguf(with_it), read_gguf(without_it)
    return {
        name
        for name, info in a.tensors.items()
        if not np.array_equal(
            np.fromfile(with_it, np.uint8, info.n_bytes, offset=info.offset),
            np.fromfile(without_it, np.uint8, info.n_bytes, offset=b.tensors[name].offset),
        )
    }


@pytest.mark.parametrize("quant", ["q4_k", "q4_0", "iq3_xs", "iq2_m", "q2_k_s"])
def test_bytes_are_those_of_llama_quantize(quant: str, source: Path, original: Path, tmp_path: Path) -> None:
    """An ordinary model: keys and tensors, each expert by its own weights."""
    dense = original.with_name("dense.gguf")
    run("llama-quantize", "--imatrix", original, dense, tmp_path / "theirs.gguf", quant.upper(), 1)
    recipe = Recipe(parse_quant(quant), imatrix=(str(original),))
    export(source, tmp_path / "ours.gguf", recipe, allow_dense=True, quiet=True)
    same_files(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    keys = read_gguf(tmp_path / "ours.gguf").keys
    assert keys["quantize.imatrix.chunks_count"] == 4
    assert keys["quantize.imatrix.entries_count"] == len(entries(original))


@pytest.mark.parametrize("kind", FACTORIZED)
@pytest.mark.parametrize("quant", ["iq3_xxs", "q4_k"])
def test_bytes_of_a_mobe_model(quant: str, kind: str, factorized: Any, tmp_path: Path) -> None:
    checkpoint, plain, imatrix = factorized(kind)
    run("llama-quantize", "--imatrix", imatrix, plain, tmp_path / "theirs.gguf", quant.upper(), 1)
    recipe = Recipe(parse_quant(quant), imatrix=(str(imatrix),))
    report = export(checkpoint, tmp_path / "ours.gguf", recipe, refit=False, quiet=True)
    same_files(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    said = importance_lines(report.entries)
    assert said[-1] == "importance not known, all columns alike: embeddings", said
    down = "" if "down" in FACTORIZED[kind].get("projections", ()) else ", down"
    assert len(said) == 2 and said[0].startswith(f"importance from {imatrix.name}: A, B{down}")


def test_rules_that_ask_for_an_imatrix(model: Callable[..., Path], original: Path, tmp_path: Path) -> None:
    """Every value of --quant: the types that llama-quantize gives when there is one."""
    sizes = dict(num_hidden_layers=9, moe_intermediate_size=256, n_routed_experts=2, n_group=1, topk_group=1)
    plain = tmp_path / "f32.gguf"
    source = model("deepseek_v3", hidden_size=256, kv_lora_rank=256, **sizes)
    report = export(source, plain, Recipe("f32"), allow_dense=True, quiet=True)
    specs, file = [Spec(e.name, e.shape) for e in report.entries], read_gguf(plain)
    for quant in {*QUANTS, *ALIASES} - {"q1_0"}:
        command = [runtime.tool("llama-quantize"), "--dry-run", "--imatrix", original, plain, quant.upper()]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        lines = re.findall(
            r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$", said.stdout + said.stderr, re.M
        )
        recipe = Recipe(parse_quant(quant), imatrix=(str(original),))
        choices = plan(specs, recipe, ModelFacts.of(file.arch, file.keys))
        expected = {name: (new or old).lower() for name, old, new in lines}
        assert {name: c.type for name, c in choices.items()} == expected, quant


@pytest.mark.parametrize("kind", FACTORIZED)
def test_what_the_patched_tool_collects(kind: str, factorized: Any, original: Path) -> None:
    """Shapes and counts; what the mix is filed with is what the experts were given; the bases' sums follow from it."""
    _, plain, imatrix = factorized(kind)
    found, dense, file = entries(imatrix), entries(original), read_gguf(plain)
    names = [name for name in file.tensors if name.endswith(".mix")]
    assert names and {n for n in found if n.endswith(".mix")} == set(names)
    for name in names:
        mix, layer = tensor(plain, name).astype(np.float64), name.split(".ffn_")[0]
        basis, experts = name.replace(".mix", ".weight"), name.replace("_basis.mix", "_exps.weight")
        m, _, d = file.tensors[basis].shape  # of down d is its rank: what A makes is what the bases are given
        n, _, width = file.tensors[experts].shape
        inputs = found[name]
        assert inputs.sums.shape == (n, d) and found[basis].sums.shape == (m, d)
        assert found[experts].sums.shape == (n, width)
        # each token went to USED experts, and each of these got the token's input
        assert inputs.counts.sum() == USED * TOKENS and (found[basis].counts == TOKENS).all()
        np.testing.assert_array_equal(found[experts].counts, inputs.counts)
        if "_down_" not in name:
            energy = found[f"{layer}.ffn_gate_inp.weight"].sums[0].astype(np.float64)
            np.testing.assert_allclose(inputs.sums.sum(0, dtype=np.float64), USED * energy, rtol=1e-4)
        # A multiplies z, which some basis made: it is zero for an expert exactly if that saw nothing
        np.testing.assert_array_equal(found[experts].sums.any(1), inputs.counts[:, 0] > 0)
        squares = np.square(mix).reshape(n, -1, 1) if mix.ndim == 2 else np.square(mix).mean(-1)[..., None]
        groups = m // squares.shape[1]
        want = (squares[:, :, :] * inputs.sums[:, None, :]).reshape(groups, n // groups, -1, d).sum(1)
        np.testing.assert_allclose(found[basis].sums, want.reshape(m, d), rtol=1e-4)
        if layer == "blk.0" and "_down_" not in name:  # before the first experts both models are the same
            np.testing.assert_array_equal(inputs.counts, dense[experts].counts)
            np.testing.assert_allclose(inputs.sums, dense[experts].sums, rtol=1e-4)


@pytest.mark.parametrize("kind", FACTORIZED)
def test_bases_by_the_original_models_file(kind: str, factorized: Any, original: Path) -> None:
    """In the first layer both models' inputs are the same, so what the mix makes of one is what is in the other's."""
    _, plain, imatrix = factorized(kind)
    file = read_gguf(plain)
    tensors = {
        name: Tensor(name, Whole(torch.from_numpy(tensor(plain, name))))
        for name in file.tensors
        if "_basis." in name or "_exps." in name
    }
    for name in (name for name in tensors if name.endswith("_basis.weight") and "_down_" not in name):
        theirs, ours = (Imatrix([path]).find(tensors, name) for path in (imatrix, original))
        assert theirs is not None and ours is not None and "by the mix" in ours.origin
        a, b = theirs.read(), ours.read()
        assert a.shape == b.shape == (file.tensors[name].shape[0], 256) and b.dtype == np.float32
        if name.startswith("blk.0."):  # counted by token there, by token and expert here
            np.testing.assert_allclose(b * USED, a, rtol=1e-4)
        experts = name.replace("_basis.", "_exps.")
        assert Imatrix([original]).find(tensors, experts) is None
        best = Imatrix([original, imatrix]).find(tensors, experts)
        assert best is not None and best.origin == imatrix.name
        np.testing.assert_array_equal(best.read(), entries(imatrix)[experts].means())


def test_down_by_the_original_models_file(factorized: Any, original: Path) -> None:
    """A multiplies what down does; the bases get A times that, with channels taken for independent."""
    _, plain, imatrix = factorized("down")
    name = "blk.1.ffn_down_basis.weight"
    experts, mix_name = name.replace("_basis.", "_exps."), name.replace(".weight", ".mix")
    a, mix = tensor(plain, experts).astype(np.float64), tensor(plain, mix_name).astype(np.float64)
    tensors = {n: Tensor(n, Whole(torch.from_numpy(tensor(plain, n)))) for n in (name, experts, mix_name)}
    entry = entries(original)[experts]

    ours = Imatrix([original]).find(tensors, experts)
    assert ours is not None and ours.origin == original.name
    np.testing.assert_array_equal(ours.read(), entry.means())

    ours = Imatrix([original]).find(tensors, name)
    assert ours is not None and ours.origin.endswith("by A and the mix)")
    n, per_group = len(mix), mix.shape[1]
    want = np.zeros((2 * per_group, a.shape[1]))
    for e in range(n):
        x2 = np.square(a[e]) @ entry.sums[e]
        for j in range(per_group):
            want[e // (n // 2) * per_group + j] += mix[e, j] ** 2 * x2
    np.testing.assert_allclose(ours.read(), want / entry.counts.sum(), rtol=1e-5)
    # the MoBE model's own file knows better
    best = Imatrix([original, imatrix]).find(tensors, name)
    assert best is not None and best.origin == imatrix.name


def test_the_original_models_file_changes_all_factors(
    factorized: Any, original: Path, tmp_path: Path
) -> None:
    checkpoint, _, imatrix = factorized("plain")
    changed = changed_by(original, tmp_path / "x", checkpoint, Recipe("q4_k_s"))
    assert {"blk.0.ffn_gate_basis.weight", "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"} < changed
    assert {"blk.0.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"} < changed
    assert not any("token_embd" in name for name in changed)
    changed = changed_by(imatrix, tmp_path / "x", checkpoint, Recipe("q4_k_s"))
    assert {"blk.0.ffn_gate_basis.weight", "blk.1.ffn_up_exps.weight"} < changed


def test_command_with_both(factorized: Any, original: Path, tmp_path: Path) -> None:
    """Each for what it fits: with an entry taken out of the MoBE model's file, the original's steps in."""
    checkpoint, _, imatrix = factorized("plain")
    data = imatrix.read_bytes().replace(b"blk.1.ffn_down_exps", b"blk.1.ffn_down_ex__")
    (tmp_path / "poor.gguf").write_bytes(data)
    options = ["--quant", "iq2_xs", "--imatrix", original, "--imatrix", tmp_path / "poor.gguf", "--json"]
    result = CliRunner().invoke(
        main, ["export", str(checkpoint), str(tmp_path / "out.gguf"), *map(str, options)]
    )
    assert result.exit_code == 0, result.stderr
    classes = {row["class"]: row["importance"] for row in json.loads(result.stdout)["classes"]}
    assert classes["down"] == {"poor.gguf": 1, "original.gguf": 1}
    assert classes["A"] == classes["B"] == {"poor.gguf": 4} and classes["embeddings"] == {}
    assert "importance from original.gguf: down (1)" in result.stderr
    assert read_gguf(tmp_path / "out.gguf").keys["quantize.imatrix.file"] == str(tmp_path / "poor.gguf")[:127]


@pytest.mark.parametrize(
    "quant", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"]
)
def test_types_that_need_one_refuse_without(quant: str, factorized: Any, tmp_path: Path) -> None:
    checkpoint, _, _ = factorized("plain")
    with pytest.raises(MobeError, match=r"no --imatrix was given(.|\n)*llama-imatrix -m"):
        export(checkpoint, tmp_path / "out.gguf", Recipe(quant), quiet=True)
    assert not list(tmp_path.iterdir())
    assert export(checkpoint, tmp_path / "x", Recipe(quant), dry_run=True, quiet=True).needs_imatrix > 1


def test_the_original_models_file_is_enough_for_a(factorized: Any, original: Path, tmp_path: Path) -> None:
    """Through the bases; embeddings are in no file."""
    checkpoint, _, _ = factorized("plain")
    recipe = Recipe("iq2_xs", imatrix=(str(original),))
    report = export(checkpoint, tmp_path / "out.gguf", recipe, quiet=True)
    said = importance_lines(report.entries)
    assert f"importance from {original.name} (experts' inputs, through the bases): A" in said
    with pytest.raises(MobeError, match=r"token_embd\.weight: type iq2_xxs"):
        export(
            checkpoint,
            tmp_path / "out.gguf",
            replace(recipe, transform="q4_k", embedding="iq2_xxs"),
            quiet=True,
        )


def test_layers_for_prediction_weigh_all_columns_alike() -> None:
    """llama-imatrix runs no text through them; types that need weights are written all the same."""
    names = ["blk.1.ffn_up_exps.weight", "blk.2.ffn_up_exps.weight", "blk.2.attn_q.weight", "output.weight"]
    shapes = ((3, 2, 8), (3, 2, 8), (4, 8), (4, 8))
    tensors = {n: Tensor(n, Whole(torch.zeros(s))) for n, s in zip(names, shapes, strict=True)}
    keys = {"x.block_count": 3, "x.nextn_predict_layers": 1}
    found = of_prediction(names, tensors, keys, "x")
    assert {name: i.read().shape for name, i in found.items()} == {names[1]: (3, 8), names[2]: (1, 8)}
    assert all((i.read() == 1).all() and "prediction" in i.origin for i in found.values())
    assert of_prediction(names, tensors, {"x.block_count": 3}, "x") == {}


def test_what_saw_nothing_weighs_all_alike() -> None:
    """Nor does what was fed zeros alone: weights of zero would leave its encoder nothing to go by."""
    sums = np.array([[2, 4], [0, 0], [3, 6], [0, 0]], np.float32)
    means = Statistics(sums, np.array([[2], [0], [0], [4]], np.float32)).means()
    np.testing.assert_array_equal(means, [[1, 2], [1, 1], [1, 1], [1, 1]])
    assert means.dtype == np.float32


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: None, "no such file"),
        (lambda data: b"\x10\x00\x00\x00" + data[4:], "Collect it again"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data.replace(b".in_sum2", b".in_sum3"), "not an importance matrix"),
        (
            lambda data: data.replace(b"ffn_down_exps.weight.counts", b"ffn_down_exps.weight.kounts"),
            "missing",
        ),
        (float("nan"), "not finite"),
        (-1.0, "negative"),
    ],
)
def test_damaged_files(damage: Any, words: str, source: Path, original: Path, tmp_path: Path) -> None:
    """``damage``: of all bytes, or a value to be put into an entry."""
    data: Any = original.read_bytes()
    if isinstance(damage, float):
        at = read_gguf(original).tensors["blk.1.ffn_up_exps.weight.in_sum2"].offset + 8
        data = data[:at] + np.float32(damage).tobytes() + data[at + 4 :]
    else:
        data = damage(data)
    if data is not None:
        (tmp_path / "imatrix.gguf").write_bytes(data)
    recipe = Recipe("q8_0", imatrix=(str(tmp_path / "imatrix.gguf"),))
    with pytest.raises(MobeError, match=words):
        export(source, tmp_path / "out.gguf", recipe, allow_dense=True, quiet=True)
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_of_another_model(model: Callable[..., Path], original: Path, tmp_path: Path) -> None:
    source = model("qwen3_moe", **(SIZES | {"moe_intermediate_size": 512}))
    recipe = Recipe("q4_k_m", imatrix=(str(original),))
    with pytest.raises(
        MobeError, match=r"ffn_down_exps.* 4 x 256 values, expected 4 x 512(.|\n)*another model"
    ):
        export(source, tmp_path / "out.gguf", recipe, allow_dense=True, quiet=True)


@pytest.mark.parametrize("kind", ["plain", "partly"])
def test_multiplied_out_experts_take_their_own_inputs(kind: str, factorized: Any, tmp_path: Path) -> None:
    """``--dense`` with the MoBE model's file: the weights that a file of the multiplied-out model would have, not A's,
    which are as many here."""
    checkpoint, _, imatrix = factorized(kind)
    export(checkpoint, tmp_path / "dense.gguf", Recipe("f32"), dense=True, quiet=True)
    truth = entries(collect(tmp_path / "dense.gguf", tmp_path / "imatrix.gguf"))
    shape = (SIZES["num_experts"], SIZES["moe_intermediate_size"], SIZES["hidden_size"])
    names = [f"blk.{i}.ffn_{p}_exps.weight" for i in range(2) for p in ("gate", "up", "down")]
    tensors = {name: Tensor(name, Whole(torch.zeros(shape))) for name in names}
    found = Imatrix([imatrix])
    for name in names:
        importance = found.find(tensors, name)
        assert importance is not None
        np.testing.assert_allclose(importance.read(), truth[name].means(), rtol=1e-4, err_msg=name)


def test_what_small_batches_leave_out(source: Path, original: Path, tmp_path: Path) -> None:
    """With -ub 8 llama-imatrix counts experts alone, exit code 0; with a rest of fewer than 16 tokens it leaves that out of dense
    matrices.  Export says what is not known."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 8)
    common = ("-m", original.with_name("dense.gguf"), "-f", text, "--chunks", 4, "-t", 1)
    small, rest = tmp_path / "small.gguf", tmp_path / "rest.gguf"
    run("llama-imatrix", *common, "-c", 32, "-b", 32, "-ub", 8, "-o", small)
    assert all("_exps." in name for name in ImatrixFile(small).names)
    run("llama-imatrix", *common, "-c", 40, "-b", 40, "-ub", 32, "-o", rest)
    dense, experts = (
        ImatrixFile(rest).entry(f"blk.0.{name}.weight").counts.sum() for name in ("attn_q", "ffn_up_exps")
    )
    assert (dense, experts) == (4 * 32, 4 * 40 * USED)

    def notes(path: Path) -> list[str]:
        recipe = Recipe("q4_0", imatrix=(str(path),))
        return export(source, tmp_path / "o.gguf", recipe, allow_dense=True, dry_run=True, quiet=True).notes

    (note,) = [line for line in notes(small) if "dense" in line]
    assert "small.gguf knows nothing of blk.0.attn" in note and "batches of 16 tokens" in note
    assert not any("dense" in line for line in notes(original))


def test_experts_that_saw_nothing_are_counted(source: Path, original: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a " * 200)
    path = tmp_path / "few.gguf"
    model = original.with_name("dense.gguf")
    run("llama-imatrix", "-m", model, "-f", text, "-c", 16, "-b", 16, "--chunks", 1, "-t", 1, "-o", path)
    file = ImatrixFile(path)
    unseen = sum(int((file.entry(n).counts == 0).sum()) for n in file.names if "_exps." in n)
    recipe = Recipe("q4_0", imatrix=(str(path),))
    found = export(source, tmp_path / "o.gguf", recipe, allow_dense=True, dry_run=True, quiet=True).notes
    said = [line for line in found if "used by no token" in line]
    assert bool(said) == bool(unseen) and all(f"few.gguf: {unseen} matrices" in line for line in said)
    assert unseen, "a text that reaches all experts tests nothing"
