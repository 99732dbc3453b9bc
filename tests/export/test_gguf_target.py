"""A GGUF file factorized and written again: what is no factor comes out bit for bit, and llama.cpp runs the result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from parity import gguf_files
from safetensors.torch import load_file

from export.gguf_sources import raw, rewritten
from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import Recipe, export, parse_override, parse_quant, write
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.gguf import GgufFile, read_gguf, read_model
from mobe_gguf.runtime import ggml

Maker = Callable[..., Path]

#: As many bases as experts, and no activation: factors that can stand for any experts exactly.
EXACT = Options(bases=8, rank=48, activation="none", steps=40, dtype="f32")
FAST = Options(bases=4, steps=2)
SIZES = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4, num_hidden_layers=2)


def factorize(model: Path, out: Path, options: Options = FAST) -> Path:
    return run(prepare(model, out, options), quiet=True).out


def tool(name: str, *options: Any) -> str:
    command = [runtime.tool(name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def values(file: GgufFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return ggml.dequantize(raw(info).reshape(*info.shape[:-1], -1), info.type, info.shape[-1])


def logits(path: Path) -> np.ndarray:
    from llama_cpp import Llama

    options = dict(
        n_ctx=32, n_threads=1, flash_attn=False, type_k=0, type_v=0, logits_all=True, verbose=False
    )
    with closing(Llama(str(path), **options)) as llama:
        llama.eval([5, 6, 7, 300, 11])
        return llama.scores[:5].copy()


def distance(truth: np.ndarray, got: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.square(got - truth).sum() / np.square(truth).sum())


def pairs(file: GgufFile) -> dict[str, bytes]:
    """Every key as its bytes in the file."""
    data = file.path.read_bytes()
    return {name: data[begin:end] for name, (begin, end) in file.key_spans.items()}


def same(a: Path, b: Path) -> None:
    """The same tensors, in the same order, and the same keys, but for those of a split."""
    a, b = read_model(a), read_model(b)
    assert list(a.tensors) == list(b.tensors)
    for name, info in a.tensors.items():
        assert (info.type, info.shape) == (b.tensors[name].type, b.tensors[name].shape), name
        np.testing.assert_array_equal(raw(info), raw(b.tensors[name]), err_msg=name)
    assert {k: v for k, v in a.keys.items() if not k.startswith("split.")} == {
        k: v for k, v in b.keys.items() if not k.startswith("split.")
    }


@pytest.fixture(scope="module")
def plain(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``plain(family)``: the ordinary model of that family as GGUF, float32."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("plain") / f"{family}.gguf"
            export(model(family), made[family], Recipe("f32"), allow_dense=True, quiet=True)
        return made[family]

    return get


@pytest.fixture(scope="module")
def quantized(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K_M of llama-quantize, rows of whole blocks of 256: several types in one file."""
    folder = tmp_path_factory.mktemp("quantized")
    export(model("qwen3_moe", **SIZES), folder / "f16.gguf", Recipe("f16"), allow_dense=True, quiet=True)
    tool("llama-quantize", folder / "f16.gguf", folder / "q4_k_m.gguf", "q4_k_m", 1)
    return folder / "q4_k_m.gguf"


