"""Full second moments of the experts' inputs: gathered, stored, minimised in."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from factorize.test_solver import reconstruct, shared_structure
from formats.test_imatrix import write as write_imatrix
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.calibrate import layers
from mobe_gguf.calibrate import moments as module
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.calibrate.roots import root, size_of
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.metric import PRIOR, Metric, Roots
from mobe_gguf.export import Recipe, export
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.runtime import ggml

FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "olmoe", "mixtral")


@pytest.fixture(scope="session")
def gathered(model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m.safetensors"
    collect(model("qwen3_moe"), text, out, ctx=64, chunks=8, quiet=True)
    return out


def compress(sums: torch.Tensor, rank: int) -> Roots:
    """As a layer's are, of the sums ``[n, d, d]`` of its experts."""
    mean = sums.mean(0)
    size = float(mean.diagonal().mean()) * (1 + PRIOR)
    roots, rests = zip(*(root((s + PRIOR * mean) / size, rank) for s in sums), strict=True)
    return Roots(torch.stack(roots), None if rests[0] is None else torch.stack(rests))


def by_hand(path: Path, text: Path, layer: int, ctx: int, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Qwen3's ``layer``, one token after the other; before PRIOR and scale."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text.read_text()).input_ids)[: ctx * chunks]
    seen = []
    block = model.model.layers[layer].mlp
    block.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(ids.view(chunks, ctx))
    source = Checkpoint(path)
    gate, up, down = (source.expert_stack(layer, name).float() for name in ("gate", "up", "down"))
    n, p, d = gate.shape
    inputs, hidden = torch.zeros(n, d, d), torch.zeros(n, p, p)
    for x in torch.cat(seen):
        weights, experts = (block.gate.weight.detach() @ x).softmax(0).topk(2)
        for weight, e in zip((weights / weights.sum()).tolist(), experts.tolist(), strict=True):
            g, u = gate[e] @ x, up[e] @ x
            h, s = torch.nn.functional.silu(g) * u, g.sigmoid()
            by = (s * (1 + g * (1 - s)) * u).square() + (s * g).square()
            slope = (by @ down[e].square().sum(0)).sqrt()
            inputs[e] += weight**2 * slope * torch.outer(x, x)
            hidden[e] += weight**2 * torch.outer(h, h)
    return inputs, hidden


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_moments_are_those_of_every_token(projection, model, text, gathered):
    expected = by_hand(model("qwen3_moe"), text, 1, 64, 8)[projection == "down"]
    expected = expected + PRIOR * expected.mean(0)
    expected /= expected.diagonal(dim1=1, dim2=2).mean()
    got = Moments(gathered).weight(1, projection, *expected.shape[:2])
    assert got.rest is None
    assert torch.allclose(got.root @ got.root.mT, expected, atol=0.02)
    assert torch.allclose(got.channels()[:, 0].float(), expected.diagonal(dim1=1, dim2=2), atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, model, text, tmp_path):
    source = Checkpoint(model(family))
    about = collect(source.path, text, tmp_path / "m", ctx=32, chunks=4, rank=16, quiet=True)
    assert about["tokens"] == 128 and about["rank"] == 16
    got = Moments(tmp_path / "m")
    n, d, p = source.n_expert, source.n_embd, source.n_ff_exp
    for layer in source.moe_layers:
        root = got.weight(layer, "up", n, d)
        assert root.root.shape == (n, d, 16) and root.rest.shape == (n, d)
        assert float(root.channels().mean()) == pytest.approx(1, rel=0.01)
        assert got.weight(layer, "down", n, p).root.shape == (n, p, p)


def test_strongest_directions_and_a_diagonal():
    g = torch.Generator().manual_seed(0)
    u, noise = torch.randn(3, 40, 4, generator=g), torch.rand(3, 40, generator=g)
    sums = 5 * u @ u.mT + torch.diag_embed(noise)
    expected = sums + PRIOR * sums.mean(0)
    expected /= expected.diagonal(dim1=1, dim2=2).mean()
    found = compress(sums, 16)
    got = found.root @ found.root.mT + torch.diag_embed(found.rest)
    assert torch.allclose(got.diagonal(dim1=1, dim2=2), expected.diagonal(dim1=1, dim2=2), rtol=1e-3)
    assert float((got - expected).square().sum() / expected.square().sum()) < 1e-4
    with pytest.raises(MobeError, match="blk.0.ffn_gate_exps: fed nothing but zeros"):
        size_of(torch.zeros(8, 8), "blk.0.ffn_gate_exps")


@pytest.mark.parametrize("k", [7, 20])
def test_metric_of_roots(k):
    g = torch.Generator().manual_seed(k)
    root = torch.randn(4, 20, k, generator=g)
    rest = torch.rand(4, 20, generator=g) if k < 20 else None
    metric = Metric.of(Roots(root, rest), 4, 20)
    s = root @ root.mT + (0 if rest is None else torch.diag_embed(rest))
    s /= s.diagonal(dim1=1, dim2=2).mean()
    x, y = torch.randn(2, 4, 5, 20, generator=g)
    assert torch.allclose(metric.apply(x) @ metric.apply(y).mT, x @ s @ y.mT, rtol=1e-4, atol=1e-4)
    assert torch.allclose(metric.adjoint(metric.apply(x)), x @ s, rtol=1e-4, atol=1e-4)
    part = metric.slice(slice(2, 3), x.double())
    assert torch.allclose(part.apply(x[2:3].double()).float(), metric.apply(x)[2:3], atol=1e-5)
    if rest is None:
        assert torch.allclose(metric.solve_rows(metric.apply_rows(x.mT)), x.mT, atol=1e-3)
    with pytest.raises(MobeError, match="expected \\[5, 20, k\\]"):
        Metric.of(Roots(root, rest), 5, 20)


@pytest.mark.parametrize("k", [12, 40])
def test_fits_in_the_metric_of_each_expert(k):
    """What is minimised is smaller than where only the channels are known, and outputs keep their size."""
    g = torch.Generator().manual_seed(1)
    w, settings = shared_structure(), Settings(3, 16, steps=60)
    strong = torch.randn(12, 40, 10, generator=g)
    sums = strong @ strong.mT + 0.1 * torch.eye(40)
    roots = compress(sums, k)
    s = Metric.of(roots, 12, 40)
    full, channels = fit(w, settings, weight=roots), fit(w, settings, weight=roots.channels())

    def error(f):
        return float(s.apply(w - reconstruct(f, settings)).square().sum() / s.apply(w).square().sum())

    assert full.objective == pytest.approx(error(full), rel=1e-3)
    assert error(full) < 0.6 * error(channels)
    size = (s.apply(w) * s.apply(reconstruct(full, settings))).sum((1, 2)) / s.apply(w).square().sum((1, 2))
    assert torch.allclose(size, torch.ones(12), atol=1e-4)


@pytest.mark.parametrize("method", ["mobe", "svd"])
def test_a_job(method, model, gathered, tmp_path):
    options = Options(steps=20, layers=(1,), moments=str(gathered), method=method)
    if method == "svd":
        options = options.replace(steps=None, target=0.75)
    result = run(prepare(model("qwen3_moe"), tmp_path / "out", options), quiet=True)
    assert result.settings.objective == "activation" and result.settings.moments == Moments(gathered).checksum
    assert all(u.objective < u.error for u in result.units)


def test_down_is_fitted_to_its_own_inputs(model, gathered, tmp_path):
    options = Options(steps=20, layers=(1,), moments=str(gathered), projections=("down",))
    (unit,) = run(prepare(model("qwen3_moe"), tmp_path / "out", options), quiet=True).units
    assert unit.objective < 0.8 * unit.error


def test_memory_counts_them(model, gathered, tmp_path):
    plain = prepare(model("qwen3_moe"), tmp_path / "a", Options(steps=3))
    job = prepare(model("qwen3_moe"), tmp_path / "b", Options(steps=3, moments=str(gathered)))
    assert job.plan.memory_bytes >= plain.plan.memory_bytes + 4 * 8 * 64 * 64


def test_errors(model, gathered, text, tmp_path):
    qwen = model("qwen3_moe")
    with pytest.raises(MobeError, match="no such file. Make it with:\n  mobe-gguf moments MODEL"):
        Moments(tmp_path / "absent")
    with pytest.raises(MobeError, match="not a file of `mobe-gguf moments`"):
        Moments(next(qwen.glob("*.safetensors")))
    cut = tmp_path / "cut"
    cut.write_bytes(gathered.read_bytes()[:-100])
    with pytest.raises(MobeError, match="cut"):
        Moments(cut)
    with pytest.raises(
        MobeError, match="expected 4 experts with 64 inputs. The moments are of another model"
    ):
        Moments(gathered).weight(1, "gate", 4, 64)
    with pytest.raises(MobeError, match="nothing of blk.9.ffn_down_exps.weight"):
        Moments(gathered).weight(9, "down", 8, 48)
    with pytest.raises(UsageError, match="--moments is only used with --objective activation"):
        prepare(qwen, tmp_path / "new", Options(objective="mse", moments=str(gathered)))
    with pytest.raises(UsageError, match="0 chunks of 8192; expected 1 at least"):
        collect(qwen, text, tmp_path / "m", ctx=8192, quiet=True)
    with pytest.raises(MobeError, match="nowhere.txt: cannot be read"):
        collect(qwen, tmp_path / "nowhere.txt", tmp_path / "m", quiet=True)
    assert not (tmp_path / "m").exists()
    os.mkfifo(tmp_path / "pipe")
    for out, words in (
        (tmp_path / "pipe", "it is a pipe"),
        (tmp_path / "no" / "m", "no such directory. Make it"),
    ):
        with pytest.raises(MobeError, match=words):
            collect(qwen, text, out, quiet=True)


def test_a_model_that_transformers_does_not_know(model, text, tmp_path):
    with pytest.raises(MobeError, match="transformers cannot load"):
        collect(model("bailing_moe"), text, tmp_path / "m", ctx=32, quiet=True)
    assert not (tmp_path / "m").exists() and not (tmp_path / ".m.part").exists()


@pytest.mark.parametrize("what", ["AutoConfig", "AutoTokenizer"])
def test_code_of_the_model_is_not_run(what, own_model, text, tmp_path):
    """transformers would ask, and take a ``y`` on stdin for yes."""
    path, marker = own_model("bailing_moe"), tmp_path / "ran"
    (path / "conf.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config, tokenizer = (json.loads((path / f).read_text()) for f in ("config.json", "tokenizer_config.json"))
    if what == "AutoConfig":
        config["auto_map"] = {"AutoConfig": "conf.C", "AutoModel": "conf.C"}
    else:
        tokenizer |= {"auto_map": {"AutoTokenizer": ["conf.C", None]}, "tokenizer_class": "Unknown"}
        for file in ("tokenizer.json", "vocab.json", "merges.txt"):
            (path / file).unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    arguments = ["moments", str(path), str(tmp_path / "m"), "--text", str(text), "--ctx", "32"]
    result = CliRunner().invoke(main, arguments, input="y\n" * 9)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "(conf.py), and code out of a model directory is never run here" in result.stderr
    assert "[y/N]" not in result.output and not marker.exists() and not (tmp_path / "m").exists()


def test_no_place_for_the_file(model, text, tmp_path, monkeypatch):
    """Said before the model is loaded."""

    def loaded(*_):
        raise AssertionError("the model is not to be loaded")

    monkeypatch.setattr(layers.Run, "run", loaded)
    arguments = [str(model("qwen3_moe")), "OUT", "--text", str(text), "--ctx", "64", "--chunks", "2"]

    def refused(out: Path) -> str:
        arguments[1] = str(out)
        result = CliRunner().invoke(main, ["moments", *arguments])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        return result.stderr

    assert f"mkdir -p {tmp_path / 'no' / 'such'}" in refused(tmp_path / "no" / "such" / "m")
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: disk)
        assert "are needed, 1.00 kB are free. Make room" in refused(tmp_path / "m")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layers.Run, "run", lambda self: self.work.layer_file("000").touch())
    monkeypatch.setattr(module, "_assemble", full)
    said = refused(tmp_path / "m")
    assert (
        "m: cannot be written: the disk is full. Finished layers are kept in" in said and "--resume" in said
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.work"]


def test_quiet_says_nothing_but_errors(model, text, tmp_path):
    """In a process of its own: transformers writes to the stderr that was there when it was imported."""
    command = [sys.executable, "-c", "from mobe_gguf.cli import main; main()", "moments"]
    command += [
        str(model("qwen3_moe")),
        str(tmp_path / "m"),
        "--text",
        str(text),
        "--ctx",
        "64",
        "--chunks",
        "2",
    ]
    loud = subprocess.run(command, capture_output=True, text=True)
    assert loud.returncode == 0 and "layer 2: " in loud.stderr and "an expert saw" in loud.stderr, loud.stderr
    quiet = subprocess.run([*command, "-q"], capture_output=True, text=True)
    assert quiet.returncode == 0 and quiet.stderr == quiet.stdout == ""
    wrong = subprocess.run([*command, "-q", "--rank", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--rank 0" in wrong.stderr


def test_command(model, text, tmp_path):
    out = tmp_path / "m.safetensors"
    arguments = [str(model("qwen3_moe")), str(out), "--text", str(text), "--ctx", "64", "--chunks", "2"]
    result = CliRunner().invoke(main, ["moments", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 128
    assert "few for 64 channels" in result.stderr
    assert CliRunner().invoke(main, ["moments", *arguments, "--rank", "0"]).exit_code == 2


def test_export_leaves_what_was_fitted_to_moments(model, gathered, tmp_path):
    """An imatrix knows less of the inputs: it must not scale A's rows again."""
    qwen, types = (
        model("qwen3_moe", hidden_size=64, moe_intermediate_size=64),
        dict(basis="q4_0", transform="q4_0"),
    )
    moments, text = tmp_path / "m", tmp_path / "t.txt"
    text.write_text("She counted nineteen ships and wrote it down. " * 60)
    collect(qwen, text, moments, ctx=32, chunks=8, quiet=True)
    options = Options(steps=10, moments=str(moments), for_basis="q4_0", for_transform="q4_0")
    run(prepare(qwen, tmp_path / "mobe", options), quiet=True)
    sums = torch.rand(8, 64).square().numpy() * 100
    imatrix = write_imatrix(tmp_path / "i.gguf", sums, [10.0] * 8, layer=1)
    export(
        tmp_path / "mobe", tmp_path / "o.gguf", Recipe("q8_0", imatrix=(str(imatrix),), **types), quiet=True
    )
    tensor = next(t for t in GGUFReader(tmp_path / "o.gguf").tensors if t.name == "blk.1.ffn_up_exps.weight")
    layer = MobeCheckpoint(tmp_path / "mobe").layer(1)
    for e in range(8):
        written = ggml.dequantize(np.ascontiguousarray(tensor.data[e]), "q4_0", 64)
        assert torch.equal(torch.from_numpy(written), layer.transform("up", e))


def test_moments_of_another_model_are_told(model, gathered, tmp_path):
    """Shapes alone do not say it: the same ones, other weights."""
    for path, told in ((model("qwen3_moe"), False), (model("qwen3_moe", seed=1), True)):
        command = ["factorize", str(path), str(tmp_path / "out"), "--moments", str(gathered), "--dry-run"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.stderr
        assert (f"{gathered} was made from another model than {path}" in result.stderr) == told