@pytest.fixture(scope="module")
def factors(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factorize(quantized, tmp_path_factory.mktemp("factors") / "factors", Options(bases=2, steps=3))


@pytest.mark.parametrize(
    ("family", "rank"),
    [("qwen3_moe", 40), ("deepseek_v3", 40), ("mixtral", 40), ("qwen3_moe", 60), ("deepseek_v3", 60)],
)
def test_as_by_way_of_the_checkpoint(
    family: str, rank: int, plain: Maker, model: Maker, tmp_path: Path
) -> None:
    """The same factors from the GGUF file as from the checkpoint that it was made of, and the same file in the end."""
    options = Options(bases=4, groups=2, rank=rank, steps=3)
    factorize(model(family), tmp_path / "mobe", options)
    export(tmp_path / "mobe", tmp_path / "mobe.gguf", Recipe("f32"), quiet=True)
    factorize(plain(family), tmp_path / "factors", options)
    export(tmp_path / "factors", tmp_path / "out.gguf", Recipe("f32"), quiet=True)
    ours, theirs = read_gguf(tmp_path / "out.gguf"), read_gguf(tmp_path / "mobe.gguf")
    assert list(ours.tensors) == list(theirs.tensors)
    for name, info in ours.tensors.items():
        assert (info.type, info.shape) == (theirs.tensors[name].type, theirs.tensors[name].shape), name
        np.testing.assert_array_equal(raw(info), raw(theirs.tensors[name]), err_msg=name)
    differ = {k for k in {*ours.keys, *theirs.keys} if ours.keys.get(k) != theirs.keys.get(k)}
    assert differ <= {"general.size_label", "general.name", "general.basename"}, (
        "of the directory's name and size"
    )


def test_everything_else_passes_through(quantized: Path, factors: Path, tmp_path: Path) -> None:
    report = export(factors, tmp_path / "out.gguf", Recipe("q5_k_m"), quiet=True)
    before, after = read_gguf(quantized), read_gguf(tmp_path / "out.gguf")
    replaced = {names.transform_name(i, p) for i in range(2) for p in names.PROJECTIONS}
    kept = [name for name in before.tensors if name not in replaced]
    assert report.copied == len(kept)
    for name in kept:
        assert after.tensors[name].type == before.tensors[name].type
        np.testing.assert_array_equal(raw(after.tensors[name]), raw(before.tensors[name]), err_msg=name)
    assert len({before.tensors[name].type for name in kept}) > 2, "the source should have several types"
    assert [name for name in after.tensors if "_basis." not in name] == list(before.tensors), "order"
    old, new = pairs(before), pairs(after)
    assert [k for k in new if k in old] == list(old), "keys stay in order"
    changed = {k for k in old if new[k] != old[k]}
    assert changed == {"general.file_type"}
    assert set(new) - set(old) == {f"qwen3moe.mobe.{k}" for k in ("version", "activation", "group_count")}
    for layer in range(2):
        for projection in names.PROJECTIONS:
            types = (names.transform_name(layer, projection), names.basis_name(layer, projection))
            assert {after.tensors[name].type for name in types} == {"q5_k"}
    assert not describe(tmp_path / "out.gguf").problems
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()


def test_exact_factors_give_the_same_model(plain: Maker, tmp_path: Path) -> None:
    """In numbers: nothing is in another place than it should be; down too."""
    for family in ("qwen3_moe", "deepseek_v3"):
        source = plain(family)
        factorize(source, tmp_path / family, EXACT.replace(projections=names.ALL_PROJECTIONS))
        export(tmp_path / family, tmp_path / f"{family}.gguf", Recipe("f32"), quiet=True)
        assert distance(logits(source), logits(tmp_path / f"{family}.gguf")) < 1e-5


def test_exact_factors_of_full_rank_in_split_files(plain: Maker, tmp_path: Path) -> None:
    """One basis of rank d, above p, can stand for any experts; through split files in, and out."""
    source = plain("qwen3_moe")
    tool("llama-gguf-split", "--split", "--split-max-tensors", 12, source, tmp_path / "s")
    first = min(tmp_path.glob("s-*.gguf"))
    wide = EXACT.replace(bases=1, rank=64, steps=20, projections=names.ALL_PROJECTIONS)
    factorize(first, tmp_path / "factors", wide)
    export(tmp_path / "factors", tmp_path / "out.gguf", Recipe("f32"), quiet=True, split_max_size=400_000)
    out = min(tmp_path.glob("out*.gguf"))
    assert len(list(tmp_path.glob("out*.gguf"))) > 1 and not describe(out).problems
    assert {(u.m, u.r) for layer in describe(out).layers for u in (layer.gate, layer.up, layer.down)} == {
        (1, 64)
    }
    assert distance(logits(source), logits(out)) < 1e-7


def test_real_tools_on_the_result(quantized: Path, factors: Path, tmp_path: Path) -> None:
    export(factors, tmp_path / "q8.gguf", Recipe("q8_0"), quiet=True)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 8)
    said = tool(
        "llama-perplexity", "-m", tmp_path / "q8.gguf", "-f", tmp_path / "text.txt", "-c", 64, "-t", 1
    )
    assert "Final estimate" in said
    tool("llama-quantize", "--allow-requantize", tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_k_s", 1)
    assert read_gguf(tmp_path / "q4.gguf").tensors[names.basis_name(0, "up")].type == "q4_k"


@pytest.mark.parametrize(
    ("quant", "source_quant", "expected"),
    [("q4_k_m", "MOSTLY_Q4_K_M", "MOSTLY_Q4_K_M"), ("q8_0", "MOSTLY_Q4_K_M", "MOSTLY_Q8_0")],
)
def test_file_type(
    quant: str, source_quant: str, expected: str, quantized: Path, factors: Path, tmp_path: Path
) -> None:
    import gguf

    assert read_gguf(quantized).keys["general.file_type"] == gguf.LlamaFileType[source_quant]
    export(factors, tmp_path / "out.gguf", Recipe(quant), quiet=True)
    assert read_gguf(tmp_path / "out.gguf").keys["general.file_type"] == gguf.LlamaFileType[expected]


def test_file_type_of_a_part(plain: Maker, tmp_path: Path) -> None:
    """One projection of one layer in q8_0 does not make a q8_0 file of a float32 one, but needs its version."""
    options = Options(bases=2, steps=2, layers=(1,), projections=("up",))
    factorize(plain("olmoe"), tmp_path / "factors", options)
    export(tmp_path / "factors", tmp_path / "out.gguf", Recipe("q8_0"), quiet=True)
    keys = read_gguf(tmp_path / "out.gguf").keys
    assert keys["general.file_type"] == 0 and keys["general.quantization_version"] == 2


def test_other_types_on_request(quantized: Path, factors: Path, tmp_path: Path) -> None:
    asked = ("attn_q=q8_0", r"blk\.0\.=q6_k")
    recipe = Recipe(
        "q4_k_m", overrides=tuple(map(parse_override, asked)), down="q5_k", embedding="f16", transform="q8_0"
    )
    report = export(factors, tmp_path / "out.gguf", recipe, quiet=True)
    before, after = read_gguf(quantized), read_gguf(tmp_path / "out.gguf")
    types = {name: info.type for name, info in after.tensors.items()}
    assert types["blk.0.attn_q.weight"] == types["blk.1.attn_q.weight"] == "q8_0"
    assert types["blk.0.attn_output.weight"] == types["blk.0.ffn_down_exps.weight"] == "q6_k"
    assert types["blk.0.ffn_up_basis.weight"] == types["blk.0.ffn_up_exps.weight"] == "q6_k"
    assert types["blk.1.ffn_down_exps.weight"] == "q5_k" and types["blk.1.ffn_up_exps.weight"] == "q8_0"
    assert types["token_embd.weight"] == "f16"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "f32", "never quantized"
    for name in ("blk.1.attn_q.weight", "blk.1.ffn_down_exps.weight"):
        expected = ggml.quantize(values(before, name), types[name])
        np.testing.assert_array_equal(raw(after.tensors[name]), expected.ravel(), err_msg=name)
    unchanged = {n for n, t in types.items() if n in before.tensors and before.tensors[n].type == t}
    assert report.copied == len(
        unchanged - {names.transform_name(i, p) for i in (0, 1) for p in ("gate", "up")}
    )


def test_what_is_never_quantized_keeps_its_type(tmp_path: Path) -> None:
    """A router in f16 is not made f32 by a pattern that fits its name."""
    file = gguf_files.qwen3moe()
    file.tensors["blk.0.ffn_gate_inp.weight"] = file.tensors["blk.0.ffn_gate_inp.weight"].astype(np.float16)
    factorize(file.write(tmp_path / "m.gguf"), tmp_path / "factors")
    recipe = Recipe("q8_0", overrides=(("blk", "q8_0"),))
    export(tmp_path / "factors", tmp_path / "o.gguf", recipe, quiet=True)
    tensors = read_gguf(tmp_path / "o.gguf").tensors
    assert (
        tensors["blk.0.ffn_gate_inp.weight"].type == "f16" and tensors["blk.0.attn_q.weight"].type == "q8_0"
    )


def test_dense(quantized: Path, factors: Path, tmp_path: Path) -> None:
    """Experts multiplied out, in their old place: an ordinary file."""
    export(factors, tmp_path / "out.gguf", Recipe("q8_0"), dense=True, quiet=True)
    before, after = read_gguf(quantized), read_gguf(tmp_path / "out.gguf")
    assert {n: i.shape for n, i in after.tensors.items()} == {n: i.shape for n, i in before.tensors.items()}
    assert not [key for key in after.keys if ".mobe." in key]
    mobe = tmp_path / "mobe.gguf"
    export(factors, mobe, Recipe("f32"), quiet=True)
    assert distance(logits(mobe), logits(tmp_path / "out.gguf")) < 1e-3


def test_split_files(quantized: Path, factors: Path, tmp_path: Path) -> None:
    """In and out; a split source is the same source."""
    tool("llama-gguf-split", "--split", "--split-max-tensors", 9, quantized, tmp_path / "in")
    first = sorted(tmp_path.glob("in-*.gguf"))[0]
    assert len(list(tmp_path.glob("in-*.gguf"))) > 2
    export(factors, tmp_path / "whole.gguf", Recipe("q4_k_m"), quiet=True)
    export(factors, tmp_path / "out.gguf", Recipe("q4_k_m"), source=first, quiet=True)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    factorize(first, tmp_path / "factors", Options(bases=2, steps=3))
    for path in factors.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "factors" / path.name).read_bytes()
    report = export(
        tmp_path / "factors", tmp_path / "parts.gguf", Recipe("q4_k_m"), split_max_size=10**6, quiet=True
    )
    assert len(report.files) > 1
    same(Path(report.path), tmp_path / "whole.gguf")
    np.testing.assert_array_equal(logits(Path(report.path)), logits(tmp_path / "whole.gguf"))
    tool("llama-gguf-split", "--merge", report.path, tmp_path / "merged.gguf")
    same(tmp_path / "merged.gguf", tmp_path / "whole.gguf")
    with pytest.raises(MobeError, match="name the first"):
        prepare(Path(sorted(tmp_path.glob("in-*.gguf"))[1]), tmp_path / "no", FAST)


def test_an_interrupted_split_goes_on(factors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(split_max_size=10**6, quiet=True)
    n_written, tofile = 0, write.Encoded.tofile

    def full(self: write.Encoded, file: Any) -> None:
        nonlocal n_written
        n_written += 1
        if n_written == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tofile(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(write.Encoded, "tofile", full)
        with pytest.raises(MobeError, match="files are finished and kept"):
            export(factors, tmp_path / "out.gguf", Recipe("f16"), **options)
    report = export(factors, tmp_path / "out.gguf", Recipe("f16"), **options)
    assert report.files_kept > 0
    again = export(factors, tmp_path / "again.gguf", Recipe("f16"), **options)
    for a, b in zip(report.files, again.files, strict=True):
        assert Path(a).read_bytes() == Path(b).read_bytes()


@pytest.mark.parametrize("layers", [(1, 2), (1,)])
def test_gate_and_up_in_one_tensor(layers: tuple[int, ...], plain: Maker, tmp_path: Path) -> None:
    """They come apart where there are factors, with the same numbers as if they had never been one."""
    apart = plain("deepseek_v3")
    merged = rewritten(apart, tmp_path / "merged.gguf", merge=True)
    np.testing.assert_array_equal(logits(apart), logits(merged))
    projections = ("up",) if len(layers) == 1 else ("gate", "up")
    options = Options(bases=4, steps=2, layers=layers, projections=projections)
    out = {}
    for name, source in (("apart", apart), ("merged", merged)):
        factorize(source, tmp_path / name, options)
        out[name] = tmp_path / f"{name}-out.gguf"
        export(tmp_path / name, out[name], Recipe("q8_0"), quiet=True)
    a, b = read_gguf(out["apart"]), read_gguf(out["merged"])
    expected = dict(a.tensors)
    if len(layers) == 1:
        assert expected.pop("blk.2.ffn_gate_exps.weight") and expected.pop("blk.2.ffn_up_exps.weight")
        assert (
            raw(b.tensors["blk.2.ffn_gate_up_exps.weight"]).tobytes()
            == raw(read_gguf(merged).tensors["blk.2.ffn_gate_up_exps.weight"]).tobytes()
        )
        assert b.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 48, 64), "not factorized, but apart"
    for name, info in expected.items():
        np.testing.assert_array_equal(raw(info), raw(b.tensors[name]), err_msg=name)
    np.testing.assert_array_equal(logits(out["apart"]), logits(out["merged"]))


def test_merged_tensors_with_a_scale_are_refused(plain: Maker, tmp_path: Path) -> None:
    scale = dict(blk__1__ffn_up_exps__scale=np.ones(8, np.float32))
    merged = rewritten(plain("deepseek_v3"), tmp_path / "merged.gguf", merge=True, **scale)
    with pytest.raises(MobeError, match=r"blk\.1\.ffn_up_exps\.scale belongs to blk\.1\.ffn_gate_up_exps"):
        prepare(merged, tmp_path / "factors", FAST)


def test_another_alignment(quantized: Path, factors: Path, tmp_path: Path) -> None:
    source = rewritten(quantized, tmp_path / "aligned.gguf", alignment=256)
    export(factors, tmp_path / "out.gguf", Recipe("q4_k_m"), source=source, quiet=True)
    after = read_gguf(tmp_path / "out.gguf")
    assert after.alignment == 256 and all(info.offset % 256 == 0 for info in after.tensors.values())
    export(factors, tmp_path / "plain.gguf", Recipe("q4_k_m"), quiet=True)
    np.testing.assert_array_equal(logits(tmp_path / "out.gguf"), logits(tmp_path / "plain.gguf"))
    report = export(
        factors, tmp_path / "parts.gguf", Recipe("q4_k_m"), source=source, split_max_size=10**6, quiet=True
    )
    np.testing.assert_array_equal(logits(Path(report.path)), logits(tmp_path / "plain.gguf"))


def test_imatrix(model: Maker, quantized: Path, tmp_path: Path) -> None:
    """llama-imatrix's file of the source weighs the fit, the bases, and what is given another type."""
    (tmp_path / "text.txt").write_text(tiny.TEXT * 8)
    matrix = tmp_path / "imatrix.gguf"
    tool("llama-imatrix", "-m", quantized, "-f", tmp_path / "text.txt", "-o", matrix, "-c", 64, "-t", 1)
    factors = factorize(quantized, tmp_path / "factors", Options(bases=2, steps=3, imatrix=str(matrix)))
    assert json.loads((factors / "factors.json").read_text())["mobe"]["settings"]["objective"] == "activation"
    recipe = Recipe("q4_k_m", imatrix=(str(matrix),), overrides=(("attn_q", "iq2_xs"),))
    report = export(factors, tmp_path / "out.gguf", recipe, quiet=True)
    weighed = {e.name.split(".")[2] for e in report.entries if e.importance and "_exps" not in e.name}
    assert weighed == {"attn_q", "ffn_gate_basis", "ffn_up_basis"}, "nothing that passes through"
    keys = read_gguf(tmp_path / "out.gguf").keys
    assert keys["quantize.imatrix.file"] == str(matrix) and keys["quantize.imatrix.chunks_count"] > 0
    with pytest.raises(
        MobeError, match=r"attn_q\.weight \(and 1 more tensors\): type iq2_xs needs an importance"
    ):
        export(factors, tmp_path / "no.gguf", Recipe("q4_k_m", overrides=(("attn_q", "iq2_xs"),)), quiet=True)


def test_imatrix_of_a_merged_model(plain: Maker, tmp_path: Path) -> None:
    merged = rewritten(plain("deepseek_v3"), tmp_path / "merged.gguf", merge=True)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 8)
    matrix = tmp_path / "imatrix.gguf"
    tool("llama-imatrix", "-m", merged, "-f", tmp_path / "text.txt", "-o", matrix, "-c", 64, "-t", 1)
    factors = factorize(merged, tmp_path / "factors", Options(bases=4, steps=3, imatrix=str(matrix)))
    report = export(
        factors, tmp_path / "out.gguf", Recipe("q8_0", imatrix=(str(matrix),)), dry_run=True, quiet=True
    )
    weighed = {e.name.split(".")[2] for e in report.entries if e.importance and "_exps" not in e.name}
    assert weighed == {"ffn_gate_basis", "ffn_up_basis"}


def test_experts_used(factors: Path, tmp_path: Path) -> None:
    export(factors, tmp_path / "out.gguf", Recipe("q8_0"), experts_used=1, quiet=True)
    assert read_gguf(tmp_path / "out.gguf").keys["qwen3moe.expert_used_count"] == 1
    with pytest.raises(UsageError, match="--experts-used 5: expected 1 to 4"):
        export(factors, tmp_path / "out.gguf", Recipe("q8_0"), experts_used=5, quiet=True)


def cli(*args: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_commands(quantized: Path, tmp_path: Path) -> None:
    code, out, err = cli("factorize", quantized, tmp_path / "f", "--steps", 2, "--dry-run", "--json")
    plan = json.loads(out)["plan"]
    assert code == 0 and not (tmp_path / "f").exists()
    assert cli("factorize", quantized, tmp_path / "f", "--steps", 2)[0] == 0
    index = json.loads((tmp_path / "f" / "model.safetensors.index.json").read_text())
    assert plan["output_bytes"] == index["metadata"]["total_size"], "the factors alone are written"
    assert plan["model_before"] == sum(int(np.prod(t.shape)) for t in read_gguf(quantized).tensors.values())
    code, out, err = cli("export", tmp_path / "f", tmp_path / "o.gguf", "--quant", "q4_k", "--dry-run")
    assert code == 0 and not (tmp_path / "o.gguf").exists() and "tensors pass through" in err
    code, out, err = cli("export", tmp_path / "f", tmp_path / "o.gguf", "--quant", "q4_k", "--json")
    report = json.loads(out)
    assert code == 0 and report["copied"] > 0 and report["bytes"] == (tmp_path / "o.gguf").stat().st_size
    code, out, err = cli("inspect", tmp_path / "f")
    assert code == 0 and "qwen3moe" in err + out, err
    code, out, err = cli("factorize", tmp_path / "f", tmp_path / "again")
    assert code == 1 and "holds factors of a GGUF file already" in err and f"export {tmp_path / 'f'}" in err


def test_types_of_the_rest(quantized: Path, tmp_path: Path) -> None:
    """``--quant-rest``: all that is no factor gets what llama-quantize gives it; a file without factors goes by ``--quant``."""
    factors, out = factorize(quantized, tmp_path / "f"), tmp_path / "o.gguf"
    options = ("--quant", "q4_0", "--quant-rest", "q5_0")
    code, said, err = cli("export", factors, out, *options, "--json")
    assert code == 0, err
    found, source = read_gguf(out).tensors, read_gguf(quantized).tensors
    changed = {n for n in found if n in source and found[n].type != source[n].type}
    assert "blk.0.attn_q.weight" in changed and found["blk.0.attn_q.weight"].type == "q5_0"
    assert "blk.0.ffn_down_exps.weight" in changed and found["blk.0.ffn_up_exps.weight"].type == "q4_0"
    assert all(found[n].type == source[n].type for n in found if "norm" in n or "gate_inp" in n)
    assert (
        np.square(
            values(read_gguf(out), "blk.0.attn_q.weight")
            - values(read_gguf(quantized), "blk.0.attn_q.weight")
        ).mean()
        < 1e-4
    )
    assert json.loads(said)["bytes"] > cli_bytes(factors, tmp_path)
    code, _, err = cli("export", quantized, out, "--quant", "q4_0")
    assert code == 2 and "--dense" in err
    code, _, err = cli("export", quantized, out, "--quant", "q4_0", "--quant-rest", "q4_0", "--dense")
    assert code == 2 and "--quant is for the whole file" in err
    code, _, err = cli("export", quantized, out, "--quant", "q4_0", "--dense")
    assert code == 0, err
    types = {n: t.type for n, t in read_gguf(out).tensors.items()}
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.1.attn_k.weight"] == "q4_0"
    assert types["blk.0.attn_norm.weight"] == "f32" and types.keys() == source.keys()
    assert np.isfinite(logits(out)).all()
    code, _, err = cli("export", quantized, quantized, "--quant", "q4_0", "--dense")
    assert code == 2 and "is the file that is read" in err


def test_the_rest_from_a_file_in_fewer_bits(quantized: Path, tmp_path: Path) -> None:
    factors, out, small = factorize(quantized, tmp_path / "f"), tmp_path / "o.gguf", tmp_path / "small.gguf"
    export(quantized, small, Recipe("q4_0"), dense=True, quiet=True)
    code, _, err = cli("export", factors, out, "--quant", "q5_0", "--rest-from", small, "--no-verify")
    assert code == 0, err
    file, rest = read_gguf(out), read_gguf(small)
    kept = [
        n
        for n in file.tensors
        if n in rest.tensors and not n.endswith(("gate_exps.weight", "up_exps.weight"))
    ]
    assert "blk.1.ffn_down_exps.weight" in kept and file.tensors["blk.0.ffn_up_exps.weight"].type == "q5_0"
    for name in kept:
        assert np.array_equal(raw(file.tensors[name]), raw(rest.tensors[name])), name
    assert np.isfinite(logits(out)).all()
    other = tmp_path / "other.gguf"
    export(tiny_other(tmp_path), other, Recipe("q8_0"), allow_dense=True, quiet=True)
    code, _, err = cli("export", factors, out, "--quant", "q5_0", "--rest-from", other)
    assert code == 2 and "give a file of the same model" in err
    code, _, err = cli("export", quantized, out, "--quant", "q5_0", "--dense", "--rest-from", small)
    assert code == 2 and "--rest-from is for factors" in err


def tiny_other(tmp_path: Path) -> Path:
    """A model of the same architecture and another size."""
    return tiny.make_model("qwen3_moe", tmp_path / "another", **SIZES | {"num_hidden_layers": 1})


def cli_bytes(factors: Path, tmp_path: Path) -> int:
    """What the file takes whose rest stays as it was."""
    return int(
        json.loads(cli("export", factors, tmp_path / "kept.gguf", "--quant", "q4_0", "--json")[1])["bytes"]
    )


def test_a_moved_source(quantized: Path, tmp_path: Path) -> None:
    """Found beside the factors or by --source; else asked for, with the command to type."""
    source = Path(shutil.copy(quantized, tmp_path / "source.gguf"))
    factors = factorize(source, tmp_path / "factors", Options(bases=2, steps=2))
    (tmp_path / "other").mkdir()
    source.rename(tmp_path / "other" / "renamed.gguf")
    code, _, err = cli("export", factors, tmp_path / "o.gguf", "--quant", "q8_0")
    assert code == 1 and f"{source} does not exist" in err and "--source FILE" in err
    options = ("--quant", "q8_0", "--source", tmp_path / "other" / "renamed.gguf")
    assert cli("export", factors, tmp_path / "o.gguf", *options)[0] == 0
    shutil.move(factors, tmp_path / "other" / "factors")
    shutil.move(tmp_path / "other" / "renamed.gguf", tmp_path / "other" / "source.gguf")
    assert cli("export", tmp_path / "other" / "factors", tmp_path / "p.gguf", "--quant", "q8_0")[0] == 0
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "p.gguf").read_bytes()


def flipped(path: Path, out: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    out.write_bytes(data)
    return out


def test_wrong_sources(
    quantized: Path, factors: Path, plain: Maker, model: Maker, mobe: Maker, tmp_path: Path
) -> None:
    f16 = quantized.with_name("f16.gguf")
    last = list(read_gguf(quantized).tensors.values())[-1]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(quantized.read_bytes()[:-1000])
    (tmp_path / "text.gguf").write_text("no GGUF at all, and long enough")
    cases = [
        (f16, "is not the file that"),  # the same model, other types
        (plain("qwen3_moe"), "is not the file that"),
        (flipped(quantized, tmp_path / "flipped.gguf", last.offset + 100), "is not the file that"),
        (cut, "lie outside the file"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (tmp_path / "missing.gguf", "missing.gguf does not exist"),
        (model("qwen3_moe"), "does not exist"),  # a directory
    ]
    for source, message in cases:
        code, _, err = cli("export", factors, tmp_path / "o.gguf", "--quant", "q8_0", "--source", source)
        assert code == 1 and message in err, (source, err)
    assert not (tmp_path / "o.gguf").exists()
    own = Path(shutil.copy(quantized, tmp_path / "own.gguf"))
    code, _, err = cli("export", factors, own, "--quant", "q8_0", "--source", own)
    assert code == 2 and "Write to another" in err and own.read_bytes() == quantized.read_bytes()
    code, _, err = cli("export", factors, tmp_path / "o.gguf", "--quant", "q8_0", "--tokenizer-pre", "qwen2")
    assert code == 2 and "tokenizer is that of the GGUF file" in err
    code, _, err = cli(
        "export", mobe("qwen3_moe"), tmp_path / "o.gguf", "--quant", "q8_0", "--source", quantized
    )
    assert code == 2 and "is a Hugging Face directory" in err


def test_metadata_does_not_make_another_source(quantized: Path, factors: Path, tmp_path: Path) -> None:
    source = rewritten(quantized, tmp_path / "same.gguf", alignment=64)
    assert source.read_bytes() != quantized.read_bytes()
    export(factors, tmp_path / "o.gguf", Recipe("q8_0"), source=source, quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("factors.json", "{", "cannot be read as JSON"),
        ("factors.json", "{}", "no 'architecture'"),
        ("factors.json", '{"architecture": "qwen3moe", "mobe": {}}', "'n_expert' is None"),
        ("model.safetensors.index.json", None, "model.safetensors.index.json is missing"),
        ("model-00002-of-00004.safetensors", None, "model-00002-of-00004.safetensors is missing"),
        ("model-00002-of-00004.safetensors", "12345678", "truncated or corrupt"),
    ],
)
def test_damaged_factors(name: str, content: str | None, message: str, factors: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(factors, tmp_path / "damaged"))
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_text(content)
    code, _, err = cli("export", damaged, tmp_path / "o.gguf", "--quant", "q8_0")
    assert code == 1 and message in " ".join(err.split()), err


def test_names_of_the_factors(factors: Path) -> None:
    """Those of a MoBE checkpoint, under ``blk.L``."""
    tensors = {}
    for path in factors.glob("*.safetensors"):
        tensors |= load_file(path)
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("blk.1.")}
    expected = {
        f"blk.1.{kind}_{p}": shape
        for p in ("gate", "up")
        for kind, shape in (("B", (2, 256, 256)), ("W", (4, 2)))
    }
    expected |= {f"blk.1.experts.{e}.{p}_proj.weight": (256, 256) for e in range(4) for p in ("gate", "up")}
    assert shapes == expected
    assert tensors["blk.0.B_up"].dtype == torch.bfloat16, "of a quantized source"


def test_dry_run_writes_nothing(factors: Path, tmp_path: Path) -> None:
    report = export(factors, tmp_path / "o.gguf", Recipe(parse_quant("q4_k")), dry_run=True, quiet=True)
    assert report.copied and not list(tmp_path.iterdir())
